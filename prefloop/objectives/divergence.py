"""f-divergences: DPO's constraint with another divergence than reverse KL.

The implicit reward becomes beta f'(pi / pi_ref). Exponents are held at 40, so that a loss stays
finite in float32 where a response has all but vanished; there is no gradient beyond.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.objectives.anchored import DiscoPOP, EXOPair
from prefloop.objectives.checks import require
from prefloop.objectives.family import PairObjective, Wrapped, log_ratio
from prefloop.objectives.pairwise import DPO, IPO, Hinge, LengthNormalizedDPO
from prefloop.objectives.references import with_sum
from prefloop.objectives.robust import RobustDPO
from prefloop.types import Logps, Pair, PerPair, UserError

__all__ = ["AlphaDivergence", "FDivergence", "ForwardKL", "JensenShannon", "ReverseKL"]

LARGEST_EXPONENT = 40.0


@dataclass(frozen=True, kw_only=True)
class ReverseKL:
    """KL(pi || pi_ref): f'(t) = log t, up to a constant. DPO's own."""

    def __call__(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return ratio


@dataclass(frozen=True, kw_only=True)
class ForwardKL:
    """KL(pi_ref || pi): f'(t) = 1 - 1/t, up to a constant."""

    def __call__(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return -torch.expm1((-ratio).clamp(max=LARGEST_EXPONENT))


@dataclass(frozen=True, kw_only=True)
class JensenShannon:
    """Jensen-Shannon divergence: f'(t) = log(2 t / (1 + t))."""

    def __call__(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return math.log(2) + logsigmoid(ratio)


@dataclass(frozen=True, kw_only=True)
class AlphaDivergence:
    """alpha-divergence: f'(t) = (t^(alpha - 1) - 1) / (alpha - 1).

    Attributes:
        alpha: 1 is reverse KL (the limit), 0 is forward KL.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        require(self, "alpha", self.alpha, math.isfinite(self.alpha), "finite (usual: 0 to 1)")

    def __call__(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        power = self.alpha - 1
        if abs(power) < 1e-6:
            return ratio
        return torch.expm1((power * ratio).clamp(max=LARGEST_EXPONENT)) / power


@runtime_checkable
class Divergence(Protocol):
    """f' of an f-divergence, as a function of log pi/pi_ref."""

    def __call__(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]: ...


DIVERGENCES = (ReverseKL, ForwardKL, JensenShannon, AlphaDivergence)
BY_RATIO = (DPO, Hinge, IPO, RobustDPO, EXOPair, DiscoPOP, LengthNormalizedDPO)


@dataclass(frozen=True, kw_only=True)
class FDivergence(Wrapped):
    """A pairwise objective with another divergence to the reference.

        h is replaced by f'(pi(y|x) / pi_ref(y|x)) in the equation of the objective inside

    Only for objectives that read the policy through h alone: DPO, Hinge, IPO, RobustDPO, EXOPair,
    DiscoPOP, LengthNormalizedDPO. Constants of f' that cancel in a difference are left out.

    When:
        reverse KL loses diversity (ForwardKL, JensenShannon), at some cost in reward

    Attributes:
        objective: the objective inside.
        divergence: ReverseKL(), ForwardKL(), JensenShannon() or AlphaDivergence(alpha=...).

    References:
        Wang et al. 2023 (f-DPO), arXiv 2309.16240; TRL's `f_divergence_type`.
    """

    objective: PairObjective = field(default_factory=DPO)
    divergence: Divergence = field(default_factory=JensenShannon)

    def __post_init__(self) -> None:
        inside, divergence = type(self.objective), type(self.divergence)
        if inside not in BY_RATIO or divergence not in DIVERGENCES:
            raise UserError(
                f"FDivergence of {inside.__name__} with {divergence.__name__} is not defined; "
                f"objectives: {', '.join(c.__name__ for c in BY_RATIO)}; divergences: "
                f"{', '.join(c.__name__ for c in DIVERGENCES)}"
            )

    @property
    def inner(self) -> PairObjective:
        return self.objective

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        chosen, rejected = (None, None) if reference is None else reference
        linked = Pair(self._linked(policy.chosen, chosen), self._linked(policy.rejected, rejected))
        none = Pair(*(with_sum(side, torch.zeros_like(side.sum)) for side in policy))
        return self.objective(linked, none)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        linked = self._linked(policy, reference)
        return self.objective.rewards(linked, with_sum(policy, torch.zeros_like(policy.sum)))

    def _linked(self, policy: Logps, reference: Logps | None) -> Logps:
        return with_sum(policy, self.divergence(log_ratio(policy, reference)))
