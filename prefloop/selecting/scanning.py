"""One pass over the rows: what rules and filters measure, a few numbers a row, block by block.

Each block's numbers are a file in a folder, written whole or not at all: processes share the
blocks, and a run that was killed goes on with those that are missing.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefloop.data.blocks import Block, Sizes, TextBlock, blocks, column_names
from prefloop.runs import read_json, write_json
from prefloop.selecting.columns import hashed, place_of, stored, table_of, values_of
from prefloop.selection import Filter, Rule, Table
from prefloop.selection.rule import ROWS
from prefloop.shares import Worker
from prefloop.types import UserError

NUMBERS = Sizes(text=8192, columns=65536)
TEXTS = Sizes(text=8192, columns=4096)
WHAT = "what.json"
"""What was measured: a folder is gone on with by the same work only."""
END = "end.json"
"""How many blocks there are; the last thing that a scan writes."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What is measured.

    Attributes:
        rules: their measures, side by side.
        filters: which rows are looked at; a rule sees only rows that each row-by-row filter passes.
        groups: columns whose values are counted apart, for quotas.
    """

    rules: tuple[Rule, ...]
    filters: tuple[Filter, ...] = ()
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [type(rule).__name__ for rule in self.rules]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(
                f"two rules are called {twice[0]}, and so would be their columns; take one of them"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a table that rules and filters read."""
        read = [name for one in (*self.filters, *self.rules) for name in one.columns]
        return tuple(dict.fromkeys((ROWS, *read)))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The numbers of all rows.

    Attributes:
        passed: which rows every filter passes.
        measures: for each rule what it measured, NaN in rows that did not pass.
        count: responses of each row.
        groups: for each column of `Scan.groups` the number of the row's value in `names`.
        names: for each of these columns its values.
        refused: number of the filter that left the row out, from 1; 0 for rows that passed.
    """

    passed: Bool[Tensor, " P"]
    measures: tuple[Float[Tensor, "P _"], ...]
    count: Int[Tensor, " P"]
    groups: tuple[Int[Tensor, " P"], ...]
    names: tuple[tuple[str, ...], ...]
    refused: Int[Tensor, " P"]


def scan(
    source: Path,
    work: Scan,
    folder: Path,
    worker: Worker,
    on_rows: Callable[[int], None] = lambda done: None,
) -> None:
    """Measure this worker's blocks of `source` into `folder`; blocks that are there stay.

    Args:
        on_rows: called with the number of rows that have been passed.

    Raises:
        UserError: a row that cannot be measured, by its place; no row at all; a folder that holds
            measures of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_other_work(source, work, folder, worker)
    if (folder / END).exists():
        return
    available = column_names(source)
    read = {*stored(work.columns, available), *work.groups} if available else set()
    names = [name for name in available if name in read]
    sizes = TEXTS if {"prompt", "responses", "chosen", "completion"} & read else NUMBERS
    seen = 0

    def wanted(number: int) -> bool:
        nonlocal seen
        seen = number + 1
        return worker.owns(number) and not _file(folder, number).exists()

    for block in blocks(source, names or None, wanted, sizes):
        _measure(block, work, _file(folder, block.number))
        on_rows(block.start + len(block))
    if not seen:
        raise UserError(f"{source}: there is no row to select from")
    if worker.leads:
        write_json(folder / END, {"blocks": seen})


def gather(work: Scan, folder: Path) -> Measured:
    """The measures of all rows, out of the folder that `scan` filled.

    Raises:
        UserError: two rows of a text file with one id.
    """
    files = [_file(folder, number) for number in range(read_json(folder / END)["blocks"])]
    _refuse_repeated_ids(files)
    passed, marks = _all(files, "passed"), _all(files, "marks")
    refused = torch.zeros(len(passed), dtype=torch.int16)
    for number, one in enumerate(work.filters):
        rows = passed.nonzero().flatten()
        out = torch.zeros(len(passed), dtype=torch.bool)
        out[rows[~one.keeps(marks[rows, number])]] = True  # by comparing rows with each other
        out |= (marks[:, number] == 0) & (refused == 0)  # by the row alone
        refused[out] = number + 1
        passed &= ~out
    codes, names = [], []
    for number, column in enumerate(work.groups):
        values, code = _all(files, f"group-{number}").unique(return_inverse=True)
        known = _names(files, column)
        codes.append(code)
        names.append(tuple(known[value] for value in values.tolist()))
    return Measured(
        passed=passed,
        measures=tuple(_all(files, f"rule-{number}") for number in range(len(work.rules))),
        count=_all(files, "count").long(),
        groups=tuple(codes),
        names=tuple(names),
        refused=refused,
    )


def _measure(block: Block, work: Scan, file: Path) -> None:
    """Measure one block and write its file."""
    table = table_of(block, work.columns)
    marks = [one.mark(table) for one in work.filters]
    passed = torch.ones(len(block), dtype=torch.bool)
    for mark in marks:
        passed &= mark != 0
    rows = passed.nonzero().flatten()
    tensors = {
        "passed": passed,
        "count": table[ROWS].int(),
        "marks": torch.stack(marks, dim=-1) if marks else torch.zeros(len(block), 0).long(),
    }
    seen = {name: values[rows] for name, values in table.items()}
    for number, rule in enumerate(work.rules):
        measured = torch.full((len(block), len(rule.measures)), torch.nan, dtype=torch.float64)
        measured[rows] = _by(rule, seen, block, rows).double()
        tensors[f"rule-{number}"] = measured
    if isinstance(block, TextBlock):
        own = [str(raw.row.get("id") or raw.made_id) for raw in block.raws]
        tensors["id"] = torch.tensor([hashed(name) for name in own])
    names = {}
    for number, column in enumerate(work.groups):
        values = [str(value) for value in values_of(block, column)]
        coded = {value: hashed(value) for value in set(values)}
        tensors[f"group-{number}"] = torch.tensor([coded[value] for value in values])
        names[column] = json.dumps({code: value for value, code in coded.items()})
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part, names)
    part.replace(file)


def _by(rule: Rule, table: Table, block: Block, rows: Tensor) -> Tensor:
    """What the rule measures; what it refuses is said with the place of the first such row."""
    try:
        return rule.measure(table)
    except UserError:
        for at, row in enumerate(rows.tolist()):
            try:
                rule.measure({name: values[at : at + 1] for name, values in table.items()})
            except UserError as error:
                raise UserError(f"{place_of(block, row)}: {error}") from None
        raise


def _refuse_other_work(source: Path, work: Scan, folder: Path, worker: Worker) -> None:
    about = Path(source).stat() if Path(source).is_file() else None
    what = {
        "source": str(source),
        "bytes": about.st_size if about else None,
        "changed": about.st_mtime_ns if about else None,
        "work": repr(work),
    }
    known = folder / WHAT
    if known.exists() and (before := read_json(known)) != what:
        differs = [name for name, value in what.items() if before.get(name) != value]
        raise UserError(
            f"{folder}: holds measures of another selection ({', '.join(differs)} differ); remove "
            "this folder, or take another --out"
        )
    if worker.leads:
        write_json(known, what)


def _file(folder: Path, number: int) -> Path:
    return folder / f"block-{number:06}.safetensors"


def _refuse_repeated_ids(files: Sequence[Path]) -> None:
    """Of a text file, where each row is read whole; of columns the ids are not read."""
    with safe_open(files[0], framework="pt") as held:
        if "id" not in held.keys():  # noqa: SIM118 - no mapping
            return
    ids, order = _all(files, "id").sort(stable=True)
    twice = (ids[1:] == ids[:-1]).nonzero().flatten()
    if len(twice):
        first, second = order[twice[0]] + 1, order[twice[0] + 1] + 1
        raise UserError(
            f"rows {first} and {second} have the same id; training tells rows apart by it. Give "
            "each its own, or leave the column out"
        )


def _all(files: Sequence[Path], name: str) -> Tensor:
    """One tensor of all blocks, joined; no more than two copies of it exist at a time."""
    parts = []
    for file in files:
        with safe_open(file, framework="pt") as held:
            parts.append(held.get_tensor(name))
    return torch.cat(parts)


def _names(files: Sequence[Path], column: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as held:
            coded = json.loads(held.metadata()[column])
        found.update({int(code): value for code, value in coded.items()})
    return found
