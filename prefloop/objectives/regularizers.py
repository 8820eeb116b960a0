"""Terms to add to an objective, with `Sum`: they hold up the likelihood of the chosen response."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from prefloop.objectives.family import Pairwise, require
from prefloop.types import Logps, Pair, PerPair

__all__ = ["SFT"]


@dataclass(frozen=True, kw_only=True)
class SFT(Pairwise):
    """Supervised fine-tuning on the chosen response.

        loss = -log pi(y_w|x) / |y_w|     ("mean")     or     -log pi(y_w|x)     ("sum")

    With more than two responses, each is counted as often as it beats another one. Pooling the
    tokens of a batch before dividing (TRL's `sft`) is neither: see PooledSFT.

    Attributes:
        log_likelihood: "mean" for nats per token, "sum" for nats.

    References:
        The negative log-likelihood; as a term beside DPO: Pang et al. 2024, arXiv 2404.19733.
    """

    log_likelihood: Literal["mean", "sum"] = "mean"
    needs_reference = False

    def __post_init__(self) -> None:
        allowed = self.log_likelihood in ("mean", "sum")
        require(self, "log_likelihood", self.log_likelihood, allowed, '"mean" or "sum"')

    def __call__(self, policy: Pair, reference: Pair | None = None) -> PerPair:
        return -self.rewards(policy.chosen)

    def rewards(self, policy: Logps, reference: Logps | None = None) -> Float[Tensor, "*shape"]:
        return policy.mean if self.log_likelihood == "mean" else policy.sum
