"""Do the answers degenerate? Repetition and length of sampled text, before and after.

An answer is a sequence of units: token ids, or words. The same answers give higher repetition in
shorter units, so compare like with like.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from prefloop.intervals import Estimate, mean, share
from prefloop.types import UserError

Units = Sequence[Hashable]
LONGEST_CYCLE = 8
"""Units of the longest repeated block that a run looks for."""


@dataclass(frozen=True, kw_only=True)
class TextStatistics:
    """Repetition and length of some answers.

    Attributes:
        length: units per answer.
        distinct: distinct n-grams over all n-grams, of all answers together, in [0, 1].
        repeated: share of an answer's n-grams that it has said before, mean over answers, in
            [0, 1); 0 for an answer shorter than n.
        longest_run: units covered by the longest stretch that repeats one block of at most
            `LONGEST_CYCLE` units back to back; mean over answers.
        looping: share of the answers whose longest run covers half of the answer or more and at
            least 2 n units.
        unfinished: share of the answers that stopped at the limit; None where no limit is known.
        empty: number of answers without a unit.
        n: units of an n-gram.
    """

    length: Estimate
    distinct: float
    repeated: Estimate
    longest_run: Estimate
    looping: Estimate
    unfinished: Estimate | None
    empty: int
    n: int


def text_statistics(
    answers: Sequence[Units],
    prompts: Sequence[int] | None = None,
    n: int = 4,
    limit: int | None = None,
) -> TextStatistics:
    """Repetition and length of `answers`.

    Args:
        answers: units of each.
        prompts: number of the prompt of each; answers to one prompt are one cluster.
        n: units of an n-gram; 4 is usual.
        limit: longest answer that the sampler allowed, in units.
    """
    if not answers or n < 1:
        raise UserError(f"there must be answers and n >= 1; found {len(answers)} and n = {n}")
    clusters = None if prompts is None else torch.tensor(prompts)
    length = torch.tensor([float(len(answer)) for answer in answers])
    runs = torch.tensor([float(longest_run(answer)) for answer in answers])
    return TextStatistics(
        length=mean(length, clusters),
        distinct=distinct(answers, n),
        repeated=mean(torch.tensor([repeated_share(answer, n) for answer in answers]), clusters),
        longest_run=mean(runs, clusters),
        looping=share((runs >= 2 * n) & (runs >= length / 2), clusters),
        unfinished=None if limit is None else share(length >= limit, clusters),
        empty=int((length == 0).sum()),
        n=n,
    )


def distinct(answers: Sequence[Units], n: int) -> float:
    """Distinct n-grams over all n-grams of all answers together; 1 where there is none."""
    grams = [gram for answer in answers for gram in _grams(answer, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated_share(answer: Units, n: int) -> float:
    """1 - distinct n-grams / n-grams of one answer (seq-rep-n of Welleck et al. 2019)."""
    grams = _grams(answer, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def longest_run(answer: Units) -> int:
    """Units covered by the longest stretch of one block, said twice or more back to back.

    "a b c b c b d" has 5 (b c b c b: the block b c, the last time in part); no repetition is 0.
    """
    best = 0
    for period in range(1, min(LONGEST_CYCLE, len(answer) // 2) + 1):
        length = 0
        for place in range(period, len(answer)):
            length = length + 1 if answer[place] == answer[place - period] else 0
            if length >= period:
                best = max(best, length + period)
    return best


def _grams(answer: Units, n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(answer[place : place + n]) for place in range(len(answer) - n + 1)]
