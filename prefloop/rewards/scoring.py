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


def score(comparisons: Sequence[Comparison], reward: Reward) -> list[Comparison]:
    """`comparisons` with `scores` from `reward`; earlier scores are replaced.

    Raises:
        UserError: a reward that is NaN or infinite, or not one number a response; names the row.
    """
    scored = reward([row.prompt for row in comparisons], [row.responses for row in comparisons])
    if len(scored) != len(comparisons):
        raise UserError(f"the reward scored {len(scored)} of {len(comparisons)} prompts")
    return [
        replace(row, scores=_checked(row, values))
        for row, values in zip(comparisons, scored, strict=True)
    ]


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
