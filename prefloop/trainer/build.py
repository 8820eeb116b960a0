"""A `Trainer` from a scorer: optimizer and devices, prepared by Accelerate."""

from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from prefloop.objectives import Objective
from prefloop.settings import TrainSettings
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
        scorer=scorer,
        optimizer=optimizer,
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
            mixed_precision=precision, log_with=list(trackers) or None, project_dir=folder
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"--trackers or --precision cannot be used here: {error}") from error
    refuse_deepspeed(accelerator.distributed_type)
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
