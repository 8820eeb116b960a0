"""Pairwise objectives that compare the policy with a reference.

In the equations h_w and h_l are log pi(y|x) - log pi_ref(y|x) of the chosen and of the rejected
response, summed over tokens; sigmoid-type losses are computed in log space.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.objectives.family import (
    Pairwise,
    log_ratio,
    mean_log_ratio,
    positive,
    require,
    share,
)
from prefloop.types import Logps, Pair, PerPair

__all__ = ["DPO", "IPO", "Hinge"]


@dataclass(frozen=True, kw_only=True)
class DPO(Pairwise):
    """Direct Preference Optimization.

        loss = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z),   z = beta (h_w - h_l)

    Attributes:
        beta: strength of the KL constraint, per nat; larger stays closer to the reference.
        label_smoothing: eps, the assumed share of flipped labels, in [0, 0.5); 0 is plain DPO.

    References:
        Rafailov et al. 2023, arXiv 2305.18290, Eq. 7; smoothing (cDPO): Mitchell 2023. TRL's
        `sigmoid` is this loss.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        share(self, "label_smoothing", self.label_smoothing)

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        return smoothed_logistic(pair_margin(self, policy, reference), self.label_smoothing)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class Hinge(Pairwise):
    """Hinge loss on the implicit reward (RSO's hinge-norm).

        loss = max(0, 1 - beta (h_w - h_l))

    No gradient once the margin is 1.

    Attributes:
        beta: reward scale, per nat (RSO's gamma).

    References:
        Liu et al. 2023 (RSO), arXiv 2309.06657; TRL's `hinge`. SLiC-HF (arXiv 2305.10425) has the
        same hinge without a reference: see SLiC.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.05 to 0.5")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        return (1 - pair_margin(self, policy, reference)).relu()

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class IPO(Pairwise):
    """Identity Preference Optimization: regression of the log-ratio difference on 1 / (2 beta).

        loss = (h_w - h_l - 1 / (2 beta))^2

    The field disagrees about h. Per token (`log_ratios="mean"`): TRL, HALOs, torchtune; TRL says
    that the authors confirmed it. Summed (`log_ratios="sum"`): the equation as printed,
    eric-mitchell/direct-preference-optimization, OpenRLHF. A beta for one means nothing for the
    other.

    Attributes:
        beta: the paper's tau, per nat; the target difference is 1 / (2 beta).
        log_ratios: "mean" for nats per token, "sum" for nats.

    References:
        Azar et al. 2023, arXiv 2310.12036, Eq. 17; TRL's `ipo` is the mean.
    """

    beta: float = 0.1
    log_ratios: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        allowed = self.log_ratios in ("mean", "sum")
        require(self, "log_ratios", self.log_ratios, allowed, '"mean" or "sum"')

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        margin = pair_margin(self, policy, reference) / self.beta
        return (margin - 1 / (2 * self.beta)).square()

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        ratio = mean_log_ratio if self.log_ratios == "mean" else log_ratio
        return self.beta * ratio(policy, reference)


def pair_margin(objective: Pairwise, policy: Pair, reference: Pair | None) -> PerPair:
    """Reward of the chosen minus reward of the rejected response."""
    chosen, rejected = (None, None) if reference is None else reference
    return objective.rewards(policy.chosen, chosen) - objective.rewards(policy.rejected, rejected)


def smoothed_logistic(margin: PerPair, flipped: float) -> PerPair:
    """-log sigmoid of the margin, where a share `flipped` of the labels is the wrong way round."""
    return -(1 - flipped) * logsigmoid(margin) - flipped * logsigmoid(-margin)
