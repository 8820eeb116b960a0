"""Distillation of a family of reward models into one policy, pessimistically. Experimental."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.objectives.checks import one_of, positive, require
from prefloop.objectives.family import Ensemble, log_ratio, mean_by_row
from prefloop.objectives.scored import scored_pairs
from prefloop.types import Logps, PerComparison

__all__ = ["EnsembleDistillation"]


@dataclass(frozen=True, kw_only=True)
class EnsembleDistillation(Ensemble):
    """Reward distillation against K reward models: near one of them is near enough.

        loss = reduce over k of [ mean over pairs ( (R_ki - R_kj) - (r_i - r_j) )^2 ]
               - gamma mean over scored i of log pi/pi_ref(y_i),   r = beta log pi/pi_ref, summed

    The last term is the forward KL penalty that pessimism over the family amounts to. What the
    authors' minimum runs over, their way to combine an ensemble otherwise, and gamma are not
    settled by any public source: `reduce` offers the readings.

    When:
        several reward models are at hand and none is trusted alone

    Attributes:
        beta: strength of the KL constraint, per nat, in the units of the scores.
        gamma: weight of the forward KL penalty; 0 for none.
        reduce: "min_example" (the model nearest for each comparison), "min_batch" (the model
            nearest for the batch) or "mean" (all of them).

    References:
        Fisch et al. 2024, arXiv 2405.19316 (dp-DPO, e-DPO); practical form as remembered.
    """

    beta: float = 0.1
    gamma: float = 1e-3
    reduce: Literal["min_example", "min_batch", "mean"] = "min_example"

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        require(self, "gamma", self.gamma, self.gamma >= 0, "0 or more (usual: 0.001)")
        one_of(self, "reduce", self.reduce, "min_example", "min_batch", "mean")

    def __call__(
        self, policy: Logps, reference: Logps | None, ensemble: Float[Tensor, "B N K"]
    ) -> PerComparison:
        by_model = self._distilled(self.rewards(policy, reference), ensemble)  # (K, B)
        ratio = log_ratio(policy, reference)
        scored = ~ensemble.isnan().any(-1)
        drift = torch.where(scored, ratio, 0.0).sum(-1) / scored.sum(-1).clamp(min=1)
        if self.reduce == "mean":
            distance = by_model.mean(0)
        elif self.reduce == "min_example":
            distance = by_model.amin(0)
        else:
            distance = by_model[by_model.mean(-1).argmin()]
        return distance - self.gamma * drift

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)

    def _distilled(
        self, rewards: Float[Tensor, "B N"], ensemble: Float[Tensor, "B N K"]
    ) -> Float[Tensor, "K B"]:
        losses = []
        for scores in ensemble.unbind(-1):
            row, first, second = scored_pairs(scores)
            error = (scores - rewards)[row, first] - (scores - rewards)[row, second]
            losses.append(mean_by_row(error.square(), row, len(scores)))
        return torch.stack(losses)
