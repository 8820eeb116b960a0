"""A `Trainer` from a scorer: optimizer and devices, prepared by Accelerate."""

import gc
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType
from accelerate.utils import InitProcessGroupKwargs, is_deepspeed_available
from torch import nn

from prefloop.objectives import Objective
from prefloop.settings import TrainSettings
from prefloop.trainer.engine import Accelerated, Engine
from prefloop.trainer.loop import Gradient, Reference, Trainer, backward
from prefloop.trainer.zero import start_zero, zero_config
from prefloop.types import UserError


def build_trainer(
    scorer: nn.Module,
    objective: Objective,
    reference: Reference | None,
    settings: TrainSettings,
    accelerator: Accelerator,
    gradient: Gradient = backward,
) -> Trainer:
    """AdamW over the trainable parameters of `scorer`, both prepared for `accelerator`."""
    trainable = [value for value in scorer.parameters() if value.requires_grad]
    if not trainable:
        raise UserError("the policy has no trainable parameter; is its adapter frozen?")
    optimizer = torch.optim.AdamW(
        trainable,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,  # one pass over the weights instead of ten, on CPUs too
    )
    return Trainer(
        engine=_engine(scorer, optimizer, settings, accelerator, gradient),
        objective=objective,
        reference=reference,
        settings=settings,
        accelerator=accelerator,
        gradient=gradient,
    )


def _engine(
    scorer: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    accelerator: Accelerator,
    gradient: Gradient,
) -> Engine:
    given = zero_asked(accelerator)
    if given is None:
        # Together: sharding replaces the parameters, and the optimizer must follow.
        scorer, optimizer = accelerator.prepare(scorer, optimizer)
        return Accelerated(scorer, optimizer, accelerator)
    if gradient is not backward:
        raise UserError(
            "the bilevel solvers fill gradients, which DeepSpeed keeps to itself; use torchrun "
            "without DeepSpeed, or the objective Stable(pull=SafeRegionEach())"
        )
    return start_zero(scorer, optimizer, zero_config(given, settings, accelerator.num_processes))


def accelerator_for(
    trackers: tuple[str, ...], folder: Path, precision: str, patience: timedelta | None = None
) -> Accelerator:
    """Devices, processes and trackers of a run.

    Args:
        trackers: any of "tensorboard", "wandb", "trackio"; metrics.jsonl is always written.
        folder: where trackers that write files put them.
        precision: "no", "bf16" or "fp16" autocast.
        patience: how long a process waits for the others; None is torch's, minutes, which is enough
            where all take the same steps.
    """
    plugin = _deepspeed(precision) if _asked("ACCELERATE_USE_DEEPSPEED", os.environ) else None
    try:
        accelerator = Accelerator(
            # Without this, processes on a machine without an accelerator do not find each other.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=precision if plugin is None else "no",
            log_with=list(trackers) or None,
            project_dir=folder,
            deepspeed_plugin=plugin,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)],
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"--trackers or --precision cannot be used here: {error}") from error
    if plugin is not None:
        accelerator.state.deepspeed_plugins = plugin  # Accelerate forgets it on CPUs
    refuse_unsharded(accelerator.distributed_type, os.environ)
    return accelerator


def finish(accelerator: Accelerator) -> None:
    """End the trackers and the processes of a run, whose trainer the caller holds no more.

    What Accelerate keeps of it goes first. Otherwise the last owner of gloo's process group would
    be DistributedDataParallel's reducer, which joins the group's thread under Python's lock while
    that thread may be waiting for the lock: the process would never end (seen with torch 2.13).
    """
    accelerator.free_memory()
    gc.collect()  # it held the policy while it collected
    accelerator.end_training()


def zero_asked(accelerator: Accelerator) -> Mapping[str, Any] | None:
    """DeepSpeed's configuration as it was passed through, or None where it is not asked for."""
    plugin: Any = accelerator.state.deepspeed_plugins
    return None if plugin is None else plugin.deepspeed_config


def in_precision(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """The precision of a forward pass in training, for passes outside of it."""
    given = zero_asked(accelerator)
    if given is not None and given.get("torch_autocast", {}).get("enabled"):
        return torch.autocast(
            accelerator.device.type, getattr(torch, given["torch_autocast"]["dtype"])
        )
    return accelerator.autocast()


def divided(accelerator: Accelerator) -> tuple[int, int]:
    """Over how many processes the weights are divided, and over how many AdamW's moments."""
    processes = accelerator.num_processes
    given = zero_asked(accelerator)
    if given is not None:
        stage = given.get("zero_optimization", {}).get("stage", 0)
        return (processes if stage == 3 else 1), processes
    sharded = accelerator.distributed_type == DistributedType.FSDP
    return (processes, processes) if sharded else (1, 1)


def _deepspeed(precision: str) -> DeepSpeedPlugin:
    """What the launcher passed through, with autocast as `precision` says."""
    if not is_deepspeed_available():
        raise UserError(
            "the launcher asks for DeepSpeed, which is not installed: pip install "
            "'prefloop[deepspeed]', or launch without --use_deepspeed"
        )
    if precision == "fp16":
        raise UserError(
            "--precision fp16 under DeepSpeed skips steps whose gradient overflows; use bf16 or no"
        )
    # Weights are divided when the run starts, not when they are loaded: the reference is scored
    # before, by the whole model.
    plugin = DeepSpeedPlugin(zero3_init_flag=False)
    if plugin.deepspeed_config.get("torch_autocast", "auto") != "auto":
        raise UserError("DeepSpeed's torch_autocast is what --precision says; leave it out")
    plugin.deepspeed_config["torch_autocast"] = {
        "enabled": precision == "bf16",
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],  # gradients stay float32
    }
    return plugin


def refuse_unsharded(kind: DistributedType, environment: Mapping[str, str]) -> None:
    """Refuse a run that was launched to be sharded and would not be."""
    if _asked("ACCELERATE_USE_FSDP", environment) and kind != DistributedType.FSDP:
        raise UserError(
            "the launcher asks for FSDP, but Accelerate shards on GPUs and other accelerators only "
            "and there is none here; every process would hold the whole model. Launch without "
            "--use_fsdp"
        )


def _asked(name: str, environment: Mapping[str, str]) -> bool:
    return environment.get(name, "").lower() in {"1", "true", "yes"}
