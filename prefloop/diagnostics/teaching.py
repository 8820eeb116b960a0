"""What the data teach: the exponent they are built for, and which responses should be rejected.

Both are about the power law of `prefloop.did`: q_{ref/l} ~ q_{policy/ref}^beta. The policy stands
for the target pi*, so they describe what this training made of the data.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefloop import did
from prefloop.diagnostics.roles import change, pairs, roles
from prefloop.intervals import Estimate, mean
from prefloop.types import Logps, UserError


@dataclass(frozen=True, kw_only=True)
class Taught:
    """The power law on the pairs.

    Attributes:
        law: slope (the data's beta), share of pairs that admit one, spread.
        ordered: share of the pairs with margins m_policy > m_ref > m_rejected, in [0, 1].
        source: what stood for m_ref - m_rejected: "scores" or "policy of the rejected".
    """

    law: did.PowerLaw
    ordered: float
    source: str


@dataclass(frozen=True, kw_only=True)
class RejectedSampler:
    """The optimal rejected sampler, as weights of the responses at hand.

        w_k proportional to (pi_ref(y_k) / pi(y_k))^beta

    Drawn by these weights out of samples of the chosen's policy, rejected responses are those from
    which DPO with beta learns this very policy (v1 for pi_w = pi_ref, as reported; general pi_w
    derived). Responses of other origin have weights too, but the claim is not about them.

    Attributes:
        weights: of each comparison's responses, summing to one.
        rejected: weight of the responses that the data rejected, mean over comparisons.
        even: what drawing evenly would give them.
        effective: 1 / sum w^2 over the number of responses, in (0, 1], mean over comparisons.
        beta: the exponent.
    """

    weights: tuple[tuple[float, ...], ...]
    rejected: Estimate
    even: float
    effective: Estimate
    beta: float


def taught_by_scores(
    policy: Logps, reference: Logps, rank: Int[Tensor, "B N"], scores: Float[Tensor, "B N"]
) -> Taught | None:
    """The power law where scores are the log-odds of preferences: log q_{w/l} (derived).

    None where the policy's margins are those of its reference.
    """
    row, chosen, rejected = pairs(rank)
    taught = (scores[row, chosen] - scores[row, rejected]).double()
    margins = _margins(policy, reference, rank)
    return _fit(*margins, margins[1] - taught, "scores")


def taught_by_policies(
    policy: Logps, reference: Logps, rejected: Logps, rank: Int[Tensor, "B N"]
) -> Taught | None:
    """The power law where the policy that wrote the rejected responses is at hand.

    It may be a model fitted to the rejected responses by SFT. None where the policy's margins are
    those of its reference.
    """
    margins = _margins(policy, reference, rank)
    return _fit(*margins, _margins(rejected, reference, rank)[0], "policy of the rejected")


def rejected_sampler(
    policy: Logps, reference: Logps, rank: Int[Tensor, "B N"], beta: float
) -> RejectedSampler:
    """The weights of all responses of each comparison that orders something."""
    moved = change(policy, reference)
    there, found = policy.exists, roles(rank, policy.exists)
    rows = found.ordered
    if not rows.any():
        raise UserError(f"none of the {len(rank)} comparisons orders two responses; give ranks")
    weight = did.rejected_log_weights(
        moved.masked_fill(~there, torch.inf), torch.zeros_like(moved), beta
    ).exp()
    count = there.sum(-1)
    return RejectedSampler(
        weights=tuple(_first(one, here) for one, here in zip(weight, there, strict=True)),
        rejected=mean((weight * found.rejected).sum(-1)[rows]),
        even=float((found.rejected.sum(-1) / count.clamp(min=1))[rows].double().mean()),
        effective=mean((1 / weight.square().sum(-1) / count.clamp(min=1))[rows]),
        beta=beta,
    )


def _first(weight: Float[Tensor, " N"], there: Bool[Tensor, " N"]) -> tuple[float, ...]:
    return tuple(weight[there].tolist())


def _margins(
    policy: Logps, reference: Logps, rank: Int[Tensor, "B N"]
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """log pi(y_w) - log pi(y_l) of every ordered pair, under both."""
    row, chosen, rejected = pairs(rank)
    base = reference.token.double().sum(-1)
    mine = base + change(policy, reference)
    one, two = (part[row, chosen] - part[row, rejected] for part in (mine, base))
    return one, two


def _fit(
    policy: Float[Tensor, " P"],
    reference: Float[Tensor, " P"],
    rejected: Float[Tensor, " P"],
    source: str,
) -> Taught | None:
    if not (policy - reference).square().sum() > 0:
        return None
    return Taught(
        law=did.fit_power_law(policy, reference, rejected),
        ordered=did.ordered_margins(policy, reference, rejected),
        source=source,
    )
