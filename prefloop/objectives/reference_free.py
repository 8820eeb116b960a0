"""Pairwise objectives that need no reference policy."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.objectives.family import Pairwise, positive, require
from prefloop.objectives.pairwise import pair_margin
from prefloop.types import Logps, Pair, PerPair

__all__ = ["SimPO"]


@dataclass(frozen=True, kw_only=True)
class SimPO(Pairwise):
    """Simple Preference Optimization: log-probabilities per token, with a target margin.

        loss = -log sigmoid( beta (log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|) - gamma )

    `gamma` is the margin itself; the authors' scripts ask for gamma / beta instead.

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
