"""Numbers of a batch for the log, as sums and counts, so that they add up over processes.

Names follow TRL's. `docs/metrics.md` says what each is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from prefloop.objectives import Objective
from prefloop.types import Judgement, Logps, PerComparison, ordered_pairs

Totals = dict[str, tuple[float, float]]


@torch.no_grad()
def batch_totals(
    objective: Objective,
    policy: Logps,
    reference: Logps | None,
    judgement: Judgement,
    losses: PerComparison,
) -> Totals:
    """(sum, count) of every metric over the comparisons of a batch.

    A comparison counts once: with more than two responses its numbers are the mean over its
    ordered pairs. Unpaired labels read good as chosen, bad as rejected, in the comparison.
    """
    comparisons = float(len(losses))
    totals: Totals = {
        "loss": ((losses.double() * judgement.weight).sum().item(), comparisons),
        "num_tokens": (float(policy.length.sum()), 1.0),
    }
    rewards = objective.rewards(policy, reference)
    row, chosen, rejected = ordered_pairs(_as_rank(judgement))
    if row.numel() == 0:
        return totals
    share = 1.0 / torch.bincount(row, minlength=len(losses))[row].double()  # one pair's weight

    def add(name: str, values: Tensor) -> None:
        totals[name] = ((values.double() * share).sum().item(), share.sum().item())

    add("rewards/chosen", rewards[row, chosen])
    add("rewards/rejected", rewards[row, rejected])
    margin = rewards[row, chosen] - rewards[row, rejected]
    add("rewards/margins", margin)
    add("rewards/accuracies", (margin > 0).double() + 0.5 * (margin == 0).double())
    add("logps/chosen", policy.sum[row, chosen])
    add("logps/rejected", policy.sum[row, rejected])
    if reference is not None:
        change = policy.sum - reference.sum
        add("displacement/chosen", change[row, chosen])
        add("displacement/rejected", change[row, rejected])
        add("displacement/chosen_fell", (change[row, chosen] < 0).double())
    return totals


def add_totals(first: Mapping[str, tuple[float, float]], second: Totals) -> Totals:
    """The totals of two batches together."""
    names = first.keys() | second.keys()
    zero = (0.0, 0.0)
    return {
        name: (
            first.get(name, zero)[0] + second.get(name, zero)[0],
            first.get(name, zero)[1] + second.get(name, zero)[1],
        )
        for name in names
    }


def means(totals: Totals) -> dict[str, float]:
    """The value of each metric, in a fixed order; `num_tokens` stays a sum."""
    return {
        name: total if name == "num_tokens" else total / count
        for name, (total, count) in sorted(totals.items())
        if count
    }


def _as_rank(judgement: Judgement) -> Tensor:
    """Ranks; where there are labels only, good = 1 and bad = 2."""
    labelled = torch.where(judgement.label >= 0, 2 - judgement.label, 0)
    return torch.where(judgement.rank > 0, judgement.rank, labelled)
