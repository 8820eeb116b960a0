"""An ensemble from one data set: which rows a member is trained on, and what it says of the rest.

Member k leaves out fold k of the rows and draws as many as remain from the rest, with replacement.
So every row was seen by some members and not by others, and the latter can be asked about it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefloop.types import Comparison


def draws(rows: Sequence[Comparison], members: int, seed: int) -> Int[Tensor, "K B"]:
    """How often each member's data hold each row; with one member, every row once."""
    if members == 1:
        return torch.ones(1, len(rows), dtype=torch.long)
    folds = torch.tensor([_fold(row, members, seed) for row in rows])
    counts = torch.zeros(members, len(rows), dtype=torch.long)
    for member in range(members):
        rng = torch.Generator().manual_seed(1000 * seed + member)
        inside = (folds != member).nonzero().flatten()
        drawn = inside[torch.randint(len(inside), (len(inside),), generator=rng)]
        counts[member] = drawn.bincount(minlength=len(rows))
    return counts


def weighted(rows: Sequence[Comparison], counts: Int[Tensor, " B"]) -> list[Comparison]:
    """The rows that were drawn, each weighing as often as it was drawn times its own weight."""
    return [
        replace(row, weight=row.weight * count)
        for row, count in zip(rows, counts.tolist(), strict=True)
        if count
    ]


def _fold(row: Comparison, members: int, seed: int) -> int:
    told = blake2b(f"{seed}:{row.id}".encode(), digest_size=8).digest()
    return int.from_bytes(told, "big") % members


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """What the members that did not see a row think of its label.

    Attributes:
        flipped: probability that another judgement of the row would go the other way.
        margin: mean lead of the response that the row calls better, in nats.
        spread: standard deviation of that lead over the members asked.
        against: how many of the members asked favour the other response.
        asked: members that did not see the row.
    """

    flipped: float
    margin: float
    spread: float
    against: int
    asked: int


def doubts(margins: Float[Tensor, "K P"], unseen: Bool[Tensor, "K P"]) -> list[Doubt]:
    """The doubt about each of P labels, from each member's margin (chosen - rejected).

        flipped = 1 - mean over the members that did not see the row of sigmoid(margin)

    It counts honest disagreement between people as well as slips: a probability of 1/2 says that
    nobody can know, one near 1 that the label is against everything else in the data.
    """
    found = []
    for values, asked in zip(margins.T, unseen.T, strict=True):
        said = values[asked].double()
        found.append(
            Doubt(
                flipped=float(1 - said.sigmoid().mean()),
                margin=float(said.mean()),
                spread=float(said.std(correction=0)),
                against=int((said < 0).sum()),
                asked=len(said),
            )
        )
    return found
