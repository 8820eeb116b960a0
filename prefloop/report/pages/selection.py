"""Which prompts were kept for labelling: the distribution of the score, the cut, both ends."""

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from prefloop.report.pages.answers import prompt_text
from prefloop.report.run import Run
from prefloop.report.section import Histogram, Section, Table
from prefloop.report.words import number, shorten

ENDS = 3
Entry: TypeAlias = tuple[float, int, Mapping[str, Any]]


def selection(runs: Sequence[Run]) -> list[Section]:
    """One section for each run that selected, since their cuts differ."""
    return [
        _of_run(run).under(run.name, runs) for run in runs if "selected.jsonl" not in run.absent
    ]


class _Tally:
    """What one pass over the rows leaves: a number a row, counts, and the rows at both ends."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.total = 0
        self.kept = 0
        self.scores = array("d")
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.highest: list[Entry] = []
        self.lowest: list[Entry] = []

    def add(self, row: Mapping[str, Any]) -> None:
        keeps = bool(row.get("kept", True))
        self.total += 1
        self.kept += keeps
        self.reasons["kept" if keeps else "left out", str(row.get("reason") or "")] += 1
        score = row.get(self.column)
        if isinstance(score, int | float) and math.isfinite(score):
            self.scores.append(score)
            _hold(self.highest, (score, -self.total, row))
            _hold(self.lowest, (-score, -self.total, row))


def _of_run(run: Run) -> Section:
    rule = str(run.selection.get("rule") or "PVar()")
    name = rule.split("(")[0]
    tally = _Tally(column=name.lower())
    for row in run.rows("selected.jsonl"):
        tally.add(row)
    why = tuple((what, reason, count) for (what, reason), count in tally.reasons.most_common())
    tables = [Table(title="Why", columns=("decision", "reason", "prompts"), rows=why)]
    if tally.scores:
        tables += [
            _examples(f"Highest {name}", tally.highest, name),
            _examples(f"Lowest {name}", tally.lowest, name),
        ]
    unscored = tally.total - len(tally.scores)
    histogram = Histogram(
        title=f"{name} of the prompts",
        x_label=name,
        values=tuple(tally.scores),
        cut=_cut(run.selection),
        below=run.selection.get("keep") == "bottom",
        note=f"{unscored} prompts have no finite score and are not drawn." if unscored else "",
    )
    return Section(
        title="Selection",
        lead=f"{tally.kept} of {tally.total} prompts were kept ({rule}).",
        tables=tuple(tables),
        figures=(histogram,) if tally.scores else (),
    )


def _hold(heap: list[Entry], entry: Entry) -> None:
    """Hold the `ENDS` largest entries; their second place is unique, so rows are not compared."""
    if len(heap) < ENDS:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


def _examples(title: str, heap: list[Entry], name: str) -> Table:
    rows = tuple(
        (shorten(prompt_text(row.get("prompt")), 160), _rewards(row), float(row[name.lower()]))
        for _, _, row in sorted(heap, reverse=True)
    )
    return Table(title=title, columns=("prompt", "rewards", name), rows=rows)


def _rewards(row: Mapping[str, Any]) -> str:
    scores = row.get("scores")
    if not isinstance(scores, list):
        return ""
    return ", ".join(number(value, 3) for value in scores if isinstance(value, int | float))


def _cut(selection: Mapping[str, Any]) -> float | None:
    for key in ("cut", "threshold"):
        value = selection.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return None
