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
    _refuse_bad_rewards(rewards, mask)
    count = mask.sum(-1)
    gap = scale * (rewards.unsqueeze(-1) - rewards.unsqueeze(-2))
    deviation = 0.5 * torch.tanh(gap / 2)  # sigmoid(gap) - 1/2, exactly 0 on the diagonal
    both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    squares = torch.where(both, deviation.square(), 0.0)
    return squares.sum((-1, -2)) / (count * (count - 1))


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
