"""Data of preferences: read, check, convert, split and tokenise `Comparison`s."""

from prefloop.data.columns import Columns, parse_columns
from prefloop.data.convert import (
    best_vs_worst,
    drop_ties,
    group,
    ordered,
    rank_from_scores,
    to_pairs,
    unpair,
    with_ranks,
)
from prefloop.data.files import as_row, iterate, read, read_prompts, unique, write
from prefloop.data.held_out import read_divided, split
from prefloop.data.keys import as_text, prompt_key
from prefloop.data.sorting import sorted_by
from prefloop.data.tokens import (
    Empty,
    Encoder,
    Overlong,
    Report,
    encoder,
    has_empty,
    tokenize,
    where,
)

__all__ = [
    "Columns",
    "Empty",
    "Encoder",
    "Overlong",
    "Report",
    "as_row",
    "as_text",
    "best_vs_worst",
    "drop_ties",
    "encoder",
    "group",
    "has_empty",
    "iterate",
    "ordered",
    "parse_columns",
    "prompt_key",
    "rank_from_scores",
    "read",
    "read_divided",
    "read_prompts",
    "sorted_by",
    "split",
    "to_pairs",
    "tokenize",
    "unique",
    "unpair",
    "where",
    "with_ranks",
    "write",
]
