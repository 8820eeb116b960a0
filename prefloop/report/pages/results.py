"""What came out: the numbers of `evaluation.json`, and reward against KL."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prefloop.report.run import Run
from prefloop.report.section import Interval, Key, Point, Scatter, Section, Table
from prefloop.types import UserError

CARDS = 4


def results(runs: Sequence[Run]) -> list[Section]:
    """The result table, the runs side by side; of one run its first numbers as cards as well."""
    measured = {run.name: found for run in runs if (found := _estimates(run))}
    names = list(dict.fromkeys(name for found in measured.values() for name in found))
    if not names:
        return []
    if len(runs) == 1:
        found = measured[runs[0].name]
        cards = tuple(
            (name, estimate, _of(count)) for name, (estimate, count) in list(found.items())[:CARDS]
        )
        rows = tuple((name, estimate, count) for name, (estimate, count) in found.items())
        return [
            Section(
                title="Results",
                cards=cards,
                tables=(Table(columns=("measure", "value", "n"), rows=rows),),
                note=NOTE,
            )
        ]
    rows = tuple(
        (name, *(found[name][0] if name in found else None for found in measured.values()))
        for name in names
    )
    table = Table(columns=("measure", *measured), rows=rows)
    return [Section(title="Results", tables=(table,), note=NOTE)]


NOTE = (
    "In brackets: the confidence interval, as the evaluation made it; n counts independent units "
    "(prompts, mostly). A bar shows a share from 0 to 100 %, its interval, and the middle."
)


def reward_against_kl(runs: Sequence[Run]) -> list[Section]:
    """Reward against the divergence it cost, a point a policy, with standard errors."""
    points = []
    for index, run in enumerate(runs):
        for order, row in enumerate(_rows(run, "reward_kl")):
            name = str(row.get("name", "policy"))
            points.append(
                Point(
                    name=name if len(runs) == 1 else f"{run.name}: {name}",
                    x=_number(row, "kl", run),
                    y=_number(row, "reward", run),
                    x_error=_number(row, "kl_se", run),
                    y_error=_number(row, "reward_se", run),
                    colour=order if len(runs) == 1 else index,
                    hollow=name == "reference",
                )
            )
    if not points:
        return []
    figure = Scatter(
        title="Reward against KL",
        x_label="KL(policy || reference), nats per response",
        y_label="mean reward",
        points=tuple(points),
        note="Bars are one standard error to each side.",
        keys=None if len(runs) == 1 else _run_keys(runs, points),
    )
    return [
        Section(
            title="Reward against KL",
            note="What the policy gained, against how far it moved from its reference.",
            figures=(figure,),
        )
    ]


def _run_keys(runs: Sequence[Run], points: Sequence[Point]) -> tuple[Key, ...]:
    keys = [Key(name=run.name, colour=place, mark="dot") for place, run in enumerate(runs)]
    if any(point.hollow for point in points):
        keys.append(Key(name="reference", mark="hollow"))
    return tuple(keys)


def _estimates(run: Run) -> dict[str, tuple[Interval, int | None]]:
    found = {}
    for row in _rows(run, "result"):
        estimate = Interval(
            value=_number(row, "value", run),
            low=_number(row, "low", run),
            high=_number(row, "high", run),
            unit=str(row.get("unit") or ""),
        )
        count = row.get("n")
        found[str(row.get("name", ""))] = (estimate, count if isinstance(count, int) else None)
    return found


def _rows(run: Run, key: str) -> list[Mapping[str, Any]]:
    rows = run.evaluation.get(key, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{run.folder / 'evaluation.json'}: {key} must be a list of objects")
    return rows


def _number(row: Mapping[str, Any], key: str, run: Run) -> float:
    value = row.get(key)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(
            f"{run.folder / 'evaluation.json'}: {key} of {row.get('name')!r} must be a number; "
            f"found {value!r}"
        )
    return float(value)


def _of(count: int | None) -> str:
    return "" if count is None else f"n = {count}"
