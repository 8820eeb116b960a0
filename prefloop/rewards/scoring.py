"""What a reward is, and how comparisons get their scores from one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeAlias, runtime_checkable

from prefloop.data.tokens import where
from prefloop.errors import UserError
from prefloop.types import Comparison

Prompt: TypeAlias = str | tuple[Mapping[str, str], ...]


@runtime_checkable
class Reward(Protocol):
    """Who scores: a number a response, higher is better, in the reward's own units."""

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """One tuple a prompt, one number for each of its responses."""
        ...


@runtime_checkable
class RowReward(Reward, Protocol):
    """A reward that reads more of a row than its texts: whether a response was cut."""

    def of_rows(self, rows: Sequence[Comparison]) -> list[tuple[float, ...]]:
        """One tuple a row, one number for each of its responses."""
        ...


@runtime_checkable
class EnsembleReward(Reward, Protocol):
    """A reward made of what K models give."""

    def members(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> list[tuple[tuple[float, ...], ...]]:
        """K numbers for each response of each prompt."""
        ...

    def combined(self, row: Sequence[Sequence[float]]) -> tuple[float, ...]:
        """The reward of each response of one prompt, from its K numbers."""
        ...


def score(comparisons: Sequence[Comparison], reward: Reward) -> list[Comparison]:
    """`comparisons` with `scores` from `reward`; earlier scores are replaced.

    An ensemble of K > 1 models also leaves what each of them gave, in `ensemble`.

    Raises:
        UserError: a reward that is NaN or infinite, or not one number a response; names the row.
    """
    prompts = [row.prompt for row in comparisons]
    responses = [row.responses for row in comparisons]
    if isinstance(reward, EnsembleReward):
        members = reward.members(prompts, responses)
        scored = [reward.combined(row) for row in members]
    else:
        by_row = isinstance(reward, RowReward)
        scored = reward.of_rows(comparisons) if by_row else reward(prompts, responses)
        members = [None] * len(comparisons)
    if len(scored) != len(comparisons):
        raise UserError(f"the reward scored {len(scored)} of {len(comparisons)} prompts")
    return [
        replace(row, scores=_checked(row, values), ensemble=_several(given))
        for row, values, given in zip(comparisons, scored, members, strict=True)
    ]


def _several(
    given: tuple[tuple[float, ...], ...] | None,
) -> tuple[tuple[float, ...], ...] | None:
    return given if given and len(given[0]) > 1 else None


def _checked(row: Comparison, values: Sequence[float]) -> tuple[float, ...]:
    if len(values) != len(row.responses):
        raise UserError(
            f"{where(row)}: the reward gave {len(values)} numbers for {len(row.responses)} "
            "responses; it must give one each"
        )
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise UserError(
                f"{where(row)}: the reward of response {index + 1} is {value}; rewards must be "
                "finite. Mend the reward, or drop the row"
            )
    return tuple(float(value) for value in values)
