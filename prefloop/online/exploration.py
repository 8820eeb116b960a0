"""Exploration: an objective that is optimistic about what the reference would not say."""

from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from prefloop.objectives import DPO, Objective
from prefloop.types import Judgement, Logps, PerComparison, UserError


@dataclass(frozen=True, kw_only=True)
class XPO:
    """Exploratory preference optimization: an objective with a bonus for exploring.

        loss = l(y_w, y_l) + alpha log pi(y_0),   y_0 drawn from the reference

    Lowering the likelihood of what the reference says moves mass to where nothing was tried yet.
    y_0 is the first response of each comparison, so draw with `Hybrid()`: it puts the reference's
    answer first. Logged rewards are those of the objective inside.

    Attributes:
        objective: l, DPO in the paper.
        alpha: strength of the bonus, per nat; 0 is the objective alone.
        rounds: round in which alpha has fallen to 0, linearly from the first: 3 gives alpha,
            alpha / 2, 0. Where this is 0, every round has alpha.

    References:
        Xie et al. 2024, arXiv 2405.21046, Algorithm 1 has one alpha; their runs of three rounds
        had 1e-5, 5e-6 and 0 (both as remembered). That it falls linearly over other numbers of
        rounds is ours.
    """

    objective: Objective = field(default_factory=DPO)
    alpha: float = 1e-5
    rounds: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise UserError(f"XPO.alpha must be 0 (no bonus) or more, got {self.alpha}")
        if self.rounds < 0 or self.rounds == 1:
            raise UserError(
                f"XPO.rounds is the round in which alpha is 0, 2 or later, or 0 for an alpha that "
                f"stays; got {self.rounds}"
            )

    def in_round(self, number: int) -> "XPO":
        """The objective of round `number`, the first being 1."""
        if not self.rounds:
            return self
        left = max(0.0, 1 - (number - 1) / (self.rounds - 1))
        return replace(self, alpha=self.alpha * left, rounds=0)

    @property
    def needs_reference(self) -> bool:
        """As the objective inside."""
        return self.objective.needs_reference

    @property
    def couples_batch(self) -> bool:
        """As the objective inside."""
        return self.objective.couples_batch

    @property
    def uses_ties(self) -> bool:
        """As the objective inside."""
        return self.objective.uses_ties

    @property
    def needs_collision(self) -> bool:
        """As the objective inside."""
        return self.objective.needs_collision

    @property
    def data(self) -> tuple[str, ...]:
        """As the objective inside."""
        return self.objective.data

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        """Implicit rewards of the objective inside."""
        return self.objective.rewards(policy, reference)

    def per_comparison(
        self, policy: Logps, reference: Logps | None, judgement: Judgement
    ) -> PerComparison:
        """The loss of each comparison, bonus included."""
        inner = self.objective.per_comparison(policy, reference, judgement)
        return inner + self.alpha * policy.sum[:, 0]


def in_round(objective: Objective, number: int) -> Any:
    """What is minimised in round `number`: the objective itself, unless its strength changes."""
    return objective.in_round(number) if isinstance(objective, XPO) else objective
