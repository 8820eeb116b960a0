"""Differential information: what a preference-trained policy knows that its reference does not.

The differential information distribution (DID) from pi_ref to pi is the normalized ratio of the
two. Everything here takes log-probabilities in nats, prompt by prompt: of a whole finite response
set (exact), or of sampled responses of a language model (estimates and pairwise diagnostics).

References:
    "Differential Information Distribution: A Bayesian Perspective on DPO", arXiv 2505.23761, v1
    and v2. Definitions are as reported in summaries of the paper; each docstring says what is
    derived here instead.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.tabular import kl, renyi
from prefloop.types import UserError


class EntropyEstimate(NamedTuple):
    """DID entropy estimated from weighted samples of each prompt.

    Attributes:
        entropy: estimate of H(q), in nats; biased when `effective_samples` is small.
        effective_samples: 1 / sum of squared normalized weights, in [1, K].
        log_normalizer: estimate of log sum over y of pi(y)/pi_ref(y), in nats.
    """

    entropy: Float[Tensor, "*shape"]
    effective_samples: Float[Tensor, "*shape"]
    log_normalizer: Float[Tensor, "*shape"]


class PowerLaw(NamedTuple):
    """How well one exponent explains (log pi_ref/pi_l) by (log pi*/pi_ref) over pairs.

    Attributes:
        beta: least-squares slope through the origin; the beta that the data ask training to use.
        matching: share of pairs whose two log-ratio differences have the same sign, so that a
            positive exponent of their own exists.
        spread: median absolute deviation of log(beta of one pair) over the matching pairs; 0 when
            one beta explains all of them, NaN when no pair matches.
        pairs: number of pairs.
    """

    beta: float
    matching: float
    spread: float
    pairs: int


class LikelihoodChange(NamedTuple):
    """Expected log pi - log pi_ref of chosen and of rejected responses, in nats."""

    chosen: Float[Tensor, "*shape"]
    rejected: Float[Tensor, "*shape"]


def log_did(
    policy_logp: Float[Tensor, "*shape Y"], reference_logp: Float[Tensor, "*shape Y"]
) -> Float[Tensor, "*shape Y"]:
    """log q(y) = log pi(y)/pi_ref(y) - log sum over y' of pi(y')/pi_ref(y').

    Uniform exactly when the policies are equal; pi_ref q, normalized, is pi (v2 Def. 2.2,
    reported).
    """
    return (policy_logp - reference_logp).log_softmax(-1)


def did_entropy(log_ratio: Float[Tensor, "*shape Y"]) -> Float[Tensor, "*shape"]:
    """Exact entropy of the DID over a finite response set, in nats.

        H(q) = logsumexp(f) - E_q[f],   f = log pi - log pi_ref

    At most log |Y|, and log |Y| exactly when the policies are equal. It tends to log |Y| as the
    update shrinks, whatever its kind: compare updates only at matched size (derived).
    """
    q = log_ratio.softmax(-1)
    return log_ratio.logsumexp(-1) - (q * log_ratio).sum(-1)


def did_entropy_of_small_update(log_ratio: Float[Tensor, "*shape Y"]) -> Float[Tensor, "*shape"]:
    """Second-order form of `did_entropy` (derived): log |Y| - Var_U(f) / 2, U uniform over Y."""
    size = torch.full_like(log_ratio[..., 0], log_ratio.shape[-1])
    return size.log() - 0.5 * log_ratio.var(-1, correction=0)


def estimate_did_entropy(
    log_ratio: Float[Tensor, "*shape K"], log_proposal: Float[Tensor, "*shape K"]
) -> EntropyEstimate:
    """Self-normalized estimate of the DID entropy from K responses drawn from a proposal.

    Derived: the paper's own estimator is not known beyond "K = 32 samples and importance
    weights". At K = 32 it is far from exact for long responses, whatever the proposal, and
    samples of the trained policy can reverse the order of two updates: read `effective_samples`.

    Args:
        log_ratio: f = log pi(y_k) - log pi_ref(y_k) of each sample.
        log_proposal: log-probability of the sample under what it was drawn from (pi_ref, pi, a
            mixture of both).
    """
    return weighted_did_entropy(log_ratio, log_ratio - log_proposal)


def weighted_did_entropy(
    log_ratio: Float[Tensor, "*shape K"], log_weight: Float[Tensor, "*shape K"]
) -> EntropyEstimate:
    """DID entropy from samples whose weights are exp(log_weight) = exp(f) / proposal.

    H = log Z - sum_k w_k f_k,   w = softmax(log_weight),   Z = mean exp(log_weight)
    """
    samples = torch.full_like(log_ratio[..., 0], log_ratio.shape[-1])
    log_normalizer = log_weight.logsumexp(-1) - samples.log()
    weight = log_weight.softmax(-1)
    return EntropyEstimate(
        entropy=log_normalizer - (weight * log_ratio).sum(-1),
        effective_samples=1 / weight.square().sum(-1),
        log_normalizer=log_normalizer,
    )


class MatchedEntropy(NamedTuple):
    """DID entropy of an update that was shrunk to a given size.

    Attributes:
        estimate: a prompt each.
        tilt: t in [0, 1]: the update taken is pi_ref (pi / pi_ref)^t, normalized.
    """

    estimate: EntropyEstimate
    tilt: float


def entropy_at_size(
    log_ratio: Float[Tensor, "P K"],
    log_proposal: Float[Tensor, "P K"],
    log_reference: Float[Tensor, "P K"],
    size: float,
) -> MatchedEntropy | None:
    """DID entropy where the update is `size` nats large, None where it never gets so large.

        pi_t proportional to pi_ref (pi/pi_ref)^t
        KL(pi_ref || pi_t) = log E_ref e^(t f) - t E_ref f

    H(q) tends to log |Y| as an update shrinks, so entropies of two updates say something only at
    equal size. Along pi_t the divergence rises from 0; t is where its mean over prompts is `size`.
    Derived; expectations under pi_ref are self-normalized, and as rough as the entropy itself.

    Args:
        log_ratio: f = log pi(y_k) - log pi_ref(y_k) of K samples of each of P prompts.
        log_proposal: log-probability of the samples under what they were drawn from.
        log_reference: log pi_ref(y_k).
        size: KL(pi_ref || pi_t), nats a response, > 0.
    """
    if not size > 0:
        raise UserError(f"the size of an update must be positive, got {size} nats")
    chance = (log_reference - log_proposal).log_softmax(-1)

    def divergence(tilt: float) -> float:
        mean_ratio = (chance.exp() * log_ratio).sum(-1)
        return float(((chance + tilt * log_ratio).logsumexp(-1) - tilt * mean_ratio).mean())

    if divergence(1.0) < size:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle) < size else (low, middle)
    tilted = high * log_ratio
    return MatchedEntropy(weighted_did_entropy(tilted, tilted - log_proposal), high)


def sample_did(
    node_log_ratio: Float[Tensor, "nodes V"],
    length: int,
    shape: tuple[int, ...],
    rng: torch.Generator,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Sequences drawn token by token from the token-level DID: their (log_ratio, log_weight).

    At each prefix the next token comes from q_t = softmax(log pi - log pi_ref), and the weight
    collects the normalizers, log w = sum_t logsumexp(log pi - log pi_ref). The mean of w is
    unbiased for Z; with `weighted_did_entropy` this is nearly unbiased for H(q) while most samples
    are effective, and about 0.1 nat too high where 10 of 32 are (derived, measured). It needs
    next-token tables and a fixed length: for small vocabularies, where q_t is not spread over
    tokens nobody would write.

    Args:
        node_log_ratio: log pi - log pi_ref of every next token after every prefix, in the order of
            `tabular.AutoregressivePolicy`.
        length: tokens of a response.
        shape: how many sequences, with the samples of one estimate last.
        rng: source of the draws.
    """
    vocabulary = node_log_ratio.shape[-1]
    total = node_log_ratio.new_zeros(shape)
    log_weight = node_log_ratio.new_zeros(shape)
    number = torch.zeros(shape, dtype=torch.long)
    start = 0
    for position in range(length):
        row = node_log_ratio[start + number]  # (*shape, V)
        chance = row.softmax(-1).flatten(0, -2)
        token = torch.multinomial(chance, 1, generator=rng).reshape(shape)
        total = total + row.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        log_weight = log_weight + row.logsumexp(-1)
        number = number * vocabulary + token
        start += vocabulary**position
    return total, log_weight


def token_did_entropy(
    policy_logp: Float[Tensor, "*shape T V"], reference_logp: Float[Tensor, "*shape T V"]
) -> Float[Tensor, "*shape T"]:
    """Entropy of the next-token DID at each position, in nats.

    Its sum over positions is a quantity of its own: the normalizers depend on the prefix, so it is
    not the entropy of the DID over whole responses (derived).
    """
    return did_entropy(policy_logp - reference_logp)


def preference(
    chosen_logp: Float[Tensor, "*shape Y"], rejected_logp: Float[Tensor, "*shape Y"]
) -> Float[Tensor, "*shape Y Y"]:
    """p(y beats y') when of the two one was drawn from pi_w and the other from pi_l.

    sigmoid(log q_{w/l}(y) - log q_{w/l}(y')) = w(y) l(y') / (w(y) l(y') + w(y') l(y))
    """
    ratio = chosen_logp - rejected_logp
    return (ratio.unsqueeze(-1) - ratio.unsqueeze(-2)).sigmoid()


def optimal_rejected(
    chosen_logp: Float[Tensor, "*shape Y"],
    target_logp: Float[Tensor, "*shape Y"],
    reference_logp: Float[Tensor, "*shape Y"],
    beta: float | Float[Tensor, "*shape 1"],
) -> Float[Tensor, "*shape Y"]:
    """Log-probabilities of the rejected responses from which DPO learns the target exactly.

        pi_l(y) proportional to pi_w(y) (pi_ref(y) / pi*(y))^beta

    v1 reports pi_w = pi_ref; any pi_w is derived. `beta` must be the one that training uses.
    """
    return (chosen_logp - beta * (target_logp - reference_logp)).log_softmax(-1)


def rejected_log_weights(
    target_logp: Float[Tensor, "*shape K"], reference_logp: Float[Tensor, "*shape K"], beta: float
) -> Float[Tensor, "*shape K"]:
    """Log of normalized weights that turn K samples of pi_w into the optimal rejected ones.

    For language models: resample (or weight) the chosen policy's own responses by
    (pi_ref/pi*)^beta. The K weights of a prompt sum to one.
    """
    return (-beta * (target_logp - reference_logp)).log_softmax(-1)


def learned_target(
    chosen_logp: Float[Tensor, "*shape Y"],
    rejected_logp: Float[Tensor, "*shape Y"],
    reference_logp: Float[Tensor, "*shape Y"],
    beta: float | Float[Tensor, "*shape 1"],
) -> Float[Tensor, "*shape Y"]:
    """What DPO with `beta` converges to on such pairs (derived; inverse of `optimal_rejected`).

        pi*(y) proportional to pi_ref(y) (pi_w(y) / pi_l(y))^(1/beta)

    Hence data built for beta' and trained with beta reach pi_ref (pi*/pi_ref)^(beta'/beta).
    """
    return (reference_logp + (chosen_logp - rejected_logp) / beta).log_softmax(-1)


def pairwise_beta(
    policy_margin: Float[Tensor, " P"],
    reference_margin: Float[Tensor, " P"],
    rejected_margin: Float[Tensor, " P"],
) -> Float[Tensor, " P"]:
    """The exponent that one pair asks for: (m_ref - m_l) / (m_* - m_ref) (derived).

    A margin is log pi(y_w) - log pi(y_l) under pi*, pi_ref and pi_l. A positive exponent exists
    exactly when (m_ref - m_l) (m_* - m_ref) > 0; NaN where both differences are 0.
    """
    return (reference_margin - rejected_margin) / (policy_margin - reference_margin)


def fit_power_law(
    policy_margin: Float[Tensor, " P"],
    reference_margin: Float[Tensor, " P"],
    rejected_margin: Float[Tensor, " P"],
) -> PowerLaw:
    """One exponent for all pairs, and how far the pairs disagree with it (derived).

    The power law q_{ref/l} ~ q_{*/ref}^beta holds on the pairs exactly when `matching` is 1 and
    `spread` is 0.

    Args:
        policy_margin, reference_margin, rejected_margin: log pi(y_w) - log pi(y_l) under the
            trained (or target) policy, the reference and the policy behind the rejected responses.

    Raises:
        UserError: no pair, or a policy that equals its reference on all of them.
    """
    learned = policy_margin - reference_margin
    taught = reference_margin - rejected_margin
    if not learned.square().sum() > 0:
        raise UserError(
            f"no exponent can be fitted: over {len(learned)} pairs the policy's margins equal the "
            "reference's. Give pairs, and a policy that differs from its reference."
        )
    agree = learned * taught > 0
    logs = pairwise_beta(policy_margin, reference_margin, rejected_margin)[agree].log()
    spread = (logs - logs.median()).abs().median().item() if agree.any() else float("nan")
    return PowerLaw(
        beta=((learned * taught).sum() / learned.square().sum()).item(),
        matching=agree.double().mean().item(),
        spread=spread,
        pairs=len(learned),
    )


def ordered_margins(
    policy_margin: Float[Tensor, " P"],
    reference_margin: Float[Tensor, " P"],
    rejected_margin: Float[Tensor, " P"],
) -> float:
    """Share of pairs whose log-margins are ordered m_* > m_ref > m_l, in [0, 1].

    v1 Thm 3.5 ties this ordering to the power law (reported; its exact wording is not known). A
    pair that is ordered has a positive exponent of its own; one exponent for all pairs asks for
    more (derived).
    """
    ordered = (policy_margin > reference_margin) & (reference_margin > rejected_margin)
    return ordered.double().mean().item()


def expected_change(
    sampler_logp: Float[Tensor, "*shape Y"],
    policy_logp: Float[Tensor, "*shape Y"],
    reference_logp: Float[Tensor, "*shape Y"],
) -> Float[Tensor, "*shape"]:
    """E over y of the sampler of log pi(y) - log pi_ref(y), in nats."""
    return (sampler_logp.exp() * (policy_logp - reference_logp)).sum(-1)


def change_when_chosen_is_reference(
    target_logp: Float[Tensor, "*shape Y"],
    reference_logp: Float[Tensor, "*shape Y"],
    rejected_logp: Float[Tensor, "*shape Y"],
    beta: float | Float[Tensor, "*shape 1"],
) -> LikelihoodChange:
    """Why the chosen falls: changes when pi_w = pi_ref and the power law holds (derived).

    chosen    = -KL(pi_ref || pi*)                        <= 0: displacement is unavoidable
    rejected  = -KL(pi_l || pi_ref)/beta - log Z          <= chosen
    log Z     = log E_ref[(pi_ref/pi_l)^(1/beta)]         >= 0
    chosen - rejected = (KL(pi_ref || pi_l) + KL(pi_l || pi_ref)) / beta
    """
    alpha = _exponent(beta, reference_logp)
    log_z = (reference_logp + alpha.unsqueeze(-1) * (reference_logp - rejected_logp)).logsumexp(-1)
    return LikelihoodChange(
        chosen=-kl(reference_logp, target_logp),
        rejected=-alpha * kl(rejected_logp, reference_logp) - log_z,
    )


def change_when_rejected_is_reference(
    target_logp: Float[Tensor, "*shape Y"],
    reference_logp: Float[Tensor, "*shape Y"],
    chosen_logp: Float[Tensor, "*shape Y"],
    beta: float | Float[Tensor, "*shape 1"],
) -> LikelihoodChange:
    """The other case: changes when pi_l = pi_ref and the power law holds (derived).

        rejected  = -KL(pi_ref || pi*)                                             <= 0
        chosen    = KL(pi_w || pi_ref)/beta - (1/beta - 1) D_{1/beta}(pi_w || pi_ref)

    with D the Renyi divergence. The chosen cannot fall when beta >= 1; below, either sign.
    """
    alpha = _exponent(beta, reference_logp)
    divergence = renyi(chosen_logp, reference_logp, alpha)
    return LikelihoodChange(
        chosen=alpha * kl(chosen_logp, reference_logp) - (alpha - 1) * divergence,
        rejected=-kl(reference_logp, target_logp),
    )


def project_out_conflict(
    toward_chosen: Float[Tensor, "*shape D"], away_from_rejected: Float[Tensor, "*shape D"]
) -> Float[Tensor, "*shape D"]:
    """Direction of DPO-PG: DPO's, without the part of the rejected push that lowers the chosen.

        u = a + b - min(b . a, 0) / (a . a) a,   a = w grad log pi(y_w),  b = -w grad log pi(y_l)

    A small step along u never lowers log pi(y_w) of a pair taken alone; it may lower the margin.
    The paper's definition of DPO-PG is not known: this is our working version (guessed).

    Args:
        toward_chosen: a, of one pair or of a batch's mean.
        away_from_rejected: b, with the same weights.
    """
    overlap = (toward_chosen * away_from_rejected).sum(-1, keepdim=True).clamp(max=0)
    length = toward_chosen.square().sum(-1, keepdim=True)
    tiny = torch.finfo(length.dtype).tiny  # nothing overlaps with a zero vector
    return toward_chosen + away_from_rejected - overlap / length.clamp(min=tiny) * toward_chosen


def _exponent(beta: float | Tensor, like: Tensor) -> Tensor:
    """1/beta, over the leading axes of `like`."""
    inverse = 1 / torch.as_tensor(beta, dtype=like.dtype)
    return inverse.expand(*like.shape[:-1], 1).squeeze(-1)
