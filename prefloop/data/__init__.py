"""Data of preferences: read, check, convert, split and tokenise `Comparison`s."""

from prefloop.data.columns import Columns, parse_columns
from prefloop.data.files import as_row, iterate, read, read_prompts, unique, write
from prefloop.data.keys import prompt_key
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
    "encoder",
    "has_empty",
    "iterate",
    "parse_columns",
    "prompt_key",
    "read",
    "read_prompts",
    "tokenize",
    "unique",
    "where",
    "write",
]
