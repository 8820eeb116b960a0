"""Likelihood displacement: did the chosen responses become less likely, and where did mass go?

Everything compares a trained policy with its reference on the same responses. Answers to one
comparison are one cluster: they are drawn again together.

References:
    "Stable Preference Optimization", arXiv 2507.07723 (displacement as a shift of mass to
    out-of-distribution responses; as reported in its abstracts). The quantities below are ours.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefloop.diagnostics.roles import change, roles
from prefloop.intervals import Estimate, mean, ratio, share
from prefloop.types import Logps, UserError

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN = 1000
"""Most changes that are kept one by one, for a histogram."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """How the log-probability of some responses changed.

    Attributes:
        mean: log pi - log pi_ref, nats per response.
        token: sum of the changes over sum of the tokens, nats per token.
        fell: share of the responses that became less likely, in [0, 1].
        quantiles: of the change, nats per response, at `QUANTILES`.
        values: the changes, sorted; of many, `SHOWN` evenly spaced ones.
        responses: how many.
    """

    mean: Estimate
    token: Estimate
    fell: Estimate
    quantiles: tuple[float, ...]
    values: tuple[float, ...]
    responses: int

    @property
    def median(self) -> float:
        """Median change, nats per response."""
        return self.quantiles[QUANTILES.index(0.5)]


@dataclass(frozen=True, kw_only=True)
class Displacement:
    """What training did to the log-probabilities of the data.

    Attributes:
        chosen, rejected: changes of the judged responses.
        other: change of the responses nobody judged; None where there are none.
        both_fell: share of the comparisons in which every chosen and every rejected response
            became less likely.
        tied: comparisons that order nothing, left out.
    """

    chosen: Change
    rejected: Change
    other: Change | None
    both_fell: Estimate
    tied: int


@dataclass(frozen=True, kw_only=True)
class Mass:
    """Probability of a group of responses before and after.

    Attributes:
        before, after: share of the group in the probability of all scored responses of its
            comparison, in [0, 1]; exact where those are all there are, as in the tabular world.
        log_change: log of the group's probability after, less before: nats, mean over comparisons.
            It does not depend on what else was scored.
    """

    before: Estimate
    after: Estimate
    log_change: Estimate


@dataclass(frozen=True, kw_only=True)
class MassShift:
    """Where probability went; `other` is None where no comparison has an unjudged response."""

    chosen: Mass
    rejected: Mass
    other: Mass | None


def displacement(
    policy: Logps,
    reference: Logps,
    rank: Int[Tensor, "B N"],
    clusters: Int[Tensor, " B"] | None = None,
) -> Displacement:
    """Changes of chosen, rejected and other responses from `reference` to `policy`.

    Args:
        policy, reference: (B, N, T) log-probabilities of the same responses.
        rank: 1 = best, equal = tied, 0 = not judged.
        clusters: the prompt of each comparison, where several share one; else each is its own.

    Raises:
        UserError: no comparison orders two responses.
    """
    moved = change(policy, reference)
    found = roles(rank, policy.exists)
    _refuse_no_order(found.ordered)
    fell = moved < 0
    judged = found.chosen | found.rejected
    both = (fell | ~judged).all(-1)[found.ordered]
    if clusters is None:
        clusters = torch.arange(len(rank), device=rank.device)

    def described(which: Bool[Tensor, "B N"]) -> Change:
        return change_of(moved[which], policy.length[which], clusters[which.nonzero()[:, 0]])

    return Displacement(
        chosen=described(found.chosen),
        rejected=described(found.rejected),
        other=described(found.other) if found.other.any() else None,
        both_fell=share(both, clusters[found.ordered]),
        tied=int((~found.ordered).sum()),
    )


def mass_shift(policy: Logps, reference: Logps, rank: Int[Tensor, "B N"]) -> MassShift:
    """Probability of the chosen, the rejected and the other responses, before and after.

    In a tabular softmax the chosen never falls under DPO, but mass flows to every other response
    exactly while the rejected is likelier than the chosen (derived). In a language model both may
    fall, and the mass is somewhere else.

    Args:
        policy, reference: (B, N, T) log-probabilities of the same, distinct responses.
        rank: 1 = best, equal = tied, 0 = not judged: "other".
    """
    moved = change(policy, reference)
    found = roles(rank, policy.exists)
    _refuse_no_order(found.ordered)
    before = reference.token.double().sum(-1)
    scored = found.chosen | found.rejected | found.other
    return MassShift(
        chosen=_mass(before, moved, found.chosen, scored),
        rejected=_mass(before, moved, found.rejected, scored),
        other=_mass(before, moved, found.other, scored) if found.other.any() else None,
    )


def first_order_change(
    chosen: Float[Tensor, "P G"], rejected: Float[Tensor, "P G"]
) -> Float[Tensor, " P"]:
    """Sign and size of the chosen's first step under a pairwise loss: |g_w|^2 - <g_w, g_l>.

        d log pi(y_w) = eta beta sigmoid(-m) (|g_w|^2 - <g_w, g_l>),   g = grad log pi

    Negative where the step on this pair alone lowers the chosen (derived, exact to first order).
    A batch adds the other pairs' cross terms.
    """
    return chosen.square().sum(-1) - (chosen * rejected).sum(-1)


def ches(chosen: Float[Tensor, "P D"], rejected: Float[Tensor, "P D"]) -> Float[Tensor, " P"]:
    """Centered hidden embedding similarity of pairs: <E_w, E_l> - |E_w|^2.

    High: more displacement to be expected. E is the sum of the last hidden states that predict a
    response's tokens (`logps.hidden_sums`), under the policy before training. It is the first-order
    test with hidden states for gradients, so 0 for a pair of equal responses. Sums grow with
    length: compare pairs of different length by `ches_per_token`.

    References:
        Razin et al., "Unintentional Unalignment", arXiv 2410.08847 (as in its public code).
    """
    return -first_order_change(chosen.double(), rejected.double())


def ches_per_token(
    chosen: Float[Tensor, "P D"],
    rejected: Float[Tensor, "P D"],
    chosen_length: Int[Tensor, " P"],
    rejected_length: Int[Tensor, " P"],
) -> Float[Tensor, " P"]:
    """Length-normalised CHES: <E_w, E_l> / (n_w n_l) - |E_w|^2 / n_w^2, n in tokens."""
    if (chosen_length < 1).any() or (rejected_length < 1).any():
        raise UserError("CHES per token needs responses of one token or more")
    first = chosen.double() / chosen_length.unsqueeze(-1)
    second = rejected.double() / rejected_length.unsqueeze(-1)
    return ches(first, second)


def change_of(
    values: Float[Tensor, " P"], length: Int[Tensor, " P"], clusters: Int[Tensor, " P"]
) -> Change:
    """Changes of some responses, nats each, with their lengths in tokens and their prompts."""
    ordered = values.sort().values
    place = torch.linspace(0, len(values) - 1, min(SHOWN, len(values))).round().long()
    return Change(
        mean=mean(values, clusters),
        token=ratio(values, length, clusters),
        fell=share(values < 0, clusters),
        quantiles=tuple(np.quantile(ordered.cpu().numpy(), QUANTILES).tolist()),
        values=tuple(ordered[place.to(ordered.device)].tolist()),
        responses=len(values),
    )


def _mass(
    before: Float[Tensor, "B N"],
    moved: Float[Tensor, "B N"],
    group: Bool[Tensor, "B N"],
    scored: Bool[Tensor, "B N"],
) -> Mass:
    rows = group.any(-1)
    logs = {}
    for name, logp in (("before", before), ("after", before + moved)):
        within = logp.masked_fill(~group, -torch.inf).logsumexp(-1)[rows]
        whole = logp.masked_fill(~scored, -torch.inf).logsumexp(-1)[rows]
        logs[name] = (within, (within - whole).exp())
    return Mass(
        before=mean(logs["before"][1]),
        after=mean(logs["after"][1]),
        log_change=mean(logs["after"][0] - logs["before"][0]),
    )


def _refuse_no_order(ordered: Bool[Tensor, " B"]) -> None:
    if not ordered.any():
        raise UserError(
            f"none of the {len(ordered)} comparisons orders two responses; displacement needs a "
            "chosen and a rejected one. Give ranks, or scores that differ."
        )
