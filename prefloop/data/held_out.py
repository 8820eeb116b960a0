"""A held-out part that shares nothing with the rest."""

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from prefloop.data.columns import Columns
from prefloop.data.files import read
from prefloop.data.keys import prompt_key
from prefloop.data.tokens import where
from prefloop.types import Comparison, UserError


def split(
    comparisons: Iterable[Comparison],
    fraction: float,
    seed: int,
    by: Literal["prompt", "annotator"] = "prompt",
) -> tuple[list[Comparison], list[Comparison]]:
    """(training rows, held-out rows), both in their old order; no prompt is on both sides.

    Prompts are ordered by a hash of the seed and the prompt, and the first `fraction` of them is
    held out: rounded, but never none and never all. The order of rows changes nothing, nor do
    repeated rows, and one more prompt moves at most one other.

    Args:
        comparisons: the rows.
        fraction: share of the prompts to hold out, in (0, 1).
        seed: another seed holds out other prompts.
        by: what stays together: the rows of a prompt, or of an annotator.

    Raises:
        UserError: a fraction outside (0, 1), fewer than two prompts, a row without an annotator.
    """
    if not 0 < fraction < 1:
        raise UserError(
            f"the fraction to hold out must lie between 0 and 1, got {fraction}; usual is 0.1"
        )
    rows = list(comparisons)
    keys = [prompt_key(row.prompt) if by == "prompt" else _annotator(row) for row in rows]
    distinct = sorted(set(keys), key=lambda key: _hash(seed, key))
    if len(distinct) < 2:
        raise UserError(
            f"cannot hold out a part of {len(distinct)} {by}; two or more are needed. Give "
            "held-out data of its own"
        )
    count = min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
    held_out = set(distinct[:count])
    both = list(zip(rows, keys, strict=True))
    return (
        [row for row, key in both if key not in held_out],
        [row for row, key in both if key in held_out],
    )


def read_divided(
    path: Path, held_out: Path | None, fraction: float, seed: int, columns: Columns
) -> tuple[list[Comparison], list[Comparison]]:
    """(training rows, held-out rows): of `path` and of `held_out`, or a `split` of `path` alone.

    Args:
        path, held_out: any data that `read` reads.
        fraction: share of the prompts of `path` that is held out where `held_out` is None; 0 holds
            out none.
        seed: of the split.
        columns: other names of columns, of both.
    """
    rows = read(path, columns)
    if held_out:
        return rows, read(held_out, columns)
    return split(rows, fraction, seed) if fraction else (rows, [])


def _hash(seed: int, key: str) -> bytes:
    return blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()


def _annotator(row: Comparison) -> str:
    if row.annotator is None:
        raise UserError(
            f"{where(row)}: no annotator, so the data cannot be split by annotator. Name the "
            "column with --columns annotator=NAME, or split by prompt"
        )
    return row.annotator
