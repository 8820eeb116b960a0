"""Pairwise objectives that need no reference policy: half the memory, or half the scoring."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.objectives.checks import one_of, positive, require, share
from prefloop.objectives.family import Pairwise, pair_margin
from prefloop.objectives.pairwise import smoothed_logistic
from prefloop.types import Logps, Pair, PerPair

__all__ = ["CPO", "ORPO", "SLiC", "SimPO"]


@dataclass(frozen=True, kw_only=True)
class SimPO(Pairwise):
    """Simple Preference Optimization: log-probabilities per token, with a target margin.

        loss = -log sigmoid( beta (log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|) - gamma )

    `gamma` is the margin itself; the authors' scripts ask for gamma / beta instead.

    When:
        no memory or time for a reference, and length should not decide

    Attributes:
        beta: reward scale, per nat per token.
        gamma: target margin, in units of reward; 0 for none.

    References:
        Meng et al. 2024, arXiv 2405.14734, Eq. 6.
    """

    beta: float = 2.0
    gamma: float = 1.0
    needs_reference = False

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "2 to 10")
        require(self, "gamma", self.gamma, self.gamma >= 0, "0 or more (usual: 0.3 to 1.6 beta)")

    def __call__(self, policy: Pair, reference: Pair | None = None) -> PerPair:
        return -logsigmoid(pair_margin(self, policy, reference) - self.gamma)

    def rewards(self, policy: Logps, reference: Logps | None = None) -> Float[Tensor, "*shape"]:
        return self.beta * policy.mean


@dataclass(frozen=True, kw_only=True)
class CPO(Pairwise):
    """Contrastive preference optimization: DPO with a uniform reference, and an SFT term.

        loss = -log sigmoid( beta (log pi(y_w|x) - log pi(y_l|x)) ) + alpha nll(y_w)

    nll(y_w) is -log pi(y_w|x) / |y_w| ("mean") or without the division ("sum"); libraries differ,
    and TRL pools the tokens of the batch (here: `Sum` of CPO(alpha=0) and PooledSFT).

    When:
        no reference, and chosen responses good enough to imitate

    Attributes:
        beta: reward scale, per nat.
        alpha: weight of the SFT term; 0 for none.
        log_likelihood: "mean" for nats per token, "sum" for nats, in the SFT term only.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    References:
        Xu et al. 2024, arXiv 2401.08417, Eq. 3.
    """

    beta: float = 0.1
    alpha: float = 1.0
    log_likelihood: Literal["mean", "sum"] = "mean"
    label_smoothing: float = 0.0
    needs_reference = False

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.1")
        require(self, "alpha", self.alpha, self.alpha >= 0, "0 or more (usual: 1)")
        one_of(self, "log_likelihood", self.log_likelihood, "mean", "sum")
        share(self, "label_smoothing", self.label_smoothing)

    def __call__(self, policy: Pair, reference: Pair | None = None) -> PerPair:
        chosen = policy.chosen.mean if self.log_likelihood == "mean" else policy.chosen.sum
        margin = pair_margin(self, policy, reference)
        return smoothed_logistic(margin, self.label_smoothing) - self.alpha * chosen

    def rewards(self, policy: Logps, reference: Logps | None = None) -> Float[Tensor, "*shape"]:
        return self.beta * policy.sum


@dataclass(frozen=True, kw_only=True)
class ORPO(Pairwise):
    """Odds ratio preference optimization: SFT on the chosen, with the odds against the rejected.

        loss = -m_w - beta log sigmoid( log odds(m_w) - log odds(m_l) )
        m = log pi(y|x) / |y|,   odds(m) = exp(m) / (1 - exp(m))

    The likelihood term is over the response, as in LLaMA-Factory; TRL takes prompt and response,
    pooled over the batch. A response that the policy is certain of (m = 0) has infinite odds: m is
    held one rounding step below 0.

    When:
        one stage instead of SFT and then preference training, from a base model

    Attributes:
        beta: weight of the odds ratio term (lambda in the paper).

    References:
        Hong et al. 2024, arXiv 2403.07691, Eqs. 4 and 7 (as TRL cites them).
    """

    beta: float = 0.1
    needs_reference = False

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.1 to 1")

    def __call__(self, policy: Pair, reference: Pair | None = None) -> PerPair:
        odds = log_odds(policy.chosen.mean) - log_odds(policy.rejected.mean)
        return -policy.chosen.mean - self.beta * logsigmoid(odds)

    def rewards(self, policy: Logps, reference: Logps | None = None) -> Float[Tensor, "*shape"]:
        return self.beta * policy.mean


@dataclass(frozen=True, kw_only=True)
class SLiC(Pairwise):
    """Sequence likelihood calibration: a hinge on the log-likelihoods, and an SFT term.

        loss = max(0, delta - log pi(y_w|x) + log pi(y_l|x)) - lambda log pi(y_w|x)

    The SFT term's response is the chosen one. With a reference it is Hinge.

    When:
        no reference and a margin in nats; mostly for comparison with the literature

    Attributes:
        delta: margin, in nats.
        sft: lambda, the weight of the summed log-likelihood of the chosen response.

    References:
        Zhao et al. 2023, arXiv 2305.10425; 0.1 as in one public port.
    """

    delta: float = 1.0
    sft: float = 0.1
    needs_reference = False

    def __post_init__(self) -> None:
        positive(self, "delta", self.delta, "1")
        require(self, "sft", self.sft, self.sft >= 0, "0 or more (usual: 0.1)")

    def __call__(self, policy: Pair, reference: Pair | None = None) -> PerPair:
        margin = pair_margin(self, policy, reference)
        return (self.delta - margin).relu() - self.sft * policy.chosen.sum

    def rewards(self, policy: Logps, reference: Logps | None = None) -> Float[Tensor, "*shape"]:
        return policy.sum


def log_odds(logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log( p / (1 - p) ) of a log-probability, accurate at both ends."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    near_one = logp > -math.log(2)
    other = torch.where(near_one, (-torch.expm1(logp)).log(), torch.log1p(-logp.exp()))
    return logp - other
