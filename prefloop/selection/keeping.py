"""Scores of prompts to the prompts that are kept: ranking, budgets, quotas, weights."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefloop.types import UserError

End: TypeAlias = Literal["top", "bottom", "above"]
STEP = 65536  # prompts looked at in one go where they are looked at one by one


class Quota(NamedTuple):
    """At most `most` units of the budget for each group of prompts.

    Attributes:
        group: the number of each prompt's group (an annotator, a topic).
        most: units a group may take.
    """

    group: Int[Tensor, " P"]
    most: float


class Kept(NamedTuple):
    """What was chosen.

    Attributes:
        places: of the kept prompts, the most wanted first.
        refused: places of prompts that a quota kept out while they were in reach of the budget.
    """

    places: Int[Tensor, " C"]
    refused: Int[Tensor, " C2"]


def ranking(scores: Float[Tensor, " P"], keep: End, threshold: float = 0.0) -> Int[Tensor, " C"]:
    """Places of the prompts, the most wanted first.

    Of equal scores the earlier row comes first; with `bottom` the later does, so that the top and
    the bottom half never overlap. `above` leaves out scores below `threshold`.
    """
    _refuse_bad_scores(scores, 0)
    order = scores.argsort(descending=True, stable=True)
    if keep == "bottom":
        return order.flip(0)
    return order if keep == "top" else order[scores[order] >= threshold]


def affordable(
    order: Int[Tensor, " C"], cost: Int[Tensor, " P"], budget: int
) -> Int[Tensor, " C2"]:
    """The longest beginning of `order` whose costs together stay within `budget`."""
    return order[cost[order].cumsum(0) <= budget]


def within_quotas(
    order: Int[Tensor, " C"], cost: Int[Tensor, " P"], budget: int, quotas: Sequence[Quota]
) -> Kept:
    """Down `order`, every prompt that its groups' quotas and then the budget can still pay for.

    A prompt that a quota keeps out costs nothing; at the first that the budget cannot pay, it ends.
    """
    spent = [[0] * (int(quota.group.max()) + 1) for quota in quotas]
    kept: list[int] = []
    refused: list[int] = []
    left = budget
    for place, price, groups in _one_by_one(order, cost, quotas):
        if price > left:
            break
        if any(
            used[group] + price > quota.most
            for used, group, quota in zip(spent, groups, quotas, strict=True)
        ):
            refused.append(place)
            continue
        kept.append(place)
        left -= price
        for used, group in zip(spent, groups, strict=True):
            used[group] += price
    return Kept(torch.tensor(kept, dtype=torch.long), torch.tensor(refused, dtype=torch.long))


class Purse:
    """What a budget and quotas still pay for, while prompts are taken one at a time.

    Args:
        cost: of each prompt.
        budget: for all of them together.
        quotas: for each group of prompts.
    """

    def __init__(self, cost: Int[Tensor, " P"], budget: int, quotas: Sequence[Quota]) -> None:
        self._cost = cost
        self._left = budget
        self._quotas = quotas
        self._spent = [torch.zeros(int(quota.group.max()) + 1) for quota in quotas]

    def pay(self, place: int) -> None:
        """Take the prompt at `place`."""
        self._left -= int(self._cost[place])
        for quota, spent in zip(self._quotas, self._spent, strict=True):
            spent[quota.group[place]] += self._cost[place]

    def payable(self) -> Bool[Tensor, " P"]:
        """Which prompts could be taken next."""
        fine = self._cost <= self._left
        for quota, spent in zip(self._quotas, self._spent, strict=True):
            fine &= spent[quota.group] + self._cost <= quota.most
        return fine


def _one_by_one(
    order: Tensor, cost: Tensor, quotas: Sequence[Quota]
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(place, cost, group in each quota) of each prompt, without a list of all."""
    for part in order.split(STEP):
        groups = zip(*(quota.group[part].tolist() for quota in quotas), strict=True)
        yield from zip(part.tolist(), cost[part].tolist(), groups, strict=True)


def rank_weights(
    scores: Float[Tensor, " P"], fraction: float, keep: Literal["top", "bottom"] = "top"
) -> Float[Tensor, " P"]:
    """A weight a prompt instead of a cut, mean 1: the share of prompts it beats, to a power.

        w = u^a / mean(u^a),   u = (prompts it beats + half of those it equals) / P,   a = 1/f - 1

    With f = 1 all weigh 1, with f = 1/2 they grow in a straight line from 0 to 2, and the smaller f
    the more the highest count. Only the order of the scores matters, so it is unchanged by any
    increasing function of them; equal scores weigh the same. Our choice.

    Args:
        scores: of the rule.
        fraction: f, in (0, 1].
        keep: which end weighs more.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction must be in (0, 1], got {fraction}")
    _refuse_bad_scores(scores, 0)
    values = scores if keep == "top" else -scores
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    middle = count.cumsum(0) - 0.5 * count.double()
    weight = (middle / len(scores))[place] ** (1 / fraction - 1)
    return weight / weight.mean()


def overlap(first: Bool[Tensor, " P"], second: Bool[Tensor, " P"]) -> float:
    """Share of the prompts in `first` that are in `second` too, in [0, 1]; NaN of none."""
    kept = int(first.sum())
    return int((first & second).sum()) / kept if kept else float("nan")


def top(scores: Float[Tensor, " P"], count: int) -> Int[Tensor, " C"]:
    """Indices of the `count` highest scores, in data order; of equal scores the earlier is kept."""
    _refuse_bad_scores(scores, count)
    return ranking(scores, "top")[:count].sort().values


def bottom(scores: Float[Tensor, " P"], count: int) -> Int[Tensor, " C"]:
    """Indices of the `count` lowest scores, in data order; of equal scores the later is kept.

    Ties go the other way than in `top`, so that the top and the bottom half never overlap.
    """
    _refuse_bad_scores(scores, count)
    return ranking(scores, "bottom")[:count].sort().values


def above(scores: Float[Tensor, " P"], threshold: float) -> Int[Tensor, " C"]:
    """Indices of the scores of at least `threshold`, in data order."""
    return ranking(scores, "above", threshold).sort().values


def _refuse_bad_scores(scores: Tensor, count: int) -> None:
    if scores.isnan().any():
        raise UserError(f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN")
    if not 0 <= count <= len(scores):
        raise UserError(f"cannot keep {count} of {len(scores)} prompts")
