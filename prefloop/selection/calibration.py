"""The scale of a reward, from votes: how many logits of a preference one unit of it is worth."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.types import UserError, ordered_pairs


class Scale(NamedTuple):
    """The scale of maximal likelihood.

    Attributes:
        value: multiplies the rewards.
        error: standard error, from the curvature.
        before, after: mean log-likelihood of a vote, nats, at scale 1 and at `value`.
        votes: ordered pairs.
    """

    value: float
    error: float
    before: float
    after: float
    votes: int


def calibrated_scale(rewards: Float[Tensor, "B N"], rank: Int[Tensor, "B N"]) -> Scale:
    """The s that makes held-out votes likeliest under Bradley-Terry with rewards s r.

        max over s of  sum over votes of log sigmoid(s (r_w - r_l))

    One concave problem in one number, by Newton steps. Every strictly ordered pair of a row is one
    vote; ties are none. A reward that was trained on these very votes gets too large a scale.

    Args:
        rewards: a number a response, NaN where there is none.
        rank: 1 = best, equal = not ordered, 0 = not judged.

    Raises:
        UserError: no vote, votes that the reward orders all (the scale is infinite) or on the
            whole the wrong way round (the best scale is 0 or negative).
    """
    row, chosen, rejected = ordered_pairs(rank)
    gap = (rewards[row, chosen] - rewards[row, rejected]).double()
    if not len(gap):
        raise UserError("the votes order no two responses; calibration needs votes with a winner")
    if not gap.isfinite().all():
        raise UserError("a response of the votes has no reward; score the votes with this reward")
    if gap.sum() <= 0:  # the slope at 0 is half of this sum, and the likelihood is concave
        raise UserError(
            f"the reward disagrees with the {len(gap)} votes: the winner's reward is on average "
            f"{float(gap.mean()):.3g} above the loser's, so no positive scale fits. Take another "
            "reward, or other votes"
        )
    if bool((gap >= 0).all()):
        raise UserError(
            f"the reward agrees with all {len(gap)} votes, so a larger scale is always likelier. "
            "Give more votes, and votes that the reward was not trained on"
        )
    value, error = _newton(gap)
    return Scale(
        value,
        error,
        before=float(logsigmoid(gap).mean()),
        after=float(logsigmoid(value * gap).mean()),
        votes=len(gap),
    )


def _newton(gap: Float[Tensor, " P"]) -> tuple[float, float]:
    """The maximiser and its standard error; steps are halved until the likelihood rises."""
    scale = 0.0
    while True:
        chance = torch.sigmoid(-scale * gap)  # of the loser
        slope = float((gap * chance).sum())
        curvature = float((gap.square() * chance * (1 - chance)).sum())
        step = slope / curvature
        if abs(step) <= 1e-9 * scale:
            return scale, curvature**-0.5
        best = logsigmoid(scale * gap).sum() - 1e-12 * len(gap)  # rounding does not stop it
        while logsigmoid((scale + step) * gap).sum() < best:
            step /= 2
        scale += step
