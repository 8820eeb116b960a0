"""Two losses of the same parameters, as sums over the parts of a batch, and their derivatives.

Nothing here knows a model: a piece is a function from a dictionary of parameters to both losses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from prefloop.types import UserError

Params = dict[str, Tensor]


class Losses(NamedTuple):
    """Both levels at one point; a batch of G independent problems has a number for each.

    Attributes:
        upper: preference loss.
        lower: SFT loss, in nats.
        value: v*, the lowest that the SFT loss can be, in nats; no gradient.
    """

    upper: Float[Tensor, "*G"]
    lower: Float[Tensor, "*G"]
    value: Float[Tensor, "*G"]

    @property
    def excess(self) -> Float[Tensor, "*G"]:
        """lower - value: how far above its best the SFT loss is, in nats."""
        return self.lower - self.value


LossOf = Callable[[Params], Losses]


@dataclass(frozen=True)
class Bilevel:
    """The two losses of one batch as sums over pieces, and their derivatives.

    Parameters share the leading axes G of the losses when many independent problems are solved at
    once. Each derivative evaluates every piece anew, so a piece should have no dropout.

    Attributes:
        pieces: losses of the parts of a batch (forward passes), already divided by its size.
        reduce: adds up over processes; nothing to do for one.
    """

    pieces: Sequence[LossOf]
    reduce: Callable[[Tensor], Tensor] = lambda total: total

    @torch.no_grad()
    def losses(self, params: Params) -> Losses:
        """Both losses of the whole batch."""
        return self._sum([piece(params) for piece in self.pieces])

    def gradient(
        self, params: Params, upper: float, lower: float | Float[Tensor, "*G"]
    ) -> tuple[Params, Losses]:
        """Gradient of upper * (upper loss) + lower * (lower loss), and both losses."""
        total = {name: torch.zeros_like(value) for name, value in params.items()}
        parts = []
        for piece in self.pieces:
            leaves = _leaves(params)
            losses = piece(leaves)
            mixed = (upper * losses.upper + lower * losses.lower).sum()
            _accumulate(total, torch.autograd.grad(mixed, list(leaves.values())))
            parts.append(Losses(*(loss.detach() for loss in losses)))
        return {name: self.reduce(value) for name, value in total.items()}, self._sum(parts)

    def lower_hessian_product(self, params: Params, vector: Params) -> Params:
        """Second derivative of the lower loss times `vector`, by differentiating twice.

        Raises:
            UserError: some part of the model cannot be differentiated twice.
        """
        total = {name: torch.zeros_like(value) for name, value in params.items()}
        along = [value.detach() for value in vector.values()]
        for piece in self.pieces:
            leaves = _leaves(params)
            _differentiate_twice(piece, leaves, along)
            _accumulate(total, [_gradient_of(leaf) for leaf in leaves.values()])
        return {name: self.reduce(value) for name, value in total.items()}

    def _sum(self, parts: list[Losses]) -> Losses:
        if not parts:  # a process without rows still takes part in the sum
            zero = torch.zeros(())
            parts = [Losses(zero, zero, zero)]
        return Losses(*(self.reduce(torch.stack(kind).sum(0)) for kind in zip(*parts, strict=True)))


def sft_optimum(
    problem: Bilevel, params: Params, steps: int, step: float
) -> tuple[Params, Float[Tensor, "*G"]]:
    """Parameters and SFT loss after plain gradient descent on the SFT loss from `params`.

    An estimate of v* where there is no SFT checkpoint.
    """
    point = params
    for _ in range(steps):
        lower, _ = problem.gradient(point, 0.0, 1.0)
        point = plus(point, -step, lower)
    return point, problem.losses(point).lower


def plus(first: Params, factor: float | Float[Tensor, "*G"], second: Params) -> Params:
    """first + factor * second; a factor a problem broadcasts over the axes of each parameter."""
    return {
        name: value.detach() + _spread(factor, value) * second[name]
        for name, value in first.items()
    }


def dot(first: Params, second: Params, like: Float[Tensor, "*G"]) -> Float[Tensor, "*G"]:
    """Inner product over all parameters, for each problem; `like` has the problems' axes."""
    total = torch.zeros_like(like)
    for name, value in first.items():
        product = value * second[name]
        total = total + product.reshape(*like.shape, -1).sum(-1).to(like.dtype)
    return total


def _spread(factor: float | Tensor, value: Tensor) -> float | Tensor:
    if not isinstance(factor, Tensor):
        return factor
    return factor.reshape(*factor.shape, *(1,) * (value.dim() - factor.dim())).to(value.dtype)


def _leaves(params: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def _differentiate_twice(piece: LossOf, leaves: Params, along: Sequence[Tensor]) -> None:
    """Put d/d(leaf) <grad lower, along> into the gradients of the leaves, or raise.

    Two ways of saving memory would give a wrong answer in silence. Activation checkpointing hands
    detached tensors to the second derivative: its hooks are disabled. A once-differentiable
    function refuses by a node of its own, which `autograd.grad` passes by, since it visits only
    what leads to its inputs: `autograd.backward` visits all.
    """
    hooks = torch.autograd.graph.disable_saved_tensors_hooks("it recomputes activations")
    try:
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH), hooks:
            lower = piece(leaves).lower.sum()
            first = torch.autograd.grad(lower, list(leaves.values()), create_graph=True)
            torch.autograd.backward(first, along)
    except RuntimeError as error:
        raise UserError(
            f"this model cannot be differentiated twice ({error}). Build its scorer with "
            "head=prefloop.logps.head.exact and without activation checkpointing, or use OneStep "
            "with product=DifferenceProduct(), or OneStepFirstOrder."
        ) from error


def _gradient_of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _accumulate(total: Params, parts: Sequence[Tensor]) -> None:
    for name, part in zip(total, parts, strict=True):
        total[name] = total[name] + part
