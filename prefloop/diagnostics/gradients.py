"""The first-order test on real gradients: would a step on this pair lower its chosen response?

Costs a backward pass a response, one comparison at a time; meant for an adapter's parameters and
some tens of pairs. `displacement.ches` is the forward-only proxy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefloop.intervals import Estimate, mean, share
from prefloop.types import Tokenized, UserError, judgement, ordered_pairs, score


@dataclass(frozen=True, kw_only=True)
class FirstOrder:
    """Gradients of chosen and rejected responses, pair by pair.

    Attributes:
        falls: share of the pairs with <g_w, g_l> > |g_w|^2, whose chosen a step would lower.
        cosine: cosine of g_w and g_l, mean over pairs.
        overlap: <g_w, g_l> / |g_w|^2 of each pair; above 1 the chosen falls.
        chosen_norm, rejected_norm: |g_w| and |g_l| of each pair, per unit of the parameters.
    """

    falls: Estimate
    cosine: Estimate
    overlap: tuple[float, ...]
    chosen_norm: tuple[float, ...]
    rejected_norm: tuple[float, ...]


def first_order(scorer: nn.Module, batch: Sequence[Tokenized]) -> FirstOrder:
    """The test on every strictly ordered pair of `batch`, for the parameters that are trained.

    Raises:
        UserError: no parameter requires a gradient, or no comparison orders two responses.
    """
    parameters = [part for part in scorer.parameters() if part.requires_grad]
    if not parameters:
        raise UserError("no parameter is trained; load the policy with its adapter on")
    found: list[tuple[float, float, float]] = []
    rows: list[int] = []
    for place, row in enumerate(batch):
        _, chosen, rejected = ordered_pairs(judgement([row]).rank)
        if not len(chosen):
            continue
        grads = _response_gradients(scorer, row, parameters)
        inner = grads @ grads.T
        for better, worse in zip(chosen.tolist(), rejected.tolist(), strict=True):
            square = (inner[better, better], inner[better, worse], inner[worse, worse])
            found.append((float(square[0]), float(square[1]), float(square[2])))
            rows.append(place)
    if not found:
        raise UserError(f"none of the {len(batch)} comparisons orders two responses; give ranks")
    chosen_square, product, rejected_square = torch.tensor(found, dtype=torch.float64).T
    clusters = torch.tensor(rows)
    norm = (chosen_square * rejected_square).sqrt()
    return FirstOrder(
        falls=share(product > chosen_square, clusters),
        cosine=mean(torch.where(norm > 0, product / norm, 0.0), clusters),
        overlap=tuple(torch.where(chosen_square > 0, product / chosen_square, 0.0).tolist()),
        chosen_norm=tuple(chosen_square.sqrt().tolist()),
        rejected_norm=tuple(rejected_square.sqrt().tolist()),
    )


def _response_gradients(
    scorer: nn.Module, row: Tokenized, parameters: Sequence[Tensor]
) -> Float[Tensor, "N G"]:
    """Gradient of log pi(y|x) of each response, flat, in float32."""
    sums = score(scorer, [row]).sum[0]
    return torch.stack(
        [
            torch.cat(
                [
                    part.flatten().float()
                    for part in torch.autograd.grad(
                        one, parameters, retain_graph=True, materialize_grads=True
                    )
                ]
            )
            for one in sums
        ]
    )
