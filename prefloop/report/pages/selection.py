"""Which prompts were kept for labelling: the distribution of the score, the cut, both ends."""

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prefloop.report.pages.answers import prompt_text
from prefloop.report.run import Run
from prefloop.report.section import Histogram, Section, Table
from prefloop.report.words import number, shorten

ENDS = 3
SCORE = "pvar"


def selection(runs: Sequence[Run]) -> list[Section]:
    """One section for each run that selected, since their cuts differ."""
    found = []
    for run in runs:
        if "selected.jsonl" not in run.absent:
            title = "Selection" if len(runs) == 1 else f"Selection in {run.name}"
            found.append(_of_run(run, title))
    return found


def _of_run(run: Run, title: str) -> Section:
    scores, reasons, kept, total = array("d"), Counter(), 0, 0
    ends: list[tuple[float, int, Mapping[str, Any]]] = []
    starts: list[tuple[float, int, Mapping[str, Any]]] = []
    for total, row in enumerate(run.rows("selected.jsonl"), start=1):
        keeps = bool(row.get("kept", True))
        kept += keeps
        reasons[("kept" if keeps else "left out", str(row.get("reason") or ""))] += 1
        score = row.get(SCORE)
        if isinstance(score, int | float) and math.isfinite(score):
            scores.append(score)
            _keep(ends, (score, -total, row))
            _keep(starts, (-score, -total, row))
    cut = _cut(run.selection)
    figures = ()
    if scores:
        figures = (
            Histogram(
                title="Preference variance of the prompts",
                x_label="PVar",
                values=tuple(scores),
                cut=cut,
                note=_unscored(total - len(scores)),
            ),
        )
    rule = run.selection.get("rule")
    lead = f"{kept} of {total} prompts were kept" + (f" by the rule {rule}." if rule else ".")
    why = tuple((what, reason, count) for (what, reason), count in reasons.most_common())
    return Section(
        title=title,
        lead=lead,
        tables=(
            *(_examples(name, rows) for name, rows in (("Highest", ends), ("Lowest", starts))),
            Table(title="Why", columns=("decision", "reason", "prompts"), rows=why),
        )
        if scores
        else (Table(title="Why", columns=("decision", "reason", "prompts"), rows=why),),
        figures=figures,
    )


def _keep(heap: list, entry: tuple[float, int, Mapping[str, Any]]) -> None:
    """Hold the `ENDS` largest entries; their second place is unique, so rows are not compared."""
    if len(heap) < ENDS:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


def _examples(name: str, heap: list[tuple[float, int, Mapping[str, Any]]]) -> Table:
    rows = tuple(
        (number(float(row[SCORE])), shorten(prompt_text(row.get("prompt")), 160), _rewards(row))
        for _, _, row in sorted(heap, reverse=True)
    )
    return Table(
        title=f"{name} preference variance", columns=("PVar", "prompt", "rewards"), rows=rows
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
