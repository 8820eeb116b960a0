"""The rows with their score, weight and reason: text as JSON-lines, columns as an Arrow file."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefloop.data import as_row
from prefloop.data.blocks import (
    ArrowBlock,
    Block,
    Sizes,
    TextBlock,
    blocks,
    column_names,
    write_tables,
)
from prefloop.runs import write_jsonl
from prefloop.selecting.choosing import KEPT, Choice
from prefloop.selecting.scanning import Measured
from prefloop.selection import Rule

if TYPE_CHECKING:
    import pyarrow

ROWS = Sizes(text=1024, columns=8192)


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What is said of each row.

    Attributes:
        rules: what was scored; the first selects.
        measured, choice: numbers of all rows.
        words: why, for each code of the choice.
        cut: the score of the last prompt that is kept; NaN with weights.
    """

    rules: Sequence[Rule]
    measured: Measured
    choice: Choice
    words: Mapping[int, str]
    cut: float

    @property
    def names(self) -> tuple[str, ...]:
        """The column of each rule's score."""
        return tuple(score_name(rule) for rule in self.rules)

    def numbers(self, start: int, end: int) -> dict[str, Tensor]:
        """Column -> numbers of the rows from `start` to `end`: scores, measures, NaN for none."""
        found: dict[str, Tensor] = {}
        for rule, name, scores, values in zip(
            self.rules, self.names, self.choice.scores, self.measured.measures, strict=True
        ):
            found |= dict(zip(rule.measures, values[start:end].unbind(-1), strict=True))
            found[name] = scores[start:end]
        return found

    def reason(self, row: int) -> str:
        """Why the row was kept or left out, with its score, its place and the cut."""
        why, place = int(self.choice.why[row]), int(self.choice.place[row])
        words = self.words[why]
        score = float(self.choice.scores[0][row])
        if math.isnan(score):
            return words
        where = f"is place {place} of {self._among}" if place else "is below the threshold"
        return f"{words}: {type(self.rules[0]).__name__} {score:.4g} {where}{self._cut}"

    def verdict(self, why: int) -> str:
        """What `reason` says of all rows with this code."""
        return self.words[why] + (self._cut if why in {KEPT, KEPT + 1} else "")

    @cached_property
    def _among(self) -> int:
        return int(self.measured.passed.sum())

    @cached_property
    def _cut(self) -> str:
        kept = int(self.choice.kept.sum())
        return "" if math.isnan(self.cut) else f"; {kept} are kept, down to {self.cut:.4g}"


def score_name(rule: Rule) -> str:
    """The column that the rule's score is written under."""
    return type(rule).__name__.lower()


def write_text_rows(source: Path, out: Path, verdicts: Verdicts, shown: "Examples") -> Path:
    """`selected.jsonl`: every row, with score, measures, weight, place, `kept` and `reason`."""
    file = out / "selected.jsonl"
    write_jsonl(file, _text_rows(source, verdicts, shown))
    return file


def write_arrow_rows(source: Path, out: Path, verdicts: Verdicts, shown: "Examples") -> Path:
    """`selected.arrow`, a stream of record batches: the columns of the source, and ours.

    Its `reason` is the same for all rows that were kept or left out for one reason; score and place
    stand beside it.
    """
    return write_tables(out / "selected.arrow", _tables(source, verdicts, shown))


def _tables(source: Path, verdicts: Verdicts, shown: "Examples") -> "Iterator[pyarrow.Table]":
    for block in blocks(source, column_names(source), sizes=ROWS):
        assert isinstance(block, ArrowBlock)
        shown.look_at(block)
        yield _with_columns(block, verdicts)


class Examples:
    """Rows that are shown to a reader, picked up while all rows go by.

    Attributes:
        groups: name of the group -> places of its rows in the file.
        found: place -> the row as plain values.
    """

    def __init__(self, groups: Mapping[str, Sequence[int]]):
        self.groups = groups
        self.found: dict[int, dict[str, Any]] = {}
        self._wanted = sorted({row for rows in groups.values() for row in rows})

    def look_at(self, block: Block) -> None:
        """Take the wanted rows of the block."""
        for row in self._wanted:
            if block.start <= row < block.start + len(block):
                at = row - block.start
                self.found[row] = (
                    dict(block.raws[at].row)
                    if isinstance(block, TextBlock)
                    else block.table.slice(at, 1).to_pylist()[0]
                )


def _text_rows(source: Path, verdicts: Verdicts, shown: Examples) -> Iterator[dict[str, Any]]:
    choice = verdicts.choice
    for block in blocks(source, sizes=ROWS):
        shown.look_at(block)
        part = slice(block.start, block.start + len(block))
        numbers = {n: v.tolist() for n, v in verdicts.numbers(part.start, part.stop).items()}
        why, place = choice.why[part].tolist(), choice.place[part].tolist()
        weight = choice.weight[part].tolist()
        for at, row in enumerate(block.comparisons()):
            found = {name: _null_if_nan(values[at]) for name, values in numbers.items()}
            extra = {
                **row.extra,
                **found,
                "place": place[at],
                "kept": why[at] == KEPT,
                "reason": verdicts.reason(block.start + at),
            }
            yield as_row(replace(row, weight=weight[at], extra=extra))


def _with_columns(block: ArrowBlock, verdicts: Verdicts) -> Any:
    import pyarrow

    start, end = block.start, block.start + len(block)
    choice = verdicts.choice
    columns: dict[str, Any] = {
        name: pyarrow.array(values.numpy(), from_pandas=True)  # NaN becomes null
        for name, values in verdicts.numbers(start, end).items()
    }
    why = choice.why[start:end]
    codes = sorted(verdicts.words)
    coded = pyarrow.DictionaryArray.from_arrays(
        torch.searchsorted(torch.tensor(codes), why.long()).int().numpy(),
        pyarrow.array([verdicts.verdict(code) for code in codes]),
    )
    columns |= {
        "weight": pyarrow.array(choice.weight[start:end].numpy()),
        "place": pyarrow.array(choice.place[start:end].numpy()),
        "kept": pyarrow.array((why == KEPT).numpy()),
        "reason": coded.dictionary_decode(),
    }
    table = block.table.drop_columns([n for n in block.table.column_names if n in columns])
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


def _null_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
