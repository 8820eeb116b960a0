"""How alike chosen and rejected are for the model before training, and whether the alike ones fell.

CHES (arXiv 2410.08847) of every ordered pair, from hidden states alone: forward passes only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from prefloop.diagnostics.displacement import ches, ches_per_token
from prefloop.intervals import Estimate, mean
from prefloop.types import Tokenized, UserError, ordered_pairs

WORST = 10
"""Pairs of the highest score that are named."""


@dataclass(frozen=True, kw_only=True)
class Alikeness:
    """CHES of pairs under the model before training.

    Attributes:
        score: <E_w, E_l> - |E_w|^2, mean over pairs; 0 for equal responses, in squared units of the
            hidden state.
        values: the same per token, one a pair, sorted.
        follows: Spearman's correlation of the score per token with the change of the chosen's
            log-probability, in [-1, 1]; below 0 where alike pairs lost most. NaN where one of the
            two does not vary.
        highest: ids of the comparisons of highest score per token, most alike first.
    """

    score: Estimate
    values: tuple[float, ...]
    follows: float
    highest: tuple[str, ...]


def alikeness(
    sums: Float[Tensor, "B N D"],
    length: Int[Tensor, "B N"],
    moved: Float[Tensor, "B N"],
    rank: Int[Tensor, "B N"],
    rows: Sequence[Tokenized],
) -> Alikeness:
    """CHES of every strictly ordered pair.

    Args:
        sums: `logps.hidden_sums` of the responses under the model before training.
        length: tokens of each.
        moved: log pi - log pi_ref of each, nats.
        rank: 1 = best, equal = tied, 0 = not judged.
        rows: for their ids.
    """
    row, chosen, rejected = ordered_pairs(rank)
    if not len(row):
        raise UserError(f"none of the {len(rank)} comparisons orders two responses; give ranks")
    pair = sums[row, chosen], sums[row, rejected]
    token = ches_per_token(*pair, length[row, chosen], length[row, rejected])
    change = moved[row, chosen]
    varies = len(row) > 2 and token.std() > 0 and change.std() > 0
    orders = stats.rankdata(token.numpy()), stats.rankdata(change.numpy())
    follows = float(np.corrcoef(*orders)[0, 1]) if varies else float("nan")
    order = row[token.argsort(descending=True)].tolist()
    return Alikeness(
        score=mean(ches(*pair), row),
        values=tuple(token.sort().values.tolist()),
        follows=follows,
        highest=tuple(rows[place].id for place in dict.fromkeys(order))[:WORST],
    )


def lengths(rows: Sequence[Tokenized]) -> Int[Tensor, "B N"]:
    """Tokens of each response; 0 where there is none."""
    width = max(len(row.responses) for row in rows)
    counts = [[len(response) for response in row.responses] for row in rows]
    return torch.tensor([count + [0] * (width - len(count)) for count in counts])
