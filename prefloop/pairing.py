"""Which responses to one prompt make a pair: candidates and their scores in, pairs out.

A rule is a pure function of the scores of one prompt's responses, and of a seed where it draws. It
returns positions, (better, worse); `paired` makes comparisons of them. Responses of equal score are
never paired. To add a rule: write it here, and its laws in `tests/test_pairing.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from random import Random
from typing import TypeAlias

from prefloop.types import Comparison, Tokenized, UserError

Pairs: TypeAlias = list[tuple[int, int]]
"""(position of the better, position of the worse response), 0 being the first."""


def best_worst(scores: Sequence[float]) -> Pairs:
    """The best against the worst response; no pair where all scores are equal.

    Of equally good ones the first is taken, of equally bad ones the last.
    """
    _refuse_bad(scores)
    best = max(range(len(scores)), key=lambda at: (scores[at], -at))
    worst = min(range(len(scores)), key=lambda at: (scores[at], -at))
    return [(best, worst)] if scores[best] > scores[worst] else []


def threshold_pairs(
    scores: Sequence[float],
    threshold: float = 0.85,
    temperature: float = 1.0,
    cap: int | None = None,
    seed: int | str = 0,
) -> Pairs:
    """RS-DPO: every pair that a Bradley-Terry label would order with some confidence.

        (i, j) is kept where sigmoid((R_i - R_j) / temperature) > threshold

    Args:
        threshold: in [0.5, 1), so that at most one order of two responses is kept.
        temperature: in units of the scores, whose scale decides how many pairs there are.
        cap: most pairs for one prompt, drawn at random; the number grows with the square of N.
        seed: of the draw.

    References:
        Khaki et al. 2024, arXiv 2402.10038 (0.85 and 1 as remembered).
    """
    _refuse_bad(scores)
    if not 0.5 <= threshold < 1:
        raise UserError(f"threshold must be in [0.5, 1), got {threshold} (usual: 0.85)")
    _refuse_not_positive("temperature", temperature)
    needed = temperature * math.log(threshold / (1 - threshold))
    kept = [
        (i, j) for i, j in permutations(range(len(scores)), 2) if scores[i] - scores[j] > needed
    ]
    if cap is None or len(kept) <= cap:
        return kept
    if cap < 1:
        raise UserError(f"cap must be 1 or more, got {cap}; None keeps every pair")
    return sorted(Random(seed).sample(kept, cap))


def rejection_sample(
    scores: Sequence[float], keep: int = 8, temperature: float = 0.5, seed: int | str = 0
) -> list[int]:
    """RSO: positions of candidates drawn as if from the optimal policy, in the order accepted.

        candidates are passed over, in random order, until enough are kept; one is accepted with
        probability exp((R - max R of those that remained when the pass began) / temperature)

    The best that remains is always accepted, so no pass is in vain. A low temperature keeps the top
    `keep`, a high one the first of the random order. Duplicates are candidates of their own.

    Args:
        keep: how many to keep, at most as many as there are.
        temperature: the paper's beta, in units of the scores; the loss has a beta of its own.
        seed: of the order and of the acceptances.

    References:
        Liu et al. 2023, arXiv 2309.06657 (0.5, 8 of 64; removal and re-maximising as remembered).
    """
    _refuse_bad(scores)
    _refuse_not_positive("temperature", temperature)
    if not 1 <= keep <= len(scores):
        raise UserError(
            f"cannot keep {keep} of {len(scores)} candidates; sample more answers, or keep fewer"
        )
    rng = Random(seed)
    remaining = list(range(len(scores)))
    rng.shuffle(remaining)
    kept: list[int] = []
    while len(kept) < keep:
        best = max(scores[at] for at in remaining)
        accepted = [
            at for at in remaining if rng.random() < math.exp((scores[at] - best) / temperature)
        ]
        kept += accepted
        remaining = [at for at in remaining if at not in set(accepted)]
    return kept[:keep]


def first_round(scores: Sequence[float], candidates: Sequence[int], seed: int | str = 0) -> Pairs:
    """Random couples of candidates, each candidate once: half as many pairs as candidates."""
    _refuse_bad(scores)
    order = list(candidates)
    Random(seed).shuffle(order)
    couples = zip(order[::2], order[1::2], strict=False)  # an odd one sits out
    return [pair for first, second in couples for pair in _match(scores, first, second)]


def tournament(scores: Sequence[float], candidates: Sequence[int], seed: int | str = 0) -> Pairs:
    """A knock-out among the candidates in random order: the winners of a round meet in the next.

    One pair fewer than candidates, or less where scores are equal (the first goes on). Later rounds
    pair good responses with good ones.
    """
    _refuse_bad(scores)
    order = list(candidates)
    Random(seed).shuffle(order)
    pairs: Pairs = []
    while len(order) > 1:
        odd = order[-1:] if len(order) % 2 else []
        couples = list(zip(order[::2], order[1::2], strict=False))
        pairs += [pair for first, second in couples for pair in _match(scores, first, second)]
        order = [first if scores[first] >= scores[second] else second for first, second in couples]
        order += odd
    return pairs


def paired(row: Comparison, pairs: Pairs) -> list[Comparison]:
    """One comparison of two responses for each pair, better first, with the ids "ID#i-j"."""
    return [
        replace(
            row.picked((better, worse)),
            rank=(1, 2),
            label=None,
            id=f"{row.id}#{better + 1}-{worse + 1}",
        )
        for better, worse in pairs
    ]


def with_mismatched(rows: Sequence[Tokenized]) -> list[Tokenized]:
    """Each row with one more response: an answer to another prompt, that nobody judged.

    It is the first response of the next row with another prompt, the first row following the last.
    KTO estimates its baseline from such responses; each costs as much as any other to score.

    References:
        Ethayarajh et al. 2024, arXiv 2402.01306: mismatched pairs (x_i, y_j).
    """
    return [_with_stranger(row, _stranger(rows, at)) for at, row in enumerate(rows)]


def _stranger(rows: Sequence[Tokenized], at: int) -> tuple[int, ...]:
    for step in range(1, len(rows)):
        other = rows[(at + step) % len(rows)]
        if other.prompt != rows[at].prompt:
            return other.responses[0]
    raise UserError(
        "a mismatched response is an answer to another prompt, but all rows have the same prompt; "
        'add other prompts, or use KTO(baseline="matched")'
    )


def _with_stranger(row: Tokenized, response: tuple[int, ...]) -> Tokenized:
    nothing = None if row.ensemble is None else (math.nan,) * len(row.ensemble[0])
    return replace(
        row,
        responses=(*row.responses, response),
        rank=None if row.rank is None else (*row.rank, 0),
        scores=None if row.scores is None else (*row.scores, math.nan),
        label=None if row.label is None else (*row.label, None),
        ensemble=None if row.ensemble is None or nothing is None else (*row.ensemble, nothing),
    )


def _match(scores: Sequence[float], first: int, second: int) -> Pairs:
    if scores[first] == scores[second]:
        return []
    return [(first, second) if scores[first] > scores[second] else (second, first)]


def _refuse_bad(scores: Sequence[float]) -> None:
    if len(scores) < 2:
        raise UserError(f"a pair needs two responses, got {len(scores)}; sample more answers")
    if bad := [at for at, score in enumerate(scores) if not math.isfinite(score)]:
        raise UserError(
            f"scores must be finite; responses {[at + 1 for at in bad[:5]]} have a score that is "
            "NaN or infinite. Mend the score, or drop these responses."
        )


def _refuse_not_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name} must be positive and finite, got {value}")
