"""Terms to add to an objective with `Sum`: they hold up the likelihood of the responses."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from prefloop.objectives.checks import one_of, require
from prefloop.objectives.family import Pairwise, log_ratio, mean_log_ratio, rewards_of
from prefloop.types import Logps, Pair, PerPair

__all__ = ["SFT", "ChosenHinge", "Pessimism"]


@dataclass(frozen=True, kw_only=True)
class SFT(Pairwise):
    """Supervised fine-tuning on the chosen response.

        loss = -log pi(y_w|x) / |y_w|     ("mean")     or     -log pi(y_w|x)     ("sum")

    With more than two responses, each is counted as often as it beats another one. Pooling the
    tokens of a batch before dividing (TRL's `sft`) is neither: see PooledSFT.

    When:
        beside a preference loss, to hold up the chosen responses

    Attributes:
        log_likelihood: "mean" for nats per token, "sum" for nats.

    References:
        The negative log-likelihood; as a term beside DPO: Pang et al. 2024, arXiv 2404.19733.
    """

    log_likelihood: Literal["mean", "sum"] = "mean"
    needs_reference = False

    def __post_init__(self) -> None:
        one_of(self, "log_likelihood", self.log_likelihood, "mean", "sum")

    def __call__(self, policy: Pair, reference: Pair | None = None) -> PerPair:
        return -self.rewards(policy.chosen)

    def rewards(self, policy: Logps, reference: Logps | None = None) -> Float[Tensor, "*shape"]:
        return policy.mean if self.log_likelihood == "mean" else policy.sum


@dataclass(frozen=True, kw_only=True)
class ChosenHinge(Pairwise):
    """A charge on a chosen response that has fallen below the reference.

        loss = max(0, -h_w - slack),   h_w = log pi(y_w|x) - log pi_ref(y_w|x), per token or summed

    Added to DPO it is the form of DPOP that some ports have, with the penalty outside the sigmoid.

    When:
        beside DPO, to charge for a fall of the chosen response and for nothing else

    Attributes:
        slack: how far the chosen response may fall for free, in nats (per token with "mean").
        log_ratios: "mean" for nats per token, "sum" for nats.

    References:
        The outer form of Pal et al. 2024, arXiv 2402.13228.
    """

    slack: float = 0.0
    log_ratios: Literal["mean", "sum"] = "sum"

    def __post_init__(self) -> None:
        require(self, "slack", self.slack, self.slack >= 0, "0 or more")
        one_of(self, "log_ratios", self.log_ratios, "mean", "sum")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        return (-rewards_of(self, policy, reference).chosen - self.slack).relu()

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        ratio = mean_log_ratio if self.log_ratios == "mean" else log_ratio
        return ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class Pessimism(Pairwise):
    """Forward KL from the reference to the policy, on the responses at hand.

        loss = -(h_w + h_l) / 2,   h = log pi(y|x) - log pi_ref(y|x), summed

    The practical form of optimizing against a family of reward models: p-DPO is `Sum` of DPO and
    this one with weights (1, gamma), gamma small (0.001). Whether the authors' expectation takes in
    the rejected responses is not settled by any public source; here it does.

    When:
        beside DPO or RewardDistillation, against over-optimization

    References:
        Fisch et al. 2024, arXiv 2405.19316; practical form as remembered.
    """

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        chosen, rejected = rewards_of(self, policy, reference)
        return -(chosen + rejected) / 2

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return log_ratio(policy, reference)
