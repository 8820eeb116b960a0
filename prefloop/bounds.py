"""What preference variance (PVar) bounds: gradients of DPO, their signal-to-noise ratio, its drift.

All of it is about one prompt and the expected DPO loss over pairs drawn from the policy itself, the
draw taken as fixed. Scores are s_i = grad_theta log pi_theta(y_i|x).

References:
    "On the Role of Preference Variance in Preference Optimization", arXiv 2510.13022, as reported
    in summaries. Only `cube_root_bound` is the paper's; the others are derived here, and tighter.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def expected_preference_variance(
    rewards: Float[Tensor, "*problems Y"], logp: Float[Tensor, "*problems Y"]
) -> Float[Tensor, "*problems"]:
    """PVar of a finite policy: E over independent y_i, y_j of (sigmoid(r_i - r_j) - 1/2)^2.

    `selection.preference_variance` estimates this from samples without bias. In [0, 1/4].
    """
    deviation = 0.5 * torch.tanh((rewards.unsqueeze(-1) - rewards.unsqueeze(-2)) / 2)
    both = (logp.unsqueeze(-1) + logp.unsqueeze(-2)).exp()
    return (both * deviation.square()).sum((-1, -2))


def score_spread(
    scores: Float[Tensor, "*problems Y D"], logp: Float[Tensor, "*problems Y"]
) -> Float[Tensor, "*problems"]:
    """E ||s_i - s_j||^2 over independent responses of the policy, twice the variance of s."""
    chance = logp.exp().unsqueeze(-1)
    centered = scores - (chance * scores).sum(-2, keepdim=True)
    return 2 * (chance * centered.square()).sum((-1, -2))


def cube_root_bound(
    variance: Float[Tensor, "*problems"],
    beta: Float[Tensor, "*problems"],
    length: Float[Tensor, "*problems"],
    jacobian_norm: Float[Tensor, "*problems"],
) -> Float[Tensor, "*problems"]:
    """The paper's bound on ||grad L(x)||: 8 beta |y| gamma PVar^(1/3) (Thm 4.1).

    The form is reported; that gamma is the largest operator norm of d logits / d theta over
    prefixes, and that the loss is the unlabelled one, is our reading, and gives the constant 8.
    Loose: at most a tenth of it was ever reached.
    """
    return 8 * beta * length * jacobian_norm * variance.pow(1 / 3)


def cauchy_schwarz_bound(
    variance: Float[Tensor, "*problems"],
    beta: Float[Tensor, "*problems"],
    spread: Float[Tensor, "*problems"],
) -> Float[Tensor, "*problems"]:
    """||grad L(x)|| <= beta sqrt(PVar) sqrt(E ||s_i - s_j||^2), which is attained (derived)."""
    return beta * variance.sqrt() * spread.sqrt()


def martingale_bound(
    variance: Float[Tensor, "*problems"],
    beta: Float[Tensor, "*problems"],
    length: Float[Tensor, "*problems"],
    jacobian_norm: Float[Tensor, "*problems"],
) -> Float[Tensor, "*problems"]:
    """||grad L(x)|| <= sqrt(2 |y|) beta gamma sqrt(PVar) (derived).

    Score increments along a response are a martingale, hence E ||s||^2 <= |y| gamma^2.
    """
    return math.sqrt(2) * length.sqrt() * beta * jacobian_norm * variance.sqrt()


def labelled_bound(
    reward_variance: Float[Tensor, "*problems"],
    policy_variance: Float[Tensor, "*problems"],
    beta: Float[Tensor, "*problems"],
    spread: Float[Tensor, "*problems"],
) -> Float[Tensor, "*problems"]:
    """Bound on ||grad L(x)|| when Bradley-Terry labels of a reward order the pairs (derived).

        beta (sqrt(PVar_reward) + sqrt(PVar_policy)) sqrt(E ||s_i - s_j||^2)

    PVar_policy is 0 while the policy equals its reference, so PVar of the reward alone bounds the
    first update: the cleanest reason to select by it. Hard labels have no such bound.
    """
    return beta * (reward_variance.sqrt() + policy_variance.sqrt()) * spread.sqrt()


def signal_to_noise_bound(variance: Float[Tensor, "*problems"]) -> Float[Tensor, "*problems"]:
    """Largest ||E G||^2 / (E ||G||^2 - ||E G||^2) of the first update: 4 PVar / (1 - 4 PVar).

    G is the gradient of one random pair with a Bradley-Terry label, at pi = pi_ref (derived).
    Prompts of low PVar give small and noisy gradients.
    """
    return 4 * variance / (1 - 4 * variance)


def drift_bound(
    rewards: Float[Tensor, "*problems Y"],
    scored: Float[Tensor, "*problems Y"],
    logp: Float[Tensor, "*problems Y"],
    start_logp: Float[Tensor, "*problems Y"],
) -> Float[Tensor, "*problems"]:
    """Xi with PVar of the policy <= PVar of a reward model under the start + Xi (derived).

        Xi = 1/2 min_c E_pi |rhat - r - c| + 1/2 TV(pi, pi_0)

    The paper bounds the same difference by three errors whose expressions are not known; this one
    is ours. Splitting the first term at the true reward gives its three terms, and is weaker.

    Args:
        rewards: rhat = beta log pi/pi_ref of each response.
        scored: r, what the reward model says of it.
        logp: the policy.
        start_logp: the policy that the reward model's PVar was taken under.
    """
    gap = rewards - scored
    off = (logp.exp() * (gap - weighted_median(gap, logp).unsqueeze(-1)).abs()).sum(-1)
    return 0.5 * off + 0.25 * (logp.exp() - start_logp.exp()).abs().sum(-1)


def split_drift_bound(
    rewards: Float[Tensor, "*problems Y"],
    true: Float[Tensor, "*problems Y"],
    scored: Float[Tensor, "*problems Y"],
    logp: Float[Tensor, "*problems Y"],
    start_logp: Float[Tensor, "*problems Y"],
) -> Float[Tensor, "*problems"]:
    """`drift_bound` in three terms (derived): policy against true reward, reward error, shift.

    Xi = 1/2 min_c E_pi |rhat - r* - c| + 1/2 E_pi |r* - r| + 1/2 TV(pi, pi_0)
    """
    error = (logp.exp() * (true - scored).abs()).sum(-1)
    return drift_bound(rewards, true, logp, start_logp) + 0.5 * error


def weighted_median(
    values: Float[Tensor, "*problems Y"], logp: Float[Tensor, "*problems Y"]
) -> Float[Tensor, "*problems"]:
    """The value c that minimizes E |value - c| under exp(logp)."""
    order = values.argsort(-1)
    below = logp.exp().gather(-1, order).cumsum(-1)
    place = (below < 0.5).sum(-1, keepdim=True).clamp(max=values.shape[-1] - 1)
    return values.gather(-1, order.gather(-1, place)).squeeze(-1)
