"""Preference variance: its estimator, and what it bounds, on thousands of random policies."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop import bounds
from prefloop.objectives import DPO
from prefloop.selection import preference_variance
from prefloop.tabular import (
    LogLinearPolicy,
    TabularPolicy,
    expected_loss,
    independent_pairs,
    labelled_pairs,
    random_logp,
    sequence_logp,
)

GAUSSIAN_SPREADS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


class GradientRatios(NamedTuple):
    """Measured over bound, a number a random policy; a bound holds where the ratio is <= 1."""

    cube_root: Float[Tensor, " R"]
    cauchy_schwarz: Float[Tensor, " R"]
    martingale: Float[Tensor, " R"]
    variance: Float[Tensor, " R"]


class LabelledRatios(NamedTuple):
    """Measured over bound when Bradley-Terry labels of a reward order the pairs."""

    gradient: Float[Tensor, " R"]
    signal_to_noise: Float[Tensor, " R"]
    drift: Float[Tensor, " R"]
    split_drift: Float[Tensor, " R"]
    descent: Float[Tensor, " R"]


class Problems(NamedTuple):
    """Random log-linear policies that share one beta."""

    policy: LogLinearPolicy
    reference: Float[Tensor, "R Y"]
    features: Float[Tensor, "R Y D"]
    beta: float
    rng: torch.Generator


def gaussian_preference_variance(spreads: tuple[float, ...]) -> list[float]:
    """PVar of rewards N(0, s^2) for each s, by quadrature over two-response prompts.

    The difference of two rewards is N(0, 2 s^2); the trapezoid rule on a smooth, decaying function
    is exact to rounding.
    """
    z = torch.linspace(-12, 12, 40001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    step = float(z[1] - z[0])
    values = []
    for spread in spreads:
        gap = math.sqrt(2) * spread * z
        pairs = torch.stack([torch.zeros_like(gap), gap], -1)
        values.append(float((density * preference_variance(pairs)).sum() * step))
    return values


def estimates(spread: float, samples: int, prompts: int, seed: int) -> Float[Tensor, " P"]:
    """Estimated PVar of prompts with rewards N(0, spread^2), `samples` responses each."""
    rng = torch.Generator().manual_seed(seed)
    rewards = spread * torch.randn((prompts, samples), generator=rng, dtype=torch.float64)
    return preference_variance(rewards)


def enumerated_mean(rewards: Float[Tensor, " Y"], logp: Float[Tensor, " Y"], samples: int) -> float:
    """Exact mean of the estimator over all Y^samples draws from a finite policy."""
    responses = torch.arange(len(rewards))
    draws = torch.cartesian_prod(*[responses] * samples)
    chance = logp[draws].sum(-1).exp()
    return float((chance * preference_variance(rewards[draws])).sum())


def random_problems(seed: int, groups: int = 80, each: int = 50) -> list[Problems]:
    """Groups of random log-linear policies: 2 to 11 responses, up to 7 features, beta 0.01 to 10.

    Within a group the number of responses and beta are shared; unused features are zero.
    """
    rng = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=rng, dtype=torch.float64)

    problems = []
    for group in range(groups):
        responses = 2 + group % 10
        features = torch.randn((each, responses, 7), generator=rng, dtype=torch.float64)
        used = torch.arange(7) < uniform(1.0, 8.0, each, 1, 1).floor()
        features = features * used * 10 ** uniform(-1.0, 1.0, each, 1, 1)
        reference = random_logp((each, responses), rng, 1.0)
        reference = (uniform(0.0, 3.0, each, 1) * reference).log_softmax(-1)
        weight = torch.randn((each, 7), generator=rng, dtype=torch.float64)
        weight = weight * 10 ** uniform(-2.0, 1.0, each, 1)
        policy = LogLinearPolicy(features, reference, weight)
        beta = float(10 ** uniform(-2.0, 1.0))
        problems.append(Problems(policy, reference, features, beta, rng))
    return problems


def scores(features: Float[Tensor, "R Y D"], logp: Float[Tensor, "R Y"]) -> Float[Tensor, "R Y D"]:
    """grad log pi(y) of a log-linear policy: features minus their mean under it."""
    return features - (logp.exp().unsqueeze(-1) * features).sum(-2, keepdim=True)


def gradient(
    problem: Problems, weight: Float[Tensor, "R Y Y"], at_reference: bool = False
) -> Float[Tensor, "R D"]:
    """Gradient of the expected DPO loss by backpropagation through the objective itself."""
    policy = problem.policy
    if at_reference:
        start = torch.zeros_like(policy.weight)
        policy = LogLinearPolicy(problem.features, problem.reference, start)
    loss = expected_loss(DPO(beta=problem.beta), policy.logp(), problem.reference, weight)
    return torch.autograd.grad(loss.sum(), policy.weight)[0]


def gradient_ratios(problems: list[Problems]) -> GradientRatios:
    """Unlabelled loss, pairs from the policy: gradient norm over each of the three bounds."""
    rows = []
    for problem in problems:
        logp = problem.policy.logp().detach()
        norm = gradient(problem, independent_pairs(logp, logp)).norm(dim=-1)
        variance = bounds.expected_preference_variance(
            problem.beta * (logp - problem.reference), logp
        )
        beta, one = torch.full_like(norm, problem.beta), torch.ones_like(norm)
        jacobian = torch.linalg.matrix_norm(problem.features, ord=2)
        spread = bounds.score_spread(scores(problem.features, logp), logp)
        rows.append(
            (
                norm / bounds.cube_root_bound(variance, beta, one, jacobian),
                norm / bounds.cauchy_schwarz_bound(variance, beta, spread),
                norm / bounds.martingale_bound(variance, beta, one, jacobian),
                variance,
            )
        )
    return GradientRatios(*(torch.cat(column) for column in zip(*rows, strict=True)))


def labelled_ratios(problems: list[Problems]) -> LabelledRatios:
    """Bradley-Terry labels of a random reward: gradient, first step's noise, drift of PVar."""
    rows = []
    for problem in problems:
        logp = problem.policy.logp().detach()
        true, scored = _random_rewards(logp, problem.rng)
        rewards = problem.beta * (logp - problem.reference)
        shown = independent_pairs(logp, logp)
        norm = gradient(problem, labelled_pairs(shown, true)).norm(dim=-1)
        policy_variance = bounds.expected_preference_variance(rewards, logp)
        reward_variance = bounds.expected_preference_variance(true, logp)
        spread = bounds.score_spread(scores(problem.features, logp), logp)
        beta = torch.full_like(norm, problem.beta)
        bound = bounds.labelled_bound(reward_variance, policy_variance, beta, spread)
        start = bounds.expected_preference_variance(scored, problem.reference)
        excess = policy_variance - start
        drift = bounds.drift_bound(rewards, scored, logp, problem.reference)
        split = bounds.split_drift_bound(rewards, true, scored, logp, problem.reference)
        noise, descent = _first_step(problem, true)
        rows.append((norm / bound, noise, excess / drift, excess / split, descent))
    return LabelledRatios(*(torch.cat(column) for column in zip(*rows, strict=True)))


def _first_step(
    problem: Problems, reward: Float[Tensor, "R Y"]
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """At pi = pi_ref: signal-to-noise over its bound, and the share of the step that ascends.

    The second is <-g, d> / (||g|| ||d||) with d the gradient of the expected reward.
    """
    reference = problem.reference
    mean = gradient(
        problem, labelled_pairs(independent_pairs(reference, reference), reward), at_reference=True
    )
    score = scores(problem.features, reference)
    second = problem.beta**2 / 4 * bounds.score_spread(score, reference)
    signal = mean.square().sum(-1)
    variance = bounds.expected_preference_variance(reward, reference)
    ratio = signal / (second - signal) / bounds.signal_to_noise_bound(variance)
    ascent = ((reference.exp() * reward).unsqueeze(-1) * score).sum(-2)
    return ratio, torch.cosine_similarity(-mean, ascent, dim=-1)


def _random_rewards(like: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A true reward and a reward model's of each response, on scales from 0.03 to 10."""

    def drawn(low: float) -> Tensor:
        power = low + (1 - low) * torch.rand((len(like), 1), generator=rng, dtype=like.dtype)
        return torch.randn(like.shape, generator=rng, dtype=like.dtype) * 10**power

    true = drawn(-1.5)
    return true, true + drawn(-2.0)


class Network(NamedTuple):
    """Next-token logits B tanh(A e) of a batch of one-hidden-layer models on a prefix tree."""

    embedding: Float[Tensor, "R nodes H"]
    hidden: Float[Tensor, "R H H"]
    output: Float[Tensor, "R V H"]

    def activation(self) -> Float[Tensor, "R nodes H"]:
        """tanh(A e) of every prefix."""
        return torch.tanh(self.embedding @ self.hidden.mT)

    def logp(self, length: int) -> Float[Tensor, "R Y"]:
        """log pi of every sequence."""
        logits = self.activation() @ self.output.mT
        return sequence_logp(logits.log_softmax(-1), length)

    def jacobian_norm(self) -> Float[Tensor, " R"]:
        """Largest operator norm over prefixes of d logits / d (A, B)."""
        active = self.activation()
        inner = torch.einsum("rvk,rnk,rnj->rnvkj", self.output, 1 - active.square(), self.embedding)
        eye = torch.eye(self.output.shape[1], dtype=active.dtype)
        outer = torch.einsum("vw,rnk->rnvwk", eye, active)
        jacobian = torch.cat([inner.flatten(-2), outer.flatten(-2)], -1)
        return torch.linalg.matrix_norm(jacobian, ord=2).amax(-1)


def autoregressive_ratios(seed: int, each: int = 38) -> GradientRatios:
    """The same three ratios for autoregressive networks of 2 or 3 tokens, up to 4 long.

    Every V^T response is enumerated; gradients go through the objective and the network.
    """
    rng = torch.Generator().manual_seed(seed)
    parts = [
        _network_ratios(vocabulary, length, each, rng)
        for vocabulary in (2, 3)
        for length in (1, 2, 3, 4)
    ]
    return GradientRatios(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _network_ratios(
    vocabulary: int, length: int, each: int, rng: torch.Generator
) -> GradientRatios:
    nodes = sum(vocabulary**level for level in range(length))

    def normal(*shape: int) -> Tensor:
        return torch.randn((each, *shape), generator=rng, dtype=torch.float64)

    def power(low: float, high: float) -> Tensor:
        drawn = torch.rand((each, 1, 1), generator=rng, dtype=torch.float64)
        return 10 ** (low + (high - low) * drawn)

    embedding, scale, beta = normal(nodes, 3), power(-1.0, 0.7), float(power(-2.0, 1.0)[0])
    network = Network(
        embedding,
        (normal(3, 3) * scale).requires_grad_(),
        (normal(vocabulary, 3) * scale).requires_grad_(),
    )
    reference = Network(embedding, normal(3, 3), normal(vocabulary, 3)).logp(length)
    logp = network.logp(length)
    fixed = logp.detach()
    loss = expected_loss(DPO(beta=beta), logp, reference, independent_pairs(fixed, fixed))
    parts = torch.autograd.grad(loss.sum(), (network.hidden, network.output), retain_graph=True)
    norm = torch.cat([part.flatten(1) for part in parts], -1).norm(dim=-1)
    variance = bounds.expected_preference_variance(beta * (fixed - reference), fixed)
    spread = bounds.score_spread(_network_scores(logp, network), fixed)
    betas, tokens = torch.full_like(norm, beta), torch.full_like(norm, length)
    gamma = network.jacobian_norm().detach()
    return GradientRatios(
        norm / bounds.cube_root_bound(variance, betas, tokens, gamma),
        norm / bounds.cauchy_schwarz_bound(variance, betas, spread),
        norm / bounds.martingale_bound(variance, betas, tokens, gamma),
        variance,
    )


def _network_scores(logp: Float[Tensor, "R Y"], network: Network) -> Float[Tensor, "R Y D"]:
    """grad log pi of every sequence: one backward pass a sequence, all networks at once."""
    rows = [
        torch.autograd.grad(column.sum(), (network.hidden, network.output), retain_graph=True)
        for column in logp.unbind(-1)
    ]
    return torch.stack([torch.cat([part.flatten(1) for part in row], -1) for row in rows], 1)


def hard_label_gradient(rewards: Float[Tensor, " Y"], beta: float) -> float:
    """||grad|| of the DPO loss at pi = pi_ref (uniform) when the higher reward always wins."""
    policy = TabularPolicy(torch.zeros_like(rewards))
    logp = policy.logp()
    gap = rewards.unsqueeze(-1) - rewards.unsqueeze(-2)
    label = 0.5 + 0.5 * gap.sign()
    shown = independent_pairs(logp, logp).detach()
    loss = expected_loss(DPO(beta=beta), logp, logp.detach(), (shown + shown.mT) * label)
    return float(torch.autograd.grad(loss, policy.logits)[0].norm())


def self_labelled_gradient(logits: Float[Tensor, "R Y"], beta: float) -> float:
    """Largest ||grad|| over policies whose own implicit reward labels the pairs: 0 (derived)."""
    policy = TabularPolicy(logits)
    logp = policy.logp()
    fixed = logp.detach()
    reference = torch.zeros_like(fixed).log_softmax(-1)
    weight = labelled_pairs(independent_pairs(fixed, fixed), beta * (fixed - reference))
    loss = expected_loss(DPO(beta=beta), logp, reference, weight)
    return float(torch.autograd.grad(loss.sum(), policy.logits)[0].norm(dim=-1).max())
