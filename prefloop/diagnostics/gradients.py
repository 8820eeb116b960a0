"""The first-order test on real gradients: would a step on this pair lower its chosen response?

Costs a backward pass a response, one comparison at a time; meant for an adapter's parameters and
some tens of pairs. `displacement.ches` is the forward-only proxy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefloop.bounds import cauchy_schwarz_bound
from prefloop.intervals import Estimate, mean, share
from prefloop.selection import preference_variance
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


@dataclass(frozen=True, kw_only=True)
class GradientBound:
    """Size of the expected gradient of each prompt, against what preference variance allows.

    Attributes:
        norm: |grad L(x)|, of the pairwise loss over all pairs of the prompt's responses.
        bound: beta sqrt(PVar) sqrt(mean |s_i - s_j|^2) (`bounds.cauchy_schwarz_bound`).
        variance: PVar of the rewards, in [0, 1/4].
    """

    norm: tuple[float, ...]
    bound: tuple[float, ...]
    variance: tuple[float, ...]


def inner_products(scorer: nn.Module, batch: Sequence[Tokenized]) -> list[Tensor]:
    """<s_i, s_j> of the responses of each row, an (n, n) table a row on the CPU: all that the tests
    need.

    s = grad log pi(y|x), for the parameters that are trained.

    Raises:
        UserError: no parameter requires a gradient.
    """
    parameters = _trained(scorer)
    tables = []
    for row in batch:
        grads = _response_gradients(scorer, row, parameters)
        tables.append((grads @ grads.T).cpu().double())
    return tables


def first_order(inner_of: Sequence[Tensor], batch: Sequence[Tokenized]) -> FirstOrder:
    """The test on every strictly ordered pair of `batch`, from its `inner_products`.

    Raises:
        UserError: no comparison orders two responses.
    """
    found: list[tuple[float, float, float]] = []
    rows: list[int] = []
    for place, (row, inner) in enumerate(zip(batch, inner_of, strict=True)):
        _, chosen, rejected = ordered_pairs(judgement([row]).rank)
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


def gradient_bound(
    inner_of: Sequence[Tensor], rewards: Float[Tensor, "B N"], beta: float
) -> GradientBound:
    """Does preference variance bound the gradients of this model, on these prompts?

        grad L(x) = -beta mean over i != j of (sigmoid(r_j - r_i) - 1/2) (s_i - s_j)

    with s_i = grad log pi(y_i|x): DPO's expected gradient over pairs drawn from the prompt's own
    responses, the draw taken as fixed. The bound (derived) holds for these averages exactly, so
    what one learns is how tight it is, and whether the norm follows PVar.

    Args:
        inner_of: `inner_products` of the prompts' responses, two or more each.
        rewards: rhat = beta log pi/pi_ref of each response; of a prompt with fewer than N
            responses, the first ones count.
        beta: of the loss.
    """
    count = torch.tensor([len(inner) for inner in inner_of])
    there = torch.arange(rewards.shape[-1]) < count.unsqueeze(-1)
    variance = preference_variance(rewards.double(), there)
    norms, bounds = [], []
    for inner, padded, spread in zip(inner_of, rewards.double(), variance, strict=True):
        reward = padded[: len(inner)]
        pairs = len(reward) * (len(reward) - 1)
        pull = (reward.unsqueeze(0) - reward.unsqueeze(1)).sigmoid() - 0.5  # 0 on the diagonal
        weight = 2 * beta * pull.sum(1) / pairs  # antisymmetric: i and j count the same pair
        norms.append(float((weight @ inner @ weight).clamp(min=0).sqrt()))
        squares = inner.diagonal().unsqueeze(0) + inner.diagonal().unsqueeze(1) - 2 * inner
        scatter = squares.sum() / pairs
        bounds.append(float(cauchy_schwarz_bound(spread, torch.tensor(beta), scatter)))
    return GradientBound(norm=tuple(norms), bound=tuple(bounds), variance=tuple(variance.tolist()))


def _trained(scorer: nn.Module) -> list[nn.Parameter]:
    parameters = [part for part in scorer.parameters() if part.requires_grad]
    if not parameters:
        raise UserError("no parameter is trained; load the policy with its adapter on")
    return parameters


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
