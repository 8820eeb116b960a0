"""General preference models: a score of two responses that need not come from one reward each.

Each response is embedded in 2 K dimensions; the score of one over another is skew-symmetric, so a
cycle (rock, scissors, paper) is representable, and no scalar reward can represent one. A reward
head that gives the embeddings trains on `GPM`; `average_score` makes of them what `GPO` reads.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.objectives.checks import positive, require
from prefloop.types import PerPair, UserError

__all__ = ["GPM", "average_score", "skew_score"]


@dataclass(frozen=True, kw_only=True)
class GPM:
    """Loss of a general preference model: how improbable the observed preference is.

        loss = -log sigmoid( (S(chosen over rejected) - margin) / tau ),   S as in `skew_score`

    P(first over second) = sigmoid(S / tau), and the two orders sum to 1 by construction.

    When:
        judges prefer in circles, or a reward model of one number fits their votes badly

    Attributes:
        tau: temperature, in units of the score; 0.1 in the authors' runs.
        margin: what the score should exceed, 0 for none.

    References:
        Zhang et al. 2024, arXiv 2410.02197; as in the authors' code.
    """

    tau: float = 0.1
    margin: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "tau", self.tau, "0.1 to 1")
        require(self, "margin", self.margin, self.margin >= 0, "0 or more")

    def __call__(
        self,
        chosen: Float[Tensor, "P D"],
        rejected: Float[Tensor, "P D"],
        scale: Float[Tensor, "P K"] | None = None,
    ) -> PerPair:
        return -logsigmoid((skew_score(chosen, rejected, scale) - self.margin) / self.tau)

    def probability(
        self,
        first: Float[Tensor, "*shape D"],
        second: Float[Tensor, "*shape D"],
        scale: Float[Tensor, "*shape K"] | None = None,
    ) -> Float[Tensor, "*shape"]:
        """P(first preferred to second)."""
        return (skew_score(first, second, scale) / self.tau).sigmoid()


def skew_score(
    first: Float[Tensor, "*#shape D"],
    second: Float[Tensor, "*#shape D"],
    scale: Float[Tensor, "*#shape K"] | None = None,
) -> Float[Tensor, "..."]:
    """Score of one embedding over another: a sum of K oriented areas.

        S(a over b) = sum over k of scale_k ( a_(2k) b_(2k+1) - a_(2k+1) b_(2k) )

    S(a over a) = 0 and S(a over b) = -S(b over a), exactly. Turning both by the same angle in a
    block changes nothing. Embeddings of constant second coordinate give a scalar reward.

    Args:
        first, second: embeddings (..., 2 K) that broadcast against each other.
        scale: weight of each block, 1 when None; a prompt may set its own (K softmax weights).
    """
    if first.shape[-1] % 2:
        raise UserError(
            f"a preference embedding needs an even number of dimensions, got {first.shape[-1]}"
        )
    a, b = first.unflatten(-1, (-1, 2)), second.unflatten(-1, (-1, 2))
    areas = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    return areas.sum(-1) if scale is None else (scale * areas).sum(-1)


def average_score(
    embeddings: Float[Tensor, "B N D"],
    exists: Bool[Tensor, "B N"],
    scale: Float[Tensor, "B K"] | None = None,
) -> Float[Tensor, "B N"]:
    """Mean score of each response over the others of its comparison: what GPO regresses on.

    NaN for a response that does not exist; every comparison needs two that do.
    """
    if scale is not None:
        scale = scale.unsqueeze(-2).unsqueeze(-2)  # (B, 1, 1, K)
    table = skew_score(embeddings.unsqueeze(-2), embeddings.unsqueeze(-3), scale)  # (B, i, j)
    against = torch.where(exists.unsqueeze(-2), table, 0.0).sum(-1)  # itself adds exactly 0
    others = exists.sum(-1, keepdim=True) - 1
    return (against / others).masked_fill(~exists, torch.nan)
