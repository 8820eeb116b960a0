"""Exploration: an objective that is optimistic about what the reference would not say."""

from dataclasses import dataclass, field

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

    References:
        Xie et al. 2024, arXiv 2405.21046, Algorithm 1 (as remembered; the paper decreases alpha
        over rounds, this keeps it).
    """

    objective: Objective = field(default_factory=DPO)
    alpha: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise UserError(f"XPO.alpha must be 0 (no bonus) or more, got {self.alpha}")

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
