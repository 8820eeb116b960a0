"""Checkpoints: trainable weights and AdamW's moments as safetensors, the step as JSON.

A checkpoint is written to a temporary folder and renamed, so a killed run never leaves half of
one. It says nothing of processes: what two wrote, one can resume, and the other way round.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from prefloop.runs import read_json, write_json
from prefloop.types import UserError

FSDP_WRAPPER = "_fsdp_wrapped_module."
CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Whole tensors of everything that training changes; every process must call this together."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights: Any = get_model_state_dict(model, options=options)
    trained = _trained(model)
    moments: Any = get_optimizer_state_dict(model, optimizer, options=options)
    return {
        "model": {
            name: value.detach().contiguous().clone()
            for name, value in weights.items()  # empty but on the first process
            if name in trained  # tied weights stand there under a second name
        },
        "optimizer": {
            f"{name}/{key}": torch.as_tensor(value).detach().contiguous().clone()
            for name, state in moments.get("state", {}).items()
            for key, value in state.items()
        },
    }


def save(
    folder: Path,
    state: Mapping[str, dict[str, Tensor]],
    step: int,
    remembered: Mapping[str, float],
) -> Path:
    """Write one checkpoint and delete the older ones; one process calls this.

    `remembered` is what the gradient looks back on, empty for one that does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, tensors in state.items():
        save_file(tensors, temporary / f"{name}.safetensors")
    write_json(temporary / "state.json", {"step": step, "remembered": dict(remembered)})
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for older in finished(folder)[:-1]:
        shutil.rmtree(older)
    return target


def finished(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").exists())


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put the newest checkpoint of `folder` into model and optimizer; returns its step.

    Raises:
        UserError: there is none, or it is of another model.
    """
    found = finished(folder)
    if not found:
        raise UserError(f"{folder} holds no checkpoint to resume from")
    newest = found[-1]
    weights: dict[str, Any] = dict(load_file(newest / "model.safetensors"))
    if differing := sorted(weights.keys() ^ _trained(model)):
        raise UserError(
            f"{newest} has {len(weights)} trained tensors, this model {len(_trained(model))} (only "
            f"one has {differing[0]}): it is a checkpoint of another model or adapter. Resume with "
            "the settings of its config.json."
        )
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(
        model,
        optimizer,
        _nested(load_file(newest / "optimizer.safetensors"), model, optimizer),
        options=options,
    )
    return int(read_json(newest / "state.json")["step"])


def _trained(model: nn.Module) -> set[str]:
    """Names of the parameters that training changes, each parameter under its first name."""
    return {
        name.replace(FSDP_WRAPPER, "").replace(CHECKPOINT_WRAPPER, "")
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def remembered(folder: Path) -> dict[str, float]:
    """What the gradient looked back on when the newest checkpoint of `folder` was written."""
    return read_json(finished(folder)[-1] / "state.json").get("remembered", {})


def _nested(
    flat: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The optimizer state in the form that torch takes, groups as they are in `optimizer` now."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        parameter, key = name.rsplit("/", 1)
        state.setdefault(parameter, {})[key] = value
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    groups = get_optimizer_state_dict(model, optimizer, options=options)["param_groups"]
    return {"state": state, "param_groups": groups}
