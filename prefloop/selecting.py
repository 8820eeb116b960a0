"""Selection over a file: two passes, so that memory holds a number a prompt and no text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prefloop import data
from prefloop.runs import write_json, write_jsonl
from prefloop.selection import Rule, above, bottom, top
from prefloop.types import Comparison, UserError

CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which scores are kept.

    Attributes:
        keep: the highest, the lowest, or all of at least `threshold`.
        fraction: share of the prompts, rounded down, in (0, 1].
        budget: prompts; 0 leaves it to `fraction`.
        threshold: in the units of the rule.
    """

    keep: Literal["top", "bottom", "above"] = "top"
    fraction: float = 0.5
    budget: int = 0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction must be in (0, 1], got {self.fraction}")
        if self.budget < 0:
            raise UserError(f"budget must not be negative, got {self.budget}")

    def __call__(self, scores: Tensor) -> Tensor:
        """Indices of what is kept, in data order."""
        if self.keep == "above":
            return above(scores, self.threshold)
        count = min(self.budget, len(scores)) or int(self.fraction * len(scores))
        return {"top": top, "bottom": bottom}[self.keep](scores, count)


def select(source: Path, out: Path, rule: Rule, cut: Cut) -> dict[str, Any]:
    """Write `selected.jsonl` (every row, with score, weight and reason) and `selection.json`.

    Returns what selection.json holds: rule, cut, kept, total, lowest, highest.
    """
    scores = rule_scores(source, rule)
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[cut(scores)] = True
    if not kept.any():
        raise UserError(f"{source}: no prompt is kept of {len(scores)}; keep a larger share")
    border = scores[kept].max() if cut.keep == "bottom" else scores[kept].min()
    rows = _judged(data.iterate(source), scores.tolist(), kept.tolist(), rule, cut)
    write_jsonl(out / "selected.jsonl", (data.as_row(row) for row in rows))
    summary = {
        "rule": repr(rule),
        "keep": cut.keep,
        "cut": float(border),
        "kept": int(kept.sum()),
        "total": len(scores),
        "lowest": float(scores.min()),
        "highest": float(scores.max()),
    }
    write_json(out / "selection.json", summary)
    return summary


def rule_scores(source: Path, rule: Rule) -> Tensor:
    """The rule's score of every row of `source`, in order; (P,) float64."""
    rows = (_columns(row, rule.columns) for row in data.iterate(source))
    parts = []
    while part := list(islice(rows, CHUNK)):
        parts.append(part)
    widest = max((len(values) for part in parts for row in part for values in row), default=0)
    if widest == 0:
        raise UserError(f"{source}: there is no row to select from")
    table = {
        name: torch.tensor(
            [
                row[place] + [float("nan")] * (widest - len(row[place]))
                for part in parts
                for row in part
            ],
            dtype=torch.float64,
        )
        for place, name in enumerate(rule.columns)
    }
    return rule(table).double()


def _columns(row: Comparison, names: Iterable[str]) -> list[list[float]]:
    found = []
    for name in names:
        values = row.scores if name == "scores" else row.extra.get(name)
        if values is None:
            raise UserError(
                f"{row.place}: this rule reads {name!r}, which the row has not; score the "
                "responses first (prefloop score)"
            )
        if bad := [value for value in values if value is None or value != value]:
            raise UserError(f"{row.place}: {name} holds {bad[0]}; every response needs a number")
        found.append([float(value) for value in values])
    return found


def _judged(
    rows: Iterable[Comparison], scores: list[float], kept: list[bool], rule: Rule, cut: Cut
) -> Iterator[Comparison]:
    name = type(rule).__name__.lower()
    reason = f"{cut.keep} by {rule!r}"
    for row, score, keeps in zip(rows, scores, kept, strict=True):
        extra = {**row.extra, name: score, "kept": keeps, "reason": reason}
        yield Comparison(**(vars(row) | {"weight": float(keeps), "extra": extra}))
