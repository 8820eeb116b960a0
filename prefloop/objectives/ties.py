"""Likelihoods with room for a tie: equal ranks are a judgement, not a missing one.

Only for data in which equal ranks mean "as good as each other"; where they mean "the rest" of a
best-of-n, use PlackettLuce or BestOfN.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.objectives.checks import positive, require
from prefloop.objectives.family import Tied, log_ratio, pair_margin
from prefloop.types import Logps, Pair, PerPair

__all__ = ["Davidson", "RaoKupper"]


@dataclass(frozen=True, kw_only=True)
class RaoKupper(Tied):
    """DPO with ties after Rao and Kupper: a winner must win by more than a threshold.

        clear: -log sigmoid(d - log nu)
        tie:   -log( (nu^2 - 1) sigmoid(d - log nu) sigmoid(-d - log nu) ),   d = beta (h_1 - h_2)

    At d = 0 a tie has probability (nu - 1) / (nu + 1).

    When:
        annotators say "equally good" when they cannot see a difference

    Attributes:
        beta: strength of the KL constraint, per nat.
        nu: width of the tie, above 1; near 1 is DPO. 3 makes equals tie half of the time.

    References:
        Chen et al. 2024, arXiv 2409.17431; Rao and Kupper 1967. nu = 3 as remembered.
    """

    beta: float = 0.1
    nu: float = 3.0

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        require(self, "nu", self.nu, 1 < self.nu < math.inf, "above 1 and finite (usual: 3)")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        return -logsigmoid(pair_margin(self, policy, reference) - math.log(self.nu))

    def tie(self, policy: Pair, reference: Pair | None) -> PerPair:
        d, threshold = pair_margin(self, policy, reference), math.log(self.nu)
        width = math.log(self.nu**2 - 1)
        return -width - logsigmoid(d - threshold) - logsigmoid(-d - threshold)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class Davidson(Tied):
    """DPO with ties after Davidson: a tie is as likely as the geometric mean of the two wins.

        clear: log( 1 + exp(-d) + 2 nu exp(-d / 2) ),   d = beta (h_1 - h_2)
        tie:   the same + d / 2 - log(2 nu)

    At d = 0 a tie has probability nu / (1 + nu). Some texts write nu for 2 nu.

    When:
        as RaoKupper; its ties grow likelier the closer the rewards are, without a threshold

    Attributes:
        beta: strength of the KL constraint, per nat.
        nu: weight of the tie, above 0; near 0 is DPO. 1 makes equals tie half of the time.

    References:
        Chen et al. 2024, arXiv 2409.17431; Davidson 1970. nu = 1 as remembered.
    """

    beta: float = 0.1
    nu: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        positive(self, "nu", self.nu, "1")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        return self._total(pair_margin(self, policy, reference))

    def tie(self, policy: Pair, reference: Pair | None) -> PerPair:
        d = pair_margin(self, policy, reference)
        return self._total(d) + d / 2 - math.log(2 * self.nu)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)

    def _total(self, d: PerPair) -> PerPair:
        return torch.stack([torch.zeros_like(d), -d, math.log(2 * self.nu) - d / 2]).logsumexp(0)
