"""Pairwise objectives that compare the policy with a reference.

In the equations h_w and h_l are log pi(y|x) - log pi_ref(y|x) of the chosen and of the rejected
response, summed over tokens; sigmoid-type losses are computed in log space.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.objectives.checks import one_of, positive, require, share
from prefloop.objectives.family import Pairwise, log_ratio, mean_log_ratio, pair_margin, rewards_of
from prefloop.types import Logps, Pair, PerPair

__all__ = ["DPO", "DPOP", "IPO", "RPO", "Hinge", "LengthNormalizedDPO", "StraightThroughDPO"]


@dataclass(frozen=True, kw_only=True)
class DPO(Pairwise):
    """Direct Preference Optimization.

        loss = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z),   z = beta (h_w - h_l)

    When:
        the first thing to try on pairs; with smoothing where some labels are known to be wrong

    Attributes:
        beta: strength of the KL constraint, per nat; larger stays closer to the reference.
        label_smoothing: eps, the assumed share of flipped labels, in [0, 0.5); 0 is plain DPO.

    References:
        Rafailov et al. 2023, arXiv 2305.18290, Eq. 7; smoothing (cDPO): Mitchell 2023. TRL's
        `sigmoid` is this loss.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        share(self, "label_smoothing", self.label_smoothing)

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        return smoothed_logistic(pair_margin(self, policy, reference), self.label_smoothing)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class Hinge(Pairwise):
    """Hinge loss on the implicit reward (RSO's hinge-norm).

        loss = max(0, 1 - beta (h_w - h_l))

    No gradient once the margin is 1.

    When:
        pairs that are right already should stop moving the policy

    Attributes:
        beta: reward scale, per nat (RSO's gamma).

    References:
        Liu et al. 2023 (RSO), arXiv 2309.06657; TRL's `hinge`. SLiC-HF (arXiv 2305.10425) has the
        same hinge without a reference: see SLiC.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.05 to 0.5")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        return (1 - pair_margin(self, policy, reference)).relu()

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class IPO(Pairwise):
    """Identity Preference Optimization: regression of the log-ratio difference on 1 / (2 beta).

        loss = (h_w - h_l - 1 / (2 beta))^2

    The field disagrees about h. Per token (`log_ratios="mean"`): TRL, HALOs, torchtune; TRL says
    that the authors confirmed it. Summed (`log_ratios="sum"`): the equation as printed,
    eric-mitchell/direct-preference-optimization, OpenRLHF. A beta for one means nothing for the
    other.

    When:
        DPO's margins run away on clean or repeated labels; it asks for a fixed margin instead

    Attributes:
        beta: the paper's tau, per nat; the target difference is 1 / (2 beta).
        log_ratios: "mean" for nats per token, "sum" for nats.

    References:
        Azar et al. 2023, arXiv 2310.12036, Eq. 17; TRL's `ipo` is the mean.
    """

    beta: float = 0.1
    log_ratios: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        one_of(self, "log_ratios", self.log_ratios, "mean", "sum")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        margin = pair_margin(self, policy, reference) / self.beta
        return (margin - 1 / (2 * self.beta)).square()

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        ratio = mean_log_ratio if self.log_ratios == "mean" else log_ratio
        return self.beta * ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class LengthNormalizedDPO(Pairwise):
    """DPO on log-ratios per token, so that a long response has no longer lever.

        loss = -log sigmoid( beta (h_w / |y_w| - h_l / |y_l|) )

    Not RSO's sigmoid-norm, which is DPO itself with beta = gamma.

    When:
        lengths of the two responses differ much and the longer one should not weigh more

    Attributes:
        beta: reward scale, per nat per token: about |y| times what DPO would take.

    References:
        TRL's `sigmoid_norm`, open-instruct's `dpo_norm` (Lambert et al. 2024, arXiv 2411.15124).
    """

    beta: float = 5.0

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "2 to 10")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        return -logsigmoid(pair_margin(self, policy, reference))

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * mean_log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class DPOP(Pairwise):
    """DPO-Positive (Smaug): DPO that charges for a fall of the chosen response.

        loss = -log sigmoid( beta (h_w - h_l - penalty max(0, -h_w)) )

    The charge stands inside the sigmoid and is multiplied by beta; some ports put it outside, one
    with the wrong sign. Where h_w >= 0 this is DPO; the kink is where training starts, and takes
    the slope 0 there. Clip gradients: with penalty 50 they are 51 times as steep.

    When:
        the chosen log-probability falls during DPO, typically on pairs that differ in a few tokens

    Attributes:
        beta: strength of the KL constraint, per nat. 0.3 in the paper's runs, as we remember them.
        penalty: the paper's lambda; 50 as we remember the paper, and in PaddleNLP.

    References:
        Pal et al. 2024, arXiv 2402.13228; equation as in two public implementations.
    """

    beta: float = 0.3
    penalty: float = 50.0

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.1 to 0.5")
        require(self, "penalty", self.penalty, self.penalty >= 0, "0 or more (usual: 5 to 500)")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        chosen, rejected = rewards_of(self, policy, reference)
        return -logsigmoid(chosen - rejected - self.penalty * (-chosen).relu())

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class RPO(Pairwise):
    """Regularized Preference Optimization: DPO with the SFT loss as an adversarial regularizer.

        loss = -log sigmoid( beta (h_w - h_l) ) - eta beta log pi(y_w|x)              ("sum")
        loss = -log sigmoid( beta (h_w - h_l) ) - eta log pi(y_w|x) / |y_w|           ("mean")

    The authors' code has both, with these factors. The baseline response of the theory is the
    chosen one, as in that code. Other methods share the letters: DPO with an NLL term (Iterative
    RPO, arXiv 2404.19733) is `Sum` of DPO and SFT; reward-aware PO is regression on rewards.

    When:
        a DPO run drifts or over-optimizes, and the chosen responses are worth imitating

    Attributes:
        beta: strength of the KL constraint, per nat.
        eta: weight of the SFT term; about 0.005 with "sum", 0.2 with "mean" (remembered, not
            checked against the paper).
        log_likelihood: "sum" for nats, "mean" for nats per token.

    References:
        Liu et al. 2024, arXiv 2405.16436; factors as in the authors' code.
    """

    beta: float = 0.1
    eta: float = 0.005
    log_likelihood: Literal["mean", "sum"] = "sum"

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.1")
        require(self, "eta", self.eta, self.eta >= 0, "0 or more (usual: 0.005)")
        one_of(self, "log_likelihood", self.log_likelihood, "mean", "sum")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        preference = -logsigmoid(pair_margin(self, policy, reference))
        if self.log_likelihood == "mean":
            return preference - self.eta * policy.chosen.mean
        return preference - self.eta * self.beta * policy.chosen.sum

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class StraightThroughDPO(Pairwise):
    """DPO whose two gradients are scaled apart; the value of the loss is DPO's.

        loss = -log sigmoid(z),   z = beta (h_w - h_l)
        d loss / d h_w = -chosen_scale beta sigmoid(-z)
        d loss / d h_l = +rejected_scale beta sigmoid(-z)

    Our own, under a neutral name: it has the property that SGDPO's pilot term (arXiv 2505.12435)
    is said to have, and is not that method, whose term no public source settles.

    When:
        an experiment on which side of a pair should move

    Attributes:
        beta: strength of the KL constraint, per nat.
        chosen_scale: how strongly the chosen response is pulled up; 1 is DPO.
        rejected_scale: how strongly the rejected response is pushed down; 1 is DPO.

    References:
        None; a proposal.
    """

    beta: float = 0.1
    chosen_scale: float = 1.5
    rejected_scale: float = 0.5

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        for name, scale in (
            ("chosen_scale", self.chosen_scale),
            ("rejected_scale", self.rejected_scale),
        ):
            require(self, name, scale, scale >= 0, "0 or more")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        chosen, rejected = rewards_of(self, policy, reference)
        return -logsigmoid(
            scaled_gradient(chosen, self.chosen_scale)
            - scaled_gradient(rejected, self.rejected_scale)
        )

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


def smoothed_logistic(margin: PerPair, flipped: float) -> PerPair:
    """-log sigmoid of the margin, where a share `flipped` of the labels is the wrong way round."""
    return -(1 - flipped) * logsigmoid(margin) - flipped * logsigmoid(-margin)


def scaled_gradient(value: PerPair, scale: float) -> PerPair:
    """The value itself, with its gradient multiplied by `scale`."""
    return scale * value + (1 - scale) * value.detach()
