"""Solvers: how a preference loss and an SFT loss become one direction.

To add one: a frozen dataclass whose `__call__` turns a `Bilevel` problem into a `Step`.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.stable.bilevel import Bilevel, Losses, Params, dot, plus
from prefloop.types import UserError


class Step(NamedTuple):
    """What a solver answers.

    Attributes:
        gradient: direction to descend, for each parameter.
        losses: both losses before the step.
        weight: how much the gradient of the SFT loss counted.
    """

    gradient: Params
    losses: Losses
    weight: Float[Tensor, "*G"]


@runtime_checkable
class Solver(Protocol):
    """How the two losses become one direction."""

    def __call__(self, problem: Bilevel, params: Params) -> Step: ...


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """Constant pull towards the SFT optimum.

        gradient of  L_pref + lam (L_SFT - v*)

    The gradient of a preference loss plus lam times SFT; with lam = 0 the preference loss alone,
    bit for bit. Agrees with what is known of the paper's second version.

    Attributes:
        lam: weight of the SFT loss; >= 0.
    """

    lam: float = 0.2

    def __post_init__(self) -> None:
        _refuse_negative(self, "lam", self.lam)

    def loss(self, excess: Float[Tensor, "*G"]) -> Float[Tensor, "*G"]:
        """The term that is added to the preference loss."""
        return self.lam * excess

    def weight(self, excess: Float[Tensor, "*G"]) -> Float[Tensor, "*G"]:
        """Its derivative in the SFT loss."""
        return torch.full_like(excess, self.lam)

    def __call__(self, problem: Bilevel, params: Params) -> Step:
        gradient, losses = problem.gradient(params, 1.0, self.lam)
        return Step(gradient, losses, self.weight(losses.excess))


@dataclass(frozen=True, kw_only=True)
class Hinge:
    """Pull back only outside the safe region: the default.

        gradient of  L_pref + lam relu(L_SFT - v* - eps)

    Inside the region it is the gradient of the preference loss. A small lam lets the policy leave
    and never return; in the toy lam >= 0.1 holds it. The hinge is ours, the penalty on the optimal
    value agrees with the paper's second version.

    Attributes:
        lam: weight of the SFT loss outside the region; >= 0.
        eps: width of the region, in nats a response; >= 0.
    """

    lam: float = 1.0
    eps: float = 0.0

    def __post_init__(self) -> None:
        _refuse_negative(self, "lam", self.lam)
        _refuse_negative(self, "eps", self.eps)

    def loss(self, excess: Float[Tensor, "*G"]) -> Float[Tensor, "*G"]:
        """The term that is added to the preference loss."""
        return self.lam * (excess - self.eps).relu()

    def weight(self, excess: Float[Tensor, "*G"]) -> Float[Tensor, "*G"]:
        """Its derivative in the SFT loss: lam outside the region, 0 inside and on its border."""
        return self.lam * (excess > self.eps).to(excess.dtype)

    def __call__(self, problem: Bilevel, params: Params) -> Step:
        weight = self.weight(problem.losses(params).excess)
        gradient, losses = problem.gradient(params, 1.0, weight)
        return Step(gradient, losses, weight)


@runtime_checkable
class HessianProduct(Protocol):
    """Second derivative of the lower loss times a vector."""

    def __call__(self, problem: Bilevel, params: Params, vector: Params) -> Params: ...


@dataclass(frozen=True)
class ExactProduct:
    """By differentiating twice; the model must allow it (`head=exact`)."""

    def __call__(self, problem: Bilevel, params: Params, vector: Params) -> Params:
        return problem.lower_hessian_product(params, vector)


@dataclass(frozen=True, kw_only=True)
class DifferenceProduct:
    """By a central difference of gradients, for models with fused parts.

        H v = [grad L_SFT(theta + r v) - grad L_SFT(theta - r v)] / (2 r),   r = radius / |v|

    Attributes:
        radius: length of the step to each side, in the units of the parameters.
    """

    radius: float = 1e-2

    def __call__(self, problem: Bilevel, params: Params, vector: Params) -> Params:
        lead = problem.losses(params).lower
        length = dot(vector, vector, lead).sqrt()
        reach = torch.where(length > 0, self.radius / length, 0.0)
        ahead, _ = problem.gradient(plus(params, reach, vector), 0.0, 1.0)
        behind, _ = problem.gradient(plus(params, -reach, vector), 0.0, 1.0)
        scale = torch.where(length > 0, 0.5 / reach, 0.0)
        zero = {name: torch.zeros_like(value) for name, value in params.items()}
        return plus(plus(zero, scale, ahead), -scale, behind)


@dataclass(frozen=True, kw_only=True)
class OneStep:
    """The preference loss after one SFT step, differentiated through that step.

        phi = theta - step grad L_SFT(theta)
        gradient = (I - step H_SFT(theta)) grad L_pref(phi)  [+ that of the penalty at theta]

    On its own it does not prevent the collapse of the toy: it needs the penalty. Its form agrees
    with the "single-step gradient updates" reported of the paper's first version.

    Attributes:
        step: length of the SFT step, as a learning rate; >= 0.
        penalty: pull at theta; none when None.
        product: how H_SFT is multiplied with a vector.
    """

    step: float = 0.1
    penalty: Penalty | Hinge | None = None
    product: HessianProduct = field(default_factory=ExactProduct)

    def __post_init__(self) -> None:
        _refuse_negative(self, "step", self.step)

    def __call__(self, problem: Bilevel, params: Params) -> Step:
        upper, lower, losses = _look_ahead(problem, params, self.step)
        curved = self.product(problem, params, upper)
        return _pulled(plus(upper, -self.step, curved), lower, losses, self.penalty)


@dataclass(frozen=True, kw_only=True)
class OneStepFirstOrder:
    """`OneStep` without the second derivative: the preference gradient at phi, applied at theta.

    Our choice, for models whose second derivative is too dear.

    Attributes:
        step: length of the SFT step, as a learning rate; >= 0.
        penalty: pull at theta; none when None.
    """

    step: float = 0.1
    penalty: Penalty | Hinge | None = None

    def __post_init__(self) -> None:
        _refuse_negative(self, "step", self.step)

    def __call__(self, problem: Bilevel, params: Params) -> Step:
        upper, lower, losses = _look_ahead(problem, params, self.step)
        return _pulled(upper, lower, losses, self.penalty)


@dataclass(frozen=True, kw_only=True)
class Alternating:
    """k SFT steps, then one preference step, as one direction.

        theta_{j+1} = theta_j - step grad L_SFT(theta_j),   j = 0 .. k-1
        gradient = sum_j grad L_SFT(theta_j) + grad L_pref(theta_k)

    Descending it at learning rate `step` without momentum is exactly k SFT steps and one preference
    step; under another optimizer it is the same mixture of gradients. Our choice.

    Attributes:
        steps: k, SFT steps before each preference step; >= 1.
        step: length of an SFT step: the learning rate of plain gradient descent.
    """

    steps: int = 1
    step: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"Alternating.steps must be 1 or more, got {self.steps}")
        _refuse_negative(self, "step", self.step)

    def __call__(self, problem: Bilevel, params: Params) -> Step:
        lower, losses = problem.gradient(params, 0.0, 1.0)
        total, point = lower, plus(params, -self.step, lower)
        for _ in range(self.steps - 1):
            lower, _ = problem.gradient(point, 0.0, 1.0)
            total, point = plus(total, 1.0, lower), plus(point, -self.step, lower)
        upper, _ = problem.gradient(point, 1.0, 0.0)
        weight = torch.full_like(losses.lower, float(self.steps))
        return Step(plus(total, 1.0, upper), losses, weight)


@dataclass(frozen=True)
class Adaptive:
    """The smallest pull that keeps the SFT loss from rising, to first order.

        lam = relu(-<g_SFT, g_pref>) / |g_SFT|^2,   gradient = g_pref + lam g_SFT

    For one pair under DPO that is beta sigmoid(-m) relu(<g_w, g_l> / |g_w|^2 - 1), g the gradients
    of log pi(y_w) and log pi(y_l). Derived by us; it has nothing to tune.
    """

    def __call__(self, problem: Bilevel, params: Params) -> Step:
        upper, losses = problem.gradient(params, 1.0, 0.0)
        lower, _ = problem.gradient(params, 0.0, 1.0)
        length = dot(lower, lower, losses.lower)
        opposed = (-dot(lower, upper, losses.lower)).relu()
        weight = torch.where(length > 0, opposed / length, 0.0)
        return Step(plus(upper, weight, lower), losses, weight)


def _look_ahead(problem: Bilevel, params: Params, step: float) -> tuple[Params, Params, Losses]:
    """Gradient of the upper loss after one SFT step, of the lower loss before it, the losses."""
    lower, losses = problem.gradient(params, 0.0, 1.0)
    upper, _ = problem.gradient(plus(params, -step, lower), 1.0, 0.0)
    return upper, lower, losses


def _pulled(
    gradient: Params, lower: Params, losses: Losses, penalty: Penalty | Hinge | None
) -> Step:
    """The direction with the penalty's pull along the lower gradient."""
    if penalty is None:
        return Step(gradient, losses, torch.zeros_like(losses.lower))
    weight = penalty.weight(losses.excess)
    return Step(plus(gradient, weight, lower), losses, weight)


def _refuse_negative(owner: object, name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise UserError(f"{type(owner).__name__}.{name} must be 0 or more and finite, got {value}")
