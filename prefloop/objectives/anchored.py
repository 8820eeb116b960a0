"""Pairwise objectives that set an anchor for each response, or bend the logistic loss.

h_w and h_l are log pi(y|x) - log pi_ref(y|x) of the chosen and of the rejected response, summed;
r = beta h. Unlike DPO's, most of these losses say where each reward should be, not only which is
larger: adding the same to both changes the loss.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.objectives.checks import positive, require
from prefloop.objectives.family import Pairwise, log_ratio, pair_margin, rewards_of
from prefloop.types import Logps, Pair, PerPair

__all__ = ["APODown", "APOZero", "BCOPair", "DiscoPOP", "EXOPair", "NCAPair", "SPPOHard"]


@dataclass(frozen=True, kw_only=True)
class NCAPair(Pairwise):
    """Noise contrastive alignment of a pair.

        loss = -log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l),   r = beta h

    The chosen reward is pulled to log 2 and pulled back beyond; the rejected one is pushed down
    always. For N scored responses see NCA.

    When:
        the likelihood of the chosen responses must not fall

    Attributes:
        beta: reward scale, per nat.

    References:
        Chen et al. 2024, arXiv 2402.05369; TRL's `nca_pair`.
    """

    beta: float = 0.01

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.001 to 0.1")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        chosen, rejected = rewards_of(self, policy, reference)
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class BCOPair(Pairwise):
    """Binary classifier optimization of a pair, without its reward shift.

        loss = -log sigmoid(r_w) - log sigmoid(-r_l),   r = beta h

    This is TRL's `bco_pair`; LLaMA-Factory and older TRL subtract a running mean of the rewards
    from both. The form with the shift, taken over the batch, is BCO, which reads pairs too.

    When:
        the chosen and the rejected response should be judged each on its own

    Attributes:
        beta: reward scale, per nat.

    References:
        Jung et al. 2024, arXiv 2404.04656.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        chosen, rejected = rewards_of(self, policy, reference)
        return -logsigmoid(chosen) - logsigmoid(-rejected)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class APOZero(Pairwise):
    """Anchored preference optimization, zero: chosen up, rejected down.

        loss = 1 - sigmoid(r_w) + sigmoid(r_l),   r = beta h

    For chosen answers better than the model's own. Bounded: a pair that is far off has almost no
    gradient.

    When:
        the chosen responses are better than what the model writes

    Attributes:
        beta: reward scale, per nat.

    References:
        D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 7; TRL's `apo_zero`.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        chosen, rejected = rewards_of(self, policy, reference)
        return (-chosen).sigmoid() + rejected.sigmoid()

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class APODown(Pairwise):
    """Anchored preference optimization, down: chosen down, rejected down more.

        loss = sigmoid(r_w) + 1 - sigmoid(r_w - r_l),   r = beta h

    For chosen answers worse than the model's own. At the reference the two pulls on the chosen
    response cancel.

    When:
        both responses are worse than what the model writes, the rejected one more so

    Attributes:
        beta: reward scale, per nat.

    References:
        D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 8; TRL's `apo_down`.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        chosen, rejected = rewards_of(self, policy, reference)
        return chosen.sigmoid() + (rejected - chosen).sigmoid()

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class EXOPair(Pairwise):
    """Efficient exact optimization of a pair (EXO-pref): reverse KL to a smoothed label.

        loss = q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps),   q = sigmoid(beta (h_w - h_l))

    The best margin is log((1 - eps) / eps), 6.9 at eps = 0.001; beyond it the gradient turns. A
    badly misranked pair has almost no gradient, unlike in DPO. The authors' script takes
    unnormalised targets (0, -10) instead of log(1 - eps), log(eps). For N scored responses: EXO.

    When:
        the policy should settle on a mode of good answers rather than cover them

    Attributes:
        beta: reward scale, per nat.
        label_smoothing: eps, in (0, 0.5); 0 would make the loss infinite.

    References:
        Ji et al. 2024, arXiv 2402.00856, Eq. 16; TRL's `exo_pair`.
    """

    beta: float = 0.1
    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.1 to 0.5")
        rule = "in (0, 0.5): the loss is infinite at 0 (usual: 0.001)"
        allowed = 0 < self.label_smoothing < 0.5
        require(self, "label_smoothing", self.label_smoothing, allowed, rule)

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        margin = pair_margin(self, policy, reference)
        eps = torch.as_tensor(self.label_smoothing, dtype=margin.dtype, device=margin.device)
        right = margin.sigmoid() * (logsigmoid(margin) - torch.log1p(-eps))
        wrong = (-margin).sigmoid() * (logsigmoid(-margin) - torch.log(eps))
        return right + wrong

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class DiscoPOP(Pairwise):
    """The loss that a language model found: logistic and exponential, blended by the margin.

        loss = (1 - m) log(1 + exp(-z)) + m exp(-z),   m = sigmoid(z / tau),  z = beta (h_w - h_l)

    Not monotone: between z = -0.119 and 0.072 (at tau = 0.05) the margin is pushed down, which is
    where training starts.

    When:
        a comparison with the literature; mind where it pushes the margin down

    Attributes:
        beta: reward scale, per nat.
        tau: width of the blend, in units of z, in (0, 1): at 1 or more the loss of a badly
            misranked pair would grow exponentially.

    References:
        Lu et al. 2024, arXiv 2406.08414, Eq. 5; TRL's `discopop`.
    """

    beta: float = 0.05
    tau: float = 0.05

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.05")
        require(self, "tau", self.tau, 0 < self.tau < 1, "in (0, 1) (usual: 0.05)")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        margin = pair_margin(self, policy, reference)
        logistic = (-margin / self.tau).sigmoid() * -logsigmoid(margin)
        # in log space: m and exp(-z) apart are 0 and infinity for a badly misranked pair
        return logistic + (logsigmoid(margin / self.tau) - margin).exp()

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class SPPOHard(Pairwise):
    """Self-play preference optimization with hard labels: the winner wins always.

        loss = (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2

    A regression: the gradient turns once a log-ratio is past its target. The authors' code takes
    half of it. With estimated win probabilities instead of 1 and 0: SPPO.

    When:
        rounds of self-play with the current policy as the reference, labelled by a winner

    Attributes:
        beta: 1 / eta of the paper, per nat; 0.001 in the paper (targets of 500 nats).

    References:
        Wu et al. 2024, arXiv 2405.00675, Eq. 4.7; TRL's `sppo_hard`.
    """

    beta: float = 0.001

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.001")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        chosen, rejected = rewards_of(self, policy, reference)
        target = 0.5  # of the reward beta h; the squares are in units of h
        return ((chosen - target) / self.beta).square() + ((rejected + target) / self.beta).square()

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)
