"""Judgements by annotator: who judged what, and whether types can be told from it at all."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefloop.data import where
from prefloop.types import Comparison, Tokenized, UserError

Missing = Literal["refuse", "own"]


@dataclass(frozen=True)
class Votes:
    """Judgements and who gave them.

    Attributes:
        rows: in tokens, each with an annotator.
        names: the annotators, in order of first appearance.
    """

    rows: tuple[Tokenized, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, rows: Sequence[Tokenized]) -> "Votes":
        """The votes of rows that all name an annotator; see `with_annotators`."""
        names = dict.fromkeys(row.annotator for row in rows)
        return cls(tuple(rows), tuple(name for name in names if name is not None))

    @cached_property
    def annotator(self) -> Int[Tensor, " J"]:
        """Index into `names` of who gave each judgement."""
        index = {name: place for place, name in enumerate(self.names)}
        return torch.tensor([index[row.annotator or ""] for row in self.rows])

    def weighted(self, weight: Float[Tensor, " J"]) -> list[Tokenized]:
        """The rows with their weight times `weight`; those of weight 0 are left out."""
        return [
            replace(row, weight=row.weight * value)
            for row, value in zip(self.rows, weight.tolist(), strict=True)
            if value > 0
        ]

    def where(self, kept: Bool[Tensor, " J"]) -> "Votes":
        """The votes where `kept` is True; annotators keep their places, with or without votes."""
        rows = [row for row, keep in zip(self.rows, kept.tolist(), strict=True) if keep]
        return Votes(tuple(rows), self.names)


def with_annotators(rows: Sequence[Comparison], missing: Missing) -> list[Comparison]:
    """Rows that all name an annotator.

    Args:
        rows: comparisons.
        missing: what happens to rows without one: "refuse", or "own" makes each an annotator of
            its own.

    Raises:
        UserError: a row without an annotator under "refuse", by its place.
    """
    nameless = [row for row in rows if row.annotator is None]
    if nameless and missing == "refuse":
        raise UserError(
            f"{where(nameless[0])}: no annotator, as in {len(nameless)} of {len(rows)} rows; types "
            "are of annotators. Name the column with --columns annotator=NAME, or make each such "
            "row an annotator of its own with --annotator-missing own"
        )
    taken = {row.annotator for row in rows}
    named, number = [], 0
    for row in rows:
        name = row.annotator
        while name is None:
            number += 1
            name = f"unnamed-{number}" if f"unnamed-{number}" not in taken else None
        named.append(replace(row, annotator=name))
    return named


def refuse_unlearnable(votes: Votes, types: int, allow_unidentified: bool) -> None:
    """Refuse what no number of annotators can teach.

    With one pair an annotator, half wanting b and half -b give every pair a share of one half,
    whatever b is: types cannot be told from indifference. Two judgements of one annotator, or one
    among three responses, can (arXiv 2510.15716, Lemma 4.1 and Theorem 4.2).

    Raises:
        UserError: more types than annotators, or one binary judgement an annotator.
    """
    if types > len(votes.names):
        raise UserError(
            f"{types} types are more than the {len(votes.names)} annotators of the data; ask for "
            f"{len(votes.names)} types or fewer, or collect votes of more people"
        )
    if types == 1 or allow_unidentified or informative(votes):
        return
    raise UserError(
        f"each of the {len(votes.names)} annotators gave one judgement between two responses, and "
        "that cannot tell opposite tastes from no taste: both make every pair a toss-up. Collect a "
        "second vote of each annotator, or the best of three responses; --types 1 needs neither, "
        "and --allow-unidentified goes on all the same"
    )


def informative(votes: Votes) -> int:
    """Annotators whose judgements carry more than one binary choice."""
    binary = Counter(row.annotator for row in votes.rows if _judged(row) == 2)
    richer = {row.annotator for row in votes.rows if _judged(row) > 2}
    return len(richer | {name for name, count in binary.items() if count > 1})


def _judged(row: Tokenized) -> int:
    return sum(rank > 0 for rank in row.rank or ())
