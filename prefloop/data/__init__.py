"""Data of preferences: read, check, convert, split and tokenise `Comparison`s."""

from prefloop.data.tokens import Encoder, Overlong, Report, encoder, tokenize

__all__ = ["Encoder", "Overlong", "Report", "encoder", "tokenize"]
