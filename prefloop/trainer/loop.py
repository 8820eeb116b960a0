"""The one training loop, for every objective and every scorer.

    for each optimizer step: forward passes -> losses -> gradients -> check -> AdamW

It knows scorers, objectives, `Tokenized` rows and a reference; nothing of adapters or files of
data. Bilevel training, EM and online training are outer loops around it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import nn

from prefloop.logps import random_state_kept
from prefloop.objectives import Objective
from prefloop.settings import TrainSettings
from prefloop.trainer.coupling import everyones
from prefloop.trainer.engine import Engine
from prefloop.trainer.metrics import ROUNDING, Totals, add_totals, batch_totals, means
from prefloop.trainer.plan import (
    batch_indices,
    derived_seed,
    forward_passes,
    shares,
    steps_per_epoch,
    tokens,
)
from prefloop.types import Logps, Tokenized, UserError, judgement, score

Reference = Callable[[Sequence[Tokenized]], Logps]
Metrics = dict[str, int | float]


class NonFiniteError(UserError):
    """A loss or a gradient is not a number; the weights have not moved."""


@dataclass(frozen=True)
class Passes:
    """The forward passes of one optimizer step on this process.

    Attributes:
        parts: the rows of each pass; an empty one runs `filler`, which counts nothing.
        filler: a row to run where this process has fewer passes than another.
        scale: what a summed loss is multiplied with, so that the gradient averaged over
            processes is that of the mean over the global batch: processes / comparisons.
        number: of the optimizer step; the first is 0.
        batch: the rows of all processes, in the order of the processes.
    """

    parts: list[list[Tokenized]]
    filler: Tokenized
    scale: float
    number: int
    batch: list[Tokenized]


@runtime_checkable
class Gradient(Protocol):
    """Fills `.grad` of the scorer's parameters for one optimizer step."""

    def __call__(self, trainer: "Trainer", passes: Passes) -> Totals: ...


@runtime_checkable
class Remembering(Protocol):
    """A gradient that looks back on the steps before; a checkpoint keeps what it remembers."""

    def remembered(self) -> dict[str, float]: ...

    def remember(self, kept: Mapping[str, float]) -> None: ...


@dataclass
class Trainer:
    """A policy in training.

    Attributes:
        engine: the policy, trained in place, and what moves it.
        objective: what is minimised.
        reference: log-probabilities of the reference policy, or None for objectives without one.
        settings: the numbers of the loop.
        accelerator: devices and processes.
        gradient: how `.grad` is filled; the bilevel solvers bring their own.
    """

    engine: Engine
    objective: Objective
    reference: Reference | None
    settings: TrainSettings
    accelerator: Accelerator
    gradient: Gradient

    def __post_init__(self) -> None:
        name = type(self.objective).__name__
        if self.objective.needs_reference and self.reference is None:
            raise UserError(
                f"{name} needs a reference policy, but there is none. Pass the reference's "
                "log-probabilities, or use an objective without one (SimPO, ORPO, CPO)."
            )
        if self._meets and self.gradient is not backward:
            raise UserError(
                f"{name} compares the comparisons of a batch with each other, which a solver sees "
                f"in pieces on {self.accelerator.num_processes} processes. Use one process."
            )

    @property
    def _meets(self) -> bool:
        """Whether what several processes scored has to meet before there is a loss."""
        return self.objective.couples_batch and self.accelerator.num_processes > 1

    @property
    def scorer(self) -> nn.Module:
        """What forward passes go through."""
        return self.engine.scorer

    def step(self, batch: Sequence[Tokenized], number: int, lr: float) -> Metrics:
        """One optimizer step on the mean loss over the comparisons of the global `batch`.

        The update depends neither on how the batch is cut into forward passes nor on the number
        of processes. A loss or gradient that is not finite raises before the weights move.
        """
        passes = self._passes(batch, number)
        rank = self.accelerator.process_index
        self.scorer.train()
        self.engine.begin()
        with seeded(derived_seed(self.settings.seed, 1 + number, rank), self.accelerator.device):
            totals = self.gradient(self, passes)
        norm = self.engine.clip(self.settings.max_grad_norm)
        metrics = means(self.reduced(totals))
        self._refuse_non_finite(metrics["loss"], norm, batch, number)
        self.engine.move(lr)
        return metrics | {"grad_norm": norm, "learning_rate": lr}

    def _passes(self, batch: Sequence[Tokenized], number: int) -> Passes:
        """What this process does of a global batch; rows that a loss couples go in one pass."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        if self.objective.couples_batch:
            dealt = shares(batch, processes) if processes > 1 else [list(batch)]
            parts, rows = [dealt[rank]], [row for share in dealt for row in share]
        else:
            parts = forward_passes(batch, processes, self.settings.token_budget)[rank]
            rows = list(batch)
        return Passes(parts, min(batch, key=tokens), processes / len(batch), number, rows)

    @torch.no_grad()
    def evaluate(self, rows: Sequence[Tokenized]) -> Metrics:
        """Means of the training metrics over held-out comparisons, named `eval_...`.

        A loss that couples a batch is that of batches as large as those of training.
        """
        self.scorer.eval()
        size = self.settings.batch_size if self.objective.couples_batch else len(rows)
        totals: Totals = {}
        for start in range(0, len(rows), size):
            passes = self._passes(rows[start : start + size], 0)
            for part in passes.parts:
                policy = score(self.scorer, part or [passes.filler])
                totals = add_totals(totals, self.of_pass(part, policy, passes)[1])
        metrics = means(self.reduced(totals))
        return {f"eval_{name}": value for name, value in metrics.items()}

    def reduced(self, totals: Totals) -> Totals:
        """Sums and counts over all processes; all of them must call this together."""
        if self.accelerator.num_processes == 1:
            return totals
        gathered: list[Totals] = [{} for _ in range(self.accelerator.num_processes)]
        torch.distributed.all_gather_object(gathered, totals)
        merged: Totals = {}
        for part in gathered:
            merged = add_totals(merged, part)
        return merged

    def of_pass(
        self, part: Sequence[Tokenized], policy: Logps, passes: Passes
    ) -> tuple[torch.Tensor, Totals]:
        """Losses that this process differentiates after a pass, and what it adds to the log."""
        if self._meets:
            losses, counted = self.losses(passes.batch, everyones(policy, len(part)))
            return losses, counted if self.accelerator.is_main_process else {}
        if not part:
            return policy.token.new_zeros(0), {}
        return self.losses(part, policy)

    def losses(self, part: Sequence[Tokenized], policy: Logps) -> tuple[torch.Tensor, Totals]:
        """Weighted loss of each comparison, and the totals for the log."""
        reference = None
        if self.reference is not None:
            reference = self.reference(part).to(policy.token.device)
        judged = judgement(part, policy.token.device)
        losses = self.objective.per_comparison(policy, reference, judged)
        totals = batch_totals(self.objective, policy, reference, judged, losses, self.rounding())
        return losses * judged.weight.to(losses.dtype), totals

    def rounding(self) -> float:
        """What rounding does to a log-probability, for the coarsest type that is computed in."""
        precise = {"bf16": torch.bfloat16, "fp16": torch.float16}
        autocast = precise.get(self.accelerator.mixed_precision)
        types = {p.dtype for p in self.scorer.parameters()} | ({autocast} if autocast else set())
        return max(ROUNDING.get(kind, 0.0) for kind in types)

    def _refuse_non_finite(
        self, loss: float, norm: float, batch: Sequence[Tokenized], number: int
    ) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        self.engine.begin()
        self.scorer.eval()
        bad = [] if math.isfinite(loss) else [row for row in batch if not self._finite(row)]
        places = ", ".join(row.place or row.id for row in (bad or batch)[:5])
        raise NonFiniteError(
            f"step {number + 1}: loss {loss}, gradient norm {norm}; the weights have not moved. "
            f"Rows: {places}. Look at these rows with `prefloop check --show`, or lower the "
            "learning rate."
        )

    @torch.no_grad()
    def _finite(self, row: Tokenized) -> bool:
        return bool(self.losses([row], score(self.scorer, [row]))[0].isfinite().all())


def backward(trainer: Trainer, passes: Passes) -> Totals:
    """The plain gradient: every pass adds its share of the mean over the global batch."""
    totals: Totals = {}
    for number, part in enumerate(passes.parts):
        with trainer.engine.one_pass(last=number == len(passes.parts) - 1):
            policy = score(trainer.scorer, part or [passes.filler])
            losses, counted = trainer.of_pass(part, policy, passes)
            totals = add_totals(totals, counted)
            loss = losses.sum() * passes.scale
            # A process without rows takes part in the exchange of gradients all the same.
            trainer.engine.backward(loss if loss.requires_grad else policy.token.sum() * 0.0)
    return totals


def total_steps(rows: int, settings: TrainSettings) -> int:
    """Optimizer steps of a whole run."""
    steps = settings.epochs * steps_per_epoch(rows, settings.batch_size)
    return min(steps, settings.max_steps) if settings.max_steps else steps


def rows_seen(rows: int, settings: TrainSettings) -> list[int]:
    """Numbers of the rows that a run trains on, in order; a run cut short sees some of them."""
    total = total_steps(rows, settings)
    if total >= steps_per_epoch(rows, settings.batch_size):
        return list(range(rows))
    first = batch_indices(rows, rows, 0, settings.seed, settings.ordering)
    return sorted(first[: total * settings.batch_size])


def global_batch(
    rows: Sequence[Tokenized], settings: TrainSettings, number: int
) -> list[Tokenized]:
    """The comparisons of optimizer step `number` (the first is 0)."""
    size, seed = settings.batch_size, settings.seed
    return [rows[i] for i in batch_indices(len(rows), size, number, seed, settings.ordering)]


class seeded:
    """Random numbers inside the block follow from `seed`; outside nothing has changed."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._fork = random_state_kept(device)
        self._seed = seed

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *error: object) -> None:
        self._fork.__exit__(None, None, None)
