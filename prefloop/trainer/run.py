"""A training run on disk: steps, evaluations, checkpoints, metrics; killed and gone on with.

run/metrics.jsonl   one line a logged step, one a evaluation
run/checkpoint/     the newest checkpoint
"""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from prefloop.runs import append_jsonl, read_jsonl, write_jsonl
from prefloop.trainer import checkpoint
from prefloop.trainer.loop import Metrics, Remembering, Trainer, global_batch, total_steps
from prefloop.trainer.plan import steps_per_epoch
from prefloop.types import Tokenized, UserError


class Interrupted(KeyboardInterrupt):
    """The user pressed Ctrl-C; the run has been saved and can be resumed."""


@dataclass(frozen=True)
class Progress:
    """What a run has done so far: handed to the caller after every step.

    Attributes:
        step: optimizer steps done.
        total: optimizer steps of the run.
        metrics: of the last step.
    """

    step: int
    total: int
    metrics: Metrics


def fit(
    trainer: Trainer,
    rows: Sequence[Tokenized],
    held_out: Sequence[Tokenized],
    folder: Path,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Metrics:
    """Train on `rows` from the newest checkpoint in `folder`, or from the start; last metrics.

    A run that was killed and goes on ends in the same weights, bit for bit on a CPU, as one that
    was not: the order of the data and every random number follow from the step.

    Raises:
        UserError: no rows, or a checkpoint of another model.
        NonFiniteError: a loss or gradient is not finite; the checkpoint before it stays.
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    if not rows:
        raise UserError("there is nothing to train on: no comparison is left")
    total = total_steps(len(rows), trainer.settings)
    folder.mkdir(parents=True, exist_ok=True)
    log, saved = folder / "metrics.jsonl", folder / "checkpoint"
    done = 0
    if checkpoint.finished(saved):
        done = checkpoint.load(saved, trainer.engine)
        _look_back(trainer, checkpoint.remembered(saved))
    metrics = _rewind(trainer, log, done)
    save_every = trainer.settings.save_every or max(1, total // 10)
    with _CtrlC(trainer) as pressed:
        if done == 0:
            _log_evaluation(trainer, held_out, log, 0)
        while done < total:
            metrics = _timed_step(trainer, rows, done, total)
            done += 1
            if done % trainer.settings.log_every == 0 or done == total:
                _log(trainer, log, metrics)
            if _evaluates(trainer, done, total):
                metrics = metrics | _log_evaluation(trainer, held_out, log, done)
            stop = pressed()
            if stop or done % save_every == 0 or done == total:
                _save(trainer, saved, done)
            on_step(Progress(done, total, metrics))
            if stop and done < total:
                raise Interrupted(f"stopped after step {done} of {total}")
    return metrics


def _timed_step(trainer: Trainer, rows: Sequence[Tokenized], number: int, total: int) -> Metrics:
    settings = trainer.settings
    batch = global_batch(rows, settings, number)
    started = time.perf_counter()
    metrics = trainer.step(batch, number, settings.learning_rate(number, total))
    seconds = time.perf_counter() - started
    epoch = (number + 1) / steps_per_epoch(len(rows), settings.batch_size)
    return {
        "step": number + 1,
        "epoch": epoch,
        **metrics,
        "comparisons_per_second": len(batch) / seconds,
    }


def _evaluates(trainer: Trainer, done: int, total: int) -> bool:
    every = trainer.settings.eval_every
    return done == total or (every > 0 and done % every == 0)


def _log(trainer: Trainer, log: Path, metrics: Metrics) -> None:
    if trainer.accelerator.is_main_process:
        append_jsonl(log, metrics)
    trainer.accelerator.log(metrics, step=int(metrics["step"]))


def _log_evaluation(
    trainer: Trainer, held_out: Sequence[Tokenized], log: Path, step: int
) -> Metrics:
    if not held_out:
        return {}
    metrics = trainer.evaluate(held_out)
    _log(trainer, log, {"step": step, **metrics})
    return metrics


def _save(trainer: Trainer, folder: Path, step: int) -> None:
    state = trainer.engine.whole()
    gradient = trainer.gradient
    remembered = gradient.remembered() if isinstance(gradient, Remembering) else {}
    if trainer.accelerator.is_main_process:
        checkpoint.save(folder, state, step, remembered)
    trainer.accelerator.wait_for_everyone()


def _look_back(trainer: Trainer, remembered: Mapping[str, float]) -> None:
    if isinstance(trainer.gradient, Remembering) and remembered:
        trainer.gradient.remember(remembered)


def _rewind(trainer: Trainer, log: Path, step: int) -> Metrics:
    """Forget logged steps after the checkpoint; the last step's metrics that stay."""
    if not log.exists():
        return {}
    rows = [row for row in read_jsonl(log) if row["step"] <= step] if step else []
    if trainer.accelerator.is_main_process:
        write_jsonl(log, rows)
    trainer.accelerator.wait_for_everyone()
    merged: Metrics = {}
    for row in rows:
        if row["step"] == step:
            merged.update(row)
    return merged


class _CtrlC:
    """The first Ctrl-C asks the loop to stop after the step; the second one stops at once."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._pressed = False

    def __enter__(self) -> Callable[[], bool]:
        try:
            self._before = signal.signal(signal.SIGINT, self._note)
        except ValueError:  # not the main thread: nobody presses anything here
            self._before = None
        return self._anywhere

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True

    def _anywhere(self) -> bool:
        """Whether it was pressed on any process, so that all stop after the same step."""
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return self._pressed
        flag: Any = torch.tensor(float(self._pressed), device=accelerator.device)
        summed: Any = accelerator.reduce(flag, reduction="sum")
        return float(summed) > 0
