"""Comparisons from files and to files."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prefloop import runs
from prefloop.data import sources
from prefloop.data.columns import NAMES, Columns, refuse_unknown
from prefloop.data.keys import prompt_key
from prefloop.data.rows import comparison, prompt_only
from prefloop.data.sources import Refuse
from prefloop.data.tokens import where
from prefloop.types import Comparison, UserError


def read(source: str | Path, columns: Columns | None = None) -> list[Comparison]:
    """Every comparison of a file or data set, all checked, in its order.

    Rows may be written as

        prompt, responses, and rank (1 = best) or scores or label, one entry a response;
        ensemble, a list a response with one score a reward model, may stand beside them
        prompt, chosen, rejected; or chosen and rejected alone, which then begin with the prompt
        prompt, completion, label (true = good)

    with text or chat messages (lists of {"role", "content"}) for prompt, chosen, rejected and
    completion; `annotator`, `weight` and `id` may stand beside them, and other columns are kept in
    `extra`. chosen/rejected become the ranks 1 and 2.

    Args:
        source: JSON-lines, JSON, CSV, TSV, Parquet or Arrow, a folder written by `save_to_disk`, or
            a Hub name with an optional split: "ORG/NAME[/CONFIGURATION][:SPLIT]".
        columns: our name -> the file's name or names, `{"prompt": "instruction"}`.

    Raises:
        UserError: the first row that is not allowed, ids that repeat, or no row at all.
    """
    found = list(unique(iterate(source, columns), _raise))
    if not found:
        raise UserError(f"{source}: holds no row; at least one is needed")
    return found


def iterate(
    source: str | Path, columns: Columns | None = None, refuse: Refuse | None = None
) -> Iterator[Comparison]:
    """The comparisons of `read` one by one, in constant memory (a JSON list is held whole).

    That ids differ is not checked here, since it takes memory: wrap it in `unique` for that.

    Args:
        source, columns: as in `read`.
        refuse: called with the error of each bad row, which is then left out. None: the first bad
            row raises its error.
    """
    refuse = _raise if refuse is None else refuse
    columns = {} if columns is None else columns
    refuse_unknown(columns)
    for place, made_id, row in sources.rows(source, columns, refuse):
        try:
            found = comparison(row, columns, place, made_id)
        except UserError as error:
            refuse(error)
        else:
            yield found


def read_prompts(source: str | Path, columns: Columns | None = None) -> list[Comparison]:
    """Each prompt of a file once, in order of appearance, as comparisons without responses.

    Rows may hold a prompt alone, or be of any form that `read` takes: their responses are left
    out, and of rows with the same prompt the first stands for all.
    """
    columns = {} if columns is None else columns
    refuse_unknown(columns)
    found: dict[str, Comparison] = {}
    for place, made_id, row in sources.rows(source, columns, _raise):
        prompt = prompt_only(row, columns, place, made_id)
        found.setdefault(prompt_key(prompt.prompt), prompt)
    if not found:
        raise UserError(f"{source}: holds no prompt; at least one is needed")
    return list(unique(found.values(), _raise))


def read_row(source: str | Path, number: int, columns: Columns | None = None) -> Comparison:
    """Row `number` of a file, counted from 1; bad rows before it count too.

    Raises:
        UserError: the row is bad, or there is no such row.
    """
    count = 0

    def refuse(error: UserError) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise error

    for row in iterate(source, columns, refuse):
        count += 1
        if count == number:
            return row
    raise UserError(f"{source}: there is no row {number}; it has {count:,}, counted from 1")


def unique(comparisons: Iterable[Comparison], refuse: Refuse) -> Iterator[Comparison]:
    """`comparisons`, without those whose id another one had before: `refuse` gets their error."""
    places: dict[str, str] = {}
    for found in comparisons:
        if found.id in places:
            refuse(
                UserError(
                    f"{where(found)}: the id {found.id!r} is used already at {places[found.id]}; "
                    "every row needs its own. Ignore the column with --columns id=, and ids are "
                    "made from the places"
                )
            )
            continue
        places[found.id] = found.place
        yield found


def write(path: str | Path, comparisons: Iterable[Comparison]) -> int:
    """Write JSON-lines that `read` reads back as the same comparisons; returns how many.

    The file appears whole or not at all. Only `place` is not kept: it is where a row was read.

    Raises:
        UserError: a column of `extra` that has a name of ours or cannot be written as JSON.
    """
    return runs.write_jsonl(Path(path), map(as_row, comparisons))


def as_row(comparison: Comparison) -> dict[str, Any]:
    """The columns of a comparison in a file; what is None or the default is left out."""
    if taken := sorted(comparison.extra.keys() & set(NAMES)):
        raise UserError(
            f"{where(comparison)}: extra holds {', '.join(taken)}, a name that means something; "
            f"rename it. Taken are {', '.join(NAMES)}"
        )
    prompt = comparison.prompt
    row: dict[str, Any] = {
        "id": comparison.id,
        "prompt": prompt if isinstance(prompt, str) else [dict(message) for message in prompt],
        "responses": list(comparison.responses),
        "finished": comparison.finished,
        "rank": comparison.rank,
        "scores": comparison.scores,
        "ensemble": comparison.ensemble,
        "label": comparison.label,
        "annotator": comparison.annotator,
        "weight": None if comparison.weight == 1.0 else comparison.weight,
    }
    extra = {key: _plain(key, value, comparison) for key, value in comparison.extra.items()}
    return {key: value for key, value in row.items() if value not in (None, "", [])} | extra


def _plain(name: str, value: Any, comparison: Comparison) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where(comparison)}: the column {name} cannot be written as JSON: {error}. Drop the "
            "column, or turn it into text"
        ) from None
    return value


def _raise(error: UserError) -> None:
    raise error
