"""Prompts that are far from each other: greedy k-centre."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefloop.selection.keeping import Purse
from prefloop.types import UserError


def k_centres(
    points: Float[Tensor, "P D"], count: int, purse: Purse | None = None
) -> Int[Tensor, " C"]:
    """At most `count` points, each the farthest from those before it; the first is the first point.

    Greedy k-centre (farthest-first traversal): the largest distance of any point to its nearest
    centre is at most twice the smallest that `count` centres can reach. Distances are between
    directions, |a/|a| - b/|b||, so that a long vector is not far from everything; of equal
    distances the earlier point is taken, and points that fall on centres come last, in their order.

    Args:
        points: an embedding a prompt, the most wanted prompt first.
        count: how many to take.
        purse: pays for each point; what it cannot pay for is passed over, and where it pays for
            nothing that is left, it ends. With quotas the bound above need not hold.

    References:
        Gonzalez 1985 (the bound); Sener and Savarese, arXiv 1708.00489 (as active learning).
    """
    if not 0 <= count <= len(points):
        raise UserError(f"cannot take {count} of {len(points)} prompts")
    if not points.isfinite().all():
        raise UserError("an embedding holds NaN or infinity; score the rows again")
    direction = torch.nn.functional.normalize(points.float(), dim=-1)
    nearest = torch.full((len(points),), torch.inf)
    taken: list[int] = []
    for _ in range(count):
        payable = nearest if purse is None else nearest.where(purse.payable(), -torch.inf)
        place = int(payable.argmax())
        if purse is not None:
            if payable[place] == -torch.inf:
                break
            purse.pay(place)
        taken.append(place)
        distance = (2 - 2 * direction @ direction[place]).clamp(min=0)
        nearest = torch.minimum(nearest, distance)
        nearest[place] = -torch.inf
    return torch.tensor(taken, dtype=torch.long)
