"""Objectives that read a number a response (a reward) instead of a ranking.

r = beta log pi/pi_ref is the implicit reward of a response, R its score. Scores are differences of
log-odds of a preference in most of them, so their scale matters. A response without a score (NaN)
takes no part.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.objectives.checks import positive
from prefloop.objectives.family import Scored, log_ratio, mean_by_row
from prefloop.types import Logps, PerComparison, PerResponse

__all__ = ["EXO", "GPO", "NCA", "SPPO", "InfoNCA", "RewardDistillation", "SoftLabelDPO"]


@dataclass(frozen=True, kw_only=True)
class SoftLabelDPO(Scored):
    """DPO with the probability of a preference instead of a label (soft-label Bradley-Terry).

        loss = mean over pairs of -p log sigmoid(z) - (1 - p) log sigmoid(-z)
           z = r_i - r_j,   p = sigmoid( margin_scale (R_i - R_j) )

    The best margin is margin_scale (R_i - R_j); the gradient turns beyond it.

    When:
        a reward model's scores or shares of votes are at hand, not only who won

    Attributes:
        beta: strength of the KL constraint, per nat.
        margin_scale: log-odds of a preference per unit of score.

    References:
        The cross-entropy to Bradley-Terry probabilities; compare Wang et al. 2024 (Secrets of
        RLHF II), arXiv 2401.06080.
    """

    beta: float = 0.1
    margin_scale: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        positive(self, "margin_scale", self.margin_scale, "1")

    def __call__(
        self, policy: Logps, reference: Logps | None, scores: Float[Tensor, "B N"]
    ) -> PerComparison:
        row, first, second = scored_pairs(scores)
        rewards = self.rewards(policy, reference)
        margin = rewards[row, first] - rewards[row, second]
        gap = self.margin_scale * (scores[row, first] - scores[row, second])
        losses = -gap.sigmoid() * logsigmoid(margin) - (-gap).sigmoid() * logsigmoid(-margin)
        return mean_by_row(losses, row, len(scores))

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class RewardDistillation(Scored):
    """Distilled DPO: regression of the implicit on the explicit difference of rewards.

        loss = mean over pairs of ( (R_i - R_j) - (r_i - r_j) )^2

    Any pair, no label; which response comes first makes no difference. REBEL has the same loss.
    Against several reward models: EnsembleDistillation; with the forward KL penalty: `Sum` with
    Pessimism.

    When:
        a trusted reward model scores any responses, labelled or not

    Attributes:
        beta: strength of the KL constraint, per nat, in the units of the scores.

    References:
        Fisch et al. 2024, arXiv 2405.19316 (d-DPO).
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")

    def __call__(
        self, policy: Logps, reference: Logps | None, scores: Float[Tensor, "B N"]
    ) -> PerComparison:
        row, first, second = scored_pairs(scores)
        rewards = self.rewards(policy, reference)
        error = (scores - rewards)[row, first] - (scores - rewards)[row, second]
        return mean_by_row(error.square(), row, len(scores))

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class EXO(Scored):
    """Efficient exact optimization on scored responses (EXO-rw): reverse KL to the scores.

        loss = KL(q || p),   q = softmax(beta log pi/pi_ref),   p = softmax(R / temperature)

    Mode-seeking, unlike InfoNCA's cross-entropy. The authors' HH script divides the log-ratios by
    0.8 as well. For pairs with labels: EXOPair.

    When:
        as EXOPair, with scores for N responses

    Attributes:
        beta: beta_pi of the paper, per nat.
        temperature: beta_r of the paper, in units of the scores.

    References:
        Ji et al. 2024, arXiv 2402.00856.
    """

    beta: float = 0.5
    temperature: float = 0.5

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.1 to 0.5")
        positive(self, "temperature", self.temperature, "0.5")

    def __call__(
        self, policy: Logps, reference: Logps | None, scores: Float[Tensor, "B N"]
    ) -> PerComparison:
        scored = ~scores.isnan()
        ours = log_shares(self.rewards(policy, reference), scored)
        theirs = log_shares(scores / self.temperature, scored)
        return torch.where(scored, ours.exp() * (ours - theirs), 0.0).sum(-1)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class InfoNCA(Scored):
    """InfoNCA: cross-entropy from the shares of the scores to the shares of the rewards.

        loss = - sum over i of softmax(R / temperature)_i log softmax(r)_i

    Two responses and a temperature near 0 give DPO.

    When:
        scores for N responses, and all of them should be learned from

    Attributes:
        beta: reward scale, per nat.
        temperature: alpha of the paper, in units of the scores.

    References:
        Chen et al. 2024, arXiv 2402.05369.
    """

    beta: float = 0.01
    temperature: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.001 to 0.1")
        positive(self, "temperature", self.temperature, "0.01 to 1")

    def __call__(
        self, policy: Logps, reference: Logps | None, scores: Float[Tensor, "B N"]
    ) -> PerComparison:
        scored = ~scores.isnan()
        ours = log_shares(self.rewards(policy, reference), scored)
        theirs = log_shares(scores / self.temperature, scored)
        return -torch.where(scored, theirs.exp() * ours, 0.0).sum(-1)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class NCA(Scored):
    """Noise contrastive alignment: each reward on its own, so likelihoods need not all fall.

        loss = - sum over i of [ p_i log sigmoid(r_i) + 1/N log sigmoid(-r_i) ]
           p = softmax(R / temperature)

    When:
        as InfoNCA, where likelihoods of good responses must not fall

    Attributes:
        beta: reward scale, per nat.
        temperature: alpha of the paper, in units of the scores.

    References:
        Chen et al. 2024, arXiv 2402.05369. For labelled pairs: NCAPair.
    """

    beta: float = 0.01
    temperature: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.001 to 0.1")
        positive(self, "temperature", self.temperature, "0.01 to 1")

    def __call__(
        self, policy: Logps, reference: Logps | None, scores: Float[Tensor, "B N"]
    ) -> PerComparison:
        scored = ~scores.isnan()
        rewards = self.rewards(policy, reference)
        pull = log_shares(scores / self.temperature, scored).exp() * logsigmoid(rewards)
        push = logsigmoid(-rewards) / scored.sum(-1, keepdim=True)
        return -torch.where(scored, pull + push, 0.0).sum(-1)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class SPPO(Scored):
    """Self-play preference optimization with estimated win probabilities.

        loss = sum over i of ( h_i - (P_i - 1/2) / beta )^2,   h = log pi/pi_ref, summed
        P_i = mean over j != i of sigmoid( margin_scale (R_i - R_j) )

    P is the chance of beating another answer of the policy. The authors' code counts the response
    against itself as well (one half), trains on the best and the worst of five only, and takes half
    of the sum. With labels instead of scores: SPPOHard.

    When:
        rounds of self-play with the current policy as the reference, scored by a reward model

    Attributes:
        beta: 1 / eta of the paper, per nat; 0.001 in the paper.
        margin_scale: log-odds of a preference per unit of score.

    References:
        Wu et al. 2024, arXiv 2405.00675, Eq. 4.7.
    """

    beta: float = 0.001
    margin_scale: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.001")
        positive(self, "margin_scale", self.margin_scale, "1")

    def __call__(
        self, policy: Logps, reference: Logps | None, scores: Float[Tensor, "B N"]
    ) -> PerComparison:
        gap = self.margin_scale * (scores.unsqueeze(-1) - scores.unsqueeze(-2))
        wins = 0.5 * torch.tanh(gap / 2)  # sigmoid(gap) - 1/2, exactly 0 against itself
        target = wins.nansum(-1) / ((~scores.isnan()).sum(-1, keepdim=True) - 1)
        return regression(self.rewards(policy, reference), target, scores, self.beta)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class GPO(Scored):
    """General preference optimization: SPPO's regression on a score that need not be transitive.

        loss = sum over i of ( h_i - R_i / beta )^2
        R_i = mean over j != i of S(y_i over y_j), see `average_score`

    The scores column holds the averaged preference scores. They have no bound: standardise them.

    When:
        preferences that are not transitive, scored by a general preference model

    Attributes:
        beta: strength of the KL constraint, per nat; 0.001 as in the authors' runs.

    References:
        Zhang et al. 2024, arXiv 2410.02197 (loss as remembered; data as in the authors' code).
    """

    beta: float = 0.001

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.001")

    def __call__(
        self, policy: Logps, reference: Logps | None, scores: Float[Tensor, "B N"]
    ) -> PerComparison:
        return regression(self.rewards(policy, reference), scores, scores, self.beta)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


def scored_pairs(
    scores: Float[Tensor, "B N"],
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Every pair of responses that both have a score, once: (comparison, first, second)."""
    scored = ~scores.isnan()
    both = (scored.unsqueeze(-1) & scored.unsqueeze(-2)).triu(1)
    row, first, second = both.nonzero(as_tuple=True)
    return row, first, second


def log_shares(values: PerResponse, scored: Bool[Tensor, "B N"]) -> PerResponse:
    """Log of the softmax over the scored responses; 0 for the others, which nobody should read."""
    kept = values.masked_fill(~scored, -torch.inf)
    return torch.where(scored, values - kept.logsumexp(-1, keepdim=True), 0.0)


def regression(
    rewards: PerResponse, target: PerResponse, scores: PerResponse, beta: float
) -> PerComparison:
    """Sum over scored responses of ((reward - target) / beta)^2, in squared nats."""
    error = (rewards - target) / beta
    return torch.where(scores.isnan(), 0.0, error.square()).sum(-1)
