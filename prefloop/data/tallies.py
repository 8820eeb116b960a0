"""What `check` counts while rows stream by. Texts are kept as digests, so memory stays small.

To add a count: a class with `add(comparison, prompt)` and `result()`, here or in a file beside, and
a field of `Verdict`.
"""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import numpy as np
import torch

from prefloop import intervals
from prefloop.data.convert import ordered
from prefloop.data.keys import Digest, digest
from prefloop.data.tokens import has_empty
from prefloop.types import Comparison, Tokenized

PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How many rows of which kind.

    Attributes:
        prompts: different prompts.
        responses: number of responses -> rows that have so many.
        ranked, scored, labelled, unjudged: rows with a rank, scores, labels, none of them.
        pairs: strictly ordered pairs of responses, over all rows.
        ties: rows with ranks or scores that order no two of their responses.
        identical: rows with the same response twice.
        empty: rows with a response of no text, or of nothing but white space.
        repeats_prompt: rows with a response that begins with its plain-text prompt, which is what
            a whole text in place of a response looks like.
        cut: rows with a response that did not finish.
    """

    prompts: int
    responses: Mapping[int, int]
    ranked: int
    scored: int
    labelled: int
    unjudged: int
    pairs: int
    ties: int
    identical: int
    empty: int
    repeats_prompt: int
    cut: int


class Shapes:
    """Counts a `Shape`."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._responses: Counter[int] = Counter()
        self._prompts = 0

    def add(self, row: Comparison, prompt: int) -> None:
        """Count one row; `prompt` is the number of its prompt, in order of first appearance."""
        self._prompts = max(self._prompts, prompt + 1)
        self._responses[len(row.responses)] += 1
        pairs = len(ordered(row))
        ranked, scored = row.rank is not None, row.scores is not None
        facts = {
            "ranked": ranked,
            "scored": scored,
            "labelled": row.label is not None,
            "unjudged": not (ranked or scored or row.label is not None),
            "pairs": pairs,
            "ties": (ranked or scored) and not pairs,
            "identical": len(set(row.responses)) < len(row.responses),
            "empty": has_empty(row),
            "repeats_prompt": isinstance(row.prompt, str)
            and any(response.startswith(row.prompt) for response in row.responses),
            "cut": not all(row.ends),
        }
        self._counts.update({name: int(fact) for name, fact in facts.items()})

    def result(self) -> Shape:
        """The counts so far."""
        return Shape(
            prompts=self._prompts,
            responses=dict(sorted(self._responses.items())),
            **{name: self._counts[name] for name in COUNTED},
        )


COUNTED = (
    "ranked",
    "scored",
    "labelled",
    "unjudged",
    "pairs",
    "ties",
    "identical",
    "empty",
    "repeats_prompt",
    "cut",
)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What happens where the same thing is judged more than once.

    A thing is two responses to one prompt that are ordered or tied, or one response with a label.

    Attributes:
        duplicates: rows that repeat an earlier row in every respect but id and extra columns.
        things: different things that were judged.
        repeated: of them, judged more than once.
        contradicted: of them, judged both ways (a tie contradicts nothing).
        self_contradicted: things that one and the same annotator judged both ways.
        minority: votes against the more frequent order, over all things; on an even split, half.
    """

    duplicates: int
    things: int
    repeated: int
    contradicted: int
    self_contradicted: int
    minority: int


class Agreements:
    """Counts an `Agreement`."""

    def __init__(self) -> None:
        self._rows: set[Digest] = set()
        self._duplicates = 0
        self._votes: dict[Digest, list[int]] = {}  # for, against, tied
        self._own: dict[Digest, int] = {}  # 1 for, 2 against, 3 both: of one annotator

    def add(self, row: Comparison, prompt: int) -> None:
        """Count one row; `prompt` is the number of its prompt, in order of first appearance."""
        texts = [digest(text) for text in row.responses]
        judged = (row.rank, row.scores, row.label, row.ends, row.annotator, row.weight)
        judgement = repr((prompt, *judged))
        whole = digest(judgement, *row.responses)
        self._duplicates += whole in self._rows
        self._rows.add(whole)
        better = set(ordered(row))
        for (i, first), (j, second) in combinations(enumerate(texts), 2):
            if first == second or not _compared(row, i, j):
                continue
            (i, first), (j, second) = sorted([(i, first), (j, second)], key=lambda one: one[1])
            side = 0 if (i, j) in better else 1 if (j, i) in better else 2
            self._vote(f"{prompt}".encode() + first + second, side, row.annotator)
        for text, good in zip(texts, row.label or (), strict=False):
            self._vote(f"label {prompt}".encode() + text, 0 if good else 1, row.annotator)

    def _vote(self, thing: bytes, side: int, annotator: str | None) -> None:
        self._votes.setdefault(thing, [0, 0, 0])[side] += 1
        if annotator is not None and side < 2:
            own = thing + annotator.encode()
            self._own[own] = self._own.get(own, 0) | (side + 1)

    def result(self) -> Agreement:
        """The counts so far."""
        votes = self._votes.values()
        return Agreement(
            duplicates=self._duplicates,
            things=len(votes),
            repeated=sum(sum(sides) > 1 for sides in votes),
            contradicted=sum(bool(sides[0] and sides[1]) for sides in votes),
            self_contradicted=sum(sides == 3 for sides in self._own.values()),
            minority=sum(min(sides[:2]) for sides in votes),
        )


def _compared(row: Comparison, first: int, second: int) -> bool:
    if row.rank is not None:
        return row.rank[first] is not None and row.rank[second] is not None
    return row.scores is not None


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """How often the longer response wins; 1/2 where length plays no part.

    Attributes:
        longer_wins: share of ordered pairs in which the better response has more characters.
        low, high: 95 % interval that takes the pairs of one prompt as alike (cluster-robust, t;
            Wilson's over prompts where all pairs agree); None where one prompt has all the pairs
            and they disagree.
        pairs: ordered pairs of different length, which the share is of.
        equal: ordered pairs of equal length, left out.
    """

    longer_wins: float
    low: float | None
    high: float | None
    pairs: int
    equal: int


class LengthBiases:
    """Counts a `LengthBias`."""

    def __init__(self) -> None:
        self._wins = array("b")
        self._prompts = array("q")
        self._equal = 0

    def add(self, row: Comparison, prompt: int) -> None:
        """Count one row; `prompt` is the number of its prompt, in order of first appearance."""
        for better, worse in ordered(row):
            gap = len(row.responses[better]) - len(row.responses[worse])
            if gap == 0:
                self._equal += 1
            else:
                self._wins.append(gap > 0)
                self._prompts.append(prompt)

    def result(self) -> LengthBias | None:
        """The bias so far; None where no ordered pair differs in length."""
        if not self._wins:
            return None
        wins = torch.tensor(self._wins, dtype=torch.float64)
        prompts = torch.tensor(self._prompts)
        settled = bool((wins == wins[0]).all())
        found = intervals.share(wins, prompts) if settled else intervals.mean(wins, prompts)
        known = found.low == found.low  # NaN where there is one prompt
        return LengthBias(
            longer_wins=found.value,
            low=max(found.low, 0.0) if known else None,
            high=min(found.high, 1.0) if known else None,
            pairs=len(wins),
            equal=self._equal,
        )


@dataclass(frozen=True, kw_only=True)
class Annotators:
    """Who judged, and how much.

    Attributes:
        annotators: different names.
        unnamed: rows without one.
        fewest, median, most: rows of an annotator.
    """

    annotators: int
    unnamed: int
    fewest: int
    median: float
    most: int


class AnnotatorRows:
    """Counts `Annotators`."""

    def __init__(self) -> None:
        self._rows: Counter[str | None] = Counter()

    def add(self, row: Comparison, prompt: int) -> None:
        """Count one row."""
        self._rows[row.annotator] += 1

    def result(self) -> Annotators | None:
        """The counts so far; None where no row names an annotator."""
        rows = [count for name, count in self._rows.items() if name is not None]
        if not rows:
            return None
        return Annotators(
            annotators=len(rows),
            unnamed=self._rows[None],
            fewest=min(rows),
            median=float(median(rows)),
            most=max(rows),
        )


@dataclass(frozen=True, kw_only=True)
class TokenLengths:
    """Lengths in tokens, as a model will read the rows; end-of-turn tokens included.

    Attributes:
        prompt, response, row: percentile -> tokens, of prompts, of single responses, and of a
            prompt with its longest response.
        limit: most tokens a row may have, or None.
        overlong: rows past the limit.
        spells_special: rows with a response whose text spells a special token of the tokenizer
            ("</s>"): it is tokenised as text, never as the token.
    """

    prompt: Mapping[int, int]
    response: Mapping[int, int]
    row: Mapping[int, int]
    limit: int | None
    overlong: int
    spells_special: int


class TokenCounts:
    """Counts `TokenLengths`."""

    def __init__(self, limit: int | None, special: Sequence[str]) -> None:
        self._limit = limit
        self._special = special
        self._prompt, self._response, self._row = array("q"), array("q"), array("q")
        self._spells = 0

    def add(self, row: Comparison, tokens: Tokenized) -> None:
        """Count one row and its tokens."""
        lengths = [len(response) for response in tokens.responses]
        self._prompt.append(len(tokens.prompt))
        self._response.extend(lengths)
        self._row.append(len(tokens.prompt) + max(lengths))
        self._spells += any(word in text for text in row.responses for word in self._special)

    def result(self) -> TokenLengths | None:
        """The lengths so far; None where no row could be tokenised."""
        if not self._row:
            return None
        limit = self._limit
        return TokenLengths(
            prompt=_percentiles(self._prompt),
            response=_percentiles(self._response),
            row=_percentiles(self._row),
            limit=limit,
            overlong=0 if limit is None else sum(length > limit for length in self._row),
            spells_special=self._spells,
        )


def _percentiles(lengths: Sequence[int]) -> dict[int, int]:
    found = np.percentile(np.asarray(lengths), PERCENTILES, method="higher")
    return dict(zip(PERCENTILES, map(int, found), strict=True))
