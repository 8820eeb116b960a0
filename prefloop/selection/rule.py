"""What a rule is: columns of prompts to one score a prompt."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefloop.types import UserError

Table: TypeAlias = Mapping[str, Tensor]
"""Columns of P prompts: (P, N) a number a response, NaN where a prompt has fewer; (P, N, N) a
number a pair of responses; (P,) a number a prompt."""

ROWS = "count"
"""The column that every file has: how many responses each prompt has, (P,)."""

BEST_WORST = "order"
"""Ranks of the responses (1 = best, NaN = not judged), by score where nobody ranked; (P, N)."""


class Rule(ABC):
    """A score for each prompt; higher means more worth a label.

    The work is done row by row in `measure`, so that a file is read once and in pieces; `scores`
    then sees the measures of all prompts, for rules that compare prompts with each other.

    Attributes:
        columns: what the rule reads.
        measures: names of the numbers that `measure` gives; they are written beside the score.
    """

    columns: ClassVar[tuple[str, ...]]
    measures: ClassVar[tuple[str, ...]]

    @abstractmethod
    def measure(self, table: Table) -> Float[Tensor, "P C"]:
        """The numbers of each prompt, one column for each of `measures`."""

    def scores(self, measured: Float[Tensor, "P C"]) -> Float[Tensor, " P"]:
        """One score a prompt, from the measures of all prompts; the first of them if not said."""
        return measured[:, 0]

    def __call__(self, table: Table) -> Float[Tensor, " P"]:
        return self.scores(self.measure(table))


class BestWorst(NamedTuple):
    """Places of the best and of the worst response of each prompt."""

    best: Int[Tensor, " P"]
    worst: Int[Tensor, " P"]

    def margin(self, values: Float[Tensor, "P N"]) -> Float[Tensor, " P"]:
        """values of the best - values of the worst."""
        rows = torch.arange(len(self.best))
        return values[rows, self.best] - values[rows, self.worst]


def best_worst(order: Float[Tensor, "P N"]) -> BestWorst:
    """The first response of the best rank and the last of the worst, of those that are judged.

    Raises:
        UserError: a prompt whose ranks order nothing.
    """
    judged = ~order.isnan()
    low = order.masked_fill(~judged, torch.inf)
    high = order.masked_fill(~judged, -torch.inf)
    flat = (low.amin(-1) >= high.amax(-1)).nonzero().flatten()
    if flat.numel():
        raise UserError(
            f"this rule compares the best response with the worst, and prompts "
            f"{flat[:5].tolist()} order no two: all tied, or not judged. Leave such rows out with "
            "--filters 'Ordered()', or give ranks or scores that differ"
        )
    last = order.shape[-1] - 1
    return BestWorst(low.argmin(-1), last - high.flip(-1).argmax(-1))


def standardised(values: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """(value - mean) / population standard deviation; 0 for all where they are equal."""
    centred = values - values.mean()
    deviation = centred.square().mean().sqrt()
    return centred / deviation if deviation > 0 else torch.zeros_like(values)
