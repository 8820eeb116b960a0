"""What a person is asked: which answers of a prompt, in which order, and which prompt first."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from prefloop.data import where
from prefloop.errors import UserError
from prefloop.policies.sampling import derived_seed
from prefloop.selection import preference_variance
from prefloop.types import Comparison

ANSWERS = (2, 3)
"""How many answers a person ranks at once."""


@dataclass(frozen=True)
class Task:
    """One prompt with the answers to rank.

    Attributes:
        row: the comparison that it is made of.
        shown: positions of the answers that are shown, in the order of the file.
        priority: preference variance of the row's scores; -1 where it has none.
    """

    row: Comparison
    shown: tuple[int, ...]
    priority: float

    def order(self, annotator: str) -> tuple[int, ...]:
        """The positions in the order on the screen, which differs from person to person.

        Nobody can tell from its place where an answer comes from, and whoever prefers the left
        does no harm.
        """
        places = list(self.shown)
        random.Random(derived_seed("order", annotator, self.row.id)).shuffle(places)
        return tuple(places)

    def ranks(self, annotator: str, screen: Sequence[int]) -> tuple[int | None, ...]:
        """Ranks of the row's responses from those of the answers on the screen.

        1 = best, equal = a tie; None for what was not shown.

        Raises:
            UserError: not one rank an answer, or ranks that are not 1, 2, ... without a gap.
        """
        if len(screen) != len(self.shown) or set(screen) != set(range(1, max(screen) + 1)):
            raise UserError(
                f"{self.row.id}: ranks {list(screen)} for {len(self.shown)} answers; give each its "
                "own, from 1 = best without a gap"
            )
        ranks: list[int | None] = [None] * len(self.row.responses)
        for place, rank in zip(self.order(annotator), screen, strict=True):
            ranks[place] = rank
        return tuple(ranks)


def tasks_of(rows: Iterable[Comparison], answers: int = 3) -> list[Task]:
    """The tasks of `rows`, the highest preference variance first, then those without scores.

    Of a row with more than `answers` responses the best, the worst and (of three) the middle one by
    score are shown; without scores the first.

    Raises:
        UserError: a row with fewer than two different responses.
    """
    if answers not in ANSWERS:
        raise UserError(f"answers must be 2 or 3, got {answers}; more are hard to rank at once")
    tasks = [_task(row, answers) for row in rows]
    return sorted(tasks, key=lambda task: -task.priority)  # stable: equal ones as in the file


def _task(row: Comparison, answers: int) -> Task:
    texts = list(dict.fromkeys(row.responses))
    if len(texts) < 2:
        raise UserError(
            f"{where(row)}: {len(row.responses)} responses, {len(texts)} of them different; a "
            "person compares two. Sample more answers, or drop the row"
        )
    places = [row.responses.index(text) for text in texts]  # of equal answers the first
    if row.scores is None:
        return Task(row, tuple(places[:answers]), -1.0)
    scores = row.scores
    variance = float(preference_variance(torch.tensor([scores], dtype=torch.float64))[0])
    return Task(row, _spread(places, scores, answers), variance)


def _spread(places: list[int], scores: Sequence[float], answers: int) -> tuple[int, ...]:
    by_score = sorted(places, key=lambda place: scores[place])
    if len(by_score) <= answers:
        return tuple(places)
    picked = {by_score[0], by_score[-1]}
    if answers == 3:
        picked.add(by_score[len(by_score) // 2])
    return tuple(sorted(picked))
