"""How good a policy is: accuracy, win rate, length control, KL, calibration, groups.

Pure functions on rewards, margins and log-probabilities; nothing here runs a model. Each returns a
frozen result that `dataclasses.asdict` turns into plain JSON.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from scipy import optimize, stats
from torch import Tensor
from torch.nn.functional import softplus

from prefloop.intervals import CONFIDENCE, RESAMPLES, Estimate, mean, ratio, share
from prefloop.types import Logps, UserError

RIDGE = 0.01
"""Penalty of the length-control fit, so that outcomes without a loss keep finite coefficients."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Preference accuracy.

    Attributes:
        accuracy: share of pairs ordered as labelled, a tie counting half, in [0, 1].
        correct, tied, wrong: numbers of pairs.
    """

    accuracy: Estimate
    correct: int
    tied: int
    wrong: int


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often A's answer gets the higher reward.

    Attributes:
        rate: probability that A wins, a tie counting half, in [0, 1]; bootstrap over prompts.
        wins, ties, losses: numbers of (answer of A, answer of B) to the same prompt.
    """

    rate: Estimate
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True, kw_only=True)
class LengthControlled:
    """Win rate at equal length, by a logistic model.

    Attributes:
        rate: sigmoid(intercept), in [0, 1].
        raw: the plain win rate of the same outcomes.
        slope: b below, log-odds per unit of tanh(d / sd); positive where the longer answer wins.
        scale: standard deviation of the length differences, in the units of length given.
    """

    rate: Estimate
    raw: float
    slope: float
    scale: float


@dataclass(frozen=True, kw_only=True)
class KL:
    """KL(policy || reference) from the policy's own samples, in nats.

    Attributes:
        sequence: nats per response; mean of log policy / reference (k1). Unbiased, any sign.
        sequence_k3: nats per response; sum over tokens of k3. Unbiased, never negative.
        token, token_k3: nats per token; the same sums over the number of tokens.
        tokens: response tokens behind it.
    """

    sequence: Estimate
    sequence_k3: Estimate
    token: Estimate
    token_k3: Estimate
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """Pairs whose confidence lies in [low, high): how many, how confident, how often right."""

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Do the Bradley-Terry probabilities mean what they say?

    Attributes:
        ece: expected calibration error, sum over bins of (pairs / all) |accuracy - confidence|;
            in [0, 1], biased upward with few pairs a bin.
        brier: mean squared difference of probability and outcome, in [0, 1]; 1/4 for always 1/2.
        nll: mean negative log-likelihood of the outcomes, nats per pair; log 2 for always 1/2.
        overconfidence: mean confidence - mean accuracy; positive where it is too sure.
        bins: equal widths over the confidences [1/2, 1]; bins without a pair are left out.
    """

    ece: float
    brier: float
    nll: float
    overconfidence: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """One number a group, and what the groups come to.

    Attributes:
        groups: mean of each group, by name, in order of name.
        worst: name of the group with the lowest mean; the first by name of several.
        average: mean of group means: each group counts once, whatever its size.
        pooled: mean over all values: each value counts once.
        gini: inequality of the group means, in [0, 1 - 1/K]; 0 is equal. None where a mean is
            negative or all are 0, since it is not defined there.
    """

    groups: dict[str, Estimate]
    worst: str
    average: float
    pooled: float
    gini: float | None


def preference_accuracy(
    margin: Float[Tensor, " P"],
    clusters: Int[Tensor, " P"] | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Accuracy:
    """How often the chosen response has the higher reward: margin = reward chosen - rejected.

    A margin of exactly 0 is a tie: it counts half, so that a policy that equals its reference
    scores 1/2. Labelled ties are not pairs; `types.ordered_pairs` leaves them out.
    """
    _refuse_nan("margins", margin)
    credit = (margin.sign() + 1) / 2
    return Accuracy(
        accuracy=share(credit, clusters, confidence, seed=seed),
        correct=int((margin > 0).sum()),
        tied=int((margin == 0).sum()),
        wrong=int((margin < 0).sum()),
    )


def win_rate(
    first: Float[Tensor, "B N"],
    second: Float[Tensor, "B M"],
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> WinRate:
    """Win rate of A against B under a reward, with a bootstrap interval over prompts.

        rate = mean over prompts, i, j of [r_A(x, i) > r_B(x, j)] + 1/2 [r_A(x, i) = r_B(x, j)]

    Args:
        first, second: rewards of N answers of A and M answers of B to the same B prompts, a
            prompt a row. All N M pairs of a prompt are compared, and drawn again together.
        confidence: of the interval.
        resamples: bootstrap draws.
        seed: of the draws.
    """
    credit = outcomes(first, second)
    flat = credit.flatten()
    return WinRate(
        rate=share(flat, _row_of_each(credit), confidence, resamples, seed),
        wins=int((flat == 1).sum()),
        ties=int((flat == 0.5).sum()),
        losses=int((flat == 0).sum()),
    )


def outcomes(first: Float[Tensor, "B N"], second: Float[Tensor, "B M"]) -> Float[Tensor, "B N M"]:
    """1 where A's answer i beats B's answer j to the same prompt, 1/2 for a tie, 0 else."""
    _refuse_nan("rewards", first)
    _refuse_nan("rewards", second)
    # Compared, not subtracted: inf - inf would be NaN, and equal infinities are a tie.
    above = first.unsqueeze(-1) > second.unsqueeze(-2)
    equal = first.unsqueeze(-1) == second.unsqueeze(-2)
    return above.double() + equal.double() / 2


def length_controlled_win_rate(
    credit: Num[Tensor, " P"],
    length_difference: Num[Tensor, " P"],
    clusters: Int[Tensor, " P"] | None = None,
    confidence: float = CONFIDENCE,
) -> LengthControlled:
    """Win rate of A if its answers were as long as B's, by a logistic model of the outcomes.

        P(A wins) = sigmoid(a + b tanh(d / sd(d)))        d = length of A - length of B
        rate = sigmoid(a)

    This is the minimal formula of alpaca_eval's length-controlled win rate, the one that can be
    computed for any prompts. It is not the number on AlpacaEval's leaderboard: that adds a
    difficulty fitted for the AlpacaEval prompts and data of gamed baselines. As there, d is divided
    by its sample standard deviation and not centred. The penalty is 0.01 / 2 (a^2 + b^2) on the
    summed loss (theirs is L1), so shares near 0 or 1 are drawn to 1/2 a little.
    It is a statement about a model: it corrects what length explains, nothing else, and where one
    side is always the longer it extrapolates.

    Args:
        credit: outcome in [0, 1] for A, a tie 1/2.
        length_difference: in tokens, words or characters; only its ratio to its spread matters.
        clusters: prompt of each outcome; the interval is Student's t on the log-odds scale, from
            a cluster-robust (sandwich) error.
        confidence: of the interval.
    """
    raw = share(credit, clusters, confidence)  # refuses what is no credit
    outcome, (feature, scale) = _numbers(credit), _length_feature(_numbers(length_difference))
    design = np.stack([np.ones_like(feature), feature], axis=1)
    weights = _logistic_fit(design, outcome)
    error, count = _intercept_error(design, outcome, weights, clusters)
    half = error * float(stats.t.ppf((1 + confidence) / 2, count - 1)) if count > 1 else np.nan
    low, value, high = 1 / (1 + np.exp(-(weights[0] + np.array([-half, 0.0, half]))))
    rate = Estimate(
        value=float(value),
        low=float(low),
        high=float(high),
        error=float(value * (1 - value) * error),
        clusters=count,
        values=len(outcome),
        confidence=confidence,
    )
    return LengthControlled(rate=rate, raw=raw.value, slope=float(weights[1]), scale=scale)


def kl(policy: Logps, reference: Logps, confidence: float = CONFIDENCE) -> KL:
    """KL(policy || reference) from responses that were sampled from the policy.

        k1 = sum over t of l_t                          l_t = log policy_t - log reference_t
        k3 = sum over t of (exp(-l_t) - 1 + l_t)        >= 0, with the same expectation

    Both are unbiased for the divergence of whole responses only if they were drawn from `policy`
    itself: temperature 1, no top-k or top-p. A response cut at a maximum length counts up to there.
    k3 is applied token by token (Schulman, "Approximating KL divergence", 2020; as used in GRPO);
    applied to whole sequences its variance grows without bound.

    Args:
        policy, reference: log-probabilities (B, N, T) of the same responses, N to each of B
            prompts. Answers to one prompt are one cluster.
        confidence: of the intervals.
    """
    if policy.mask.shape != reference.mask.shape or (policy.mask != reference.mask).any():
        raise UserError("policy and reference scored different tokens; score the same responses")
    gap = (policy.token - reference.token).double()
    _refuse_nan("log-probabilities", gap)
    exists = policy.exists
    log_ratio = gap.sum(-1)[exists]
    k3 = torch.where(policy.mask, torch.expm1(-gap) + gap, 0.0).sum(-1)[exists]
    length = policy.length[exists].double()
    row = exists.nonzero()[:, 0]
    return KL(
        sequence=mean(log_ratio, row, confidence),
        sequence_k3=mean(k3, row, confidence),
        token=ratio(log_ratio, length, row, confidence),
        token_k3=ratio(k3, length, row, confidence),
        tokens=int(length.sum()),
    )


def calibration(
    margin: Float[Tensor, " P"], outcome: Num[Tensor, " P"] | None = None, bins: int = 10
) -> Calibration:
    """Calibration of sigmoid(margin) as the probability that the first of two responses wins.

    A pair and the same pair the other way round say the same thing, so each is read from the side
    that the model favours: confidence = sigmoid(|margin|) in [1/2, 1], and it is right if that
    side won. A margin of 0 is right with credit 1/2.

    Args:
        margin: reward of the first response minus reward of the second: log-odds, nats.
        outcome: share of votes for the first, in [0, 1]; None where the first is always the chosen.
        bins: equal widths over [1/2, 1].
    """
    _refuse_nan("margins", margin)
    if len(margin) == 0 or bins < 1:
        raise UserError(f"calibration needs pairs and bins; found {len(margin)} and {bins}")
    logit = margin.double()
    won = torch.ones_like(logit) if outcome is None else outcome.double()
    if not ((won >= 0) & (won <= 1)).all():
        raise UserError("an outcome is a share of votes in [0, 1]; found one outside")
    confidence = logit.abs().sigmoid()
    right = torch.where(logit > 0, won, torch.where(logit < 0, 1 - won, 0.5))
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table = tuple(
        ReliabilityBin(
            low=0.5 + 0.5 * index / bins,
            high=0.5 + 0.5 * (index + 1) / bins,
            pairs=int((place == index).sum()),
            confidence=float(confidence[place == index].mean()),
            accuracy=float(right[place == index].mean()),
        )
        for index in place.unique().tolist()
    )
    return Calibration(
        ece=sum(row.pairs * abs(row.accuracy - row.confidence) for row in table) / len(logit),
        brier=float((logit.sigmoid() - won).square().mean()),
        nll=float((won * softplus(-logit) + (1 - won) * softplus(logit)).mean()),
        overconfidence=float((confidence - right).mean()),
        bins=table,
    )


def by_group(
    values: Num[Tensor, " P"],
    groups: Sequence[str],
    clusters: Int[Tensor, " P"] | None = None,
    confidence: float = CONFIDENCE,
) -> Groups:
    """The mean of each group (an annotator, a topic), the worst, the average and the inequality."""
    if len(groups) != len(values):
        raise UserError(f"{len(values)} values but {len(groups)} group names; give one a value")
    pooled = mean(values, clusters, confidence).value
    means = {}
    for name in sorted(set(groups)):
        inside = torch.tensor([group == name for group in groups], device=values.device)
        within = None if clusters is None else clusters[inside]
        means[name] = mean(values[inside], within, confidence)
    levels = [estimate.value for estimate in means.values()]
    return Groups(
        groups=means,
        worst=min(means, key=lambda name: means[name].value),
        average=float(np.mean(levels)),
        pooled=pooled,
        gini=gini(torch.tensor(levels, dtype=torch.float64)),
    )


def gini(values: Float[Tensor, " K"]) -> float | None:
    """Gini coefficient of K values >= 0; None where one is negative or all are 0.

    sum over i, j of |x_i - x_j| / (2 K sum x)
    """
    total = float(values.sum())
    if (values < 0).any() or total == 0:
        return None
    gap = (values.unsqueeze(0) - values.unsqueeze(1)).abs().sum()
    return float(gap / (2 * len(values) * total))


def _row_of_each(table: Tensor) -> Tensor:
    """Index of the row of each entry of a flattened table."""
    return torch.arange(len(table)).repeat_interleave(table[0].numel())


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


def _length_feature(difference: np.ndarray) -> tuple[np.ndarray, float]:
    """tanh(d / sd) and sd; all zeros where both sides are always equally long."""
    if len(difference) < 2 or not np.isfinite(difference).all():
        raise UserError(
            "length control needs two outcomes or more with finite lengths; found "
            f"{int(np.isfinite(difference).sum())}. Compare more prompts."
        )
    scale = float(difference.std(ddof=1))
    if scale == 0 and difference[0] != 0:
        raise UserError(
            f"one side is always {abs(difference[0]):g} longer, so length and winner cannot be "
            "told apart; report the plain win rate, or compare answers of varied length"
        )
    return (difference if scale == 0 else np.tanh(difference / scale)), scale


def _logistic_fit(design: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logit = design @ weights
        value = np.logaddexp(0, logit).sum() - outcome @ logit + RIDGE / 2 * weights @ weights
        slope = design.T @ (1 / (1 + np.exp(-logit)) - outcome) + RIDGE * weights
        return float(value), slope

    start = np.zeros(design.shape[1])
    found = optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9})
    return found.x


def _intercept_error(
    design: np.ndarray, outcome: np.ndarray, weights: np.ndarray, clusters: Tensor | None
) -> tuple[float, int]:
    """Sandwich standard error of the intercept, and the number of clusters."""
    chance = 1 / (1 + np.exp(-(design @ weights)))
    bread = (design * (chance * (1 - chance))[:, None]).T @ design + RIDGE * np.eye(2)
    scores = design * (outcome - chance)[:, None]
    if clusters is not None:
        _, index = np.unique(clusters.cpu().numpy(), return_inverse=True)
        scores = np.stack([np.bincount(index, column) for column in scores.T], axis=1)
    count = len(scores)
    if count < 2:
        return float("nan"), count
    inverse = np.linalg.inv(bread)
    cover = inverse @ (scores.T @ scores * count / (count - 1)) @ inverse
    return float(np.sqrt(cover[0, 0])), count


def _refuse_nan(what: str, values: Tensor) -> None:
    bad = values.isnan()
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise UserError(
            f"{int(bad.sum())} of {bad.numel()} {what} are NaN, the first at index {where}; mend "
            "what made them, or drop those rows"
        )
