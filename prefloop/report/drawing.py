"""Figures of a report as SVG that takes its colours from the page, in light and in dark.

matplotlib draws with marker colours; afterwards each becomes a CSS variable of `style.css`. The
same figure gives the same text, byte for byte, and its ids are its own.
"""

import warnings
from functools import singledispatch
from io import StringIO
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, NullFormatter

from prefloop.report.section import Heatmap, Histogram, Key, Lines, Scatter, Series
from prefloop.report.words import number, shorten, visible

PALETTE = 8
"""Colours before they repeat; style.css defines as many."""
INK, MUTED, GRID, SURFACE = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
SERIES = tuple(f"#0a0b1{index}" for index in range(PALETTE))
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", SURFACE: "--surface"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES)
}
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-4, 5),
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}
SIZE = (4.5, 2.75)  # inches: one to one on a phone, larger in a wide page
HEAT = LinearSegmentedColormap.from_list("heat", ["#eef3fb", "#7fa6e6", "#2f57b8", "#14245c"])
LABELLED_CELLS = 120
VECTOR_CELLS = 2500
NAMESPACE = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"


def draw(figure: Lines | Scatter | Heatmap | Histogram, identity: str, description: str) -> str:
    """The figure as an inline <svg>; `identity` starts every id, `description` is read out."""
    with (
        matplotlib.rc_context({**STYLE, "svg.hashsalt": identity}),
        warnings.catch_warnings(),
    ):
        # The reader's fonts draw the text; whether ours has the glyph does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas = Canvas(figsize=_size(figure), layout="constrained")
        canvas.patch.set_alpha(0)
        axes = canvas.add_subplot()
        axes.patch.set_alpha(0)
        _fill(figure, axes)
        text = StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None})
    return _inline(text.getvalue(), identity, figure.title, description)


def legend(figure: Lines | Scatter | Heatmap | Histogram) -> tuple[Key, ...]:
    """What the reader has to tell apart; nothing for a single line."""
    if isinstance(figure, Lines | Scatter) and figure.keys is not None:
        return figure.keys
    if isinstance(figure, Lines):
        keys = tuple(
            Key(
                name=series.name,
                colour=_colour(index, series.colour),
                mark=f"{'dashed' * series.dashed} {'dotted' * series.marks}",
            )
            for index, series in enumerate(figure.series)
            if not series.faint
        )
        return keys if len(keys) > 1 else ()
    if isinstance(figure, Scatter):
        return tuple(
            Key(
                name=point.name,
                colour=_colour(index, point.colour),
                mark="hollow" if point.hollow else "dot",
            )
            for index, point in enumerate(figure.points)
        )
    if isinstance(figure, Histogram) and figure.cut is not None:
        kept, rest = ("at or below", "above") if figure.below else ("at or above", "below")
        return (
            Key(name=f"{kept} {number(figure.cut)}", colour=0, mark="block"),
            Key(name=rest, colour=6, mark="block"),
        )
    return ()


def describe(figure: Lines | Scatter | Heatmap | Histogram) -> str:
    """What the figure shows, in a sentence for those who do not see it."""
    if isinstance(figure, Lines):
        return "; ".join(_course(series) for series in figure.series if not series.faint)
    if isinstance(figure, Scatter):
        return "; ".join(
            f"{point.name}: {figure.x_label} {number(point.x)}, {figure.y_label} {number(point.y)}"
            for point in figure.points
        )
    if isinstance(figure, Heatmap):
        return f"{len(figure.rows)} rows by {len(figure.columns)} columns"
    values = [value for value in figure.values if np.isfinite(value)]
    if not values:
        return "no values"
    cut = "" if figure.cut is None else f", cut at {number(figure.cut)}"
    spread = f"from {number(min(values))} to {number(max(values))}"
    return f"{len(values)} values {spread}, median {number(float(np.median(values)))}{cut}"


def _course(series: Series) -> str:
    known = [(x, y) for x, y in zip(series.x, series.y, strict=True) if np.isfinite(y)]
    if not known:
        return f"{series.name}: no finite value"
    (start, first), (end, last) = known[0], known[-1]
    return f"{series.name}: {number(first)} at {number(start)}, {number(last)} at {number(end)}"


def _size(figure: Lines | Scatter | Heatmap | Histogram) -> tuple[float, float]:
    if not isinstance(figure, Heatmap):
        return SIZE
    return SIZE[0], min(9.0, max(1.6, 0.8 + 0.26 * len(figure.rows)))


def _colour(index: int, chosen: int | None) -> int:
    return (index if chosen is None else chosen) % PALETTE


@singledispatch
def _fill(figure: object, axes: Axes) -> None:
    raise TypeError(f"no way to draw a {type(figure).__name__}")


@_fill.register
def _(figure: Lines, axes: Axes) -> None:
    for index, series in enumerate(figure.series):
        colour = SERIES[_colour(index, series.colour)]
        x, y = np.array(series.x), np.array(series.y, dtype=float)
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=(0, (4, 2)) if series.dashed else "-",
            linewidth=0.8 if series.faint else 1.7,
            alpha=0.35 if series.faint else 1,
            marker="o",
            markevery=np.isfinite(y) if series.marks else _alone(y),
            markersize=5,
            markeredgecolor=SURFACE,
            markeredgewidth=0.8,
        )
        if series.low is not None and series.high is not None:
            low, high = np.array(series.low, dtype=float), np.array(series.high, dtype=float)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if figure.log_y and any(value > 0 for series in figure.series for value in series.y):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter(lambda value, place: number(value, 2))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(_ticks(5))
    axes.xaxis.set_major_locator(_ticks(6, whole=_whole(figure)))
    axes.set(xlabel=_label(figure.x_label, 44), ylabel=_label(figure.y_label, 26))


@_fill.register
def _(figure: Scatter, axes: Axes) -> None:
    for index, point in enumerate(figure.points):
        colour = SERIES[_colour(index, point.colour)]
        axes.errorbar(
            point.x,
            point.y,
            xerr=_bar(point.x_error),
            yerr=_bar(point.y_error),
            fmt="o",
            color=colour,
            markersize=7,
            markerfacecolor=SURFACE if point.hollow else colour,
            markeredgecolor=colour,
            markeredgewidth=1.4,
            elinewidth=1.2,
            capsize=3,
        )
    axes.margins(0.15)
    axes.xaxis.set_major_locator(_ticks(6))
    axes.yaxis.set_major_locator(_ticks(5))
    axes.set(xlabel=_label(figure.x_label, 44), ylabel=_label(figure.y_label, 26))


@_fill.register
def _(figure: Histogram, axes: Axes) -> None:
    values = np.array([value for value in figure.values if np.isfinite(value)])
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_locator(_ticks(5, whole=True))
    axes.set(xlabel=_label(figure.x_label, 44), ylabel="count")
    if not len(values):
        return
    # Bins are closed on the left: the next number up puts a value at the cut below it.
    cut = figure.cut if figure.cut is None or not figure.below else np.nextafter(figure.cut, np.inf)
    edges = _edges(values, cut)
    counts, _ = np.histogram(values, edges)
    above = np.diff(edges) / 2 + edges[:-1] > (-np.inf if cut is None else cut)
    kept = ~above if figure.below else above
    axes.bar(
        edges[:-1],
        counts,
        np.diff(edges),
        align="edge",
        color=[SERIES[0] if keeps else SERIES[6] for keeps in kept],
        edgecolor=SURFACE,
        linewidth=0.8,
    )
    if figure.cut is not None:
        axes.axvline(figure.cut, color=INK, linewidth=1.1, linestyle=(0, (3, 2)))


@_fill.register
def _(figure: Heatmap, axes: Axes) -> None:
    table = np.array(figure.values, dtype=float).reshape(len(figure.rows), len(figure.columns))
    values = np.ma.masked_invalid(table)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    if not values.size:
        return
    small = values.size <= VECTOR_CELLS
    mesh = axes.pcolormesh(
        values,
        cmap=HEAT,
        edgecolors=SURFACE if small else "none",
        linewidth=0.8 if small else 0,
        rasterized=not small,
    )
    axes.invert_yaxis()
    _name_ticks(axes, "x", figure.columns)
    _name_ticks(axes, "y", figure.rows)
    if values.size > LABELLED_CELLS or not values.count():
        return
    for (row, column), value in np.ma.ndenumerate(values):
        dark = np.asarray(mesh.norm(value)).item() > 0.45 and values.min() < values.max()
        ink = "#ffffff" if dark else "#14245c"
        label = number(float(value), digits=3)
        axes.text(column + 0.5, row + 0.5, label, ha="center", va="center", color=ink, size=8.5)


def _alone(values: np.ndarray) -> np.ndarray:
    """Which values have a gap on both sides, where a line alone would show nothing."""
    known = np.pad(np.isfinite(values), 1)
    return known[1:-1] & ~known[:-2] & ~known[2:]


def _ticks(count: int, whole: bool = False) -> MaxNLocator:
    return MaxNLocator(count, integer=whole, steps=[1, 2, 2.5, 5, 10])


def _label(text: str, length: int) -> str:
    return visible(shorten(text, length))


def _bar(error: float) -> float | None:
    return error if np.isfinite(error) and error > 0 else None


def _whole(figure: Lines) -> bool:
    """Steps and rounds get whole ticks."""
    return all(float(x).is_integer() for series in figure.series for x in series.x)


def _edges(values: np.ndarray, cut: float | None) -> np.ndarray:
    """About 24 equal bins, shifted so that the cut is an edge."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    count = int(np.clip(2 * np.sqrt(len(values)), 5, 24))
    width = (high - low) / count
    if cut is None or not low < cut < high:
        return np.linspace(low, high, count + 1)
    below, above = int(np.ceil((cut - low) / width)), int(np.ceil((high - cut) / width))
    return cut + width * np.arange(-below, above + 1)


def _name_ticks(axes: Axes, axis: str, names: tuple[str, ...]) -> None:
    """Names at the middle of the cells; every k-th where there are too many to read."""
    every = max(1, -(-len(names) // (12 if axis == "x" else 32)))
    places = np.arange(0, len(names), every)
    labels = [_label(names[place], 18) for place in places]
    if axis == "y":
        axes.set_yticks(places + 0.5, labels)
        return
    slanted = sum(map(len, labels)) > 40
    axes.set_xticks(
        places + 0.5, labels, rotation=30 if slanted else 0, ha="right" if slanted else "center"
    )


def _inline(text: str, identity: str, title: str, description: str) -> str:
    """Own ids, colours from the page, a title and a description; nothing that leaks out."""
    ElementTree.register_namespace("", NAMESPACE)
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {f"{{{NAMESPACE}}}metadata", f"{{{NAMESPACE}}}style"}:
                parent.remove(child)
    used = _references(root)
    for element in root.iter():
        _own(element, identity, used)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{identity}-title {identity}-desc")
    for place, (tag, words) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{NAMESPACE}}}{tag}", {"id": f"{identity}-{tag}"})
        element.text = visible(words)
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _references(root: ElementTree.Element) -> set[str]:
    """Ids that something in the figure points to."""
    found = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == LINK:
                found.add(value.removeprefix("#"))
            elif "url(#" in value:
                found.add(value.split("url(#")[1].split(")")[0])
    return found


def _own(element: ElementTree.Element, identity: str, used: set[str]) -> None:
    """Rename the ids that are used, drop the others, and turn marker colours into variables."""
    for key, value in list(element.attrib.items()):
        if key == "id" and value not in used:
            del element.attrib[key]
        elif key == "id":
            element.set(key, f"{identity}-{value}")
        elif key == LINK and value.startswith("#"):
            del element.attrib[key]
            element.set("href", f"#{identity}-{value[1:]}")
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{identity}-"))
        else:
            element.set(key, _themed(value))


def _themed(value: str) -> str:
    for colour, variable in VARIABLES.items():
        value = value.replace(colour, f"var({variable})")
    return value
