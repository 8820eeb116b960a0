"""A source in blocks of rows: text as comparisons, columns as Arrow tables, neither held whole.

Blocks are numbered and have the same rows whoever reads them, so that several processes can share
the work and a killed run knows what it had done.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from prefloop.data import sources
from prefloop.data.rows import comparison
from prefloop.data.sources import Columnar, Raw
from prefloop.types import Comparison, UserError

if TYPE_CHECKING:
    import pyarrow

TEXT_ROWS = 1024
"""Rows of a block of text."""

Share: TypeAlias = Callable[[int], bool]
"""Which blocks are wanted, by their number."""


class Sizes(NamedTuple):
    """Rows of a block: of text rows, and of columns that hold numbers only."""

    text: int = TEXT_ROWS
    columns: int = 65536


@dataclass(frozen=True)
class TextBlock:
    """Rows of a text file.

    Attributes:
        number: of the block, from 0.
        start: rows before it.
        raws: the rows as they were found.
    """

    number: int
    start: int
    raws: Sequence[Raw] = field(repr=False)

    def __len__(self) -> int:
        return len(self.raws)

    def comparisons(self) -> list[Comparison]:
        """The rows, checked."""
        return [comparison(raw.row, {}, raw.place, raw.made_id) for raw in self.raws]


@dataclass(frozen=True)
class ArrowBlock:
    """Rows of a source of columns; only the columns that were asked for.

    Attributes:
        number: of the block, from 0.
        start: rows before it.
        source: where they come from.
        table: the columns.
    """

    number: int
    start: int
    source: Columnar = field(repr=False)
    table: "pyarrow.Table" = field(repr=False)

    def __len__(self) -> int:
        return len(self.table)

    def place(self, row: int) -> str:
        """Where row `row` of the block was found."""
        return f"{self.source.name} row {self.start + row + 1}"

    def comparisons(self) -> list[Comparison]:
        """The rows, checked; they need the columns of prompt and responses."""
        made = self.source.made
        return [
            comparison(row, {}, self.place(at), f"{made}:{self.start + at + 1}")
            for at, row in enumerate(self.table.to_pylist())
        ]


Block: TypeAlias = TextBlock | ArrowBlock


def blocks(
    source: str | Path,
    columns: Sequence[str] | None = None,
    wanted: Share = lambda number: True,
    sizes: Sizes | None = None,
) -> Iterator[Block]:
    """The wanted blocks of `source`, in order; the others are passed over unparsed.

    Args:
        source: as in `data.read`.
        columns: names to read where the source keeps columns (those that it has); None: all.
        wanted: which blocks, by number.
        sizes: rows of a block.

    Raises:
        UserError: the source cannot be read; a row that is no JSON.
    """
    sizes = Sizes() if sizes is None else sizes
    found = sources.columnar(source)
    if found is None:
        yield from _text(source, wanted, sizes.text)
        return
    names = found.columns if columns is None else [n for n in found.columns if n in set(columns)]
    if not names:
        raise UserError(
            f"{found.name}: has none of the columns {', '.join(columns or ())}; it has "
            f"{', '.join(found.columns)}"
        )
    size = sizes.columns if columns is not None else sizes.text
    start = 0
    for number, table in enumerate(_tables(found, names, size)):
        if wanted(number):
            yield ArrowBlock(number, start, found, table)
        start += len(table)


def is_columnar(source: str | Path) -> bool:
    """Whether the source keeps columns (Parquet, Arrow, a data set)."""
    return sources.columnar(source) is not None


def column_names(source: str | Path) -> tuple[str, ...]:
    """Names of a columnar source's columns; none of a text file."""
    found = sources.columnar(source)
    return () if found is None else found.columns


def _text(source: str | Path, wanted: Share, size: int) -> Iterator[TextBlock]:
    raws = sources.rows(source, {}, _raise)
    number = start = 0
    while part := list(islice(raws, size)):
        if wanted(number):
            yield TextBlock(number, start, part)
        number += 1
        start += len(part)


def _tables(found: Columnar, names: Sequence[str], size: int) -> Iterator[Any]:
    """Tables of exactly `size` rows, the last one shorter, however the file is cut."""
    import pyarrow

    held: list[Any] = []
    rows = 0
    for batch in found.batches(names, size):
        held.append(batch if isinstance(batch, pyarrow.Table) else pyarrow.table(batch))
        rows += len(batch)
        if rows < size:
            continue
        table = pyarrow.concat_tables(held)
        whole = rows - rows % size
        for start in range(0, whole, size):
            yield table.slice(start, size)
        held, rows = [table.slice(whole)], rows - whole
    if rows:
        yield pyarrow.concat_tables(held)


def _raise(error: UserError) -> None:
    raise error


def write_tables(file: Path, tables: "Iterable[pyarrow.Table]") -> Path:
    """One Arrow stream of `tables`, whole or not at all; its schema is that of the first.

    No table leaves a file of no bytes.
    """
    import pyarrow

    part, writer = file.with_name(f".{file.name}.part"), None
    with pyarrow.OSFile(str(part), "wb") as sink:
        for table in tables:
            if writer is None:
                writer = pyarrow.ipc.new_stream(sink, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    part.replace(file)
    return file
