"""Objectives around objectives: length-desensitised, weighted by confidence, several at once."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.objectives.checks import one_of, require
from prefloop.objectives.family import Objective, PairObjective, Wrapped
from prefloop.objectives.pairwise import DPO
from prefloop.types import Judgement, Logps, Pair, PerComparison, PerPair, UserError

__all__ = ["LD", "WPO", "Sum"]


@dataclass(frozen=True, kw_only=True)
class LD(Wrapped):
    """Length desensitisation: tokens beyond the shorter response of the pair count less.

        log p(y|x) is replaced by sum over t <= n of log p_t + alpha sum over t > n of log p_t,
           n = min(|y_w|, |y_l|)

    For objectives on summed log-probabilities; lengths that an objective divides by stay the full
    ones, as in TRL. Libraries disagree about the reference: TRL weighs both models ("both"), and
    policy = reference then gives log 2; LLaMA-Factory weighs the policy only ("policy"), which
    leaves -(1 - alpha) log ref of the tail in the margin. Logged rewards are unweighted.

    When:
        the policy grows verbose under an objective on summed log-probabilities

    Attributes:
        objective: the objective inside.
        alpha: weight of the tail, in [0, 1]; 1 changes nothing, 0 cuts to the shared length.
        sides: "both" for policy and reference, "policy" for the policy only.

    References:
        Liu et al. 2024 (LD-DPO), arXiv 2409.06411; TRL's `ld_alpha`.
    """

    objective: PairObjective = field(default_factory=DPO)
    alpha: float = 0.5
    sides: Literal["both", "policy"] = "both"

    def __post_init__(self) -> None:
        require(self, "alpha", self.alpha, 0 <= self.alpha <= 1, "in [0, 1] (usual: 0.5)")
        one_of(self, "sides", self.sides, "both", "policy")

    @property
    def inner(self) -> PairObjective:
        return self.objective

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        if reference is not None and self.sides == "both":
            reference = self._weighted(reference)
        return self.objective(self._weighted(policy), reference)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.objective.rewards(policy, reference)

    def _weighted(self, pair: Pair) -> Pair:
        shared = torch.minimum(pair.chosen.length, pair.rejected.length).unsqueeze(-1)
        sides = []
        for side in pair:
            tail = side.mask.cumsum(-1) > shared
            token = torch.where(tail, self.alpha * side.token, side.token)
            sides.append(Logps(token, side.mask, side.collision))
        return Pair(*sides)


@dataclass(frozen=True, kw_only=True)
class WPO(Wrapped):
    """Weighted preference optimization: pairs that the policy would itself write count more.

        loss = sg[ w(y_w) w(y_l) ] l,   l = the loss inside
           w(y) = exp( mean over t of (log p(y_t) - log sum over v of p(v)^2) )

    The subtraction aligns the weights: a token drawn from the policy has weight about 1, and a
    weight may exceed 1. Earlier ports cut the product at 1; TRL 1.16 does not. Which of the two
    is the authors' own is unsettled. Needs the collision probabilities of the full vocabulary.

    When:
        training on responses that another model wrote

    Attributes:
        objective: the objective inside.
        max_weight: largest weight of a pair; 1 for the earlier ports, inf for none.

    References:
        Zhou et al. 2024, arXiv 2406.11827, Eq. 2; TRL's `use_weighting`.
    """

    objective: PairObjective = field(default_factory=lambda: DPO(beta=0.01))
    max_weight: float = math.inf
    weighs_by_collision = True

    def __post_init__(self) -> None:
        require(self, "max_weight", self.max_weight, self.max_weight > 0, "positive (or inf)")

    @property
    def inner(self) -> PairObjective:
        return self.objective

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        weight = confidence(policy.chosen) * confidence(policy.rejected)
        return weight.clamp(max=self.max_weight) * self.objective(policy, reference)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.objective.rewards(policy, reference)


@dataclass(frozen=True, kw_only=True)
class Sum:
    """Several objectives at once, each with a weight.

        loss = sum over k of weights_k loss_k

    Each part reads what it needs; comparisons must have it all. Logged rewards are those of the
    first part. `Sum(objectives=(DPO(), SFT()), weights=(1.0, 0.2))` is DPO with an SFT term.

    When:
        one objective is not enough: DPO with an SFT term, a loss with a regularizer

    Attributes:
        objectives: the parts, one or more.
        weights: one number a part, 0 or more; None for 1 each.

    References:
        TRL's list of `loss_type` with `loss_weights`.
    """

    objectives: tuple[Objective, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.objectives:
            raise UserError("Sum.objectives is empty; give one objective or more")
        if self.weights is None:
            return
        if len(self.weights) != len(self.objectives):
            raise UserError(
                f"Sum.weights has {len(self.weights)} numbers for {len(self.objectives)} "
                "objectives; give one for each, or none for 1 each"
            )
        allowed = all(0 <= weight < math.inf for weight in self.weights)
        require(self, "weights", self.weights, allowed, "0 or more and finite, each")

    @property
    def needs_reference(self) -> bool:
        """Whether any part does."""
        return any(part.needs_reference for part in self.objectives)

    @property
    def couples_batch(self) -> bool:
        """Whether any part does."""
        return any(part.couples_batch for part in self.objectives)

    @property
    def uses_ties(self) -> bool:
        """Whether every part does: a tie is an observation only if all can read it."""
        return all(part.uses_ties for part in self.objectives)

    @property
    def needs_collision(self) -> bool:
        """Whether any part does."""
        return any(part.needs_collision for part in self.objectives)

    @property
    def data(self) -> tuple[str, ...]:
        """The columns that the parts read, each once."""
        return tuple(dict.fromkeys(name for part in self.objectives for name in part.data))

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        """Implicit reward of each response under the first part."""
        return self.objectives[0].rewards(policy, reference)

    def per_comparison(
        self, policy: Logps, reference: Logps | None, judgement: Judgement
    ) -> PerComparison:
        """Weighted sum of the parts' losses of each comparison."""
        weights = self.weights or (1.0,) * len(self.objectives)
        parts = [
            weight * part.per_comparison(policy, reference, judgement)
            for part, weight in zip(self.objectives, weights, strict=True)
        ]
        return torch.stack(parts).sum(0)


def confidence(policy: Logps) -> Float[Tensor, "*shape"]:
    """Geometric mean over tokens of p(y_t) / sum_v p(v)^2, without a gradient."""
    if policy.collision is None:
        raise UserError(
            "WPO weighs by the full vocabulary's sum of squared probabilities, but the policy's "
            "Logps has no collision; build the scorer with it (the trainer does so when "
            "objective.needs_collision)"
        )
    aligned = torch.where(policy.mask, policy.token - policy.collision, 0.0).detach()
    return (aligned.sum(-1) / policy.length.clamp(min=1)).exp()
