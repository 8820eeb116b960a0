"""How training went: the curves of `metrics.jsonl`."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from prefloop.report.run import Run
from prefloop.report.section import Key, Lines, Section, Series, Table

CURVES = (
    ("Loss", "loss per comparison", (("loss", ""),)),
    ("Reward margin", "nats", (("rewards/margins", ""),)),
    ("Rewards", "nats", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    (
        "Log-probability of the answers",
        "nats per answer",
        (("logps/chosen", "chosen"), ("logps/rejected", "rejected")),
    ),
    (
        "Change since the reference",
        "nats per answer",
        (("displacement/chosen", "chosen"), ("displacement/rejected", "rejected")),
    ),
    ("Chosen answers that became less likely", "share", (("displacement/chosen_fell", ""),)),
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
HELD_OUT = 2  # colour of held-out values where nothing else needs colours
MARKED = 40  # held-out values that get a dot each


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
    note = (
        "Rewards are beta log policy / reference; the margin is chosen minus rejected. A log-"
        "probability of the chosen answers that falls means that they became less likely, even "
        "where the margin grows."
    )
    if left > 0:
        note += f" {left} more metrics were logged and are not drawn."
    return [
        Section(
            title="Training",
            note=note,
            tables=(_glance(runs),),
            figures=tuple(figure for figure in figures if figure is not None),
        )
    ]


def _curve(
    title: str, unit: str, group: Sequence[tuple[str, str]], runs: Sequence[Run]
) -> Lines | None:
    """One figure: every run, every metric of the group, in training and held out.

    Of one run the colour tells the metric, of several the run.
    """
    series: list[Series] = []
    notes: list[str] = []
    single, alone = len(runs) == 1, len(runs) == len(group) == 1
    for place, run in enumerate(runs):
        for order, (metric, role) in enumerate(group):
            for prefix, kind in (("", "training"), ("eval_", "held out")):
                x, y = run.metric(prefix + metric)
                if not x:
                    continue
                _note_gaps(notes, y, prefix + metric, "" if single else run.name)
                line = Series(
                    name=", ".join(filter(None, ("" if single else run.name, role, kind))),
                    x=x,
                    y=y,
                    colour=HELD_OUT if alone and prefix else order if single else place,
                    dashed=order > 0 and not single,
                    marks=prefix != "" and len(x) <= MARKED,
                )
                series += _readable(line, notes)
    if not series:
        return None
    return Lines(
        title=title,
        x_label="step",
        y_label=unit,
        series=tuple(series),
        note=" ".join(dict.fromkeys(notes)),
        keys=_keys(group, runs, series),
    )


def _keys(
    group: Sequence[tuple[str, str]], runs: Sequence[Run], series: Sequence[Series]
) -> tuple[Key, ...]:
    """Runs by colour, then what line styles mean; an entry a line would not fit."""
    held_out = any(line.marks for line in series)
    if len(runs) == len(group) == 1:
        both = (
            Key(name="training", colour=0),
            Key(name="held out", colour=HELD_OUT, mark="dotted"),
        )
        return both if held_out else ()
    keys = [Key(name=role, colour=order) for order, (_, role) in enumerate(group)]
    if len(runs) > 1:
        drawn = {line.colour for line in series}
        keys = [Key(name=run.name, colour=at) for at, run in enumerate(runs) if at in drawn]
        keys += [
            Key(name=role, mark="dashed" if order else "") for order, (_, role) in enumerate(group)
        ]
    if held_out:
        keys.append(Key(name="held out", mark="dotted"))
    return tuple(key for key in keys if key.name)


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
    if len(series.x) <= DENSE and not _rough(series.y):
        return [series]
    block = -(-len(series.x) // DENSE)
    raw = _block_means(series, block) if block > 1 else series
    window = max(3, len(raw.x) // WINDOWS) | 1
    if block > 1:
        notes.append("Thin: means of neighbouring steps.")
    notes.append(f"Thick: running mean over {100 // WINDOWS} % of the steps.")
    smooth = _running_mean(raw.y, window)
    return [
        replace(raw, faint=True, marks=False),
        replace(raw, y=smooth),
    ]


def _block_means(series: Series, block: int) -> Series:
    starts = range(0, len(series.x), block)
    return replace(
        series,
        x=tuple(_mean(series.x[start : start + block]) for start in starts),
        y=tuple(_mean(series.y[start : start + block]) for start in starts),
    )


def _rough(values: Sequence[float]) -> bool:
    """Whether a curve turns more often than a trend would."""
    rises = [after > before for before, after in pairwise(values)]
    return sum(before != after for before, after in pairwise(rises)) > len(values) / 10


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
            last = [y[-1] if y else None for _, y in found]
            steps = max(x[-1] for x, _ in found if x)
            rows.append((run.name, kind, int(steps), *last))
    columns = ("run", "data", "step", *GLANCE)
    drop = 1 if len(runs) == 1 else 0
    return Table(
        title="Last logged values",
        columns=columns[drop:],
        rows=tuple(tuple(row[drop:]) for row in rows),
    )
