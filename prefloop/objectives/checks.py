"""What several objectives refuse: a bad hyper-parameter, a comparison with nothing to learn."""

import math

from jaxtyping import Bool, Float
from torch import Tensor

from prefloop.types import Logps, UserError

__all__: list[str] = []


def given(reference: Logps | None) -> Logps:
    """The reference, or a user error where there is none."""
    if reference is None:
        raise UserError(
            "this objective compares the policy with a reference policy, but reference is None; "
            "pass the reference's log-probabilities, or use an objective without one (SimPO, ORPO, "
            "CPO)"
        )
    return reference


def refuse_unordered(ordered: Bool[Tensor, " B"]) -> None:
    """A user error where a comparison orders no two of its responses."""
    if not ordered.all():
        empty = (~ordered).nonzero().flatten().tolist()
        raise UserError(
            f"comparisons {empty[:5]} of the batch order no two responses (all ranks are equal or "
            "missing), so there is no pair to learn from; drop them, or use an objective with a "
            "model of ties (Davidson, RaoKupper)"
        )


def refuse_unscored(scored: Bool[Tensor, " B"]) -> None:
    """A user error where a comparison has fewer than two scores."""
    if not scored.all():
        empty = (~scored).nonzero().flatten().tolist()
        raise UserError(
            f"comparisons {empty[:5]} of the batch have fewer than two scores, and this objective "
            "reads scores; score the responses first (prefloop score), or use an objective that "
            "reads ranks (DPO)"
        )


def refuse_unlabelled(labelled: Bool[Tensor, " B"]) -> None:
    """A user error where a comparison calls no response good or bad."""
    if not labelled.all():
        empty = (~labelled).nonzero().flatten().tolist()
        raise UserError(
            f"comparisons {empty[:5]} of the batch have no label, and no ranks that say which "
            "response is better; give them `label` (true is good, false is bad) or `rank`, or "
            "drop them"
        )


def require(owner: object, name: str, value: object, holds: bool, rule: str) -> None:
    """A user error that names the field as it was typed, unless the rule holds."""
    if not holds:
        raise UserError(f"{type(owner).__name__}.{name} must be {rule}, got {value}")


def positive(owner: object, name: str, value: float, usual: str) -> None:
    """Require a finite number above zero; `usual` says which values people take."""
    require(owner, name, value, 0 < value < math.inf, f"positive and finite (usual: {usual})")


def share(owner: object, name: str, value: float) -> None:
    """Require a share of flipped labels: in [0, 0.5)."""
    rule = "in [0, 0.5): at 0.5 a label says nothing, above it labels are read backwards"
    require(owner, name, value, 0 <= value < 0.5, rule)


def one_of(owner: object, name: str, value: str, *allowed: str) -> None:
    """Require one of a few words."""
    listed = " or ".join(f'"{word}"' for word in allowed)
    require(owner, name, value, value in allowed, listed)


def refuse_unequal(weight: Float[Tensor, " B"], name: str) -> None:
    """A user error where comparisons that count do not count the same."""
    counted = weight[weight > 0]
    if counted.numel() and (counted != counted[0]).any():
        raise UserError(
            f"{name} is one loss for the whole batch, so a weight of its own for a comparison "
            f"means nothing; found weights from {counted.min():.4g} to {counted.max():.4g}. Give "
            "every comparison the same weight (or 0, to leave it out), or use DPO"
        )
