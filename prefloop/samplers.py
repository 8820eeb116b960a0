"""Which distribution answers: the policy, its reference, or a tilt from one away from the other.

A `Sampler` says for each answer of a prompt which mixture of the two models' logits it is drawn
from. Pairs are answers (0, 1), (2, 3), ... of a prompt: the first of a pair comes from the first
component. Mixing logits token by token approximates the mixture of whole answers.

A `Chooser` needs scores: it has several candidates drawn and says which two of them are compared.
To add either: write the dataclass here, name it in `SAMPLERS` or `CHOOSERS`, and in the tables of
`tests/test_samplers.py`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from prefloop.errors import UserError
from prefloop.pairing import rejection_sample
from prefloop.policies import Policy
from prefloop.policies.readers import Reader
from prefloop.policies.sampling import (
    ON_POLICY,
    POLICY,
    REFERENCE,
    Blend,
    FromPolicy,
    Sampler,
    derived_seed,
)
from prefloop.types import Comparison


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


@runtime_checkable
class Chooser(Protocol):
    """Which two of several scored candidates are compared.

    Attributes:
        candidates: how many answers to draw for a prompt.
        source: where they come from.
    """

    candidates: int
    source: Sampler

    def choose(self, scores: Sequence[float], rng: np.random.Generator) -> tuple[int, int]:
        """Two different positions, 0 being the first candidate; who is better is not said."""
        ...


@dataclass(frozen=True, kw_only=True)
class UniformOver:
    """Any two of the candidates, all pairs alike.

    Attributes:
        candidates: how many answers to draw for a prompt.
        source: where they come from.
    """

    candidates: int = 8
    source: Sampler = ON_POLICY

    def __post_init__(self) -> None:
        _refuse_few(self.candidates)

    def choose(self, scores: Sequence[float], rng: np.random.Generator) -> tuple[int, int]:
        """Two positions without replacement; the scores are not read."""
        first, second = rng.choice(len(scores), size=2, replace=False).tolist()
        return first, second


@dataclass(frozen=True, kw_only=True)
class BestWorst:
    """The best against the worst candidate: the widest gap of n.

    Attributes:
        candidates: how many answers to draw for a prompt.
        source: where they come from.
    """

    candidates: int = 8
    source: Sampler = ON_POLICY

    def __post_init__(self) -> None:
        _refuse_few(self.candidates)

    def choose(self, scores: Sequence[float], rng: np.random.Generator) -> tuple[int, int]:
        """(position of the highest score, of the lowest); the first and the last of equals."""
        last = len(scores) - 1
        return int(np.argmax(scores)), last - int(np.argmin(scores[::-1]))


@dataclass(frozen=True, kw_only=True)
class RewardTilted:
    """DPO-Mix-R on candidates: pairs that a score gap makes informative, by importance resampling.

        P(a, b) is proportional to 1 + exp(scale (r_a - r_b)),   a != b

    The 1 is the pair of the source itself, the exponential the pair that is tilted up and down by
    the reward; taken both ways round, the two weigh a pair by 1 / sigmoid'(r_a - r_b).

    Attributes:
        candidates: how many answers to draw for a prompt.
        source: where they come from; the paper's theory has the uniform distribution, its language
            models the policy.
        scale: multiplies the scores: the reward's units to logits of a preference.

    References:
        "The Crucial Role of Samplers in Online DPO", arXiv:2409.19605, DPO-Mix-R (coefficients
        recalled, checked against the authors' pair matrix [code]); resampling a finite set of
        candidates is ours.
    """

    candidates: int = 8
    source: Sampler = ON_POLICY
    scale: float = 1.0

    def __post_init__(self) -> None:
        _refuse_few(self.candidates)
        if not 0 <= self.scale < float("inf"):
            raise UserError(f"RewardTilted.scale must be 0 (uniform) or more, got {self.scale}")

    def choose(self, scores: Sequence[float], rng: np.random.Generator) -> tuple[int, int]:
        """(a, b) drawn together from P."""
        rewards = self.scale * np.asarray(scores, dtype=float)
        log_weight = np.logaddexp(0.0, rewards[:, None] - rewards[None, :])
        np.fill_diagonal(log_weight, -np.inf)
        weight = np.exp(log_weight - log_weight.max()).ravel()
        first, second = divmod(int(rng.choice(weight.size, p=weight / weight.sum())), len(scores))
        return first, second


@dataclass(frozen=True, kw_only=True)
class RejectionSampling:
    """RSO: two candidates accepted as if from the optimal policy (`pairing.rejection_sample`).

    Attributes:
        candidates: how many answers to draw for a prompt; the paper draws 64 to keep 8.
        source: where they come from; the paper draws from the reference (SFT) policy.
        temperature: the paper's beta, in units of the scores.

    References:
        Liu et al. 2023, arXiv:2309.06657.
    """

    candidates: int = 8
    source: Sampler = FromReference()
    temperature: float = 0.5

    def __post_init__(self) -> None:
        _refuse_few(self.candidates)
        if not self.temperature > 0:
            raise UserError(
                f"RejectionSampling.temperature must be positive, got {self.temperature}"
            )

    def choose(self, scores: Sequence[float], rng: np.random.Generator) -> tuple[int, int]:
        """The first two accepted."""
        seed = int(rng.integers(2**62))
        first, second = rejection_sample(scores, 2, self.temperature, seed)
        return first, second


CHOOSERS = (UniformOver, BestWorst, RewardTilted, RejectionSampling)


def chosen_pair(row: Comparison, chooser: Chooser, seed: int) -> Comparison:
    """`row` with the two responses that `chooser` takes, and their scores, in its order.

    The draw follows from (seed, id of the row).
    """
    if row.scores is None:
        raise UserError(
            f"{row.place or row.id}: choosing a pair needs scores, and the row has none"
        )
    rng = np.random.default_rng(derived_seed(seed, row.id))
    places = chooser.choose(row.scores, rng)
    return row.picked(places)


class MixedLogits(LogitsProcessor):
    """Mixes the reference's logits into those of the policy, for plain `model.generate`.

        policy.model.generate(..., logits_processor=[MixedLogits(policy, Blend(1.5, -0.5), mask)])

    `transformers` runs it before temperature and top-p: mix first, warp after. One object serves
    one call of `generate`, with greedy search or sampling; beam search moves rows, and is refused.
    `sample(..., sampler=Tilted())` is faster: with an adapter both models run as one batch there.

    Args:
        policy: the policy that generates, and its reference.
        blend: coefficients of the two.
        prompt_mask: the attention mask that `generate` is given; None where no prompt is padded.
    """

    def __init__(
        self, policy: Policy, blend: Blend, prompt_mask: Int[Tensor, "R L"] | None = None
    ) -> None:
        self.blend = blend
        self.prompt_mask = prompt_mask
        self.read: Tensor | None = None

        def reference(rows: int) -> AbstractContextManager[Any]:
            return policy.reference()

        if policy.frozen is None:
            self.reader = Reader(policy.model, policy.base, switch=reference)
        else:
            self.reader = Reader(policy.frozen, policy.frozen)

    @torch.no_grad()
    def __call__(
        self, input_ids: Int[Tensor, "R L"], scores: Float[Tensor, "R V"]
    ) -> Float[Tensor, "R V"]:
        """a * scores + b * logits of the reference for the same text."""
        if self.read is None:
            new = input_ids
        elif torch.equal(input_ids[:, :-1], self.read):
            new = input_ids[:, -1:]
        else:
            raise UserError(
                "MixedLogits reads one text a row, token by token; the rows were reordered. Make a "
                "new object for each call of generate, without beam search"
            )
        self.read = input_ids
        reference = self.reader.read(new, self._mask(input_ids))[0]
        return self.blend.policy * scores + self.blend.reference * reference

    def _mask(self, input_ids: Tensor) -> Bool[Tensor, "R M"]:
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        if self.prompt_mask is not None:
            prompt = self.prompt_mask.bool()
            copies = len(input_ids) // len(prompt)  # num_return_sequences
            mask[:, : prompt.shape[1]] = prompt.repeat_interleave(copies, 0)
        return mask


def _alternating(pair: tuple[Blend, Blend], count: int) -> tuple[Blend, ...]:
    return tuple(pair[index % 2] for index in range(count))


def _refuse_bad_tilt(k: float) -> None:
    if not 0 <= k < float("inf"):
        raise UserError(f"the tilt k must be 0 (on-policy) or more, got {k}; 0.5 is the paper's")


def _refuse_few(candidates: int) -> None:
    if candidates < 2:
        raise UserError(f"two of the candidates are compared, so 2 are needed; got {candidates}")
