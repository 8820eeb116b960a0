"""The engine: log-probabilities of responses, with the prompt encoded once."""

from prefloop.logps.head import chunked, exact
from prefloop.logps.layout import buckets
from prefloop.logps.scorer import Scorer, hidden_sums, verify
from prefloop.logps.ways import FullLogits, Masked, OneARow, PrefixShared

__all__ = [
    "FullLogits",
    "Masked",
    "OneARow",
    "PrefixShared",
    "Scorer",
    "buckets",
    "chunked",
    "exact",
    "hidden_sums",
    "verify",
]
