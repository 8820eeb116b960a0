"""Who says which answer of a round's pairs is better: the scores, a judge, people.

A labeller gets the round's pairs and its folder, and gives back those that it judged, with ranks.
What it learnt is on disk before it returns, so that a killed run asks nobody twice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from prefloop.data import with_ranks
from prefloop.errors import UserError
from prefloop.objectives import Objective
from prefloop.types import Comparison


@runtime_checkable
class Labels(Protocol):
    """Pairs and a folder -> the pairs that were judged, with ranks."""

    def __call__(self, rows: Sequence[Comparison], folder: Path) -> list[Comparison]: ...


class ByScores:
    """The reward orders the answers; nobody else is asked."""

    def __call__(self, rows: Sequence[Comparison], folder: Path) -> list[Comparison]:
        """Ranks from scores, where the pairing has not ordered the answers already."""
        return with_ranks(rows)


class Waiting(Exception):
    """The round goes on when people have labelled; says what to run meanwhile."""


def refuse_scores(objective: Objective) -> None:
    """Refuse an objective that would learn from the scores what others were asked to judge."""
    if "scores" in objective.data:
        raise UserError(
            f"{objective!r} learns from the reward's scores, and a judge or a person gives an "
            'order only; take an objective that reads one, such as --objective "DPO(beta=0.1)"'
        )
