"""What one process of `tests/test_processes.py` does: train a tiny model, save it.

torchrun --nproc-per-node 2 process_worker.py OUT ddp|fsdp|zero1|zero2|zero3 STEPS|broken
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

from prefloop.logps.layout import response_mask
from prefloop.objectives import DPO
from prefloop.policies import Policy
from prefloop.settings import TrainSettings
from prefloop.trainer import NonFiniteError, finish
from prefloop.trainer.build import accelerator_for
from prefloop.training import Training
from prefloop.types import Logps, Tokenized

ROWS = tiny.batch(11, responses=(2, 3), longest=12)


def main(out: Path, kind: str, steps: str) -> None:
    accelerator = {"fsdp": sharded}.get(kind, lambda out: accelerator_for((), out, "no"))(out)
    settings = TrainSettings(
        lr=0.01,
        batch_size=5,
        epochs=2,
        max_steps=3 if steps == "broken" else int(steps),
        warmup=0.0,
        schedule="constant",
        token_budget=60,
    )
    training = Training(
        policy=Policy(tiny.llama(), tiny.tokenizer(), "tiny"),
        objective=DPO(beta=0.5),
        settings=settings,
        accelerator=accelerator,
        out=out,
    )
    metrics = refused(training) if steps == "broken" else training(ROWS, ROWS[:5])
    if accelerator.is_main_process:
        (out / "last.json").write_text(json.dumps(metrics))
    finish(accelerator)


def refused(training: Training) -> dict[str, str]:
    """What is said of a reference that is no number; every weight must be as it was."""
    model = training.policy.model
    before = [value.detach().clone() for value in model.parameters()]
    try:
        replace(training, reference=lambda *_: no_number)(ROWS)
    except NonFiniteError as error:
        after = list(model.parameters())
        assert all(map(torch.equal, before, after)), "a weight has moved"
        return {"refused": str(error)}
    raise AssertionError("a loss that is no number was not refused")


def no_number(batch: Sequence[Tokenized]) -> Logps:
    """A reference that has nothing to say."""
    mask = response_mask(batch)
    return Logps(torch.where(mask, torch.nan, 0.0), mask)


def sharded(out: Path) -> Accelerator:
    """FSDP2, which Accelerate uses on accelerators only; on the CPU it has to be told."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def ask_for_deepspeed(out: Path, stage: int) -> None:
    """As `accelerate launch --use_deepspeed --deepspeed_config_file` does."""
    without_compiling()
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # divide small ones too
    config = {"zero_optimization": zero, "train_batch_size": "auto", "gradient_clipping": "auto"}
    path = out / f"zero-{os.environ['RANK']}.json"
    path.write_text(json.dumps(config))
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)


def without_compiling() -> None:
    """On CPUs DeepSpeed compiles a shared-memory operation, for minutes; gloo does without."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, name = Path(sys.argv[1]), sys.argv[2]
    if name.startswith("zero"):
        ask_for_deepspeed(place, int(name[-1]))
    main(place, name, sys.argv[3])
