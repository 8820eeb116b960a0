"""How sure a number is: intervals and paired tests, with the prompt as the unit that repeats.

Answers to one prompt are alike, so numbers of one prompt are one cluster: they are left out, drawn
again or counted together, never one by one. `clusters` names the cluster of each value; None says
that every value stands alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from scipy import stats
from torch import Tensor

from prefloop.types import UserError

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number estimated from data, with how sure it is.

    Attributes:
        value: the estimate.
        low, high: confidence interval; NaN where one cluster is all there is.
        error: standard error of `value`, in its units; NaN where one cluster is all there is.
        clusters: independent units behind it (prompts, mostly).
        values: numbers behind it.
        confidence: probability that an interval made this way covers the truth, in (0, 1).
        method: how the interval was made: "t", "bootstrap" or "Wilson".
    """

    value: float
    low: float
    high: float
    error: float
    clusters: int
    values: int
    confidence: float = CONFIDENCE
    method: str = "t"

    def row(self, name: str, unit: str = "") -> Mapping[str, Any]:
        """The row of `evaluation.json` that a report shows: name, value, low, high, n, unit."""
        interval = {"low": self.low, "high": self.high, "error": self.error}
        return {"name": name, "value": self.value, **interval, "n": self.clusters, "unit": unit}


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Is A above B on the same units?

    Attributes:
        difference: mean of A - B over clusters, with a bootstrap interval.
        t_p: two-sided p-value of the paired t test on cluster means; 1 where all are 0.
        wilcoxon_p: two-sided p-value of Wilcoxon's signed-rank test on cluster means.
    """

    difference: Estimate
    t_p: float
    wilcoxon_p: float


def mean(
    values: Num[Tensor, " P"],
    clusters: Int[Tensor, " P"] | None = None,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Mean of `values` with a cluster-robust standard error and a Student-t interval.

        error^2 = G / (G - 1) * sum over clusters g of (sum over i in g of (x_i - mean))^2 / P^2

    With every value its own cluster that is s / sqrt(P). G clusters leave G - 1 degrees of freedom.
    """
    return ratio(values, torch.ones_like(values), clusters, confidence)


def ratio(
    numerator: Num[Tensor, " P"],
    denominator: Num[Tensor, " P"],
    clusters: Int[Tensor, " P"] | None = None,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """sum(numerator) / sum(denominator), linearised, with a cluster-robust standard error.

        error^2 = G / (G - 1) * sum over g of (sum over i in g of (a_i - R b_i))^2 / (sum b)^2

    For a mean per token: the sum of a sequence over its number of tokens. It is biased by O(1 / G).

    Raises:
        UserError: no values, a value that is not finite, or a denominator that sums to 0.
    """
    _refuse_bad_values(numerator, confidence)
    _refuse_bad_values(denominator, confidence)
    top, bottom, _ = _totals(numerator, denominator, clusters)
    if bottom.sum() == 0:
        raise UserError("cannot divide by a total of 0; leave out what has no tokens")
    value = float(top.sum() / bottom.sum())
    count = len(top)
    error = half = float("nan")
    if count > 1:
        residual = top - value * bottom
        error = float(np.sqrt(count / (count - 1) * (residual**2).sum()) / abs(bottom.sum()))
        half = error * float(stats.t.ppf((1 + confidence) / 2, count - 1))
    return Estimate(
        value=value,
        low=value - half,
        high=value + half,
        error=error,
        clusters=count,
        values=len(numerator),
        confidence=confidence,
    )


def bootstrap(
    values: Num[Tensor, " P"],
    clusters: Int[Tensor, " P"] | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of `values` with a percentile bootstrap interval: whole clusters are drawn again.

    `error` is the standard deviation of the resampled means. Where all values are equal nothing
    varies and the interval is that point.
    """
    _refuse_bad_values(values, confidence)
    if resamples < 100:
        raise UserError(f"{resamples} resamples are too few for an interval; take 100 or more")
    top, bottom, members = _totals(values, torch.ones_like(values), clusters)
    rng = np.random.default_rng(seed)
    means = _resampled_means(top, bottom, resamples, rng)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    alone = len(top) == 1
    return Estimate(
        value=float(top.sum() / bottom.sum()),
        low=float("nan") if alone else float(low),
        high=float("nan") if alone else float(high),
        error=float("nan") if alone else float(means.std(ddof=1)),
        clusters=len(top),
        values=members,
        confidence=confidence,
        method="bootstrap",
    )


def wilson(successes: int, trials: int, confidence: float = CONFIDENCE) -> Estimate:
    """Share of successes in independent trials, with Wilson's score interval.

    Honest at 0 and at 1, where a bootstrap has nothing to vary: 24 of 24 gives [0.862, 1].
    """
    if not 0 <= successes <= trials or trials == 0:
        raise UserError(
            f"{successes} successes in {trials} trials make no share; trials must be positive and "
            "successes between 0 and trials"
        )
    share = successes / trials
    interval = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Estimate(
        value=share,
        low=float(interval.low),
        high=float(interval.high),
        error=float(np.sqrt(share * (1 - share) / trials)),
        clusters=trials,
        values=trials,
        confidence=confidence,
        method="Wilson",
    )


def share(
    credits: Num[Tensor, " P"] | Bool[Tensor, " P"],
    clusters: Int[Tensor, " P"] | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of credits in [0, 1] (a tie is 1/2): bootstrap over clusters, except at the ends.

    Where every credit is 0 or every credit is 1, a bootstrap would claim certainty; the interval
    is then Wilson's with one trial a cluster, and `method` says so.
    """
    credits = credits.double()
    _refuse_bad_values(credits, confidence)
    if ((credits < 0) | (credits > 1)).any():
        raise UserError(
            f"a credit lies in [0, 1]; found {credits.min():g} to {credits.max():g}. Give 1 for a "
            "win, 1/2 for a tie, 0 for a loss."
        )
    if bool((credits == credits[0]).all()) and float(credits[0]) in (0.0, 1.0):
        count = len(credits) if clusters is None else len(clusters.unique())
        return wilson(int(credits[0]) * count, count, confidence)
    return bootstrap(credits, clusters, confidence, resamples, seed)


def paired(
    first: Float[Tensor, " P"],
    second: Float[Tensor, " P"],
    clusters: Int[Tensor, " P"] | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> PairedTest:
    """Difference of two numbers on the same units, with a paired bootstrap and two tests.

    The tests see one number a cluster, its mean difference. With five seeds Wilcoxon's smallest
    p-value is 1/16, whatever the difference.
    """
    difference = first.double() - second.double()
    estimate = bootstrap(difference, clusters, confidence, seed=seed)
    top, bottom, _ = _totals(difference, torch.ones_like(difference), clusters)
    means = top / bottom
    if len(means) < 2:
        raise UserError("a paired test needs two units or more; found 1")
    if np.ptp(means) == 0:  # no variance: t is 0/0 or infinite
        t_p = 1.0 if means[0] == 0 else 0.0
    else:
        error = means.std(ddof=1) / np.sqrt(len(means))
        t_p = float(2 * stats.t.sf(abs(means.mean() / error), len(means) - 1))
    if not means.any():  # Wilcoxon drops what is 0, and would have nothing left
        return PairedTest(difference=estimate, t_p=t_p, wilcoxon_p=1.0)
    ranked: Any = stats.wilcoxon(means)  # scipy does not type its results
    return PairedTest(difference=estimate, t_p=t_p, wilcoxon_p=float(ranked.pvalue))


def _totals(
    numerator: Tensor, denominator: Tensor, clusters: Tensor | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Sums of numerator and denominator in each cluster, and how many values there were."""
    top = numerator.detach().double().cpu().numpy()
    bottom = denominator.detach().double().cpu().numpy()
    if clusters is None:
        return top, bottom, len(top)
    _, index = np.unique(clusters.cpu().numpy(), return_inverse=True)
    return np.bincount(index, top), np.bincount(index, bottom), len(top)


def _resampled_means(
    top: np.ndarray, bottom: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Means of `resamples` draws of clusters: one multinomial count a cluster, never an index."""
    count = len(top)
    means = np.empty(resamples)
    block = max(1, 4_000_000 // count)  # at most 32 MB of counts at a time
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        times = rng.multinomial(count, np.full(count, 1 / count), size=size)
        means[start : start + size] = (times @ top) / (times @ bottom)
    return means


def _refuse_bad_values(values: Tensor, confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"confidence must lie in (0, 1); found {confidence}")
    if len(values) == 0:
        raise UserError("there is no value to average; the data are empty")
    bad = (~values.isfinite()).nonzero().flatten()
    if bad.numel():
        raise UserError(
            f"{bad.numel()} of {len(values)} values are NaN or infinite, the first at index "
            f"{int(bad[0])}; mend them, or drop their rows and say so"
        )
