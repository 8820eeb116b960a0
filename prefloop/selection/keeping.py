"""Scores of prompts to the prompts that are kept."""

from jaxtyping import Float, Int
from torch import Tensor

from prefloop.types import UserError


def top(scores: Float[Tensor, " P"], count: int) -> Int[Tensor, " C"]:
    """Indices of the `count` highest scores, in data order; of equal scores the earlier is kept."""
    _refuse_bad_scores(scores, count)
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def bottom(scores: Float[Tensor, " P"], count: int) -> Int[Tensor, " C"]:
    """Indices of the `count` lowest scores, in data order; of equal scores the later is kept.

    Ties go the other way than in `top`, so that the top and the bottom half never overlap.
    """
    _refuse_bad_scores(scores, count)
    order = scores.argsort(descending=True, stable=True)
    return order[len(order) - count :].sort().values


def above(scores: Float[Tensor, " P"], threshold: float) -> Int[Tensor, " C"]:
    """Indices of the scores of at least `threshold`, in data order."""
    _refuse_bad_scores(scores, 0)
    return (scores >= threshold).nonzero().flatten()


def _refuse_bad_scores(scores: Tensor, count: int) -> None:
    if scores.isnan().any():
        raise UserError(f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN")
    if not 0 <= count <= len(scores):
        raise UserError(f"cannot keep {count} of {len(scores)} prompts")
