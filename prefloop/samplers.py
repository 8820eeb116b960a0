"""Which distribution answers: the policy, its reference, or a tilt from one away from the other.

A sampler says for each answer of a prompt which mixture of the two models' logits it is drawn
from. Pairs are answers (0, 1), (2, 3), ... of a prompt: the first of a pair comes from the first
component. Mixing logits token by token approximates the mixture of whole answers.
To add a sampler: write the dataclass here, name it in `SAMPLERS` and in `tests/test_samplers.py`.
"""

from dataclasses import dataclass

import numpy as np

from prefloop.errors import UserError
from prefloop.policies.sampling import POLICY, REFERENCE, Blend, FromPolicy


@dataclass(frozen=True)
class FromReference:
    """Every answer from the reference: what offline DPO has, drawn anew."""

    def blends(self, count: int, rng: np.random.Generator) -> tuple[Blend, ...]:
        """`count` times the reference."""
        return (REFERENCE,) * count


@dataclass(frozen=True)
class Hybrid:
    """One answer of a pair from the reference, the other from the policy (GSHF).

    References:
        Xiong et al. 2023, arXiv:2312.11456; as a pair sampler in arXiv:2409.19605 [code].
    """

    def blends(self, count: int, rng: np.random.Generator) -> tuple[Blend, ...]:
        """Reference, policy, reference, policy, ..."""
        return _alternating((REFERENCE, POLICY), count)


@dataclass(frozen=True)
class Tilted:
    """One answer tilted away from the reference, the other towards it.

        s1 = pi_theta^(1+k) pi_ref^(-k),   s2 = pi_theta^(1-k) pi_ref^k

    Attributes:
        k: size of the tilt; 1/2 is the paper's, 0 is on-policy.

    References:
        "The Crucial Role of Samplers in Online DPO", arXiv:2409.19605, the second component of
        DPO-Mix-P on language models (exponents as in the authors' code [code]).
    """

    k: float = 0.5

    def __post_init__(self) -> None:
        _refuse_bad_tilt(self.k)

    def blends(self, count: int, rng: np.random.Generator) -> tuple[Blend, ...]:
        """(1+k) policy - k reference, (1-k) policy + k reference, ..."""
        return _alternating((Blend(1 + self.k, -self.k), Blend(1 - self.k, self.k)), count)


@dataclass(frozen=True)
class Mixture:
    """DPO-Mix-P: with probability `on_policy` a pair from the policy, else a `Tilted` pair.

    The coin is thrown once a prompt.

    Attributes:
        on_policy: probability of the on-policy pair; 0.3 is the code's for Iterative-Prompt, 0 its
            choice for Safe-RLHF [code].
        k: size of the tilt.

    References:
        "The Crucial Role of Samplers in Online DPO", arXiv:2409.19605.
    """

    on_policy: float = 0.3
    k: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.on_policy <= 1:
            raise UserError(f"Mixture.on_policy is a probability, in [0, 1]; got {self.on_policy}")
        _refuse_bad_tilt(self.k)

    def blends(self, count: int, rng: np.random.Generator) -> tuple[Blend, ...]:
        """All from the policy, or as `Tilted`."""
        if rng.random() < self.on_policy:
            return (POLICY,) * count
        return Tilted(self.k).blends(count, rng)


SAMPLERS = (FromPolicy, FromReference, Hybrid, Tilted, Mixture)


def _alternating(pair: tuple[Blend, Blend], count: int) -> tuple[Blend, ...]:
    return tuple(pair[index % 2] for index in range(count))


def _refuse_bad_tilt(k: float) -> None:
    if not 0 <= k < float("inf"):
        raise UserError(f"the tilt k must be 0 (on-policy) or more, got {k}; 0.5 is the paper's")
