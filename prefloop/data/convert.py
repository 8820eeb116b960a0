"""Comparisons into other comparisons: scores to ranks, rankings to pairs, pairs to labels, votes to
rankings. Responses keep the order of the file, so that columns with an entry a response still fit
wherever no response is left out; the rank says which is better, never the position.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np

from prefloop.data.keys import prompt_key
from prefloop.types import Comparison


def rank_from_scores(scores: Sequence[float | int]) -> tuple[int, ...]:
    """1 for the highest score, 2 for the next lower one, ...; equal scores share a rank.

    (0.3, 0.9, 0.3) gives (2, 1, 2).
    """
    levels = sorted(set(scores), reverse=True)
    return tuple(levels.index(score) + 1 for score in scores)


def with_ranks(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Comparisons that have scores but no rank get their rank from the scores."""
    return [
        replace(row, rank=rank_from_scores(row.scores))
        if row.rank is None and row.scores is not None
        else row
        for row in comparisons
    ]


def ordered(comparison: Comparison) -> list[tuple[int, int]]:
    """Every strictly ordered pair, (position of the better, of the worse), by rank, else score."""
    rank: Sequence[int | None] | None = comparison.rank
    if rank is None and comparison.scores is not None:
        rank = rank_from_scores(comparison.scores)
    if rank is None:
        return []
    judged = [(at, place) for at, place in enumerate(rank) if place is not None]
    return [(a, b) for (a, best), (b, worse) in permutations(judged, 2) if best < worse]


def to_pairs(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """One comparison of two responses for every strictly ordered pair; a tie gives none.

    Every pair has the weight of its row. A row that is one pair already stays as it is; the pairs
    of other rows get the ids "ID#i-j", positions counted from 1.
    """
    return [pair for row in comparisons for pair in _pairs(row, ordered(row))]


def best_vs_worst(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """One pair a row: the first of the best responses against the last of the worst.

    Rows that order no two responses are left out; `drop_ties` counts them.
    """
    found = []
    for row in with_ranks(comparisons):
        if pairs := ordered(row):
            rank = [0 if place is None else place for place in row.rank or ()]
            widest = max(pairs, key=lambda pair: (rank[pair[1]] - rank[pair[0]], -pair[0], pair[1]))
            found += _pairs(row, [widest])
    return found


def unpair(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Labels instead of ranks: the best responses of a row are good, the worst are bad.

    Responses in between and responses that nobody judged are left out, and so are rows that order
    no two responses. The responses of a row stay together, so their prompt is still computed once.
    """
    found = []
    for row in with_ranks(comparisons):
        if not ordered(row) or row.rank is None:
            continue
        judged = [place for place in row.rank if place is not None]
        ends = (min(judged), max(judged))
        kept = [at for at, place in enumerate(row.rank) if place in ends]
        label = tuple(row.rank[at] == ends[0] for at in kept)
        found.append(replace(row.picked(kept), rank=None, label=label))
    return found


def drop_ties(comparisons: Iterable[Comparison]) -> tuple[list[Comparison], int]:
    """Rows that order at least two responses, or label them; and how many others there were."""
    rows = list(comparisons)
    kept = [row for row in rows if row.label is not None or ordered(row)]
    return kept, len(rows) - len(kept)


def group(comparisons: Iterable[Comparison]) -> tuple[list[Comparison], int]:
    """Rows of one prompt merged into one comparison of all its responses, where that is exact.

    Rows are merged that have the same prompt, annotator and weight, and say the same kind of thing:

    - scores, labels: every response keeps its own;
    - ranks: only if together they order every pair of responses without contradiction, a > b and
      b > c counting as a > c. Nothing is averaged and no order is made up.

    The merged row has the id and the place of its first row, and the extra columns on which all
    its rows agree.

    Returns:
        (comparisons in order of first appearance, rows that had company but could not be merged)
    """
    groups: dict[tuple[object, ...], list[Comparison]] = {}
    for row in comparisons:
        kind = (row.rank is None, row.scores is None, row.label is None)
        key = (prompt_key(row.prompt), row.annotator, row.weight, *kind)
        groups.setdefault(key, []).append(row)
    found: list[Comparison] = []
    alone = 0
    for rows in groups.values():
        merged = _merged(rows) if len(rows) > 1 else rows[0]
        found += rows if merged is None else [merged]
        alone += len(rows) if merged is None else 0
    return found, alone


def _pairs(row: Comparison, pairs: Sequence[tuple[int, int]]) -> Iterator[Comparison]:
    for better, worse in pairs:
        if len(row.responses) == 2 and row.rank is not None:
            yield row
            continue
        first, second = sorted((better, worse))
        rank = (1, 2) if better < worse else (2, 1)
        name = row.id if len(row.responses) == 2 else f"{row.id}#{first + 1}-{second + 1}"
        yield replace(row.picked((first, second)), rank=rank, id=name)


def _merged(rows: Sequence[Comparison]) -> Comparison | None:
    """One comparison that says what `rows` say, or None where that is not possible."""
    responses = tuple(dict.fromkeys(text for row in rows for text in row.responses))
    first = rows[0]
    scores = _agreed([(row.responses, row.scores) for row in rows], responses)
    label = _agreed([(row.responses, row.label) for row in rows], responses)
    rank = None if first.rank is None else _joint_rank(rows, responses)
    ensemble = _agreed([(row.responses, row.ensemble) for row in rows], responses)
    ends = _agreed([(row.responses, row.ends) for row in rows], responses)
    if ends is None:  # one text is an answer in one row and the start of one in another
        return None
    for merged, before in ((scores, first.scores), (label, first.label), (rank, first.rank)):
        if merged is None and before is not None:
            return None
    same = [
        (key, value)
        for key, value in first.extra.items()
        if all(key in row.extra and row.extra[key] == value for row in rows)
    ]
    return replace(
        first,
        responses=responses,
        rank=rank,
        scores=scores,
        label=label,
        extra=dict(same),
        ensemble=ensemble,
        finished=None if all(ends) else ends,
    )


def _agreed(
    columns: Iterable[tuple[tuple[str, ...], tuple[Any, ...] | None]], responses: Sequence[str]
) -> tuple[Any, ...] | None:
    """The entry of each response, or None where a row has none or two rows say different things."""
    known: dict[str, Any] = {}
    for texts, entries in columns:
        if entries is None:
            return None
        for text, entry in zip(texts, entries, strict=True):
            if known.setdefault(text, entry) != entry:
                return None
    return tuple(known[text] for text in responses)


def _joint_rank(rows: Sequence[Comparison], responses: Sequence[str]) -> tuple[int, ...] | None:
    """The one ranking that all `rows` follow and that they settle completely, or None."""
    position = {text: at for at, text in enumerate(responses)}
    count = len(responses)
    at_least = np.eye(count, dtype=bool)  # [a, b]: a was judged as good as b, or better
    above = np.zeros((count, count), dtype=bool)
    for row in rows:
        judged = [
            (position[text], place)
            for text, place in zip(row.responses, row.rank or (), strict=True)
            if place is not None
        ]
        for (a, first), (b, second) in permutations(judged, 2):
            at_least[a, b] |= first <= second
            above[a, b] |= first < second
    for middle in range(count):  # transitive closure, Warshall's
        at_least |= at_least[:, middle, None] & at_least[middle]
    if (above & at_least.T).any() or not (at_least | at_least.T).all():
        return None
    return rank_from_scores(at_least.sum(1).tolist())
