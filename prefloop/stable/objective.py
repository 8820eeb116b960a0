"""Stable Preference Optimization as an objective: a preference loss with its SFT penalty.

To add a penalty: a frozen dataclass with `couples_batch` and `rows`, as `SafeRegion` has.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prefloop.objectives import DPO, Objective
from prefloop.stable.solvers import Hinge, Penalty
from prefloop.types import Judgement, Logps, PerComparison, UserError


@dataclass(frozen=True, kw_only=True)
class SafeRegion:
    """The penalty of the batch: lam relu(mean excess - eps), the same number for each comparison.

    This is the constraint of the specification, estimated on a batch. The batch is then never split
    over forward passes or processes; `StableGradient(Hinge(...))` has no such limit.

    Attributes:
        lam: weight of the SFT loss outside the region; >= 0.
        eps: width of the region, in nats a response; >= 0.
    """

    lam: float = 1.0
    eps: float = 0.0
    couples_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Hinge(lam=self.lam, eps=self.eps)

    def rows(self, excess: Float[Tensor, " B"], weight: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        mean = (excess * weight).sum() / weight.sum().clamp(min=1e-12)
        return Hinge(lam=self.lam, eps=self.eps).loss(mean).expand_as(excess)


@dataclass(frozen=True, kw_only=True)
class SafeRegionEach:
    """lam relu(excess - eps) of each comparison: every chosen response has to stay in the region.

    Stricter than the specification's mean, needs no coupling; with eps = 0 and the reference's own
    v* it is DPOP's hinge on the chosen.

    Attributes:
        lam: weight of the SFT loss outside the region; >= 0.
        eps: width of the region, in nats a response; >= 0.
    """

    lam: float = 1.0
    eps: float = 0.0
    couples_batch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        Hinge(lam=self.lam, eps=self.eps)

    def rows(self, excess: Float[Tensor, " B"], weight: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        return Hinge(lam=self.lam, eps=self.eps).loss(excess)


@dataclass(frozen=True, kw_only=True)
class ConstantPull:
    """lam excess of each comparison: the preference loss plus lam times SFT.

    Attributes:
        lam: weight of the SFT loss; >= 0.
    """

    lam: float = 0.2
    couples_batch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        Penalty(lam=self.lam)

    def rows(self, excess: Float[Tensor, " B"], weight: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        return Penalty(lam=self.lam).loss(excess)


@dataclass(frozen=True, kw_only=True)
class Stable:
    """A preference objective that is pulled back where the SFT loss leaves its safe region.

        loss = L_pref + pull(L_SFT - v*),   L_SFT = -log pi(y_w|x)

    v* is the reference's SFT loss on the same comparisons (the reference is the SFT checkpoint), or
    a number: its mean over the data, or the loss of a short SFT run where there is no reference.

    Attributes:
        objective: L_pref: DPO, SimPO, CPO, IPO, ... with its regularizers.
        pull: `SafeRegion` of the batch, `SafeRegionEach` comparison, or `ConstantPull`.
        value: v* in nats a response; None for that of the reference.

    References:
        arXiv 2507.07723, v2 (form consistent with its abstract; the hinge is our choice).
    """

    # A protocol's read-only property may be a ClassVar; basedpyright does not know that.
    objective: Objective = field(default_factory=DPO)  # pyright: ignore[reportAssignmentType]
    pull: SafeRegion | SafeRegionEach | ConstantPull = field(default_factory=SafeRegion)
    value: float | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether the reference is read: for v* when there is no number for it."""
        return self.objective.needs_reference or self.value is None

    @property
    def couples_batch(self) -> bool:
        """Whether a batch must stay whole."""
        return self.objective.couples_batch or self.pull.couples_batch

    @property
    def uses_ties(self) -> bool:
        """As the preference objective."""
        return self.objective.uses_ties

    @property
    def needs_collision(self) -> bool:
        """As the preference objective."""
        return self.objective.needs_collision

    @property
    def data(self) -> tuple[str, ...]:
        """As the preference objective."""
        return self.objective.data

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        """Those of the preference objective."""
        return self.objective.rewards(policy, reference)

    def per_comparison(
        self, policy: Logps, reference: Logps | None, judgement: Judgement
    ) -> PerComparison:
        """One loss a comparison."""
        losses = self.objective.per_comparison(policy, reference, judgement)
        excess = sft_loss(policy, judgement) - sft_value(reference, judgement, self.value)
        return losses + self.pull.rows(excess, judgement.weight.to(excess.dtype))


def sft_loss(policy: Logps, judgement: Judgement) -> PerComparison:
    """-log pi(y_w|x) of each comparison, in nats; the mean over its best responses."""
    best = best_responses(judgement)
    total = torch.where(best, policy.sum, 0.0).sum(-1)
    return -total / best.sum(-1).clamp(min=1)


def sft_value(
    reference: Logps | None, judgement: Judgement, value: float | None
) -> PerComparison | float:
    """v* of each comparison: the given number, or the SFT loss of the reference; no gradient."""
    if value is not None:
        return value
    if reference is None:
        raise UserError(
            "the safe region is measured from the SFT loss of the reference, but reference is "
            "None. Pass a reference, or the loss of an SFT run as `value` in nats a response."
        )
    return sft_loss(reference.detach(), judgement)


def best_responses(judgement: Judgement) -> Bool[Tensor, "B N"]:
    """Which responses SFT learns from: those of the best rank, else good ones, else best scores.

    A comparison that has only bad labels has none.
    """
    rank, scores = judgement.rank, judgement.scores
    ranked = rank > 0
    first = torch.where(ranked, rank, rank.max() + 1).amin(-1, keepdim=True)
    known = ~scores.isnan()
    highest = scores.masked_fill(~known, -torch.inf).amax(-1, keepdim=True)
    by_rank, by_label = ranked & (rank == first), judgement.label == 1
    by_score = known & (scores == highest)
    labelled = (judgement.label >= 0).any(-1, keepdim=True)
    unranked = torch.where(labelled, by_label, by_score)
    return torch.where(ranked.any(-1, keepdim=True), by_rank, unranked)
