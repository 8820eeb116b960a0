"""Solvers around the one trainer: they fill the gradients, the trainer takes the step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers.modeling_layers import GradientCheckpointingLayer

from prefloop.stable.bilevel import Bilevel, Losses, LossOf, Params
from prefloop.stable.levels import Level, Memory, ReferenceLevel, mean_loss
from prefloop.stable.objective import best_responses, sft_loss, sft_value
from prefloop.stable.solvers import Hinge, Solver
from prefloop.trainer import Passes, Trainer
from prefloop.trainer.metrics import Totals, add_totals
from prefloop.trainer.plan import batch_indices, forward_passes
from prefloop.types import Logps, Tokenized, UserError, judgement


@dataclass(frozen=True)
class Demonstrations:
    """Responses that SFT is done on, apart from the comparisons.

    Attributes:
        rows: with a response each that is ranked first, good, or scored highest.
    """

    rows: Sequence[Tokenized]

    def __post_init__(self) -> None:
        if not self.rows:
            raise UserError("there is no demonstration; give one or more, or train without them")
        for row in self.rows:
            if not best_responses(judgement([row])).any():
                raise UserError(
                    f"{row.place or row.id}: no response of this demonstration is ranked first, "
                    "labelled good or scored; give it a label of true, or leave the row out"
                )

    def drawn(self, trainer: Trainer, passes: Passes) -> Passes:
        """This process's share of as many demonstrations as the step has comparisons."""
        processes = trainer.accelerator.num_processes
        size = min(round(processes / passes.scale), len(self.rows))
        seed = trainer.settings.seed
        batch = [self.rows[i] for i in batch_indices(len(self.rows), size, passes.number, seed)]
        parts = forward_passes(batch, processes, trainer.settings.token_budget)
        mine = parts[trainer.accelerator.process_index]
        return Passes(mine, passes.filler, processes / len(batch), passes.number, batch)


@dataclass
class Past:
    """What a gradient remembers of the steps before."""

    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True, kw_only=True)
class StableGradient:
    """Fill `.grad` by a bilevel solver; hand it to the trainer as `gradient`.

    The trainer's objective is the upper level. The lower one is SFT on the best response of each
    comparison, weighted as the comparison is, or on `demonstrations`. A batch may go through in any
    number of forward passes and over any number of processes; sharded parameters are refused.

    Logged beside the objective's metrics: `stable/sft` (SFT loss, nats a response),
    `stable/excess` (above v*), `stable/weight` (of the SFT gradient).

    Attributes:
        solver: which direction the two losses become.
        level: where v* comes from; a `RunningLevel` remembers, so give each run its own gradient.
        demonstrations: what SFT is done on in place of the chosen responses; as many a step as
            there are comparisons. v* is then of them.
    """

    solver: Solver = field(default_factory=Hinge)
    level: Level = field(default_factory=ReferenceLevel)
    demonstrations: Demonstrations | None = None
    _past: Past = field(default_factory=Past, init=False, repr=False, compare=False)

    def __call__(self, trainer: Trainer, passes: Passes) -> Totals:
        scorer = trainer.engine.bare
        params = trainable(scorer)
        shown = None
        if self.demonstrations is not None:
            shown = self.demonstrations.drawn(trainer, passes)
        reduce = _mean_over_processes(trainer)
        seen: dict[int, Totals] = {}

        def problem(value: float | None) -> Bilevel:
            return Bilevel(_Step(trainer, scorer, value, seen).pieces(passes, shown), reduce)

        share = _share(shown or passes, reduce)
        value = self.level.of(problem(0.0), params, share, self._past.memory)
        step = self.solver(problem(value), params)
        self._past.memory = self.level.after(mean_loss(step.losses.lower, share), self._past.memory)
        for name, parameter in params.items():
            parameter.grad = step.gradient[name].to(parameter.dtype)
        totals: Totals = {
            "stable/sft": (step.losses.lower.item(), 1.0),
            "stable/excess": (step.losses.excess.item(), 1.0),
            "stable/weight": (step.weight.item(), 1.0),
        }
        for counted in seen.values():
            totals = add_totals(totals, counted)
        return totals

    def remembered(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return self._past.memory._asdict()

    def remember(self, kept: Mapping[str, float]) -> None:
        """Go on from what a checkpoint kept."""
        self._past.memory = Memory(**kept)


@dataclass(frozen=True)
class _Step:
    """The forward passes of a step as losses of parameters; `seen` collects each one's metrics."""

    trainer: Trainer
    scorer: nn.Module
    value: float | None
    seen: dict[int, Totals]

    def pieces(self, passes: Passes, shown: Passes | None) -> list[LossOf]:
        """Both levels of each pass; with demonstrations, the preference and the SFT apart."""
        both = [self._both(passes, number) for number, part in enumerate(passes.parts) if part]
        if shown is None:
            return both
        lower = [self._lower(part, shown.scale) for part in shown.parts if part]
        return [*map(_upper_only, both), *lower]

    def _both(self, passes: Passes, number: int) -> LossOf:
        part = passes.parts[number]

        def losses(params: Params) -> Losses:
            policy = Logps(*functional_call(self.scorer, params, (part,)))
            weighted, counted = self.trainer.losses(part, policy)
            self.seen.setdefault(number, counted)
            return self._sft(weighted.sum() * passes.scale, part, policy, passes.scale)

        return losses

    def _lower(self, part: Sequence[Tokenized], scale: float) -> LossOf:
        def losses(params: Params) -> Losses:
            policy = Logps(*functional_call(self.scorer, params, (part,)))
            return self._sft(policy.token.sum() * 0.0, part, policy, scale)

        return losses

    def _sft(self, upper: Tensor, part: Sequence[Tokenized], policy: Logps, scale: float) -> Losses:
        judged = judgement(part, policy.token.device)
        share = judged.weight.to(policy.token.dtype) * scale
        reference = None
        if self.value is None and self.trainer.reference is not None:
            reference = self.trainer.reference(part).to(policy.token.device)
        best = sft_value(reference, judged, self.value)
        return Losses(upper, (sft_loss(policy, judged) * share).sum(), (best * share).sum())


def _upper_only(piece: LossOf) -> LossOf:
    def losses(params: Params) -> Losses:
        upper = piece(params).upper
        return Losses(upper, upper * 0.0, torch.zeros_like(upper.detach()))

    return losses


def _share(passes: Passes, reduce: Callable[[Tensor], Tensor]) -> float:
    """Sum of the weights of a step's rows over their number, over all processes."""
    mine = sum(row.weight for part in passes.parts for row in part) * passes.scale
    return float(reduce(torch.tensor(mine, dtype=torch.float64)))


def trainable(scorer: nn.Module) -> Params:
    """The parameters that training changes, by name.

    Raises:
        UserError: they are sharded, or the model recomputes activations: it would do so with its
            own parameters, and derivatives at any others would silently be wrong.
    """
    params: Params = {
        name: value for name, value in scorer.named_parameters() if value.requires_grad
    }
    sharded = [name for name, value in params.items() if isinstance(value, DTensor)]
    if sharded:
        raise UserError(
            f"the bilevel solvers need whole parameters, but {sharded[0]} is sharded. Use one "
            "process or plain data parallelism, or the objective Stable(pull=SafeRegionEach())."
        )
    recomputing = [
        name
        for name, module in scorer.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    if recomputing:
        raise UserError(
            f"the bilevel solvers cannot be used with activation checkpointing, which is on in "
            f"{recomputing[0]}: backward would compute activations again at other weights. Turn it "
            "off, or use the objective Stable(pull=SafeRegionEach())."
        )
    return params


def _mean_over_processes(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    """Sums over processes: a piece's scale already counts the processes, so it is a mean."""
    if trainer.accelerator.num_processes == 1:
        return lambda total: total

    def mean(total: Tensor) -> Tensor:
        # A process without rows sends a zero of its own type; a collective of two types waits.
        sent = total.double() if total.dim() == 0 else total
        whole = trainer.accelerator.reduce(sent.to(trainer.accelerator.device), reduction="mean")
        assert isinstance(whole, torch.Tensor)
        return whole.to(total.dtype)

    return mean
