"""Rows that several processes score: each its share, all of them know the whole."""

from collections.abc import Sequence

import torch
from torch import nn

from prefloop.logps.layout import response_mask, table_shape
from prefloop.shares import Worker
from prefloop.types import Logps, Tokenized, score


def shared_logps(scorer: nn.Module, rows: Sequence[Tokenized], worker: Worker) -> Logps:
    """What `scorer` says of `rows`, (B, N, T) on the CPU, each worker scoring its share.

    Log-probabilities only: no collision, no gradient.
    """
    with torch.no_grad():
        if worker.count == 1:
            return score(scorer, rows).to("cpu")
        found = worker.mapped(lambda mine: score(scorer, mine).token.cpu().unbind(), rows)
    token = found[0].new_zeros(table_shape(rows))
    for at, one in enumerate(found):  # each is padded to the largest row of its worker
        count, longest = min(one.shape[0], token.shape[1]), min(one.shape[1], token.shape[2])
        token[at, :count, :longest] = one[:count, :longest]
    return Logps(token, response_mask(rows))
