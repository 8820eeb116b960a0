"""Numbers of a batch for the log, as sums and counts, so that they add up over processes.

Names follow TRL's. `docs/metrics.md` says what each is.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefloop.objectives import Objective
from prefloop.types import Judgement, Logps, PerComparison, ordered_pairs

Totals = dict[str, tuple[float, float]]

ROUNDING = {
    torch.float64: 0.0,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
"""How far rounding alone may move log pi(y|x), in nats times the square root of the tokens.

By the type that the model computes in. Ours: float32 is what the engine is tested to agree with
the model's own logits to, a token; the coarser types are guessed."""


class Side(NamedTuple):
    """The responses that count as chosen, or those that count as rejected.

    Attributes:
        row: the comparison of each.
        place: its position there.
        share: what it counts; a comparison's counts sum to 1.
    """

    row: Int[Tensor, " P"]
    place: Int[Tensor, " P"]
    share: Float[Tensor, " P"]

    def of(self, table: Float[Tensor, "B N"]) -> Float[Tensor, " P"]:
        """The numbers of these responses."""
        return table[self.row, self.place]


@torch.no_grad()
def batch_totals(
    objective: Objective,
    policy: Logps,
    reference: Logps | None,
    judgement: Judgement,
    losses: PerComparison,
    rounding: float = 0.0,
) -> Totals:
    """(sum, count) of every metric over the comparisons of a batch.

    A comparison counts once: with more than two responses its numbers are the mean over its
    ordered pairs. Where nothing is ranked, labels and else scores say which is better. A response
    labelled without one of the other kind beside it is chosen or rejected alone, and has no margin.
    Sums are taken on the CPU, in float64, which not every device has.

    Args:
        rounding: what a change from the reference has to pass to count as one, in nats times the
            square root of the response's tokens.
    """
    policy, judgement, losses = policy.detach().to("cpu"), judgement.to("cpu"), losses.cpu()
    reference = None if reference is None else reference.detach().to("cpu")
    totals: Totals = {
        "loss": ((losses.double() * judgement.weight).sum().item(), float(len(losses))),
        "num_tokens": (float(policy.length.sum()), 1.0),
    }
    order = _order(judgement)
    row, chosen, rejected = ordered_pairs(order)
    share = _shares(row, len(losses))
    lonely = ~torch.zeros_like(judgement.weight, dtype=torch.bool).index_fill(0, row, True)

    def add(name: str, values: Tensor, share: Tensor) -> None:
        if len(values):
            totals[name] = ((values.double() * share).sum().item(), share.sum().item())

    rewards = objective.rewards(policy, reference)
    change = None if reference is None else policy.sum - reference.sum
    noise = rounding * policy.length.to(policy.token.dtype).sqrt()
    sides = {
        "chosen": _with(row, chosen, share, lonely, judgement.label == 1),
        "rejected": _with(row, rejected, share, lonely, judgement.label == 0),
    }
    for name, side in sides.items():
        add(f"rewards/{name}", side.of(rewards), side.share)
        add(f"logps/{name}", side.of(policy.sum), side.share)
        if change is not None:
            add(f"displacement/{name}", side.of(change), side.share)
    margin = rewards[row, chosen] - rewards[row, rejected]
    add("rewards/margins", margin, share)
    if change is not None:
        same = change.abs() <= noise
        margin = margin.masked_fill(same[row, chosen] & same[row, rejected], 0.0)
        fell = sides["chosen"].of((change < -noise).double())
        add("displacement/chosen_fell", fell, sides["chosen"].share)
    add("rewards/accuracies", (margin.sign() + 1) / 2, share)
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


def _order(judgement: Judgement) -> Int[Tensor, "B N"]:
    """Ranks; in a comparison without them good = 1 and bad = 2; without labels, by score."""
    scores = judgement.scores
    if judgement.ensemble is not None:
        scores = torch.where(scores.isnan(), judgement.ensemble.mean(-1), scores)
    above = scores.unsqueeze(-2) > scores.unsqueeze(-1)  # false beside NaN
    by_score = torch.where(scores.isnan(), 0, 1 + above.sum(-1))
    by_label = torch.where(judgement.label >= 0, 2 - judgement.label, 0)
    order = torch.where((by_label > 0).any(-1, keepdim=True), by_label, by_score)
    return torch.where((judgement.rank > 0).any(-1, keepdim=True), judgement.rank, order)


def _shares(row: Int[Tensor, " P"], comparisons: int) -> Float[Tensor, " P"]:
    """One over how many there are of the same comparison."""
    return 1.0 / torch.bincount(row, minlength=comparisons)[row].double()


def _with(
    row: Int[Tensor, " P"],
    place: Int[Tensor, " P"],
    share: Float[Tensor, " P"],
    lonely: Bool[Tensor, " B"],
    labelled: Bool[Tensor, "B N"],
) -> Side:
    """One side of the pairs, and the labelled responses of comparisons without a pair."""
    alone, at = (labelled & lonely.unsqueeze(-1)).nonzero(as_tuple=True)
    return Side(
        torch.cat([row, alone]),
        torch.cat([place, at]),
        torch.cat([share, _shares(alone, len(lonely))]),
    )
