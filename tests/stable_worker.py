"""What one process of the two-process test in `test_stable.py` does: one step's gradients, saved.

torchrun --nproc-per-node N stable_worker.py OUT
"""

import faulthandler
import sys
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator

from prefloop.logps import Scorer
from prefloop.logps.head import exact
from prefloop.objectives import DPO
from prefloop.settings import TrainSettings
from prefloop.stable import Adaptive, FixedLevel, Hinge, OneStep, StableGradient
from prefloop.trainer import build_trainer, finish
from prefloop.types import Logps, score

SOLVERS = (Hinge(lam=0.3), OneStep(step=0.1, penalty=Hinge(lam=0.3)), Adaptive())


def main(out: Path) -> None:
    accelerator = Accelerator(cpu=True)
    found = gradients(accelerator)
    if accelerator.is_main_process:
        torch.save(found, out / f"{accelerator.num_processes}.pt")
    accelerator.wait_for_everyone()
    finish(accelerator)


def gradients(accelerator: Accelerator) -> dict[str, tuple[torch.Tensor, dict[str, float]]]:
    """Of every solver, and the metrics of the step."""
    rows = tiny.batch(5, responses=(2,), longest=6)
    start, model = Scorer(tiny.llama(), head=exact), tiny.llama()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from the reference
        for value in model.parameters():
            value += 0.1 * torch.randn(value.shape, generator=rng)

    def reference(batch) -> Logps:
        with torch.no_grad():
            return score(start, batch)

    settings = TrainSettings(lr=0.01, max_grad_norm=1e9)
    found = {}
    for solver in SOLVERS:
        # Always outside the region.
        gradient = StableGradient(solver=solver, level=FixedLevel(nats=0.0))
        scorer = Scorer(model, head=exact)
        trainer = build_trainer(scorer, DPO(), reference, settings, accelerator, gradient)
        metrics = trainer.step(rows, 0, 0.0)
        inner = trainer.engine.bare
        flat = torch.cat([value.grad.flatten() for value in inner.parameters()])
        found[type(solver).__name__] = (flat, metrics)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(240)  # a worker that hangs says where
    main(Path(sys.argv[1]))
