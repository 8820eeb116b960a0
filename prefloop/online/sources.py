"""Where the comparisons of a round come from: who answers, how often, and what is compared.

A sampler alone compares all its answers; a chooser compares two of its candidates; `ThresholdPairs`
makes several comparisons of one prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from prefloop.errors import UserError
from prefloop.pairing import paired, threshold_pairs
from prefloop.policies.sampling import ON_POLICY, Sampler, derived_seed
from prefloop.samplers import CHOOSERS, SAMPLERS, Chooser, chosen_pair
from prefloop.types import Comparison

Pairing = Callable[[Comparison, int], list[Comparison]]
"""A scored row and a seed -> the comparisons that are trained on."""


@dataclass(frozen=True)
class Source:
    """Where the comparisons of a round come from.

    Attributes:
        sampler: which distribution each answer comes from.
        answers: how many are drawn for a prompt; all of them are scored.
        pairing: which of them are compared.
    """

    sampler: Sampler
    answers: int
    pairing: Pairing


@dataclass(frozen=True, kw_only=True)
class ThresholdPairs:
    """RS-DPO: every two of the candidates that the scores order with some confidence.

    Attributes:
        candidates: how many answers to draw for a prompt.
        source: where they come from; the paper draws from the fine-tuned policy.
        threshold: probability of the better one winning, in [0.5, 1).
        temperature: in units of the scores.
        cap: most pairs of one prompt.

    References:
        Khaki et al. 2024, arXiv 2402.10038 (0.85 and 1 as remembered).
    """

    candidates: int = 8
    source: Sampler = ON_POLICY
    threshold: float = 0.85
    temperature: float = 1.0
    cap: int = 4

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise UserError(f"two candidates are compared, so 2 are needed; got {self.candidates}")
        threshold_pairs((0.0, 1.0), self.threshold, self.temperature, self.cap)  # refuses bad ones
        if self.cap < 1:
            raise UserError(f"ThresholdPairs.cap must be 1 or more, got {self.cap}")

    def pairs(self, row: Comparison, seed: int) -> list[Comparison]:
        """One comparison for each pair that is far enough apart."""
        scores = _scores(row)
        kept = threshold_pairs(
            scores, self.threshold, self.temperature, self.cap, derived_seed(seed, row.id)
        )
        return paired(row, kept)


SOURCES: tuple[type, ...] = (*SAMPLERS, *CHOOSERS, ThresholdPairs)
"""Everything that a round's comparisons can come from, for the command line."""


def source_of(made: Any, answers: int) -> Source:
    """The source that an object of `SOURCES` stands for.

    Args:
        made: a sampler, a chooser or `ThresholdPairs`.
        answers: answers a prompt, where `made` does not say so itself.
    """
    if isinstance(made, ThresholdPairs):
        return Source(made.source, made.candidates, made.pairs)
    if isinstance(made, Chooser):
        return Source(made.source, made.candidates, partial(_chosen, made))
    if answers < 2:
        raise UserError(f"answers of a prompt are compared, so 2 are needed; got {answers}")
    return Source(made, answers, _whole)


def _whole(row: Comparison, seed: int) -> list[Comparison]:
    return [row]


def _chosen(chooser: Chooser, row: Comparison, seed: int) -> list[Comparison]:
    # Columns with an entry a candidate would no longer fit.
    return [replace(chosen_pair(row, chooser, seed), extra={})]


def _scores(row: Comparison) -> tuple[float, ...]:
    assert row.scores is not None, "rows are scored before they are paired"
    return row.scores
