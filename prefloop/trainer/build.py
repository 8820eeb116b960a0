"""A `Trainer` from a scorer: optimizer and devices, prepared by Accelerate."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from prefloop.objectives import Objective
from prefloop.settings import TrainSettings
from prefloop.trainer.engine import Accelerated
from prefloop.trainer.loop import Gradient, Reference, Trainer, backward
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
    # Together: sharding replaces the parameters, and the optimizer must follow.
    scorer, optimizer = accelerator.prepare(scorer, optimizer)
    return Trainer(
        engine=Accelerated(scorer, optimizer, accelerator),
        objective=objective,
        reference=reference,
        settings=settings,
        accelerator=accelerator,
        gradient=gradient,
    )


def accelerator_for(trackers: tuple[str, ...], folder: Path, precision: str) -> Accelerator:
    """Devices, processes and trackers of a run.

    Args:
        trackers: any of "tensorboard", "wandb", "trackio"; metrics.jsonl is always written.
        folder: where trackers that write files put them.
        precision: "no", "bf16" or "fp16" autocast.
    """
    try:
        accelerator = Accelerator(
            # Without this, processes on a machine without an accelerator do not find each other.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=precision,
            log_with=list(trackers) or None,
            project_dir=folder,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"--trackers or --precision cannot be used here: {error}") from error
    refuse_deepspeed(accelerator.distributed_type)
    refuse_unsharded(accelerator.distributed_type, os.environ)
    return accelerator


def refuse_deepspeed(kind: DistributedType) -> None:
    """Refuse an engine that steps the optimizer inside backward.

    There a loss or gradient that is no number would reach the weights before it is seen, and its
    checkpoints are pickles.
    """
    if kind == DistributedType.DEEPSPEED:
        raise UserError(
            "DeepSpeed moves the weights inside its backward pass, before a loss or gradient that "
            "is no number can be refused, and keeps checkpoints as pickles; it is not supported. "
            "FSDP2 shards the same things: accelerate launch --use_fsdp --fsdp_version 2"
        )


def refuse_unsharded(kind: DistributedType, environment: Mapping[str, str]) -> None:
    """Refuse a run that was launched to be sharded and would not be."""
    asked = environment.get("ACCELERATE_USE_FSDP", "").lower() in {"1", "true", "yes"}
    if asked and kind != DistributedType.FSDP:
        raise UserError(
            "the launcher asks for FSDP, but Accelerate shards on GPUs and other accelerators only "
            "and there is none here; every process would hold the whole model. Launch without "
            "--use_fsdp"
        )
