"""Rows in the order of a column of numbers: a curriculum that the file itself holds."""

from collections.abc import Iterable
from math import inf, isfinite

from prefloop.data.tokens import where
from prefloop.types import Comparison, UserError


def sorted_by(comparisons: Iterable[Comparison], column: str) -> list[Comparison]:
    """The rows, smallest number first; equal ones stay in the order of the file.

    Rows of weight 0, which training skips, need no number and come last.

    Args:
        comparisons: the rows.
        column: of numbers, such as `place` of `prefloop select` or `validation_loss`.

    Raises:
        UserError: a row without the column, or with something else than a finite number in it.
    """
    return sorted(comparisons, key=lambda row: _number(row, column) if row.weight > 0 else inf)


def _number(row: Comparison, column: str) -> float:
    if column not in row.extra:
        names = ", ".join(sorted(row.extra)) or "no further column"
        raise UserError(f"{where(row)}: there is no column {column!r} to sort by; it has {names}")
    value = row.extra[column]
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise UserError(
            f"{where(row)}: {column} is {value!r}; rows are sorted by finite numbers. Drop the "
            "row, or sort by another column"
        )
    return float(value)
