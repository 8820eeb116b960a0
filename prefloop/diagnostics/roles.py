"""Which response is chosen, which rejected, which neither.

A response that is there but not judged (rank null) is "other": a held-out or a sampled answer that
the preference data never named. It goes through the model with the rest, so that one can see where
probability went.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefloop.types import Logps, UserError, ordered_pairs


@dataclass(frozen=True)
class Roles:
    """Masks over the responses of a batch; no response has two roles.

    Attributes:
        chosen: the best ranked response, or all that share the best rank.
        rejected: judged, and worse than the best.
        other: exists and is not judged.
    """

    chosen: Bool[Tensor, "B N"]
    rejected: Bool[Tensor, "B N"]
    other: Bool[Tensor, "B N"]

    @property
    def ordered(self) -> Bool[Tensor, " B"]:
        """Comparisons that order something: a chosen and a rejected response."""
        return self.chosen.any(-1) & self.rejected.any(-1)


def roles(rank: Int[Tensor, "B N"], exists: Bool[Tensor, "B N"]) -> Roles:
    """The roles by rank (1 = best, 0 = not judged); nothing of a comparison that is all ties.

    The unjudged responses of such a comparison have no role either: they have nothing to be other
    than.
    """
    judged = (rank > 0) & exists
    best = rank.masked_fill(~judged, torch.iinfo(rank.dtype).max).amin(-1, keepdim=True)
    chosen, rejected = judged & (rank == best), judged & (rank > best)
    ordered = rejected.any(-1, keepdim=True)
    return Roles(chosen & ordered, rejected, exists & (rank == 0) & ordered)


def change(policy: Logps, reference: Logps) -> Float[Tensor, "B N"]:
    """log pi(y|x) - log pi_ref(y|x) of every response, in nats, float64.

    Raises:
        UserError: the two scored different tokens, or a log-probability is not finite.
    """
    if policy.mask.shape != reference.mask.shape or (policy.mask != reference.mask).any():
        raise UserError("policy and reference scored different tokens; score the same responses")
    found = (policy.token.double() - reference.token.double()).sum(-1)
    if bad := int((~found.isfinite()).sum()):
        raise UserError(
            f"{bad} of {found.numel()} responses have a log-probability that is not finite; look "
            "for a model with NaN weights or a response of probability 0"
        )
    return found


def pairs(
    rank: Int[Tensor, "B N"],
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"], Int[Tensor, " P"]]:
    """`ordered_pairs` of data that must order something.

    Raises:
        UserError: no comparison orders two responses.
    """
    found = ordered_pairs(rank)
    if not len(found[0]):
        raise UserError(f"none of the {len(rank)} comparisons orders two responses; give ranks")
    return found
