"""The engine: log-probabilities of responses, with the prompt encoded once."""

from prefloop.logps.cache import CachedLogps, cached_reference, model_identity
from prefloop.logps.check import random_state_kept
from prefloop.logps.distinct import Distinct, distinct, logps_once
from prefloop.logps.embedded import EmbeddedScorer
from prefloop.logps.head import chunked, exact
from prefloop.logps.layout import TOKENS, buckets, by_buckets
from prefloop.logps.scorer import Scorer, hidden_sums, logps_and_hidden_sums, verify
from prefloop.logps.sharing import shared_logps
from prefloop.logps.ways import FullLogits, Masked, OneARow, PrefixShared

__all__ = [
    "TOKENS",
    "CachedLogps",
    "Distinct",
    "EmbeddedScorer",
    "FullLogits",
    "Masked",
    "OneARow",
    "PrefixShared",
    "Scorer",
    "buckets",
    "by_buckets",
    "cached_reference",
    "chunked",
    "distinct",
    "exact",
    "hidden_sums",
    "logps_and_hidden_sums",
    "logps_once",
    "model_identity",
    "random_state_kept",
    "shared_logps",
    "verify",
]
