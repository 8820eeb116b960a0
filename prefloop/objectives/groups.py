"""Groups against groups: what a set of responses does, not what one of them says.

Of a ranked comparison, the responses of the best rank are the chosen group and all judged ones
below it are the rejected group. Not the multimodal method that is also called mDPO.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.objectives.checks import one_of, positive
from prefloop.objectives.family import Listwise, log_ratio, mean_log_ratio
from prefloop.types import Logps, PerComparison, PerResponse, UserError

__all__ = ["MDPO", "MIPO"]


@dataclass(frozen=True, kw_only=True)
class MDPO(Listwise):
    """Multi-sample DPO: DPO on the mean log-ratio of each group.

        loss = -log sigmoid( beta (H_w - H_l) ),   H = mean over the group of log pi/pi_ref, summed

    The likelihood of a group is the geometric mean of its members'. One response a group is DPO.
    Biased for the population's value when groups are small.

    When:
        what is judged is a set of answers: diversity, bias, consistency

    Attributes:
        beta: strength of the KL constraint, per nat.

    References:
        Wang et al. 2024, arXiv 2410.12138 (equation as remembered, consistent with its reviews).
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")

    def __call__(
        self, policy: Logps, reference: Logps | None, rank: Int[Tensor, "B N"]
    ) -> PerComparison:
        rewards = self.rewards(policy, reference)
        chosen, rejected = groups(rank)
        return -logsigmoid(group_mean(rewards, chosen) - group_mean(rewards, rejected))

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class MIPO(Listwise):
    """Multi-sample IPO: regression of the difference of the groups' mean log-ratios.

        loss = (H_w - H_l - 1 / (2 beta))^2   [ - s_w^2 / k_w - s_l^2 / k_l ]

    The bracket is `unbiased`: sample variances over group sizes make the square an unbiased
    estimate for independent members (derived here; the paper has an unbiased estimator too). One
    response a group is IPO, whose sum-or-mean question this inherits.

    When:
        as MDPO, with labels that nearly always agree

    Attributes:
        beta: the paper's tau, per nat; the target difference is 1 / (2 beta).
        log_ratios: "mean" for nats per token, "sum" for nats.
        unbiased: subtract the variances; every group then needs two responses or more.

    References:
        Wang et al. 2024, arXiv 2410.12138 (equation as remembered, consistent with its reviews).
    """

    beta: float = 0.1
    log_ratios: Literal["mean", "sum"] = "mean"
    unbiased: bool = False

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        one_of(self, "log_ratios", self.log_ratios, "mean", "sum")

    def __call__(
        self, policy: Logps, reference: Logps | None, rank: Int[Tensor, "B N"]
    ) -> PerComparison:
        ratios = self.rewards(policy, reference) / self.beta
        chosen, rejected = groups(rank)
        gap = group_mean(ratios, chosen) - group_mean(ratios, rejected)
        loss = (gap - 1 / (2 * self.beta)).square()
        if not self.unbiased:
            return loss
        return loss - mean_variance(ratios, chosen) - mean_variance(ratios, rejected)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        ratio = mean_log_ratio if self.log_ratios == "mean" else log_ratio
        return self.beta * ratio(policy, reference)


def groups(rank: Int[Tensor, "B N"]) -> tuple[Bool[Tensor, "B N"], Bool[Tensor, "B N"]]:
    """The responses of the best rank, and the judged ones below it."""
    judged = rank > 0
    best = rank.masked_fill(~judged, int(rank.max()) + 1).amin(-1, keepdim=True)
    return judged & (rank == best), judged & (rank > best)


def group_mean(values: PerResponse, group: Bool[Tensor, "B N"]) -> PerComparison:
    """Mean over the members of each comparison's group."""
    return torch.where(group, values, 0.0).sum(-1) / group.sum(-1).clamp(min=1)


def mean_variance(values: PerResponse, group: Bool[Tensor, "B N"]) -> PerComparison:
    """Sample variance of a group over its size: the variance of its mean."""
    count = group.sum(-1)
    if (small := (count < 2).nonzero().flatten()).numel():
        raise UserError(
            "MIPO(unbiased=True) needs two responses or more in each group; comparisons "
            f"{small[:5].tolist()} of the batch have a group of one. Set unbiased=False, or drop "
            "them."
        )
    apart = torch.where(group, values - group_mean(values, group).unsqueeze(-1), 0.0)
    return apart.square().sum(-1) / ((count - 1) * count)
