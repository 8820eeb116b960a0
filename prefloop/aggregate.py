"""One policy from several: min-max regret over annotator types, and the forms a mixture can take.

R[u, i] is what type u loses when policy i answers instead of its own. The weights w of the mixture
sum_i w_i pi_i are the minimax strategy of the game with that matrix: solved exactly as a linear
program (with the adversary's weights as a certificate), or as the authors do, by optimistic
multiplicative weights.

To add a policy form: a function of log-probabilities (or logits) and weights, beside `mixture`.

References:
    MMRA of arXiv 2510.15716 (MinMax-DPO of 2405.15065), after the authors' public code.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linprog
from torch import Tensor

from prefloop.types import UserError


class Regret(NamedTuple):
    """Regret matrix estimated from samples.

    Attributes:
        matrix: R[u, i], what type u loses in reward when policy i answers; 0 on the diagonal, may
            be negative.
        standard_error: of each entry, from the spread over prompts (paired: the same prompts).
    """

    matrix: Float[Tensor, "K K"]
    standard_error: Float[Tensor, "K K"]


def regret_matrix(
    policies: Float[Tensor, "*G K Y"], reference: Float[Tensor, "*G Y"], beta: float
) -> Float[Tensor, "*G K K"]:
    """Exact regret over a finite response set, by expectation.

        R[u, i] = E_{y ~ pi_u} h_u(y) - E_{y ~ pi_i} h_u(y),   h_u = beta log pi_u / pi_ref

    When pi_u is optimal for its reward it equals the regret in true reward, without the KL term.

    Args:
        policies: log pi_k(y) of each type's policy.
        reference: log pi_ref(y).
        beta: strength of the KL constraint, per nat.
    """
    implicit = beta * (policies - reference.unsqueeze(-2))  # (*G, u, Y)
    value = implicit @ policies.exp().mT  # (*G, u, i): E_{y ~ pi_i} h_u
    return value.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) - value


def sampled_regret(log_ratio: Float[Tensor, "K K X S"], beta: float) -> Regret:
    """Regret matrix from samples, with standard errors.

    Args:
        log_ratio: log pi_u(y|x) / pi_ref(y|x), in nats, at [i, u, x, s]: answering policy, type,
            prompt, sample of that prompt. All policies answer the same X >= 2 prompts.
        beta: strength of the KL constraint, per nat.
    """
    prompts = log_ratio.shape[2]
    if prompts < 2:
        raise UserError(
            f"a standard error of the regret needs two prompts, got {prompts}; answer more prompts"
        )
    value = beta * log_ratio.double().mean(-1).transpose(0, 1)  # (u, i, X)
    own = value.diagonal(dim1=0, dim2=1).mT.unsqueeze(1)  # (u, 1, X)
    gap = own - value
    return Regret(gap.mean(-1), gap.std(-1) / prompts**0.5)


@dataclass(frozen=True)
class Aggregation:
    """Weights of a mixture of policies, and the proof of how good they are.

    Attributes:
        weights: w_i >= 0, sum 1: how often policy i answers.
        worst: max over types of c_u sum_i w_i R[u, i], at least 0: what these weights guarantee.
        adversary: weights over (nobody, type 1, ..., type K) of the least favourable population.
        bound: no mixture has a lower worst regret than this, as the adversary's weights prove.
    """

    weights: Float[Tensor, " K"]
    worst: float
    adversary: Float[Tensor, " Z"]
    bound: float

    @property
    def gap(self) -> float:
        """worst - bound >= 0: how far from optimal the weights can be."""
        return self.worst - self.bound


def min_max_regret(
    regret: Float[Tensor, "K K"], importance: Float[Tensor, " K"] | None = None
) -> Aggregation:
    """The mixture whose worst-off type loses least, by linear programming.

        min over w of max(0, max over u of c_u sum_i w_i R[u, i]),   w in the simplex

    The row of zeros (regret is never counted below 0) is the authors'.

    Args:
        regret: R[u, i], finite.
        importance: c_u > 0, how much a unit of each type's regret counts; 1 when None.
    """
    game = _game(regret, importance)
    return _certified(game, *_solved(game))


@dataclass(frozen=True)
class MaxMin:
    """The mixture whose worst-off type gets most, and the proof of it.

    Attributes:
        weights: w_i >= 0, sum 1: how often policy i answers.
        least: min over types of sum_i w_i V[u, i], in units of the reward.
        bound: no mixture gives the worst-off more, as the duals of the linear program prove.
    """

    weights: Float[Tensor, " K"]
    least: float
    bound: float


def max_min_reward(value: Float[Tensor, "K K"]) -> MaxMin:
    """MaxMin-RLHF's aim among mixtures: the most reward for the type that gets least.

        max over w of min over u of sum_i w_i V[u, i],   V[u, i] = E_{y ~ pi_i} h_u(y)

    Unlike regret it compares rewards of different types, and implicit rewards are known up to a
    constant of the prompt: a type whose rewards are small everywhere decides alone. The paper
    trains a policy on the worst-off type's reward; here that aim is taken among mixtures.

    Args:
        value: V[u, i], reward of type u when policy i answers; finite.

    References:
        Chakraborty et al. 2024, "MaxMin-RLHF", arXiv 2402.08925.
    """
    _refuse_not_finite(value, "rewards")
    game = -value.double().numpy()
    found = _certified(game, *_solved(game))
    return MaxMin(weights=found.weights, least=-found.worst, bound=-found.bound)


def multiplicative_weights(
    regret: Float[Tensor, "K K"],
    importance: Float[Tensor, " K"] | None = None,
    steps: int = 100_000,
    step_size: float | None = None,
) -> Aggregation:
    """The same game by optimistic multiplicative weights, as the authors' code solves it.

        l_t = A y_{t-1},  x_t ~ x_{t-1} exp( step_size (2 l_t - l_{t-1}))
        m_t = A' x_{t-1}, y_t ~ y_{t-1} exp(-step_size (2 m_t - m_{t-1})),   w = mean of y_t

    It converges at rate 1 / steps; `min_max_regret` is exact and as fast. It is here to compare.

    Args:
        regret, importance: as in `min_max_regret`.
        steps: how many updates.
        step_size: of both players; 5 / sqrt(steps) when None, as in the code.
    """
    game = _game(regret, importance)
    rate = 5 / steps**0.5 if step_size is None else step_size
    rows, types = game.shape
    x, y = np.full(rows, 1 / rows), np.full(types, 1 / types)
    before_x, before_y = game @ y, x @ game
    sum_x, sum_y = np.zeros(rows), np.zeros(types)
    for _ in range(steps):
        now_x, now_y = game @ y, x @ game
        x = x * np.exp(rate * (2 * now_x - before_x))
        y = y * np.exp(-rate * (2 * now_y - before_y))
        x, y = x / x.sum(), y / y.sum()
        before_x, before_y = now_x, now_y
        sum_x, sum_y = sum_x + x, sum_y + y
    return _certified(game, sum_y, sum_x)


def evaluate_weights(
    regret: Float[Tensor, "K K"],
    weights: Float[Tensor, " K"],
    importance: Float[Tensor, " K"] | None = None,
) -> float:
    """Worst regret of given weights (uniform ones, population shares), at least 0."""
    game = _game(regret, importance)
    return float((game @ weights.double().numpy()).max())


def two_type_weights(
    first: float, second: float, importance: tuple[float, float] = (1.0, 1.0)
) -> tuple[tuple[float, float], float]:
    """Weights and value of the game of two types, in closed form.

        a = c_1 R[1, 2], b = c_2 R[2, 1]:   w = (a, b) / (a + b),   value = a b / (a + b)

    Args:
        first: R[1, 2] > 0, what type 1 loses when policy 2 answers.
        second: R[2, 1] > 0.
        importance: c_1, c_2 > 0.
    """
    if first <= 0 or second <= 0:
        raise UserError(
            f"the closed form needs two positive regrets, got {first} and {second}; with one of "
            "them <= 0 that policy alone has worst regret 0"
        )
    a, b = importance[0] * first, importance[1] * second
    return (a / (a + b), b / (a + b)), a * b / (a + b)


def next_token(
    logits: Float[Tensor, "K M V"], before: Float[Tensor, "K M"], weights: Float[Tensor, " K"]
) -> Float[Tensor, "M V"]:
    """Next-token probabilities of the affine mixture sum_k w_k pi_k(y|x), exactly.

        p(v | prefix) = sum_k c_k pi_k(v | prefix),   c_k ~ w_k pi_k(prefix)

    Args:
        logits: of each policy's next token, at M places.
        before: log pi_k of the response's tokens before each place, in nats.
        weights: in the simplex.
    """
    _refuse_bad_weights(weights)
    belief = (weights.to(before).log().unsqueeze(-1) + before).softmax(0)
    return torch.einsum("km,kmv->mv", belief.to(logits), logits.softmax(-1))


def mixture(logps: Float[Tensor, "K ..."], weights: Float[Tensor, "K ..."]) -> Float[Tensor, "..."]:
    """Log-probability of whole responses under the affine mixture sum_k w_k pi_k(y|x).

    Sample from it by drawing k once a prompt and letting pi_k answer: mixing the probabilities of
    single tokens is another policy. With weights (K, B) of each annotator (their responsibilities)
    over log-probabilities (K, B), it is the personal policy of that annotator.

    Args:
        logps: log pi_k(y|x) of whole responses, in nats.
        weights: in the simplex over K; its further axes are the first of those of `logps`.
    """
    _refuse_bad_weights(weights)
    missing = logps.dim() - weights.dim()
    spread = weights.to(logps.dtype).reshape(*weights.shape, *(1,) * missing)
    return (spread.log() + logps).logsumexp(0)


def geometric(
    logits: Float[Tensor, "K *shape V"],
    reference: Float[Tensor, "*shape V"],
    coefficients: Float[Tensor, " K"],
) -> Float[Tensor, "*shape V"]:
    """Logits of the geometric pool pi_ref prod_k (pi_k / pi_ref)^a_k, not normalised.

        z = sum_k a_k z_k + (1 - sum_k a_k) z_ref

    Over whole responses it averages implicit rewards: pi ~ pi_ref exp(sum_k a_k h_k / beta). Over
    the next token it is the usual approximation of that. Coefficients may be negative or sum to
    anything: (1 + s) of one policy tilts it away from the reference.
    """
    weighted = torch.einsum("k,k...->...", coefficients.to(logits.dtype), logits)
    return weighted + (1 - coefficients.sum()) * reference


def choose_policy(
    weights: Float[Tensor, " K"], prompts: int, rng: torch.Generator
) -> Int[Tensor, " X"]:
    """Which policy answers each prompt: drawn once a prompt, so that the mixture is exact."""
    _refuse_bad_weights(weights)
    return torch.multinomial(weights, prompts, replacement=True, generator=rng)


def _game(regret: Tensor, importance: Tensor | None) -> np.ndarray:
    """The matrix (K + 1, K) that the mixture minimises and the adversary maximises."""
    _refuse_not_finite(regret, "regrets")
    scale = torch.ones(len(regret)) if importance is None else importance
    if not (scale > 0).all() or not scale.isfinite().all():
        raise UserError(f"importance must be positive and finite, got {scale.tolist()}")
    rows = (scale.double().unsqueeze(-1) * regret.double()).numpy()
    return np.vstack([np.zeros(rows.shape[1]), rows])


def _solved(game: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both players' weights in the zero-sum game that the columns' player minimises."""
    rows, types = game.shape
    solved = linprog(
        c=np.append(np.zeros(types), 1.0),
        A_ub=np.hstack([game, -np.ones((rows, 1))]),
        b_ub=np.zeros(rows),
        A_eq=np.append(np.ones(types), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * types + [(None, None)],
        method="highs",
    )
    assert solved.status == 0, solved.message  # feasible and bounded for any finite matrix
    return solved.x[:types], -solved.ineqlin.marginals


def _certified(game: np.ndarray, weights: np.ndarray, adversary: np.ndarray) -> Aggregation:
    """Normalise both players' weights and compute what each one guarantees."""
    weights, adversary = weights.clip(0), adversary.clip(0)
    weights, adversary = weights / weights.sum(), adversary / adversary.sum()
    return Aggregation(
        weights=torch.from_numpy(weights),
        worst=float((game @ weights).max()),
        adversary=torch.from_numpy(adversary),
        bound=float((adversary @ game).min()),
    )


def _refuse_not_finite(table: Tensor, what: str) -> None:
    bad = ~table.isfinite()
    if bad.any():
        raise UserError(
            f"{what} must be finite, {int(bad.sum())} of {table.numel()} are not; look at the "
            "log-probabilities of the types' policies"
        )


def _refuse_bad_weights(weights: Tensor) -> None:
    total = weights.sum(0)
    if (weights < 0).any() or not torch.allclose(total, torch.ones_like(total), atol=1e-4):
        raise UserError(
            f"weights of a mixture must be at least 0 and sum to 1, got {weights.tolist()}"
        )
