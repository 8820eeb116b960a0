"""The rules that read rewards, and the one that reads nothing."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.selection.rule import Table
from prefloop.selection.variance import preference_variance, reward_gap
from prefloop.types import UserError


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
