"""Figures of the experiments: lines with bands, side by side, in one small PNG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("Agg")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve; `low` and `high` are its band where there is one."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes: curves by name, and a horizontal line that they are read against."""

    title: str
    x_label: str
    lines: Mapping[str, Line]
    level: float | None = None


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the panels as a PNG. A name has one colour in all of them."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, line in panel.lines.items():
            axes.plot(line.x, line.y, color=colours[name], label=name, linewidth=1.5)
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colours[name], alpha=0.15)
        if panel.level is not None:
            axes.axhline(panel.level, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.x_label)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = [], []
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles, labels = [*handles, handle], [*labels, label]
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
