"""What selection.json holds: all that a report or `--explain` shows, of constant size."""

from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal

import torch

from prefloop.data import as_text
from prefloop.selecting.choosing import Choice
from prefloop.selecting.cut import Cut
from prefloop.selecting.scanning import Measured, Scan
from prefloop.selecting.writing import Examples, Verdicts

SHOWN = 1000
"""Most scores that are kept one by one, for a histogram."""
ENDS, BORDER = 3, 2
"""Examples from each end of the ranking, and from each side of the cut."""
GROUPS = 20
"""Most groups of a quota that are listed."""
CHARACTERS = 2000
"""Most of a prompt or response that is kept."""


def examples(choice: Choice) -> Examples:
    """Which rows to show: both ends of the ranking, both sides of the cut."""
    ranked = choice.order
    kept = choice.kept[ranked]
    groups = {"most wanted": ranked[:ENDS]}
    if not kept.all():
        groups |= {"last kept": ranked[kept][-BORDER:], "first left out": ranked[~kept][:BORDER]}
    groups["least wanted"] = ranked[-ENDS:]
    return Examples({name: rows.tolist() for name, rows in groups.items()})


def summarise(
    work: Scan, cut: Cut, weights: bool, verdicts: Verdicts, shown: Examples
) -> dict[str, Any]:
    """The content of selection.json, from a finished choice."""
    choice, measured = verdicts.choice, verdicts.measured
    scores = choice.scores[0][choice.order]
    scores = scores if cut.keep == "bottom" else scores.flip(0)  # ascending
    spaced = torch.linspace(0, len(scores) - 1, min(SHOWN, len(scores))).round().long()
    why = Counter(choice.why.tolist()) if len(choice.why) < SHOWN else _counted(choice.why)
    return {
        "rule": repr(work.rules[0]),
        "keep": cut.keep,
        "weights": weights,
        "cut": None if weights else verdicts.cut,
        "kept": int(choice.kept.sum()),
        "total": len(choice.why),
        "labels": choice.labels,
        "budget": cut.budget or None,
        "price": cut.price if cut.budget else None,
        "lowest": float(scores[0]),
        "highest": float(scores[-1]),
        "values": scores[spaced].tolist(),
        "why": {verdicts.words[code]: count for code, count in sorted(why.items())},
        "rules": [repr(rule) for rule in work.rules],
        "overlap": [list(row) for row in choice.overlap],
        "quotas": _quotas(cut, measured, choice),
        "examples": [
            {"group": group, **_example(row, shown, verdicts)}
            for group, rows in shown.groups.items()
            for row in rows
        ],
    }


def _counted(why: torch.Tensor) -> Mapping[int, int]:
    codes, counts = why.unique(return_counts=True)
    return dict(zip(codes.tolist(), counts.tolist(), strict=True))


def _example(row: int, shown: Examples, verdicts: Verdicts) -> dict[str, Any]:
    found = shown.found[row]
    numbers = {name: float(values) for name, values in verdicts.numbers(row, row + 1).items()}
    return {
        "row": row + 1,
        "prompt": prompt_text(found)[:CHARACTERS],
        "rewards": found.get("scores"),
        "best": _end(found, 0),
        "worst": _end(found, -1),
        "score": numbers.pop(verdicts.names[0]),
        "measures": {name: None if value != value else value for name, value in numbers.items()},
        "weight": float(verdicts.choice.weight[row]),
        "kept": bool(verdicts.choice.kept[row]),
        "reason": verdicts.reason(row),
    }


def _end(row: Mapping[str, Any], end: Literal[0, -1]) -> str | None:
    """The best (0) or the worst (-1) response of a row, by rank, else by score; None if unknown."""
    pair = ("chosen", "rejected")[end]
    if pair in row:
        return prompt_text({"prompt": row[pair]})[:CHARACTERS]
    responses, rank = row.get("responses") or (), row.get("rank") or ()
    order = rank or [-score for score in row.get("scores") or ()]
    judged = [
        (place, text) for place, text in zip(order, responses, strict=False) if place is not None
    ]
    return sorted(judged, key=itemgetter(0))[end][1][:CHARACTERS] if judged else None


def prompt_text(row: Mapping[str, Any]) -> str:
    """The prompt of a row as text; where it has none, what it has of chosen, or its id."""
    for name in ("prompt", "chosen", "id"):
        found = row.get(name)
        if isinstance(found, Sequence) and found:
            return as_text(found if isinstance(found, str) else tuple(found))
    return ""


def _quotas(cut: Cut, measured: Measured, choice: Choice) -> list[dict[str, Any]]:
    """For each quota and its largest groups: rows that passed, rows kept, labels they cost."""
    found = []
    cost = cut.costs(measured.count)
    for quota, group, names in zip(cut.quotas, measured.groups, measured.names, strict=True):
        size = torch.bincount(group[measured.passed], minlength=len(names))
        kept = torch.bincount(group[choice.kept], minlength=len(names))
        labels = torch.zeros(len(names), dtype=torch.long)
        labels.index_add_(0, group[choice.kept], cost[choice.kept])
        for at in size.argsort(descending=True, stable=True)[:GROUPS].tolist():
            found.append(
                {
                    "quota": str(quota),
                    "group": names[at],
                    "rows": int(size[at]),
                    "kept": int(kept[at]),
                    "labels": int(labels[at]),
                }
            )
    return found
