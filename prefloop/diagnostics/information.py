"""Differential information of a trained language model: what it knows that its reference does not.

A summary over prompts of `prefloop.did`, which says what is exact and what is estimated.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefloop import did
from prefloop.diagnostics.roles import change, roles
from prefloop.intervals import Estimate, mean
from prefloop.types import Logps, UserError


@dataclass(frozen=True, kw_only=True)
class InformationOfSamples:
    """DID entropy from sampled answers; compare only updates of equal `divergence`.

    Attributes:
        entropy: estimated H(q), nats, mean over prompts; biased low where few samples count.
        effective_samples: 1 / sum of squared weights, in [1, samples], mean over prompts. Near 1
            the entropy says nothing.
        divergence: log pi - log pi_ref of the samples, nats, mean over prompts; it is
            KL(pi || pi_ref) where they were drawn from pi, -KL(pi_ref || pi) where from pi_ref.
        samples: answers a prompt.
        matched: the entropy at each of `SIZES` that the update reaches; these may be compared.
    """

    entropy: Estimate
    effective_samples: Estimate
    divergence: Estimate
    samples: int
    matched: tuple["AtSize", ...] = ()


@dataclass(frozen=True, kw_only=True)
class AtSize:
    """DID entropy of the update shrunk to a size that other updates reach too.

    Attributes:
        size: KL(pi_ref || pi_t), nats a response.
        tilt: t of pi_t = pi_ref (pi / pi_ref)^t, normalized; 1 is the update as it is.
        entropy, effective_samples: as in `InformationOfSamples`.
    """

    size: float
    tilt: float
    entropy: Estimate
    effective_samples: Estimate


SIZES = (0.1, 0.5, 2.0)
"""Sizes at which entropies of updates are compared, nats a response."""


def information_of_samples(
    policy: Logps, reference: Logps, proposal: Float[Tensor, "B N"]
) -> InformationOfSamples:
    """Entropy of the differential information distribution, estimated prompt by prompt.

    The estimator is `did.estimate_did_entropy` (derived; the paper's own is not known). With K = 32
    samples of long answers it is far from exact, and samples of the trained policy can reverse the
    order of two updates: report `effective_samples` with it.

    Args:
        policy, reference: (B, N, T) log-probabilities of N sampled answers to each prompt.
        proposal: log-probability of each answer under what it was drawn from, nats.
    """
    moved = change(policy, reference)
    if not policy.exists.all() or moved.shape[-1] < 2:
        raise UserError("DID entropy needs equally many answers to each prompt, two or more")
    proposal = proposal.double()
    found = did.estimate_did_entropy(moved, proposal)
    base = reference.token.double().sum(-1)
    matched = [(size, did.entropy_at_size(moved, proposal, base, size)) for size in SIZES]
    return InformationOfSamples(
        entropy=mean(found.entropy),
        effective_samples=mean(found.effective_samples),
        divergence=mean(moved.mean(-1)),
        samples=moved.shape[-1],
        matched=tuple(
            AtSize(
                size=size,
                tilt=at.tilt,
                entropy=mean(at.estimate.entropy),
                effective_samples=mean(at.estimate.effective_samples),
            )
            for size, at in matched
            if at is not None
        ),
    )


def information_of_chosen(policy: Logps, reference: Logps, rank: Int[Tensor, "B N"]) -> Estimate:
    """log q of the chosen responses above uniform, nats: 0 where training told nothing apart.

        log q(y_w) + log n,   q = the likelihood ratios of the n scored responses, normalised

    Over the scored responses of a comparison, not over all responses; mean over comparisons, and
    over the responses that share the best rank.
    """
    moved = change(policy, reference)
    found = roles(rank, policy.exists)
    scored = found.chosen | found.rejected | found.other
    log_q = did.log_did(moved.masked_fill(~scored, -torch.inf), torch.zeros_like(moved))
    above = log_q + scored.sum(-1, keepdim=True).double().log()
    chosen = found.chosen
    if not chosen.any():
        raise UserError(f"none of the {len(rank)} comparisons orders two responses; give ranks")
    return mean(above[chosen], chosen.nonzero()[:, 0])
