"""What a reward model is trained to minimise, of rewards r and of how somebody ranked them.

They read as objectives do, so that the one trainer trains them: the "policy" is a scorer whose
`Logps.sum` is the reward. There is no reference.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from prefloop.errors import UserError
from prefloop.objectives.checks import refuse_unordered
from prefloop.objectives.family import mean_by_row
from prefloop.types import Judgement, Logps, PerComparison, PerResponse, ordered_pairs


class RewardLoss(ABC):
    """A loss of rewards, in the form of an objective."""

    needs_reference = False
    couples_batch = False
    uses_ties = False
    needs_collision = False
    data = ("rank",)

    @abstractmethod
    def of_rewards(self, rewards: PerResponse, judgement: Judgement) -> PerComparison:
        """The loss of rewards (B, N)."""

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        """The reward of each response."""
        return policy.sum

    def per_comparison(
        self, policy: Logps, reference: Logps | None, judgement: Judgement
    ) -> PerComparison:
        """The loss of each comparison, of the rewards that stand in `policy.sum`."""
        return self.of_rewards(policy.sum, judgement)


@dataclass(frozen=True, kw_only=True)
class BradleyTerry(RewardLoss):
    """A better response wins against a worse one with probability sigmoid(r_i - r_j).

        loss = mean over ordered pairs i > j of
               (1 - eps) softplus(m - d) + eps softplus(m + d) + centre (r_i + r_j)^2
           d = r_i - r_j,   m = margin + score_margin (s_i - s_j)

    softplus(m - d) = -log sigmoid(d - m): the better response shall lead by m. A flipped label
    would ask for the same lead the other way, hence m + d.

    Attributes:
        margin: lead that is asked of every pair, in nats, 0 or more.
        score_margin: lead a unit of difference between the row's own `scores`, 0 or more; rows
            without scores have none.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).
        centre: pulls the rewards of a pair to a sum of 0, which the likelihood leaves open.

    References:
        Bradley and Terry 1952. Margin: Touvron et al. 2023, arXiv:2307.09288, Eq. 2. Centring:
        Eisenstein et al. 2023, arXiv:2312.09244, as TRL's RewardTrainer writes it.
    """

    margin: float = 0.0
    score_margin: float = 0.0
    label_smoothing: float = 0.0
    centre: float = 0.0

    def __post_init__(self) -> None:
        for name in ("margin", "score_margin", "centre"):
            _refuse_negative(self, name, getattr(self, name))
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                "BradleyTerry.label_smoothing must be in [0, 0.5), got "
                f"{self.label_smoothing}; it is the share of labels that are thought to be flipped"
            )

    def of_rewards(self, rewards: PerResponse, judgement: Judgement) -> PerComparison:
        """Mean loss over the strictly ordered pairs of each comparison."""
        row, better, worse = ordered_pairs(judgement.rank)
        refuse_unordered(row.bincount(minlength=len(rewards)) > 0)
        high, low = rewards[row, better], rewards[row, worse]
        gap = (judgement.scores[row, better] - judgement.scores[row, worse]).nan_to_num(nan=0.0)
        margin = self.margin + self.score_margin * gap.to(rewards.dtype)
        told = softplus(margin - (high - low))
        flipped = softplus(margin + (high - low))
        losses = (1 - self.label_smoothing) * told + self.label_smoothing * flipped
        return mean_by_row(losses + self.centre * (high + low).square(), row, len(rewards))


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(RewardLoss):
    """The ranking as a whole: a response is drawn from those that remain with softmax(r).

        loss = sum over judged i of log(1 + sum over j worse than i of exp(m + r_j - r_i))
               + centre (mean over judged i of r_i)^2

    Two responses give Bradley-Terry without its smoothing (and, centring apart, the same numbers).

    Attributes:
        margin: lead that is asked of a response over each worse one, in nats, 0 or more.
        centre: pulls the mean reward of a row to 0, which the likelihood leaves open.

    References:
        Plackett 1975; Luce 1959.
    """

    margin: float = 0.0
    centre: float = 0.0

    def __post_init__(self) -> None:
        for name in ("margin", "centre"):
            _refuse_negative(self, name, getattr(self, name))

    def of_rewards(self, rewards: PerResponse, judgement: Judgement) -> PerComparison:
        """The loss of rewards (B, N)."""
        rank = judgement.rank
        judged = rank > 0
        worse = (rank.unsqueeze(-1) < rank.unsqueeze(-2)) & judged.unsqueeze(-1)
        refuse_unordered(worse.any((-1, -2)))
        itself = torch.eye(rank.shape[-1], dtype=torch.bool, device=rank.device)
        lead = self.margin + rewards.unsqueeze(-2) - rewards.unsqueeze(-1)  # (B, i, j): of j on i
        lead = lead.masked_fill(itself, 0.0)  # the 1 of the sum, so that none is ever empty
        terms = lead.masked_fill(~(worse | itself), -math.inf).logsumexp(-1)
        mean = (rewards * judged).sum(-1) / judged.sum(-1)
        return terms.sum(-1) + self.centre * mean.square()


LOSSES: tuple[type, ...] = (BradleyTerry, PlackettLuce)
"""What the command line reads."""

Loss = BradleyTerry | PlackettLuce


def _refuse_negative(owner: object, name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UserError(f"{type(owner).__name__}.{name} must be 0 or more and finite, got {value}")
