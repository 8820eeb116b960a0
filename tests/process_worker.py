"""What one process of `tests/test_processes.py` does: train a tiny model, write what came out.

torchrun --nproc-per-node 2 process_worker.py OUT ddp|fsdp [STEPS]
"""

import json
import sys
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from prefloop.logps import Scorer, cached_reference
from prefloop.objectives import DPO
from prefloop.settings import TrainSettings
from prefloop.trainer import build_trainer, fit


def main(out: Path, kind: str, steps: int) -> None:
    plugin = None
    if kind == "fsdp":
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    if plugin is not None:  # Accelerate shards on accelerators only; on the CPU it has to be told
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    rows = tiny.batch(11, responses=(2, 3), longest=12)
    model = tiny.llama()
    reference = cached_reference(Scorer(model), rows, path=out / "cache", identity="tiny")
    settings = TrainSettings(
        lr=0.01,
        batch_size=5,
        epochs=2,
        max_steps=steps,
        warmup=0.0,
        schedule="constant",
        token_budget=60,
    )
    scorer = Scorer(model, token_budget=None)
    trainer = build_trainer(scorer, DPO(beta=0.5), reference, settings, accelerator)
    sharded = any(isinstance(value, DTensor) for value in trainer.scorer.parameters())
    assert sharded == (kind == "fsdp"), f"asked for {kind}, sharded: {sharded}"
    metrics = fit(trainer, rows, rows[:5], out)
    weights = trainer.engine.whole().model
    if accelerator.is_main_process:
        save_file(weights, out / "weights.safetensors")
        (out / "last.json").write_text(json.dumps(metrics))
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
