"""Figures of the reproductions: panels in one row, bars with errors, curves; no global state."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from prefloop.reproduce.claims import Number

COLORS = ("#2b6cb0", "#dd6b20", "#718096", "#38a169", "#805ad5", "#c53030", "#b7791f", "#319795")


def panels(
    titles: Sequence[str], columns: int = 3, width: float = 4.2
) -> tuple[Figure, list[Axes]]:
    """A figure with one titled panel for each title, in rows of at most `columns`.

    `width` is that of one panel, in inches.
    """
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(width * columns, 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[len(titles) :]:
        spare.set_axis_off()
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[: len(titles)]


def bars(
    ax: Axes, groups: Sequence[str], series: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """Grouped bars: for each name of `series`, a (value, standard error) a group."""
    width = 0.8 / len(series)
    for place, (name, values) in enumerate(series.items()):
        at = [group + (place - (len(series) - 1) / 2) * width for group in range(len(groups))]
        ax.bar(
            at,
            [value for value, _ in values],
            width,
            yerr=[error for _, error in values],
            label=name,
            color=COLORS[place % len(COLORS)],
        )
    ax.set_xticks(range(len(groups)), groups, fontsize=8)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def curves(
    ax: Axes, x: Sequence[Number], series: Mapping[str, Sequence[Number]], style: str = "-"
) -> None:
    """One line for each name of `series` over the same x; `style` is matplotlib's ("--", "o-")."""
    for place, (name, values) in enumerate(series.items()):
        ax.plot(x, values, style, label=name, color=COLORS[place % len(COLORS)], ms=3)
    ax.legend(fontsize=7)


def logarithmic(ax: Axes, ticks: Sequence[Number]) -> None:
    """A logarithmic x axis with ticks at the given values only."""
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
