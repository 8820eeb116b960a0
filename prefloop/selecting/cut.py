"""Which prompts are kept, once each has a score: the end of the ranking, a budget, quotas."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefloop.selection import (
    Kept,
    Purse,
    Quota,
    affordable,
    rank_weights,
    ranking,
    within_quotas,
)
from prefloop.selection.keeping import End
from prefloop.types import UserError

PRICES = {
    "pairs": "each of its N (N - 1) / 2 pairs of responses is compared",
    "responses": "each of its N responses is judged",
    "prompt": "one judgement a prompt, as of the best against the worst",
}
"""How many labels a prompt with N responses costs."""


@dataclass(frozen=True, kw_only=True)
class QuotaOf:
    """At most so much for each value of a column.

    Attributes:
        column: an annotator, a topic: a text or a number a row.
        most: labels from 1 on, a share of the budget below 1.
    """

    column: str
    most: float

    def __post_init__(self) -> None:
        if not 0 < self.most < float("inf"):
            raise UserError(f"quota of {self.column}: must be positive and finite, got {self.most}")

    def __str__(self) -> str:
        return f"{self.column}={self.most:g}"


def parse_quota(text: str) -> QuotaOf:
    """`annotator=100` or `topic=0.2` as a quota."""
    column, _, most = text.partition("=")
    try:
        number = float(most)
    except ValueError:
        raise UserError(
            f"quota {text!r}: write it as COLUMN=LABELS, annotator=100, or as a share of the "
            "budget, topic=0.2"
        ) from None
    return QuotaOf(column=column.strip(), most=number)


class Candidates(NamedTuple):
    """What a cut sees of the prompts that passed the filters.

    Attributes:
        scores: of the rule.
        responses: how many each prompt has.
        groups: for each quota the group of each prompt.
    """

    scores: Float[Tensor, " P"]
    responses: Int[Tensor, " P"]
    groups: tuple[Int[Tensor, " P"], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which scores are kept.

    Attributes:
        keep: the highest, the lowest, or all of at least `threshold`.
        fraction: share of the prompts, rounded down, in (0, 1].
        budget: labels; 0 leaves it to `fraction`.
        threshold: in the units of the rule.
        price: labels that a prompt with N responses costs, one of `PRICES`.
        quotas: at most so much for each annotator or topic.
        spread: keep what lies far apart among the `spread` times as many that are most wanted; 1
            keeps the most wanted.
    """

    keep: End = "top"
    fraction: float = 0.5
    budget: int = 0
    threshold: float = 0.0
    price: Literal["pairs", "responses", "prompt"] = "pairs"
    quotas: tuple[QuotaOf, ...] = ()
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction must be in (0, 1], got {self.fraction}")
        if self.budget < 0:
            raise UserError(f"budget must not be negative, got {self.budget}")
        if not 1 <= self.spread < float("inf"):
            raise UserError(f"spread must be 1 or more, got {self.spread}")
        if math.isnan(self.threshold):
            raise UserError("threshold must be a number, got nan")
        if self.threshold and self.keep != "above":
            raise UserError(
                f"threshold {self.threshold:g} is of use with keep above only, and keep is "
                f"{self.keep}; take --keep above, or leave the threshold out"
            )
        if self.spread > 1 and self.keep == "above":
            raise UserError("spread needs a number to keep: use it with top or bottom")

    @property
    def too_narrow(self) -> str:
        """Why it may be that nothing is kept, and what to do."""
        if self.keep == "above":
            return f"no score reaches the threshold {self.threshold:g}; lower it"
        if self.quotas:
            return f"budget and quotas pay for none ({', '.join(map(str, self.quotas))})"
        if self.budget:
            return f"the first costs more than the budget of {self.budget} (price {self.price!r})"
        return f"a share of {self.fraction:g} is less than one; keep a larger share"

    def costs(self, responses: Int[Tensor, " P"]) -> Int[Tensor, " P"]:
        """What each prompt costs in the unit of `limit`: labels, or prompts without a budget."""
        if not self.budget or self.price == "prompt":
            return torch.ones_like(responses)
        return responses if self.price == "responses" else responses * (responses - 1) // 2

    def limit(self, prompts: int) -> int:
        """How much may be spent on these prompts."""
        if self.budget:
            return self.budget
        if self.keep == "above":
            return prompts
        return int(self.fraction * prompts)

    def order(self, found: Candidates) -> Int[Tensor, " P"]:
        """Places of all candidates, the most wanted first."""
        return ranking(found.scores, "bottom" if self.keep == "bottom" else "top")

    def within(self, order: Int[Tensor, " P"], found: Candidates) -> Int[Tensor, " C"]:
        """The beginning of `order` that may be kept: all of it, but for a threshold."""
        if self.keep != "above":
            return order
        return order[: int((found.scores >= self.threshold).sum())]

    def pool(self, order: Int[Tensor, " C"], found: Candidates) -> Kept:
        """What `spread` chooses from: down `order`, what so many budgets and quotas pay for."""
        return self.take(order, found, times=self.spread)

    def take(self, order: Int[Tensor, " C"], found: Candidates, times: float = 1.0) -> Kept:
        """Down `order`, what the budget and the quotas, each `times` over, pay for."""
        limit = self.limit(len(found.scores))
        cost, whole = self.costs(found.responses), int(times * limit)
        if not self.quotas:
            return Kept(affordable(order, cost, whole), torch.empty(0, dtype=torch.long))
        quotas = [Quota(quota.group, times * quota.most) for quota in self._quotas(found)]
        return within_quotas(order, cost, whole, quotas)

    def purse(self, found: Candidates, places: Int[Tensor, " C"]) -> Purse:
        """What the budget and the quotas pay for, of the candidates at `places` only."""
        cost, limit = self.costs(found.responses), self.limit(len(found.scores))
        quotas = [Quota(quota.group[places], quota.most) for quota in self._quotas(found)]
        return Purse(cost[places], limit, quotas)

    def _quotas(self, found: Candidates) -> list[Quota]:
        limit = self.limit(len(found.scores))
        return [
            Quota(group, quota.most if quota.most >= 1 else quota.most * limit)
            for quota, group in zip(self.quotas, found.groups, strict=True)
        ]

    def kept(self, found: Candidates) -> Bool[Tensor, " P"]:
        """Which candidates are kept, without a spread: what another rule would have kept."""
        mask = torch.zeros(len(found.scores), dtype=torch.bool)
        mask[self.take(self.within(self.order(found), found), found).places] = True
        return mask

    def weights(self, scores: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """A weight a prompt instead of a cut, see `selection.rank_weights`."""
        if self.keep == "above" or self.budget or self.quotas or self.spread > 1:
            raise UserError(
                "weights keep every prompt, so they take no threshold, budget, quota or spread; "
                "leave those out, and set how much the highest count by --fraction"
            )
        return rank_weights(scores, self.fraction, self.keep)
