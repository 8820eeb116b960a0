"""How often an online sampler shows each pair of responses, exactly, over a finite response set.

A sampler draws its two responses from two distributions, or from a mixture of several such couples.
All that training sees of it is one symmetric weight a pair, W(y, y'): the expected update is

    theta_y += lr beta sum over y' of W(y, y') [sigmoid(D(y, y')) - sigmoid(U(y, y'))]

with D the true and U = beta (log pi/pi_ref (y) - log pi/pi_ref (y')) the implicit reward gap. No
gradient flows through W. To add a sampler: a value of `PairSampler`, or a frozen dataclass that
turns `Arms` into weights.

References:
    "The Crucial Role of Samplers in Online DPO", arXiv 2409.19605 (ICLR 2025). The mixture weights
    agree with the authors' public code; the coefficients that lead to them are from memory.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefloop.types import UserError


class Arms(NamedTuple):
    """What a sampler may look at: the rewards of the Y responses of each problem.

    Attributes:
        reward: true reward r(y), the logit of a preference.
        implicit: beta log pi(y)/pi_ref(y), up to a constant for each problem.
        base: log of the distribution that is tilted, up to a constant; 0 for the uniform one, -inf
            for a response that does not exist.
    """

    reward: Float[Tensor, "*problems Y"]
    implicit: Float[Tensor, "*problems Y"]
    base: Float[Tensor, "*problems Y"]


def arms(
    reward: Float[Tensor, "*problems Y"],
    implicit: Float[Tensor, "*problems Y"],
    base: Float[Tensor, "*problems Y"] | None = None,
) -> Arms:
    """`Arms` without a gradient, over the uniform base when none is given."""
    flat = torch.zeros_like(reward) if base is None else base
    return Arms(reward.detach(), implicit.detach(), flat.detach())


class Component(NamedTuple):
    """One couple of distributions and how much it counts.

    Attributes:
        first, second: probabilities of the two responses.
        alpha: coefficient of the couple, a number a problem.
    """

    first: Float[Tensor, "*problems Y"]
    second: Float[Tensor, "*problems Y"]
    alpha: Float[Tensor, "*problems"]


@dataclass(frozen=True)
class Tilt:
    """A distribution proportional to base(y) exp(reward r(y) + implicit h(y)).

    Attributes:
        reward: multiplies the true reward.
        implicit: multiplies the implicit reward beta log pi/pi_ref; 1 gives (pi/pi_ref)^beta.
    """

    reward: float = 0.0
    implicit: float = 0.0

    def log(self, arms: Arms) -> Float[Tensor, "*problems Y"]:
        """Log of the unnormalised distribution."""
        return arms.base + self.reward * arms.reward + self.implicit * arms.implicit


@dataclass(frozen=True)
class Couple:
    """Two responses, each drawn on its own from its tilt of the base."""

    first: Tilt = Tilt()
    second: Tilt = Tilt()


@runtime_checkable
class PairWeights(Protocol):
    """Anything that gives every pair of responses its symmetric weight."""

    def __call__(self, arms: Arms) -> Float[Tensor, "*problems Y Y"]: ...


@dataclass(frozen=True)
class PairSampler:
    """A mixture of couples: W = sum_i alpha_i [s1_i(y) s2_i(y') + s1_i(y') s2_i(y)].

    alpha_i = multiple_i Z_1 Z_2 carries the normalizers of the two tilts, so they cancel, and a
    couple contributes multiple (e^{t1(y) + t2(y')} + e^{t1(y') + t2(y)}), t the exponents. The
    diagonal is kept: a response may be drawn twice, and that pair has no gradient.

    Attributes:
        couples: where the two responses come from.
        multiples: a factor for each couple; 1 for the uniform couple is alpha = n^2.
    """

    couples: tuple[Couple, ...]
    multiples: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.multiples) != len(self.couples):
            raise UserError(
                f"PairSampler has {len(self.couples)} couples and {len(self.multiples)} multiples. "
                "Give one multiple a couple."
            )

    def __call__(self, arms: Arms) -> Float[Tensor, "*problems Y Y"]:
        square = (*arms.reward.shape, arms.reward.shape[-1])
        weight = arms.reward.new_zeros(square)
        for couple, multiple in zip(self.couples, self.multiples, strict=True):
            first, second = couple.first.log(arms), couple.second.log(arms)
            ordered = (first.unsqueeze(-1) + second.unsqueeze(-2)).exp()
            weight = weight + multiple * (ordered + ordered.mT)
        return weight

    def components(self, arms: Arms) -> tuple[Component, ...]:
        """The couples as one draws from them: two distributions and a coefficient each."""
        return tuple(
            _component(couple, multiple, arms)
            for couple, multiple in zip(self.couples, self.multiples, strict=True)
        )


@dataclass(frozen=True)
class Clipped:
    """A sampler whose weights stop at what a gap as large as the widest reward gap would get.

        W*(y, y') = min(W(y, y'), 2 + e^Rm + e^-Rm),   Rm = max r - min r

    Mix-P with this cap is Mix-P*, for updates estimated from sampled pairs: in practice pairs above
    the cap are rejected with the matching probability.
    """

    sampler: PairSampler

    def __call__(self, arms: Arms) -> Float[Tensor, "*problems Y Y"]:
        exists = arms.base > -torch.inf
        highest = arms.reward.masked_fill(~exists, -torch.inf).amax(-1)
        lowest = arms.reward.masked_fill(~exists, torch.inf).amin(-1)
        cap = 2 + 2 * torch.cosh(highest - lowest)
        return self.sampler(arms).minimum(cap[..., None, None])


@dataclass(frozen=True)
class FixedMixture:
    """Couples drawn with given probabilities, whatever their normalizers: the authors' ablation.

        W(y, y') = sum_i share_i [s1_i(y) s2_i(y') + s1_i(y') s2_i(y)]

    Unlike Mix-R and Mix-P it is a probability (its sum is 2), so its learning rate is another.

    Attributes:
        couples: where the two responses come from.
        shares: probability of each couple; must sum to 1.
    """

    couples: tuple[Couple, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.couples) or abs(sum(self.shares) - 1) > 1e-9:
            raise UserError(
                f"FixedMixture.shares must be {len(self.couples)} numbers that sum to 1, got "
                f"{self.shares}. Give one share a couple."
            )

    def __call__(self, arms: Arms) -> Float[Tensor, "*problems Y Y"]:
        square = (*arms.reward.shape, arms.reward.shape[-1])
        weight = arms.reward.new_zeros(square)
        for share, couple in zip(self.shares, self.couples, strict=True):
            part = _component(couple, 1.0, arms)
            ordered = part.first.unsqueeze(-1) * part.second.unsqueeze(-2)
            weight = weight + share * (ordered + ordered.mT)
        return weight


BASE = Couple()
"""Both responses from the base, which is uniform in the paper's theorems."""

BY_REWARD = Couple(Tilt(reward=1.0), Tilt(reward=-1.0))
"""Tilted by the true reward: one response from e^r, the other from e^-r."""

BY_POLICY = Couple(Tilt(implicit=1.0), Tilt(implicit=-1.0))
"""Tilted by the policy: one from (pi/pi_ref)^beta, the other from (pi_ref/pi)^beta."""

UNIFORM = PairSampler((BASE,), (2.0,))
"""DPO-Unif: both responses uniform, alpha = 2 n^2. W = 4."""

MIX_R = PairSampler((BASE, BY_REWARD), (1.0, 1.0))
"""DPO-Mix-R: W = 2 + e^D + e^-D = 1 / sigmoid'(D)."""

MIX_P = PairSampler((BASE, BY_POLICY), (1.0, 1.0))
"""DPO-Mix-P: W = 2 + e^U + e^-U = 1 / sigmoid'(U)."""

MIX_P_CLIPPED = Clipped(MIX_P)
"""DPO-Mix-P*: Mix-P with the cap of the noisy setting."""


def shares(components: tuple[Component, ...]) -> Float[Tensor, "*problems C"]:
    """Probability with which each of C couples is drawn: alpha_i / sum alpha."""
    alpha = torch.stack([component.alpha for component in components], -1)
    return alpha / alpha.sum(-1, keepdim=True)


def joint(weight: Float[Tensor, "*problems Y Y"]) -> Float[Tensor, "*problems Y Y"]:
    """Probability of drawing the ordered pair (y, y'): W / sum W, the diagonal included."""
    return weight / weight.sum((-1, -2), keepdim=True)


def draw_pairs(
    probability: Float[Tensor, "*problems Y Y"], count: int, rng: torch.Generator
) -> tuple[Int[Tensor, "*problems C"], Int[Tensor, "*problems C"]]:
    """`count` ordered pairs of each problem, drawn with replacement: (first, second) indices."""
    size = probability.shape[-1]
    flat = probability.flatten(-2).flatten(0, -2)
    cells = torch.multinomial(flat, count, replacement=True, generator=rng)
    cells = cells.reshape(*probability.shape[:-2], count)
    return cells // size, cells % size


def _component(couple: Couple, multiple: float, arms: Arms) -> Component:
    first, second = couple.first.log(arms), couple.second.log(arms)
    normalizers = first.logsumexp(-1) + second.logsumexp(-1)
    return Component(first.softmax(-1), second.softmax(-1), multiple * normalizers.exp())
