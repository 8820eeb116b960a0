"""Sections from JSON: how any stage adds a page to the report of its run.

A stage writes `NAME.section.json` into the run folder and touches nothing of the report. All keys
but "title" may be left out.

    {"title": "Annotator types", "paragraphs": ["..."],
     "tables": [{"title": "...", "columns": ["type", "eta"], "rows": [["a", 0.4]]}],
     "lines": [{"title": "...", "x_label": "round", "y_label": "nats", "log_y": false,
                "series": [{"name": "...", "x": [1, 2], "y": [0.5, null],
                            "low": [..], "high": [..]}]}],
     "scatters": [{"title": "...", "x_label": "KL", "y_label": "reward",
                   "points": [{"name": "...", "x": 1, "y": 2, "x_error": 0.1, "y_error": 0.2,
                               "hollow": false}]}],
     "heatmaps": [{"title": "...", "rows": ["a"], "columns": ["b"], "values": [[0.5]]}],
     "histograms": [{"title": "...", "x_label": "PVar", "values": [0.1, 0.2], "cut": 0.15}],
     "answers": [{"prompt": "...", "texts": [{"name": "before", "text": "...", "reward": 0.1}]}]}

A cell of a table is text, a number, null, or a number with its interval: {"value": 0.7,
"low": 0.6, "high": 0.8, "unit": "share"}. null in a list of numbers is a missing value: a gap in a
line, an empty cell of a heat map.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from reprlib import repr
from typing import Any, TypeVar

from prefloop.report.section import (
    Answers,
    Cell,
    Heatmap,
    Histogram,
    Interval,
    Lines,
    Point,
    Scatter,
    Section,
    Series,
    Table,
    Text,
)
from prefloop.runs import read_json
from prefloop.types import UserError

Part = TypeVar("Part")


def read_section(path: Path) -> Section:
    """The section of a `*.section.json` file; what does not fit its form is refused by place."""
    return section(read_json(path), str(path))


def section(value: Any, place: str) -> Section:
    """The section that a JSON value describes; `place` names it in messages."""
    _fields(
        value,
        place,
        "title",
        "paragraphs",
        "tables",
        "lines",
        "scatters",
        "heatmaps",
        "histograms",
        "answers",
    )
    return Section(
        title=_text(value, "title", place),
        paragraphs=_texts(value.get("paragraphs", []), f"{place}: paragraphs"),
        tables=_each(value, "tables", place, table),
        figures=(
            *_each(value, "lines", place, _lines),
            *_each(value, "scatters", place, _scatter),
            *_each(value, "heatmaps", place, _heatmap),
            *_each(value, "histograms", place, _histogram),
        ),
        answers=_each(value, "answers", place, _answers),
    )


def table(value: Any, place: str) -> Table:
    """The table of {"title", "columns", "rows"}; every row as long as the columns."""
    _fields(value, place, "title", "columns", "rows")
    columns = _texts(value.get("columns"), f"{place}: columns")
    rows = _list(value.get("rows"), f"{place}: rows")
    for index, row in enumerate(rows):
        cells = _list(row, f"{place}: rows[{index}]")
        if len(cells) != len(columns):
            raise UserError(
                f"{place}: row {index} has {len(cells)} cells for {len(columns)} columns"
            )
    return Table(
        title=_text(value, "title", place, ""),
        columns=columns,
        rows=tuple(
            tuple(_cell(cell, f"{place}: row {index}") for cell in row)
            for index, row in enumerate(rows)
        ),
    )


def _cell(value: Any, place: str) -> Cell:
    if isinstance(value, Mapping):
        _fields(value, place, "value", "low", "high", "unit")
        number = {
            key: _number(value.get(key), f"{place}: {key}") for key in ("value", "low", "high")
        }
        return Interval(**number, unit=_text(value, "unit", place, ""))
    if value is None or isinstance(value, str | int | float):
        return value
    raise UserError(f"{place}: a cell is text, a number, null or an interval; found {repr(value)}")


def _lines(value: Any, place: str) -> Lines:
    _fields(value, place, "title", "x_label", "y_label", "series", "log_y", "note")
    return Lines(
        title=_text(value, "title", place),
        x_label=_text(value, "x_label", place, ""),
        y_label=_text(value, "y_label", place, ""),
        series=_each(value, "series", place, _series),
        log_y=value.get("log_y") is True,
        note=_text(value, "note", place, ""),
    )


def _series(value: Any, place: str) -> Series:
    _fields(value, place, "name", "x", "y", "low", "high")
    x, y, low, high = (
        None if value.get(key) is None else _numbers(value[key], f"{place}: {key}")
        for key in ("x", "y", "low", "high")
    )
    if x is None or y is None or (low is None) != (high is None):
        raise UserError(f"{place}: a series needs x and y, and low and high both or neither")
    lengths = {len(column) for column in (x, y, low, high) if column is not None}
    if len(lengths) > 1:
        raise UserError(
            f"{place}: x, y, low and high must be equally long; found {sorted(lengths)} values"
        )
    return Series(name=_text(value, "name", place), x=x, y=y, low=low, high=high)


def _scatter(value: Any, place: str) -> Scatter:
    _fields(value, place, "title", "x_label", "y_label", "points", "note")
    return Scatter(
        title=_text(value, "title", place),
        x_label=_text(value, "x_label", place, ""),
        y_label=_text(value, "y_label", place, ""),
        points=_each(value, "points", place, _point),
        note=_text(value, "note", place, ""),
    )


def _point(value: Any, place: str) -> Point:
    _fields(value, place, "name", "x", "y", "x_error", "y_error", "hollow")
    return Point(
        name=_text(value, "name", place),
        x=_number(value.get("x"), f"{place}: x"),
        y=_number(value.get("y"), f"{place}: y"),
        x_error=_number(value.get("x_error", 0), f"{place}: x_error"),
        y_error=_number(value.get("y_error", 0), f"{place}: y_error"),
        hollow=value.get("hollow") is True,
    )


def _heatmap(value: Any, place: str) -> Heatmap:
    _fields(value, place, "title", "rows", "columns", "values", "note")
    rows = _texts(value.get("rows"), f"{place}: rows")
    columns = _texts(value.get("columns"), f"{place}: columns")
    values = tuple(
        _numbers(row, f"{place}: values[{index}]")
        for index, row in enumerate(_list(value.get("values"), f"{place}: values"))
    )
    if len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        raise UserError(
            f"{place}: values must be {len(rows)} rows of {len(columns)} numbers, one a name"
        )
    return Heatmap(
        title=_text(value, "title", place),
        rows=rows,
        columns=columns,
        values=values,
        note=_text(value, "note", place, ""),
    )


def _histogram(value: Any, place: str) -> Histogram:
    _fields(value, place, "title", "x_label", "values", "cut", "note")
    cut = value.get("cut")
    return Histogram(
        title=_text(value, "title", place),
        x_label=_text(value, "x_label", place, ""),
        values=_numbers(value.get("values"), f"{place}: values"),
        cut=None if cut is None else _number(cut, f"{place}: cut"),
        note=_text(value, "note", place, ""),
    )


def _answers(value: Any, place: str) -> Answers:
    _fields(value, place, "prompt", "texts", "heading")
    return Answers(
        prompt=_text(value, "prompt", place),
        texts=_each(value, "texts", place, _answer),
        heading=_text(value, "heading", place, ""),
    )


def _answer(value: Any, place: str) -> Text:
    _fields(value, place, "name", "text", "reward")
    reward = value.get("reward")
    return Text(
        name=_text(value, "name", place),
        text=_text(value, "text", place),
        reward=None if reward is None else _number(reward, f"{place}: reward"),
    )


def _fields(value: Any, place: str, *known: str) -> None:
    """Refuse what is no JSON object, or has a key that nobody would read."""
    if not isinstance(value, Mapping):
        raise UserError(f"{place}: expected an object with {', '.join(known)}")
    if unknown := sorted(set(value) - set(known)):
        raise UserError(
            f"{place}: nobody reads {', '.join(unknown)}; the keys are {', '.join(known)}"
        )


def _text(value: Mapping[str, Any], key: str, place: str, default: str | None = None) -> str:
    found = value.get(key, default)
    if not isinstance(found, str):
        raise UserError(f"{place}: {key} must be text; found {repr(found)}")
    return found


def _number(value: Any, place: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{place}: expected a number or null; found {repr(value)}")
    return float(value)


def _list(value: Any, place: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise UserError(f"{place}: expected a list; found {repr(value)}")
    return value


def _numbers(value: Any, place: str) -> tuple[float, ...]:
    return tuple(_number(item, place) for item in _list(value, place))


def _texts(value: Any, place: str) -> tuple[str, ...]:
    items = _list(value, place)
    if any(not isinstance(item, str) for item in items):
        raise UserError(f"{place}: expected a list of texts; found {repr(value)}")
    return tuple(items)


def _each(
    value: Mapping[str, Any], key: str, place: str, read: Callable[[Any, str], Part]
) -> tuple[Part, ...]:
    items = _list(value.get(key, []), f"{place}: {key}")
    return tuple(read(item, f"{place}: {key}[{index}]") for index, item in enumerate(items))
