"""Results of arms as a table: quality with intervals, and paired tests against random labels.

Arms of one seed share their pool and their held-out prompts, so arms are compared prompt by prompt
within a seed. Two tests answer two questions. Over prompts: would other prompts say the same, of
these trainings? Over seeds: would other pools, choices and trainings? With three seeds the second
has two degrees of freedom and finds large differences only.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefloop.experiment.arms import EVERYTHING, NOTHING, RANDOM, Arm
from prefloop.intervals import Estimate, PairedTest, bootstrap, paired

Result = tuple[Arm, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting, over its seeds.

    Attributes:
        objective, equal, rule, keep, reward, share: as in `Arm`.
        labels: prompts labelled, mean over seeds.
        quality: mean over held-out prompts and seeds, a seed's prompt being the unit.
        seeds: the mean of each seed.
        over_prompts: against random of the same objective, share and schedule, prompt by prompt.
        over_seeds: p-value of the paired t test on the seeds' means, or None for one seed.
    """

    objective: str
    equal: str
    rule: str
    keep: str
    reward: str
    share: float
    labels: float
    quality: Estimate
    seeds: tuple[float, ...]
    over_prompts: PairedTest | None
    over_seeds: float | None

    @property
    def name(self) -> str:
        """A short name: which end of which rule on which reward."""
        if self.rule in (EVERYTHING, NOTHING, RANDOM):
            return self.rule.removesuffix("()").lower()
        return f"{self.rule.removesuffix('()')} {self.keep}, {self.reward}"

    def estimate(self) -> Mapping[str, Any]:
        """The row of evaluation.json."""
        told = f"{self.objective}, equal {self.equal}, {self.name}, {100 * self.share:g} %"
        return self.quality.row(told)


def summarise(results: Sequence[Result], main: float) -> list[Row]:
    """A row a setting, in the order of the plan; `main`: the share that the two ends face."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for arm, result in results:
        groups.setdefault(arm.setting, []).append((arm, result))
    return [_row(group, _rivals(group[0][0], groups, main)) for group in groups.values()]


def _rivals(arm: Arm, groups: Mapping[tuple[str, ...], list[Result]], main: float) -> list[Result]:
    """The results of random labels at the same cost; of the full data, at the main share."""
    if arm.rule == RANDOM:
        return []
    share = main if arm.rule in (EVERYTHING, NOTHING) else arm.share
    wanted = (RANDOM, arm.objective, arm.equal, share)
    for group in groups.values():
        other = group[0][0]
        if (other.rule, other.objective, other.equal, other.share) == wanted:
            return group
    return []


def _row(group: Sequence[Result], rivals: Sequence[Result]) -> Row:
    arm = group[0][0]
    own = {a.seed: result["quality"] for a, result in group}
    values = torch.tensor(
        [value for quality in own.values() for value in quality.values()], dtype=torch.float64
    )
    over_prompts, over_seeds = None, None
    if rivals:
        over_prompts, over_seeds = _against(own, {a.seed: r["quality"] for a, r in rivals})
    return Row(
        objective=arm.objective,
        equal=arm.equal,
        rule=arm.rule,
        keep=arm.keep,
        reward=arm.reward,
        share=arm.share,
        labels=sum(result["labels"] for _, result in group) / len(group),
        quality=bootstrap(values),
        seeds=tuple(_mean(quality) for quality in own.values()),
        over_prompts=over_prompts,
        over_seeds=over_seeds,
    )


def _against(
    own: Mapping[int, Mapping[str, float]], other: Mapping[int, Mapping[str, float]]
) -> tuple[PairedTest, float | None]:
    pairs = [
        (own[seed][name], other[seed][name])
        for seed in sorted(own.keys() & other.keys())
        for name in own[seed]
    ]
    table = torch.tensor(pairs, dtype=torch.float64)
    means = [(_mean(own[seed]), _mean(other[seed])) for seed in sorted(own.keys() & other.keys())]
    seeds = torch.tensor(means, dtype=torch.float64)
    p = paired(seeds[:, 0], seeds[:, 1]).t_p if len(means) > 1 else None
    return paired(table[:, 0], table[:, 1]), p


def _mean(quality: Mapping[str, float]) -> float:
    return sum(quality.values()) / len(quality)


COLUMNS = (
    "objective",
    "equal",
    "labels chosen by",
    "labels",
    "quality",
    "less random",
    "p over prompts",
    "p over seeds",
)


def cells(row: Row) -> list[Any]:
    """The row of the printed table."""
    test = row.over_prompts
    return [
        row.objective,
        row.equal,
        row.name,
        round(row.labels),
        _interval(row.quality),
        None if test is None else _interval(test.difference),
        None if test is None else test.t_p,
        row.over_seeds,
    ]


def page(rows: Sequence[Row], quality: str) -> Mapping[str, Any]:
    """What experiment.section.json holds: the table, and quality against labels."""
    seeds = len(rows[0].seeds)
    return {
        "title": "Which labels are worth their price",
        "paragraphs": [
            f"Quality is the {quality}; {seeds} seed{'s' if seeds > 1 else ''}, each with its own "
            "pool. Intervals and differences to random labels are over held-out prompts; the last "
            "column tests the means of the seeds."
        ],
        "tables": [{"title": "Arms", "columns": list(COLUMNS), "rows": [cells(r) for r in rows]}],
        "lines": [
            _curve([row for row in rows if row.equal == equal], equal)
            for equal in dict.fromkeys(row.equal for row in rows)
        ],
    }


def _curve(rows: Sequence[Row], equal: str) -> dict[str, Any]:
    """Quality against labels, of the first objective, from none to the full data.

    A line a rule that was tried at several shares; where none was, a line each.
    """
    first = [row for row in rows if row.objective == rows[0].objective]
    ends = [row for row in first if row.rule in (EVERYTHING, NOTHING)]
    names = Counter(row.name for row in first if row not in ends)
    several = [name for name, shares in names.items() if shares > 1]
    lines = []
    for name in several or names:
        points = sorted([*(r for r in first if r.name == name), *ends], key=lambda r: r.labels)
        lines.append(
            {
                "name": name,
                "x": [row.labels for row in points],
                "y": [row.quality.value for row in points],
                "low": [row.quality.low for row in points],
                "high": [row.quality.high for row in points],
            }
        )
    return {
        "title": f"Quality against labels, equal {equal}",
        "x_label": "labels",
        "y_label": "quality",
        "series": lines,
        "note": f"{rows[0].objective}; every line goes from no labels to the full data."
        + (" Rules that were tried at one share are in the table." if several else ""),
    }


def _interval(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def text_table(rows: Sequence[Row]) -> list[str]:
    """The table as lines of Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        shown = [_shown(cell) for cell in cells(row)]
        lines.append("| " + " | ".join(shown) + " |")
    return lines


def _shown(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, dict):
        return f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)
