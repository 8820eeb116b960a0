"""What one process of `tests/test_coupling.py` does: gradients of one step by each objective.

torchrun --nproc-per-node N coupling_worker.py OUT
"""

import faulthandler
import json
import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from prefloop.logps import Scorer
from prefloop.objectives import ALL, DPO, Objective, needs_mismatched
from prefloop.objectives.family import Batchwise
from prefloop.pairing import with_mismatched
from prefloop.settings import TrainSettings
from prefloop.stable import Stable
from prefloop.trainer import build_trainer, finish
from prefloop.trainer.build import accelerator_for
from prefloop.types import Logps, Tokenized, score


def objectives() -> list[Objective]:
    """Every objective that couples a batch, and one that does not."""
    made = [kind() for kind in ALL if kind.__name__ != "Sum"]
    return [DPO(), Stable(), *(objective for objective in made if objective.couples_batch)]


def rows(objective: Objective) -> list[Tokenized]:
    """Seven comparisons of two and three responses, of several scores, and weights if allowed."""
    made = [
        replace(
            row,
            weight=1.0 if isinstance(objective, Batchwise) else 1.0 + index % 3,
            ensemble=tuple((0.3 * j - 0.1 * index, 0.5 - j) for j in range(len(row.responses))),
        )
        for index, row in enumerate(tiny.batch(7, responses=(2, 3), longest=9))
    ]
    return with_mismatched(made) if needs_mismatched(objective) else made


def moved() -> torch.nn.Module:
    """A model away from its reference."""
    model, rng = tiny.llama(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn(value.shape, generator=rng)
    return model


def main(out: Path) -> None:
    accelerator = accelerator_for((), out, "no")
    gradients, metrics = steps(accelerator)
    if accelerator.is_main_process:
        save_file(gradients, out / "gradients.safetensors")
        (out / "metrics.json").write_text(json.dumps(metrics))
    finish(accelerator)


def steps(
    accelerator: Accelerator,
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """Gradient and metrics of a step of each objective on five comparisons, and on one."""
    start, model = Scorer(tiny.llama()), moved()

    def reference(batch) -> Logps:
        with torch.no_grad():
            return score(start, batch)

    settings = TrainSettings(batch_size=5, max_grad_norm=1e9, token_budget=60)
    gradients, metrics = {}, {}
    for objective in objectives():
        trainer = build_trainer(Scorer(model), objective, reference, settings, accelerator)
        given = rows(objective)
        for count in (5, 1):  # of one comparison a second process has nothing to do
            name = f"{type(objective).__name__}-{count}"
            metrics[name] = trainer.step(given[:count], 0, 0.0)
            inner = trainer.engine.bare
            gradients[name] = torch.cat([value.grad.flatten() for value in inner.parameters()])
        metrics[name] |= trainer.evaluate(given)
    return gradients, metrics


if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(240)  # a worker that hangs says where
    main(Path(sys.argv[1]))
