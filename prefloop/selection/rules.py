"""The rules that read rewards alone, and the one that reads nothing."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.selection.rule import ROWS, Rule, Table
from prefloop.selection.variance import reward_gap, variance_and_error
from prefloop.types import UserError


@dataclass(frozen=True, kw_only=True)
class PVar(Rule):
    """Preference variance of the reward (offline form).

    Attributes:
        scale: multiplies the rewards; 1 is the paper's. `calibrated_scale` fits it to votes.
    """

    scale: float = 1.0
    columns: ClassVar[tuple[str, ...]] = ("scores",)
    measures: ClassVar[tuple[str, ...]] = ("pvar", "pvar_se")

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise UserError(f"PVar.scale must be positive and finite, got {self.scale}")

    def measure(self, table: Table) -> Float[Tensor, "P C"]:
        rewards = table["scores"]
        found = variance_and_error(rewards, ~rewards.isnan(), self.scale)
        return torch.stack(found, dim=-1)


@dataclass(frozen=True, kw_only=True)
class RewardGap(Rule):
    """Largest minus smallest reward; blind to how the others lie between."""

    columns: ClassVar[tuple[str, ...]] = ("scores",)
    measures: ClassVar[tuple[str, ...]] = ("reward_gap",)

    def measure(self, table: Table) -> Float[Tensor, "P C"]:
        rewards = table["scores"]
        return reward_gap(rewards, ~rewards.isnan()).unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class Random(Rule):
    """A random number a prompt: the baseline of every rule.

    Attributes:
        seed: another seed draws other prompts.
    """

    seed: int = 0
    columns: ClassVar[tuple[str, ...]] = (ROWS,)
    measures: ClassVar[tuple[str, ...]] = ()

    def measure(self, table: Table) -> Float[Tensor, "P C"]:
        return torch.zeros(len(next(iter(table.values()))), 0, dtype=torch.float64)

    def scores(self, measured: Float[Tensor, "P C"]) -> Float[Tensor, " P"]:
        rng = torch.Generator().manual_seed(self.seed)
        return torch.rand(len(measured), generator=rng, dtype=torch.float64)
