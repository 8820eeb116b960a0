"""The engine: log-probabilities of responses, with the prompt encoded once."""

from prefloop.logps.head import chunked, exact
from prefloop.logps.layout import Cheapest, buckets, separate, shared
from prefloop.logps.scorer import Scorer

__all__ = ["Cheapest", "Scorer", "buckets", "chunked", "exact", "separate", "shared"]
