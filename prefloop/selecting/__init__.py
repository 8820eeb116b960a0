"""Selection over a file of any size: measure row by row, choose, write.

scanning  what rules and filters measure, block by block; shared by processes, resumable
choosing  the cut, quotas, spread; what other rules would have kept
writing   every row with score, weight and reason
summary   selection.json: what reports and `--explain` show

Memory holds a few numbers a row and no text.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefloop.data.blocks import is_columnar
from prefloop.runs import is_whole, read_json, write_json
from prefloop.selecting.choosing import Choice, choose, reasons
from prefloop.selecting.cut import PRICES, Candidates, Cut, QuotaOf, parse_quota
from prefloop.selecting.scanning import Scan, gather, scan
from prefloop.selecting.summary import examples, summarise
from prefloop.selecting.writing import Verdicts, write_arrow_rows, write_text_rows
from prefloop.selection import Filter, Rule
from prefloop.shares import Worker
from prefloop.types import UserError


@dataclass(frozen=True, kw_only=True)
class Selecting:
    """How a file is selected from.

    Attributes:
        rule: whose scores are cut.
        cut: what is kept.
        also: rules that are scored in the same pass: their columns, and how much of what they
            would keep is kept.
        filters: rows that are left out before.
        weights: keep every row, with a weight that grows with its place.
        worker: this process among those that share the scan.
    """

    rule: Rule
    cut: Cut
    also: tuple[Rule, ...] = ()
    filters: tuple[Filter, ...] = ()
    weights: bool = False
    worker: Worker = field(default_factory=Worker)

    def __call__(
        self, source: Path, out: Path, on_rows: Callable[[int], None] = lambda done: None
    ) -> dict[str, Any]:
        """Write the rows of `source` with their fate, and selection.json; what that one holds.

        `selected.jsonl`, or `selected.arrow` where the source keeps columns. What is finished is
        not done again; a killed run goes on with the blocks that are missing.
        """
        finished, folder = out / "selection.json", out / "measured"
        if not is_whole(finished):
            groups = tuple(quota.column for quota in self.cut.quotas)
            rules = (self.rule, *self.also)
            work = Scan(rules=rules, filters=self.filters, groups=groups)
            scan(Path(source), work, folder, self.worker, on_rows)
            self.worker.wait()
            if self.worker.leads:
                write_json(finished, self._choose_and_write(Path(source), work, out, folder))
            self.worker.wait()
        if self.worker.leads:  # also where a run was killed before it came to this
            shutil.rmtree(folder, ignore_errors=True)
        return read_json(finished)

    def _choose_and_write(
        self, source: Path, work: Scan, out: Path, folder: Path
    ) -> dict[str, Any]:
        measured = gather(work, folder)
        if not measured.passed.any():
            raise UserError(
                f"{source}: the filters leave out all {len(measured.passed)} rows; loosen them"
            )
        choice = choose(source, measured, work.rules, self.cut, self.weights)
        if not choice.kept.any():
            count = int(measured.passed.sum())
            raise UserError(f"{source}: no prompt is kept of {count}; {self.cut.too_narrow}")
        verdicts = Verdicts(
            rules=work.rules,
            measured=measured,
            choice=choice,
            words=reasons(self.filters, self.cut),
            cut=math.nan if self.weights else _border(choice, self.cut),
        )
        shown = examples(choice)
        write = write_arrow_rows if is_columnar(source) else write_text_rows
        file = write(source, out, verdicts, shown)
        found = summarise(work, self.cut, self.weights, verdicts, shown)
        return {**found, "file": file.name}


def select(source: Path, out: Path, rule: Rule, cut: Cut) -> dict[str, Any]:
    """Write every row with its score, weight and reason, and selection.json, in one process."""
    return Selecting(rule=rule, cut=cut)(source, out)


def _border(choice: Choice, cut: Cut) -> float:
    """The score of the last prompt that is kept."""
    scores = choice.scores[0][choice.kept]
    return float(scores.max() if cut.keep == "bottom" else scores.min())


__all__ = [
    "PRICES",
    "Candidates",
    "Choice",
    "Cut",
    "QuotaOf",
    "Selecting",
    "parse_quota",
    "select",
]
