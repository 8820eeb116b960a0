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
SCORE = "pvar"
Entry: TypeAlias = tuple[float, int, Mapping[str, Any]]


def selection(runs: Sequence[Run]) -> list[Section]:
    """One section for each run that selected, since their cuts differ."""
    return [
        _of_run(run).under(run.name, runs) for run in runs if "selected.jsonl" not in run.absent
    ]


def _of_run(run: Run) -> Section:
    scores, reasons, kept, total = array("d"), Counter(), 0, 0
    highest: list[Entry] = []
    lowest: list[Entry] = []
    for total, row in enumerate(run.rows("selected.jsonl"), start=1):
        keeps = bool(row.get("kept", True))
        kept += keeps
        reasons[("kept" if keeps else "left out", str(row.get("reason") or ""))] += 1
        score = row.get(SCORE)
        if isinstance(score, int | float) and math.isfinite(score):
            scores.append(score)
            _keep(highest, (score, -total, row))
            _keep(lowest, (-score, -total, row))
    cut = _cut(run.selection)
    rule = run.selection.get("rule")
    why = tuple((what, reason, count) for (what, reason), count in reasons.most_common())
    tables = [Table(title="Why", columns=("decision", "reason", "prompts"), rows=why)]
    if scores:
        tables += [_examples("Highest", highest), _examples("Lowest", lowest)]
    histogram = Histogram(
        title="Preference variance of the prompts",
        x_label="PVar",
        values=tuple(scores),
        cut=cut,
        note=_unscored(total - len(scores)),
    )
    return Section(
        title="Selection",
        lead=f"{kept} of {total} prompts were kept" + (f" ({rule})." if rule else "."),
        tables=tuple(tables),
        figures=(histogram,) if scores else (),
    )


def _keep(heap: list[Entry], entry: Entry) -> None:
    """Hold the `ENDS` largest entries; their second place is unique, so rows are not compared."""
    if len(heap) < ENDS:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


def _examples(name: str, heap: list[Entry]) -> Table:
    rows = tuple(
        (shorten(prompt_text(row.get("prompt")), 160), _rewards(row), float(row[SCORE]))
        for _, _, row in sorted(heap, reverse=True)
    )
    return Table(
        title=f"{name} preference variance", columns=("prompt", "rewards", "PVar"), rows=rows
    )


def _rewards(row: Mapping[str, Any]) -> str:
    scores = row.get("scores")
    if not isinstance(scores, list):
        return ""
    return ", ".join(number(value, 3) for value in scores if isinstance(value, int | float))


def _cut(selection: Mapping[str, Any]) -> float | None:
    for key in ("threshold", "cut"):
        value = selection.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return None


def _unscored(count: int) -> str:
    return f"{count} prompts have no finite score and are not drawn." if count else ""
