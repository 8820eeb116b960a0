"""Accelerated preference optimization: a step of momentum between rounds, not a loss."""

from collections.abc import Mapping

import torch
from torch import Tensor

from prefloop.types import UserError

__all__ = ["extrapolate"]


def extrapolate(
    current: Mapping[str, Tensor], previous: Mapping[str, Tensor], strength: float = 0.3
) -> dict[str, Tensor]:
    """Weights beyond the current ones, in the direction of the last round.

        theta = current + strength (current - previous)

    For log-linear policies this is the authors' update, pi proportional to
    pi_current (pi_current / pi_previous)^strength; for others it is an approximation. `current`
    and `previous` are the trained weights of two rounds, not extrapolated ones: keep both. The
    extrapolated policy answers, and is the reference of the next round. Whether it is also what is
    released, and whether the authors extrapolated weights, is not settled by any public source.

    Args:
        current, previous: weights of two rounds, by name; integer buffers are taken from `current`.
        strength: the paper's alpha, 0 or more and below 1; 0 is plain iterative training.

    Returns:
        weights in the types of `current`; the arithmetic is in float32 at least.

    References:
        He et al. 2024, arXiv 2410.06293 (0.3 as remembered).
    """
    if not 0 <= strength < 1:
        raise UserError(f"strength of extrapolate must be in [0, 1), got {strength} (usual: 0.3)")
    if current.keys() != previous.keys():
        other = sorted(current.keys() ^ previous.keys())
        raise UserError(
            f"extrapolate needs the same weights twice; only one side has {', '.join(other[:3])}. "
            "Save both rounds from the same model, full or adapter."
        )
    return {name: _step(current[name], previous[name], strength) for name in current}


def _step(current: Tensor, previous: Tensor, strength: float) -> Tensor:
    if not current.is_floating_point():
        return current.clone()
    wide = torch.promote_types(current.dtype, torch.float32)
    moved = current.to(wide) + strength * (current.to(wide) - previous.to(wide))
    return moved.to(current.dtype)
