"""How training went: the curves of `metrics.jsonl`."""

import math
from collections.abc import Sequence

from prefloop.report.run import Run
from prefloop.report.section import Lines, Section, Series, Table
from prefloop.report.words import number

CURVES = (
    ("Loss", "loss per comparison", (("loss", ""),)),
    ("Reward margin", "nats", (("rewards/margins", ""),)),
    ("Rewards", "nats", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    (
        "Log-probability of the answers",
        "nats per answer",
        (("logps/chosen", "chosen"), ("logps/rejected", "rejected")),
    ),
    ("Pairs ordered as labelled", "share", (("rewards/accuracies", ""),)),
    ("Gradient norm", "before clipping", (("grad_norm", ""),)),
    ("Learning rate", "", (("learning_rate", ""),)),
)
"""Title, unit, and which metrics share the axes."""
GLANCE = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
HIDDEN = {"step", "epoch"}
MORE = 24
NOISY = 60  # points above which a running mean is drawn over the raw curve
DENSE = 400  # points that a figure can show
WINDOWS = 20


def training(runs: Sequence[Run]) -> list[Section]:
    """Loss, margins, rewards and log-probabilities over steps, and whatever else was logged."""
    if not any(run.metrics for run in runs):
        return []
    told = {name for _, _, group in CURVES for name, _ in group}
    figures = [_curve(title, unit, group, runs) for title, unit, group in CURVES]
    others = sorted(
        {
            name.removeprefix("eval_")
            for run in runs
            for row in run.metrics
            for name, value in row.items()
            if isinstance(value, int | float)
        }
        - told
        - HIDDEN
    )
    figures += [_curve(name, "", ((name, ""),), runs) for name in others[:MORE]]
    left = len(others) - MORE
    paragraphs = [
        "Rewards are beta log policy / reference; the margin is chosen minus rejected. A log-"
        "probability of the chosen answers that falls means that they became less likely, even "
        "where the margin grows."
    ]
    if left > 0:
        paragraphs.append(f"{left} more metrics were logged and are not drawn.")
    return [
        Section(
            title="Training",
            paragraphs=tuple(paragraphs),
            tables=(_glance(runs),),
            figures=tuple(figure for figure in figures if figure is not None),
        )
    ]


def _curve(
    title: str, unit: str, group: Sequence[tuple[str, str]], runs: Sequence[Run]
) -> Lines | None:
    """One figure: every run, every metric of the group, in training and held out."""
    series: list[Series] = []
    notes: list[str] = []
    for place, run in enumerate(runs):
        for order, (metric, role) in enumerate(group):
            colour = order if len(runs) == 1 else place
            for prefix, kind in (("", "training"), ("eval_", "held out")):
                x, y = run.metric(prefix + metric)
                if not x:
                    continue
                _note_gaps(notes, y, prefix + metric, run.name if len(runs) > 1 else "")
                name = _name(run.name if len(runs) > 1 else "", role, kind)
                shown = Series(
                    name=name,
                    x=x,
                    y=y,
                    colour=colour if prefix == "" or len(group) * len(runs) > 1 else 2,
                    dashed=order > 0 and len(runs) > 1,
                    marks=prefix == "eval_",
                )
                series += [shown] if prefix else _readable(shown, notes)
    if not series:
        return None
    note = " ".join(dict.fromkeys(notes))
    return Lines(title=title, x_label="step", y_label=unit, series=tuple(series), note=note)


def _name(run: str, role: str, kind: str) -> str:
    return ", ".join(word for word in (run, role, kind) if word)


def _note_gaps(notes: list[str], values: Sequence[float], metric: str, run: str) -> None:
    missing = sum(not math.isfinite(value) for value in values)
    if missing:
        where = f" of {run}" if run else ""
        notes.append(
            f"{missing} of {len(values)} values of {metric}{where} are NaN or infinite: gaps."
        )


def _readable(series: Series, notes: list[str]) -> list[Series]:
    """A long noisy curve as a faint raw line under a running mean, at most `DENSE` points each."""
    if len(series.x) <= NOISY:
        return [series]
    block = -(-len(series.x) // DENSE)
    raw = _block_means(series, block) if block > 1 else series
    window = max(3, len(raw.x) // WINDOWS) | 1
    steps = f"Thin: means of {block} logged steps; thick:" if block > 1 else "Thick:"
    notes.append(f"{steps} running mean over {window * block} logged steps.")
    smooth = _running_mean(raw.y, window)
    return [
        Series(name=raw.name, x=raw.x, y=raw.y, colour=raw.colour, faint=True),
        Series(name=raw.name, x=raw.x, y=smooth, colour=raw.colour, dashed=raw.dashed),
    ]


def _block_means(series: Series, block: int) -> Series:
    starts = range(0, len(series.x), block)
    return Series(
        name=series.name,
        x=tuple(_mean(series.x[start : start + block]) for start in starts),
        y=tuple(_mean(series.y[start : start + block]) for start in starts),
        colour=series.colour,
        dashed=series.dashed,
    )


def _running_mean(values: Sequence[float], window: int) -> tuple[float, ...]:
    """Centred mean of the finite values of a window; a gap stays a gap."""
    half = window // 2
    return tuple(
        _mean(values[max(0, place - half) : place + half + 1]) if math.isfinite(value) else math.nan
        for place, value in enumerate(values)
    )


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _glance(runs: Sequence[Run]) -> Table:
    """The last logged value of the main metrics, in training and held out."""
    rows = []
    for run in runs:
        for prefix, kind in (("", "training"), ("eval_", "held out")):
            found = [run.metric(prefix + metric) for metric in GLANCE]
            if not any(x for x, _ in found):
                continue
            last = [number(y[-1]) if y else None for _, y in found]
            steps = max(x[-1] for x, _ in found if x)
            rows.append((run.name, kind, int(steps), *last))
    columns = ("run", "data", "step", *GLANCE)
    drop = 1 if len(runs) == 1 else 0
    return Table(
        title="Last logged values",
        columns=columns[drop:],
        rows=tuple(tuple(row[drop:]) for row in rows),
    )
