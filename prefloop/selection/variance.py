"""Preference variance and reward gap: what the rewards of a prompt say about a label's worth."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prefloop.types import UserError


def preference_variance(
    rewards: Float[Tensor, "*P N"],
    mask: Bool[Tensor, "*P N"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "*P"]:
    """Variance of the predicted preference between two responses to the same prompt (PVar).

        PVar[x] = 1 / (n (n - 1)) * sum over i != j of (sigmoid(scale (r_i - r_j)) - 1/2)^2

    In [0, 1/4]; 0 exactly when all rewards are equal. A U-statistic, unbiased for every n >= 2:
    the diagonal is left out. Unchanged by a constant added to a prompt's rewards, by their order
    and by their sign; not by their scale. With `rewards` = beta log pi/pi_ref it is the online
    form, which is 0 for every prompt while the policy equals its reference.

    Args:
        rewards: reward of each of N responses, any units (the logit of a preference).
        mask: which responses exist; all of them when None. Every prompt needs two.
        scale: multiplies the rewards; 1 is the paper's.

    Raises:
        UserError: a prompt with fewer than two responses, or a reward that is not finite.

    References:
        "On the Role of Preference Variance in Preference Optimization", arXiv 2510.13022, Sec. 4
        (as reported; the U-statistic reading is derived).
    """
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    of_response = _deviation_of_each(rewards, mask, scale)
    return of_response.sum(-1) / mask.sum(-1)


def variance_and_error(
    rewards: Float[Tensor, "*P N"],
    mask: Bool[Tensor, "*P N"] | None = None,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "*P"], Float[Tensor, "*P"]]:
    """`preference_variance` and its standard error from n responses, by the jackknife.

        se^2 = 4 (n - 1) / (n (n - 2)^2) * sum_i (h_i - PVar)^2
        h_i  = 1 / (n - 1) * sum over j != i of (sigmoid(scale (r_i - r_j)) - 1/2)^2

    The error is that of having drawn n responses and not more; a wrong reward is not in it. Leaving
    out one of two responses leaves no pair, so it is NaN for n = 2. Derived: the jackknife of a
    U-statistic of order two; on average it is a little too large.
    """
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    of_response = _deviation_of_each(rewards, mask, scale)
    count = mask.sum(-1)
    variance = of_response.sum(-1) / count
    spread = torch.where(mask, of_response - variance.unsqueeze(-1), 0.0).square().sum(-1)
    factor = 4 * (count - 1) / (count * (count - 2).square().to(rewards.dtype))
    return variance, torch.where(count > 2, (factor * spread).sqrt(), torch.nan)


def reward_gap(
    rewards: Float[Tensor, "*P N"], mask: Bool[Tensor, "*P N"] | None = None
) -> Float[Tensor, "*P"]:
    """Largest minus smallest reward of each prompt, in the units of the reward.

    The paper names a "reward gap" baseline without its formula; max - min is our choice.
    """
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    _refuse_bad_rewards(rewards, mask)
    highest = rewards.masked_fill(~mask, -torch.inf).amax(-1)
    lowest = rewards.masked_fill(~mask, torch.inf).amin(-1)
    return highest - lowest


def _deviation_of_each(
    rewards: Float[Tensor, "*P N"], mask: Bool[Tensor, "*P N"], scale: float
) -> Float[Tensor, "*P N"]:
    """Mean over the other responses of (sigmoid(scale (r_i - r_j)) - 1/2)^2; 0 where none is.

    Each pair is looked at once, one response against all behind it, with the responses in front:
    no table of N x N numbers a prompt is made, and memory is read in long lines.
    """
    _refuse_bad_rewards(rewards, mask)
    half = (torch.where(mask, rewards, 0.0) * (scale / 2)).movedim(-1, 0).contiguous()
    exists = None if mask.all() else mask.movedim(-1, 0)
    sums = torch.zeros_like(half)
    for first in range(len(half) - 1):
        # (sigmoid(2 gap) - 1/2)^2, exact for the smallest gaps
        square = (0.5 * torch.tanh(half[first + 1 :] - half[first])).square()
        if exists is not None:
            square = square * (exists[first + 1 :] & exists[first])
        sums[first + 1 :] += square
        sums[first] += square.sum(0)
    return sums.movedim(0, -1) / (mask.sum(-1, keepdim=True) - 1)


def _refuse_bad_rewards(rewards: Tensor, mask: Tensor) -> None:
    if (short := (mask.sum(-1) < 2).flatten().nonzero().flatten()).numel():
        raise UserError(
            f"a prompt needs two responses to be compared; prompts {short[:5].tolist()} have "
            "fewer. Sample more answers, or drop these prompts."
        )
    bad = (~rewards.isfinite() & mask).any(-1).flatten().nonzero().flatten()
    if bad.numel():
        raise UserError(
            f"rewards must be finite; prompts {bad[:5].tolist()} have a reward that is NaN or "
            "infinite. Mend the reward, or drop these prompts."
        )
