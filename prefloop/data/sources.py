"""Rows out of files and data sets, each with the place it was found at.

To add a file format: a function that yields `Raw`s here, and its suffix in `FORMATS`; for one that
keeps columns a function that gives `Columnar`, and its suffix in `COLUMNAR`.
JSON-lines, CSV, Parquet and Arrow are read a piece at a time; a JSON list is held whole.
"""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from prefloop.data.columns import LISTS, Columns
from prefloop.types import UserError

Refuse: TypeAlias = Callable[[UserError], None]
"""What happens to an error in one row: raise it, or note it and go on with the next row."""

BATCH = 1024  # rows of Parquet or Arrow held at a time
HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+(/[\w.-]+)?(:[^/]+)?")
SPACE = re.compile(r"[ \n\r\t]*")
DECODED = LISTS | {"weight"}
"""Columns whose cells hold JSON in a CSV file, which itself knows text only."""


class Raw(NamedTuple):
    """A row as it was found: a mapping of column to value, with nothing checked yet."""

    place: str
    made_id: str
    row: dict[str, Any]


def rows(source: str | Path, columns: Columns, refuse: Refuse) -> Iterator[Raw]:
    """The rows of a file, of a saved data set, or of a data set of the Hugging Face Hub.

    Args:
        source: a file (`FORMATS`, also with .gz behind, or `COLUMNAR`), a folder written by
            `save_to_disk` with an optional ":SPLIT", or a Hub name
            "ORG/NAME[/CONFIGURATION][:SPLIT]".
        columns: names of the file's columns, to know which cells of a CSV hold JSON.
        refuse: called with the error of a row that cannot be decoded.

    Raises:
        UserError: there is no such file, folder or data set, or nothing of it can be read.
    """
    found = columnar(source)
    if found is not None:
        yield from _numbered(found)
        return
    path = Path(source)
    reader = FORMATS.get(_suffix(path))
    if reader is None:
        raise UserError(
            f"{path}: files of type {_suffix(path) or 'no suffix'!r} cannot be read; allowed are "
            f"{', '.join((*FORMATS, *COLUMNAR))}. Convert the file, or rename it if it is one of "
            "these"
        )
    try:
        _refuse_utf16(path)
        yield from reader(path, columns, refuse)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _refuse_utf16(path: Path) -> None:
    """Once, and not for every line: it is what Windows calls Unicode."""
    with _opened(path) as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(
                f"{path}: UTF-16; save it as UTF-8, or convert it: iconv -f UTF-16 -t UTF-8 "
                f"{path.name} > NEW"
            )


class Columnar(NamedTuple):
    """A source that is kept in columns: read some of them, and a piece at a time.

    Attributes:
        name: what the place of a row begins with.
        made: what a made id begins with.
        columns: names of the columns.
        batches: of (names, rows): Arrow batches of those columns, in order, of so many rows at
            most where the file lets us choose.
    """

    name: str
    made: str
    columns: tuple[str, ...]
    batches: Callable[[Sequence[str], int], Iterator[Any]]


def columnar(source: str | Path) -> Columnar | None:
    """`source` as columns: Parquet, Arrow, a saved data set, one of the Hub; None for text files.

    Raises:
        UserError: there is no such file, folder or data set, or it cannot be read.
    """
    path, split = _located(source)
    if path is None:
        return _hub(str(source))
    if path.is_dir():
        return _saved(path, split)
    opener = COLUMNAR.get(_suffix(path))
    return None if opener is None else opener(path)


def _located(source: str | Path) -> tuple[Path | None, str | None]:
    """(path, split) of what is on this machine; (None, None) for a name of the Hub."""
    if Path(source).exists():
        return Path(source), None
    folder, colon, split = str(source).rpartition(":")
    if colon and Path(folder).is_dir():
        return Path(folder), split
    known = _suffix(Path(source)) in FORMATS.keys() | COLUMNAR.keys()
    if known or not HUB_NAME.fullmatch(str(source)):
        raise UserError(f"{source}: there is no such file or folder")
    return None, None


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _opened(path: Path) -> BufferedIOBase:
    return gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb")


def _json_lines(path: Path, columns: Columns, refuse: Refuse) -> Iterator[Raw]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = _object(json.loads(line.decode("utf-8-sig")), place)
            except UserError as error:
                refuse(error)
            except UnicodeDecodeError as error:
                refuse(_not_utf8(place, error))
            except (ValueError, RecursionError) as error:
                refuse(_not_json(place, error))
            else:
                yield Raw(place, f"{path.name}:{number}", row)


def _json(path: Path, columns: Columns, refuse: Refuse) -> Iterator[Raw]:
    with _opened(path) as file:
        begins = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if begins != b"[":  # many .json files hold one object a line
        yield from _json_lines(path, columns, refuse)
        return
    try:
        with _opened(path) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        refuse(_not_utf8(str(path), error))
        return
    yield from _json_list(path, text, refuse)


def _json_list(path: Path, text: str, refuse: Refuse) -> Iterator[Raw]:
    """The objects of a JSON list, decoded one by one so that each knows its line."""
    decoder = json.JSONDecoder()
    at, line, number = text.index("[") + 1, 1, 0
    counted = 0
    while True:
        at = _behind_space(text, at)
        if text[at : at + 1] == "]" and number == 0:
            return
        number += 1
        line += text.count("\n", counted, at)
        counted = at
        place = f"{path}:{line} (row {number})"
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            refuse(_not_json(place, error))
            return  # where the next row begins is anybody's guess
        try:
            yield Raw(place, f"{path.name}:{number}", _object(value, place))
        except UserError as error:
            refuse(error)
        at = _behind_space(text, at)
        if text[at : at + 1] != ",":
            if text[at:].strip() != "]":
                refuse(UserError(f"{place}: behind this row must stand , or the end of the list ]"))
            return
        at += 1


def _behind_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    assert found is not None  # it matches no space as well
    return found.end()


def _csv(path: Path, columns: Columns, refuse: Refuse) -> Iterator[Raw]:
    delimiter = "\t" if _suffix(path) == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)  # a response may be longer than csv's 128 KiB
    roles = _cell_roles(columns)
    with _opened(path) as file:
        lines = (line.decode("utf-8-sig") for line in file)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header) or not all(header):
                raise UserError(
                    f"{path}:1: every column needs its own name; the first line names "
                    f"{', '.join(map(repr, header))}"
                )
            while True:
                place = f"{path}:{reader.line_num + 1}"
                cells = next(reader, None)
                if cells is None:
                    return
                if not cells:
                    continue
                try:
                    row = _csv_row(header, cells, roles, place)
                except UserError as error:
                    refuse(error)
                else:
                    yield Raw(place, f"{path.name}:{place.rpartition(':')[2]}", row)
        except UnicodeDecodeError as error:
            refuse(_not_utf8(f"{path}:{reader.line_num + 1}", error))
        except csv.Error as error:
            refuse(UserError(f'{path}:{reader.line_num}: not CSV: {error}. Quote cells with "'))


def _cell_roles(columns: Columns) -> dict[str, str]:
    """The file's column -> the role of its cells, where a cell is more than text."""
    roles = {name: name for name in DECODED | {"annotator", "id"} if name not in columns}
    for name, theirs in columns.items():
        if name not in DECODED | {"annotator", "id"}:
            continue
        if isinstance(theirs, str):
            roles[theirs] = name
        elif name != "responses":  # gathered responses are text, a cell each
            roles |= dict.fromkeys(theirs, name)
    return roles


def _csv_row(
    header: Sequence[str], cells: Sequence[str], roles: dict[str, str], place: str
) -> dict[str, Any]:
    if len(cells) != len(header):
        raise UserError(
            f"{place}: {len(cells)} cells under {len(header)} columns. Quote a cell that holds the "
            "delimiter"
        )
    return {
        name: _cell(cell, name, roles[name], place) if name in roles else cell
        for name, cell in zip(header, cells, strict=True)
    }


def _cell(cell: str, name: str, role: str, place: str) -> Any:
    if not cell:
        return None
    if role not in DECODED:
        return cell
    try:
        return json.loads(cell.lower() if role == "label" else cell)
    except (ValueError, RecursionError):
        raise UserError(
            f"{place}: the cell of {name} holds {cell[:40]!r}, which is not JSON; write lists as "
            '[1, 2] or ["a", "b"], numbers as 1.5, labels as true or false'
        ) from None


def _parquet(path: Path) -> Columnar:
    from pyarrow import parquet

    def batches(names: Sequence[str], rows: int) -> Iterator[Any]:
        # Read buffered, or a column of a whole row group is in memory at once.
        with (
            _arrow_errors(path, "a Parquet file"),
            parquet.ParquetFile(path, buffer_size=1 << 20) as file,
        ):
            yield from file.iter_batches(batch_size=rows, columns=list(names))

    with _arrow_errors(path, "a Parquet file"):
        names = tuple(parquet.read_schema(path).names)
    return Columnar(str(path), path.name, names, batches)


def _arrow(path: Path) -> Columnar:
    import pyarrow

    def opened(file: Any) -> tuple[Any, Iterator[Any]]:
        try:
            found = pyarrow.ipc.open_stream(file)
            return found.schema, iter(found)
        except pyarrow.ArrowInvalid:  # the other of Arrow's two layouts
            found = pyarrow.ipc.open_file(file)
            return found.schema, map(found.get_batch, range(found.num_record_batches))

    def batches(names: Sequence[str], rows: int) -> Iterator[Any]:
        with _arrow_errors(path, "an Arrow file"), pyarrow.memory_map(str(path)) as file:
            for batch in opened(file)[1]:
                yield batch.select(list(names))

    with _arrow_errors(path, "an Arrow file"), pyarrow.memory_map(str(path)) as file:
        return Columnar(str(path), path.name, tuple(opened(file)[0].names), batches)


@contextmanager
def _arrow_errors(path: Path, what: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not {what} that can be read: {error}") from None


FORMATS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
}
"""Suffix of a text file -> what reads it."""

COLUMNAR = {".parquet": _parquet, ".arrow": _arrow}
"""Suffix of a file of columns -> what opens it."""


def _saved(path: Path, split: str | None) -> Columnar:
    from datasets import load_from_disk

    try:
        found = load_from_disk(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: a folder must be a data set written by save_to_disk: {_line(error)}. To read "
            "one file of it, name the file"
        ) from None
    return _dataset(found, split, str(path), path.name)


def _hub(source: str) -> Columnar:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    parts = name.split("/")
    configuration = parts[2] if len(parts) == 3 else None
    try:
        found = load_dataset("/".join(parts[:2]), configuration)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source}: neither a file here nor a data set that could be loaded: {_line(error)}"
        ) from None
    return _dataset(found, split or None, name, parts[-1])


def _dataset(found: Any, split: str | None, name: str, made: str) -> Columnar:
    """The columns of a `datasets.Dataset`, or of the named one split of a `DatasetDict`."""
    from datasets import DatasetDict

    if isinstance(found, DatasetDict):
        splits = [str(name) for name in found]
        if split is None and len(splits) > 1:
            raise UserError(
                f"{name}: has the splits {', '.join(splits)}; say which, as {name}:{splits[0]}"
            )
        split = splits[0] if split is None else split
        if split not in found:
            raise UserError(f"{name}: has no split {split!r}; it has {', '.join(splits)}")
        found = found[split]
    elif split is not None:
        raise UserError(f"{name}: has no splits, so {split!r} cannot be chosen. Leave :{split} out")
    held = found

    def batches(names: Sequence[str], rows: int) -> Iterator[Any]:
        yield from held.select_columns(list(names)).with_format("arrow").iter(batch_size=rows)

    return Columnar(name, made, tuple(held.column_names), batches)


def _numbered(found: Columnar) -> Iterator[Raw]:
    """The rows of Arrow batches or tables, counted from 1."""
    number = 0
    for batch in found.batches(found.columns, BATCH):
        for row in batch.to_pylist():
            number += 1
            yield Raw(f"{found.name} row {number}", f"{found.made}:{number}", row)


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f'{place}: a row must be a JSON object, as {{"prompt": ...}}; found {value!r:.60}'
        )
    return value


def _not_utf8(place: str, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{place}: not UTF-8: byte {error.object[error.start]:#04x}. Save it as UTF-8")


def _not_json(place: str, error: Exception) -> UserError:
    said = (
        f"{error.msg}, column {error.colno}"
        if isinstance(error, json.JSONDecodeError)
        else _line(error)
    )
    return UserError(
        f"{place}: not JSON: {said}. A .jsonl file has one object a line, a .json file one "
        "list of objects"
    )


def _line(error: Exception) -> str:
    """What an error of a library says, on one line."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
