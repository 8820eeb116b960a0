"""Objectives on a whole ranking of N responses to one prompt.

All factors are those of the Plackett-Luce model on r = beta log pi/pi_ref: a response is drawn
from those that remain with probability softmax(r). Responses of equal rank are not ordered against
each other (ties, or the rest of a best-of-n); rank 0 is not judged and takes no part.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefloop.objectives.checks import positive, require
from prefloop.objectives.family import Listwise, log_ratio
from prefloop.types import Logps, PerComparison, PerResponse, UserError

__all__ = ["BestOfN", "PlackettLuce", "TopK"]


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(Listwise):
    """DPO on a ranking: the negative log-likelihood of the Plackett-Luce model.

        loss = sum over judged i of log( 1 + sum over j worse than i of exp(r_j - r_i) )
           r = beta (log pi(y|x) - log pi_ref(y|x))

    Two responses give DPO. Ranks 1, 2, 2 give the first factor only. Where equal ranks stand above
    others (1, 1, 2) each of them meets the worse ones on its own: a composite likelihood, since the
    order of the two was not observed.

    When:
        annotators ranked several responses

    Attributes:
        beta: strength of the KL constraint, per nat; larger stays closer to the reference.

    References:
        Rafailov et al. 2023, arXiv 2305.18290, Appendix A.3; Plackett 1975; Luce 1959.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")

    def __call__(
        self, policy: Logps, reference: Logps | None, rank: Int[Tensor, "B N"]
    ) -> PerComparison:
        return factors(self.rewards(policy, reference), rank).sum(-1)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class TopK(Listwise):
    """Plackett-Luce likelihood of the first k places only.

        loss = sum over i with rank <= k of log( 1 + sum over j worse than i of exp(r_j - r_i) )
           r = beta (log pi(y|x) - log pi_ref(y|x))

    When:
        only the first places of a ranking are trusted

    Attributes:
        beta: strength of the KL constraint, per nat.
        k: how many places count, 1 or more; places from the top, as in `rank`.

    References:
        Partial rankings of Plackett 1975, with the rewards of Rafailov et al. 2023.
    """

    beta: float = 0.1
    k: int = 2

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        require(self, "k", self.k, self.k >= 1, "1 or more")

    def __call__(
        self, policy: Logps, reference: Logps | None, rank: Int[Tensor, "B N"]
    ) -> PerComparison:
        terms = factors(self.rewards(policy, reference), rank)
        return torch.where(rank <= self.k, terms, 0.0).sum(-1)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class BestOfN(Listwise):
    """The best of N judged responses against all the others at once.

        loss = - log softmax(r)[best],   r = beta (log pi(y|x) - log pi_ref(y|x))

    Reads only which response has rank 1, of which there is exactly one; whatever order the others
    have is ignored.

    When:
        annotators picked the best of several responses

    Attributes:
        beta: strength of the KL constraint, per nat.

    References:
        First factor of Plackett 1975, with the rewards of Rafailov et al. 2023.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")

    def __call__(
        self, policy: Logps, reference: Logps | None, rank: Int[Tensor, "B N"]
    ) -> PerComparison:
        best = rank == 1
        if (wrong := (best.sum(-1) != 1).nonzero().flatten()).numel():
            raise UserError(
                f"BestOfN needs exactly one response of rank 1; comparisons {wrong[:5].tolist()} "
                "of the batch have none or several. Drop them, or use PlackettLuce."
            )
        rewards = self.rewards(policy, reference)
        lead = rewards - torch.where(best, rewards, 0.0).sum(-1, keepdim=True)
        return lead.masked_fill(rank == 0, -torch.inf).logsumexp(-1)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


def factors(rewards: PerResponse, rank: Int[Tensor, "B N"]) -> PerResponse:
    """-log probability that each response is drawn before those ranked worse; 0 if there are none.

    The response itself always stays in its own sum, as exp(0): a factor without rivals is exactly
    0, and nothing is ever the logarithm of an empty sum.
    """
    worse = (rank.unsqueeze(-1) < rank.unsqueeze(-2)) & (rank > 0).unsqueeze(-1)
    itself = torch.eye(rank.shape[-1], dtype=torch.bool, device=rank.device)
    lead = rewards.unsqueeze(-2) - rewards.unsqueeze(-1)  # (B, i, j): r_j - r_i
    return lead.masked_fill(~(worse | itself), -torch.inf).logsumexp(-1)
