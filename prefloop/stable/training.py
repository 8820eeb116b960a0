"""Solvers around the one trainer: they fill the gradients, the trainer takes the step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from prefloop.stable.bilevel import Bilevel, Losses, LossOf, Params
from prefloop.stable.objective import sft_loss, sft_value
from prefloop.stable.solvers import Hinge, Solver
from prefloop.trainer import Passes, Trainer
from prefloop.trainer.metrics import Totals, add_totals
from prefloop.types import Logps, Tokenized, UserError, judgement


@dataclass(frozen=True, kw_only=True)
class StableGradient:
    """Fill `.grad` by a bilevel solver; hand it to the trainer as `gradient`.

    The trainer's objective is the upper level. The lower one is SFT on the best response of each
    comparison, weighted as the comparison is. A batch may go through in any number of forward
    passes and over any number of processes; sharded parameters are refused.

    Logged beside the objective's metrics: `stable/sft` (SFT loss, nats a response),
    `stable/excess` (above v*), `stable/weight` (of the SFT gradient).

    Attributes:
        solver: which direction the two losses become.
        value: v* in nats a response; None for that of the reference on the same comparisons.
    """

    solver: Solver = field(default_factory=Hinge)
    value: float | None = None

    def __call__(self, trainer: Trainer, passes: Passes) -> Totals:
        scorer = trainer.accelerator.unwrap_model(trainer.scorer)
        params = trainable(scorer)
        seen: dict[int, Totals] = {}
        pieces = [
            self._piece(trainer, scorer, part, passes.scale, (seen, number))
            for number, part in enumerate(passes.parts)
            if part
        ]
        step = self.solver(Bilevel(pieces, _mean_over_processes(trainer)), params)
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

    def _piece(
        self,
        trainer: Trainer,
        scorer: nn.Module,
        part: Sequence[Tokenized],
        scale: float,
        log: tuple[dict[int, Totals], int],
    ) -> LossOf:
        """Both losses of one forward pass; its metrics are those of the first evaluation."""
        seen, number = log

        def losses(params: Params) -> Losses:
            policy = Logps(*functional_call(scorer, params, (part,)))
            weighted, counted = trainer.losses(part, policy)
            seen.setdefault(number, counted)
            judged = judgement(part, policy.token.device)
            share = judged.weight.to(policy.token.dtype) * scale
            reference = None if trainer.reference is None else trainer.reference(part)
            best = sft_value(reference, judged, self.value)
            return Losses(
                weighted.sum() * scale,
                (sft_loss(policy, judged) * share).sum(),
                (best * share).sum(),
            )

        return losses


def trainable(scorer: nn.Module) -> Params:
    """The parameters that training changes, by name; sharded ones are refused."""
    params: Params = {
        name: value for name, value in scorer.named_parameters() if value.requires_grad
    }
    sharded = [name for name, value in params.items() if isinstance(value, DTensor)]
    if sharded:
        raise UserError(
            f"the bilevel solvers need whole parameters, but {sharded[0]} is sharded. Use one "
            "process or plain data parallelism, or the objective Stable(pull=SafeRegionEach())."
        )
    return params


def _mean_over_processes(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    """Sums over processes: a piece's scale already counts the processes, so it is a mean."""
    if trainer.accelerator.num_processes == 1:
        return lambda total: total

    def mean(total: Tensor) -> Tensor:
        whole = trainer.accelerator.reduce(total.to(trainer.accelerator.device), reduction="mean")
        assert isinstance(whole, torch.Tensor)
        return whole

    return mean
