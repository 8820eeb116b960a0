"""Log-probabilities of a round's answers, for rules that read what the policy itself prefers."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from prefloop.data import encoder
from prefloop.policies import Policy
from prefloop.policies.policy import evaluating
from prefloop.types import Comparison, score

ROWS = 16  # comparisons scored at a time


def with_log_ratios(rows: Sequence[Comparison], policy: Policy) -> Iterator[Comparison]:
    """`rows` with `policy_logps` and `reference_logps` in `extra`, a number a response, in nats.

    Of the texts, the end-of-turn token included, and of the policy as it is now.
    """
    tokenized = list(encoder(policy.tokenizer).encode(rows))
    for start in range(0, len(rows), ROWS):
        batch = tokenized[start : start + ROWS]
        with torch.no_grad(), evaluating(policy.model):
            ours = score(policy.scorer(), batch).sum.tolist()
        theirs = policy.reference_logps(batch).sum.tolist()
        for row, mine, base in zip(rows[start : start + ROWS], ours, theirs, strict=True):
            count = len(row.responses)
            logps = {"policy_logps": mine[:count], "reference_logps": base[:count]}
            yield replace(row, extra={**row.extra, **logps})
