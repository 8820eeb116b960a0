"""Which prompts deserve a label: a score per prompt first, then one rule that keeps some.

A rule is a frozen dataclass: its fields are its hyper-parameters, `columns` names what it reads of
each response, and a call gives one score a prompt; higher means more worth a label. To add a rule:
write the class, name it in `RULES`, add a row to `CASES` in `tests/test_selection.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
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


Table = Mapping[str, Float[Tensor, "P N"]]
"""Columns of P prompts, a number a response; NaN pads a prompt that has fewer responses."""


@runtime_checkable
class Rule(Protocol):
    """A score for each prompt."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What the rule reads of each response."""
        ...

    def __call__(self, table: Table) -> Float[Tensor, " P"]: ...


@dataclass(frozen=True, kw_only=True)
class PVar:
    """Preference variance of the reward (offline form).

    Attributes:
        scale: multiplies the rewards; 1 is the paper's.
    """

    scale: float = 1.0
    columns: ClassVar[tuple[str, ...]] = ("scores",)

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise UserError(f"PVar.scale must be positive and finite, got {self.scale}")

    def __call__(self, table: Table) -> Float[Tensor, " P"]:
        rewards = table["scores"]
        return preference_variance(rewards, ~rewards.isnan(), self.scale)


@dataclass(frozen=True, kw_only=True)
class OnlinePVar:
    """Preference variance of the implicit reward; 0 for every prompt while policy = reference.

    Attributes:
        beta: of the implicit reward beta log pi/pi_ref, per nat.
    """

    beta: float = 0.1
    columns: ClassVar[tuple[str, ...]] = ("policy_logps", "reference_logps")

    def __call__(self, table: Table) -> Float[Tensor, " P"]:
        rewards = self.beta * (table["policy_logps"] - table["reference_logps"])
        return preference_variance(rewards, ~rewards.isnan())


@dataclass(frozen=True, kw_only=True)
class RewardGap:
    """Largest minus smallest reward; blind to how the others lie between."""

    columns: ClassVar[tuple[str, ...]] = ("scores",)

    def __call__(self, table: Table) -> Float[Tensor, " P"]:
        rewards = table["scores"]
        return reward_gap(rewards, ~rewards.isnan())


@dataclass(frozen=True, kw_only=True)
class Random:
    """A random number a prompt: the baseline of every rule.

    Attributes:
        seed: another seed draws other prompts.
    """

    seed: int = 0
    columns: ClassVar[tuple[str, ...]] = ("scores",)

    def __call__(self, table: Table) -> Float[Tensor, " P"]:
        rng = torch.Generator().manual_seed(self.seed)
        return torch.rand(len(table["scores"]), generator=rng, dtype=torch.float64)


RULES: tuple[type, ...] = (PVar, OnlinePVar, RewardGap, Random)
"""Every rule, for the command line and the test table."""


def top(scores: Float[Tensor, " P"], count: int) -> Int[Tensor, " C"]:
    """Indices of the `count` highest scores, in data order; of equal scores the earlier is kept."""
    _refuse_bad_scores(scores, count)
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def bottom(scores: Float[Tensor, " P"], count: int) -> Int[Tensor, " C"]:
    """Indices of the `count` lowest scores, in data order; of equal scores the later is kept.

    Ties go the other way than in `top`, so that the top and the bottom half never overlap.
    """
    _refuse_bad_scores(scores, count)
    order = scores.argsort(descending=True, stable=True)
    return order[len(order) - count :].sort().values


def above(scores: Float[Tensor, " P"], threshold: float) -> Int[Tensor, " C"]:
    """Indices of the scores of at least `threshold`, in data order."""
    _refuse_bad_scores(scores, 0)
    return (scores >= threshold).nonzero().flatten()


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


def _refuse_bad_scores(scores: Tensor, count: int) -> None:
    if scores.isnan().any():
        raise UserError(f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN")
    if not 0 <= count <= len(scores):
        raise UserError(f"cannot keep {count} of {len(scores)} prompts")
