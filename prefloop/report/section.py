"""What a report is made of: sections of text, tables and figures, as plain values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

Number: TypeAlias = int | float
Cell: TypeAlias = "str | Number | bool | Interval | None"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number with its confidence interval; unit "share" is shown as a percentage, with a bar."""

    value: Number
    low: Number = math.nan
    high: Number = math.nan
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under column heads; `emphasis` are the indices of rows to set off."""

    title: str = ""
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    emphasis: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: y over x, NaN a gap, perhaps a band from `low` to `high`.

    Attributes:
        colour: index into the palette; its place in the figure when None.
        dashed: for the second of two quantities of one run.
        faint: drawn thin behind the others and left out of the legend.
        marks: a dot on every point.
    """

    name: str
    x: tuple[Number, ...]
    y: tuple[Number, ...]
    low: tuple[Number, ...] | None = None
    high: tuple[Number, ...] | None = None
    colour: int | None = None
    dashed: bool = False
    faint: bool = False
    marks: bool = False


@dataclass(frozen=True, kw_only=True)
class Key:
    """One entry of a legend.

    Attributes:
        colour: index into the palette; grey when None, where only the mark tells.
        mark: any of the words "dashed" and "dotted" for lines; "dot", "hollow" or "block".
    """

    name: str
    colour: int | None = None
    mark: str = ""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Lines over a common axis; `log_y` leaves out what is not positive.

    `keys` are the legend; one entry a line when None.
    """

    title: str
    x_label: str = ""
    y_label: str = ""
    series: tuple[Series, ...]
    log_y: bool = False
    note: str = ""
    keys: tuple[Key, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point with its standard errors, drawn as bars of one error to each side.

    `hollow` points are what the others are compared with.
    """

    name: str
    x: Number
    y: Number
    x_error: Number = 0.0
    y_error: Number = 0.0
    colour: int | None = None
    hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Named points with error bars; `keys` are the legend, one entry a point when None."""

    title: str
    x_label: str = ""
    y_label: str = ""
    points: tuple[Point, ...]
    note: str = ""
    keys: tuple[Key, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """A table of numbers as colours; NaN is left empty."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[Number, ...], ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How often values occur; `cut` parts what is kept from what is not.

    Kept is what lies at or above the cut, or where `below` is set at or below it.
    """

    title: str
    x_label: str = ""
    values: tuple[Number, ...]
    cut: Number | None = None
    below: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image file that a stage drew itself, as a data URL."""

    title: str
    url: str
    note: str = ""


Figure: TypeAlias = Lines | Scatter | Heatmap | Histogram | Picture


@dataclass(frozen=True, kw_only=True)
class Text:
    """One answer, whose it is, and its reward if there is one."""

    name: str
    text: str
    reward: Number | None = None


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers to one prompt, to be read side by side."""

    prompt: str
    texts: tuple[Text, ...]
    heading: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of the page.

    Attributes:
        title: its heading, and its entry in the list of sections.
        lead: a sentence set large under the heading.
        note: how to read what follows, set small.
        paragraphs: plain text.
        cards: (name, number, remark) set very large.
        tables, figures, answers: what it shows.
        folded: tables that open on a click.
    """

    title: str
    lead: str = ""
    note: str = ""
    paragraphs: tuple[str, ...] = ()
    cards: tuple[tuple[str, Interval, str], ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    answers: tuple[Answers, ...] = ()
    folded: tuple[Table, ...] = ()

    def under(self, run: str, runs: Sequence[object]) -> "Section":
        """This section, with the run's name in its title where there are several runs."""
        return replace(self, title=of_run(self.title, run, runs))


def of_run(title: str, run: str, runs: Sequence[object]) -> str:
    """A title, with the run's name where there are several runs."""
    return title if len(runs) == 1 else f"{title}: {run}"
