"""Which column of a file plays which part: our names, renaming, and what to suggest.

A mapping goes from our name to the file's: `{"prompt": "instruction"}`. A list of names gathers
columns into one: `{"responses": ["answer_a", "answer_b"]}`; several columns of `prompt` are joined
by an empty line. An empty name says that the file has no such column, whatever it looks like.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeAlias

from prefloop.types import UserError

Columns: TypeAlias = Mapping[str, str | Sequence[str]]

NAMES = (
    "prompt",
    "responses",
    "rank",
    "scores",
    "ensemble",
    "label",
    "finished",
    "chosen",
    "rejected",
    "completion",
    "annotator",
    "weight",
    "id",
)
"""Columns that mean something; every other column is carried along in `Comparison.extra`."""

LISTS = frozenset({"responses", "rank", "scores", "ensemble", "label", "finished"})

OTHER_NAMES = {
    "prompt": ("instruction", "question", "query", "input", "context"),
    "responses": ("answers", "completions", "candidates", "outputs", "generations"),
    "rank": ("ranks", "ranking"),
    "scores": ("score", "rewards", "ratings"),
    "label": ("labels",),
    "chosen": ("chosen_response", "response_chosen", "preferred", "winner"),
    "rejected": ("reject", "rejected_response", "response_rejected", "dispreferred", "loser"),
    "completion": ("response", "answer", "output", "text"),
    "annotator": ("annotator_id", "worker", "worker_id", "user_id", "rater", "judge"),
}
"""What other data sets call our columns: for suggestions, never applied without being asked."""

NUMBERED = re.compile(r"(?:response|answer|output|completion|candidate|generation)_?(?:[0-9]|[ab])")
"""One of several columns with a response each."""


def parse_columns(words: Iterable[str]) -> dict[str, str | tuple[str, ...]]:
    """The mapping of `prompt=instruction responses=answer_a,answer_b`, as typed in a shell."""
    columns: dict[str, str | tuple[str, ...]] = {}
    for word in words:
        name, equals, theirs = word.partition("=")
        if not equals:
            raise UserError(
                f"--columns takes OURS=THEIRS, such as prompt=instruction; got {word!r}"
            )
        columns[name] = tuple(theirs.split(",")) if "," in theirs else theirs
    refuse_unknown(columns)
    return columns


def refuse_unknown(columns: Columns) -> None:
    """Refuse a mapping whose left side is not a name of ours, or that gathers what is no list."""
    for name, theirs in columns.items():
        if name not in NAMES:
            close = get_close_matches(name, NAMES, n=1)
            meant = f"; perhaps you meant {close[0]}" if close else ""
            raise UserError(
                f"columns: {name!r} is not a column that prefloop reads{meant}. On the left of = "
                f"stands one of {', '.join(NAMES)}"
            )
        if not isinstance(theirs, str) and name not in LISTS | {"prompt"}:
            raise UserError(
                f"columns: {name} is one column, got {', '.join(theirs)}. Several columns can be "
                f"gathered for prompt, {', '.join(sorted(LISTS))}"
            )


def renamed(row: Mapping[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    """The row under our names; the other columns keep theirs.

    A column that already has one of our names but is displaced by the mapping is left out.
    """
    taken = {word for theirs in columns.values() for word in _words(theirs)}
    missing = [word for word in taken if word not in row]
    if missing:
        raise UserError(
            f"{place}: no column {', '.join(sorted(missing))}, which columns asks for; found "
            f"{_listed(row)}. Name a column that every row has"
        )
    kept = {key: value for key, value in row.items() if key not in taken and key not in columns}
    for name, theirs in columns.items():
        if isinstance(theirs, str):
            if theirs:
                kept[name] = row[theirs]
        elif name == "prompt":
            kept[name] = _joined([row[word] for word in theirs], place)
        else:
            kept[name] = [row[word] for word in theirs]
    return kept


def missing(row: Mapping[str, Any], wanted: Sequence[str], place: str) -> UserError:
    """The error of a row that lacks the columns `wanted`."""
    filled = {key: value for key, value in row.items() if value is not None}
    return UserError(
        f"{place}: missing {' and '.join(wanted)}; found {_listed(filled)}. A row needs prompt and "
        "responses, or chosen and rejected, or prompt, completion and label; rename columns with "
        f"--columns OURS=THEIRS{_suggestion(filled, wanted)}"
    )


def _suggestion(row: Mapping[str, Any], wanted: Iterable[str]) -> str:
    """What to rename, where a column looks like a missing one."""
    found = [str(key) for key in row if key not in NAMES]
    pairs = [f"{name}={guess}" for name in wanted if (guess := _guess(name, found))]
    return f", perhaps --columns {' '.join(pairs)}" if pairs else ""


def _guess(name: str, found: Sequence[str]) -> str | None:
    numbered = [key for key in found if NUMBERED.fullmatch(key)]
    if name == "responses" and len(numbered) > 1:
        return ",".join(numbered)
    known = [other for other in OTHER_NAMES.get(name, ()) if other in found]
    return next(iter(known or get_close_matches(name, found, n=1)), None)


def _words(theirs: str | Sequence[str]) -> Sequence[str]:
    if isinstance(theirs, str):
        return [theirs] if theirs else []
    return theirs


def _joined(parts: Sequence[Any], place: str) -> str:
    for part in parts:
        if not isinstance(part, str | None):
            raise UserError(
                f"{place}: several columns make the prompt, and one holds {part!r:.60}; they must "
                "hold text or null"
            )
    return "\n\n".join(part for part in parts if part)


def _listed(row: Mapping[str, Any]) -> str:
    names = [str(key) if str(key).isprintable() else repr(key) for key in row]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "no column"
