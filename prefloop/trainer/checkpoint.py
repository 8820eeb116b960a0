"""Checkpoints: trainable weights and AdamW's moments as safetensors, the step as JSON.

A checkpoint is written to a temporary folder and renamed, so a killed run never leaves half of
one. It says nothing of processes: what two wrote, one can resume, and the other way round.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file

from prefloop.runs import read_json, write_json
from prefloop.trainer.engine import Engine, State, trained
from prefloop.types import UserError

MODEL, MOMENTS = "model.safetensors", "optimizer.safetensors"


def save(
    folder: Path,
    state: State,
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
    save_file(state.model, temporary / MODEL)
    save_file(state.moments, temporary / MOMENTS)
    write_json(temporary / "state.json", {"step": step, "remembered": dict(remembered)})
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for older in finished(folder)[:-1]:
        shutil.rmtree(older)
    return target


def finished(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").exists())


def load(folder: Path, engine: Engine) -> int:
    """Put the newest checkpoint of `folder` into `engine`; returns its step.

    Raises:
        UserError: there is none, or it is of another model.
    """
    found = finished(folder)
    if not found:
        raise UserError(f"{folder} holds no checkpoint to resume from")
    newest = found[-1]
    state = State(load_file(newest / MODEL), load_file(newest / MOMENTS))
    here = trained(engine.bare)
    if differing := sorted(state.model.keys() ^ here):
        raise UserError(
            f"{newest} has {len(state.model)} trained tensors, this model {len(here)} (only "
            f"one has {differing[0]}): it is a checkpoint of another model or adapter. Resume with "
            "the settings of its config.json."
        )
    engine.restore(state)
    return int(read_json(newest / "state.json")["step"])


def remembered(folder: Path) -> dict[str, float]:
    """What the gradient looked back on when the newest checkpoint of `folder` was written."""
    return read_json(finished(folder)[-1] / "state.json").get("remembered", {})
