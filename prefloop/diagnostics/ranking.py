"""Who orders the data as its labels do: the policy, its reference, the implicit reward.

Pairs are every strictly ordered pair of a comparison, as the objectives see them; pairs of one
comparison are one cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefloop.diagnostics.roles import change, pairs
from prefloop.evaluation import (
    Accuracy,
    Calibration,
    Groups,
    by_group,
    calibration,
    preference_accuracy,
)
from prefloop.intervals import Estimate, mean
from prefloop.types import Logps, UserError


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Preference accuracies of several scores on the same pairs.

    Attributes:
        policy, reference: log pi(y|x), nats per response.
        policy_token, reference_token: log pi(y|x) / |y|, nats per token.
        implicit: beta log pi / pi_ref, for any beta > 0.
        idealized: of the policy that DPO would reach with the true reward; None where it is not
            known. Below 1 where the reference is so far off that the optimum keeps its order.
    """

    policy: Accuracy
    reference: Accuracy
    policy_token: Accuracy
    reference_token: Accuracy
    implicit: Accuracy
    idealized: Accuracy | None


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Margins of the pairs whose prompt has a score in [low, high]."""

    low: float
    high: float
    margin: Estimate
    accuracy: Accuracy


def ranking(
    policy: Logps,
    reference: Logps,
    rank: Int[Tensor, "B N"],
    rewards: Float[Tensor, "B N"] | None = None,
    beta: float = 0.1,
    clusters: Int[Tensor, " B"] | None = None,
) -> Ranking:
    """Ranking accuracy of policy, reference and implicit reward.

    Args:
        policy, reference: (B, N, T) log-probabilities of the same responses.
        rank: 1 = best, equal = tied, 0 = not judged.
        rewards: the true reward of each response, the logit of the preference, where it is known:
            the optimum is then log pi* = log pi_ref + reward / beta.
        beta: of training; only `idealized` depends on it.
        clusters: the prompt of each comparison, where several share one; else each is its own.

    References:
        Chen et al., "Preference Learning Algorithms Do Not Learn Preference Rankings",
        arXiv 2405.19534 (idealized ranking accuracy; formula derived from DPO's optimum).
    """
    moved = change(policy, reference)
    row, chosen, rejected = pairs(rank)
    prompt = row if clusters is None else clusters[row]

    def accuracy(score: Float[Tensor, "B N"]) -> Accuracy:
        return preference_accuracy(score[row, chosen] - score[row, rejected], prompt)

    base = reference.token.double().sum(-1)
    length = policy.length.clamp(min=1)
    return Ranking(
        policy=accuracy(base + moved),
        reference=accuracy(base),
        policy_token=accuracy((base + moved) / length),
        reference_token=accuracy(base / length),
        implicit=accuracy(moved),
        idealized=None if rewards is None else accuracy(base + rewards.double() / beta),
    )


def margins(
    policy: Logps, reference: Logps, rank: Int[Tensor, "B N"], beta: float
) -> tuple[Float[Tensor, " P"], Int[Tensor, " P"]]:
    """Implicit reward margins of all pairs, in nats, and the comparison of each.

    margin = beta (log pi/pi_ref (y_w) - log pi/pi_ref (y_l))
    """
    reward = beta * change(policy, reference)
    row, chosen, rejected = pairs(rank)
    return reward[row, chosen] - reward[row, rejected], row


def margin_calibration(
    policy: Logps, reference: Logps, rank: Int[Tensor, "B N"], beta: float, bins: int = 10
) -> Calibration:
    """Calibration of sigmoid(margin), the Bradley-Terry probability of the label.

    Meaningful on pairs that were not trained on.
    """
    return calibration(margins(policy, reference, rank, beta)[0], bins=bins)


def margins_by_annotator(
    margin: Float[Tensor, " P"], row: Int[Tensor, " P"], annotators: Sequence[str | None]
) -> Groups:
    """Mean margin of each annotator's pairs; `annotators` names one a comparison."""
    names = [annotators[place] or "unknown" for place in row.tolist()]
    return by_group(margin, names, row)


def margins_by_score(
    margin: Float[Tensor, " P"],
    row: Int[Tensor, " P"],
    scores: Float[Tensor, " B"],
    bins: int = 4,
) -> tuple[Bin, ...]:
    """Margin and accuracy in bins of a prompt's score (preference variance, a reward gap).

    Bins hold about equally many pairs, lowest score first; equal scores share a bin, so there may
    be fewer.

    Args:
        margin, row: of each pair, from `margins`.
        scores: one a comparison.
        bins: how many, at most.
    """
    value = scores.double()[row]
    if len(value) == 0 or value.isnan().any() or bins < 1:
        raise UserError(f"binning needs pairs, scores that are numbers, and bins; found {bins}")
    steps = torch.linspace(0, 1, bins + 1, dtype=value.dtype, device=value.device)[1:-1]
    place = torch.bucketize(value, value.quantile(steps).unique(), right=True)
    return tuple(
        Bin(
            low=float(value[inside].min()),
            high=float(value[inside].max()),
            margin=mean(margin[inside], row[inside]),
            accuracy=preference_accuracy(margin[inside], row[inside]),
        )
        for inside in (place == index for index in place.unique().tolist())
    )
