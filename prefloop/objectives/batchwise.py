"""Objectives that look at the whole batch: a sort, a pool of tokens, a standard deviation.

Their value depends on which comparisons share a batch, so the trainer never splits one, and another
batch size is another objective.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.objectives.checks import given, positive, require, share
from prefloop.objectives.family import Batchwise, Pairwise, log_ratio, pair_margin, rewards_of
from prefloop.objectives.pairwise import smoothed_logistic
from prefloop.types import Logps, Pair, PerPair, Rewards

__all__ = ["AOT", "AOTUnpaired", "AlphaDPO", "PooledSFT"]


@dataclass(frozen=True, kw_only=True)
class AOT(Batchwise):
    """Alignment via optimal transport, paired: the policy's margins dominate the reference's.

        loss = mean over i of l( beta (sorted(m)_i - sorted(m_ref)_i) )
           l(z) = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)
           m = log pi(y_w|x) - log pi(y_l|x),   m_ref = the same of the reference

    Stochastic dominance of first order, by sorting both sides over the batch. Never larger than
    DPO's mean on the same batch; with one pair it is DPO.

    When:
        the policy should improve in distribution rather than pair by pair; use large batches

    Attributes:
        beta: strength, per nat; 0.01 in the authors' runs.
        label_smoothing: eps, assumed share of flipped labels, in [0, 0.5).

    References:
        Melnyk et al. 2024, arXiv 2406.05882; TRL's `aot`.
    """

    beta: float = 0.01
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        share(self, "label_smoothing", self.label_smoothing)

    def __call__(self, policy: Pair, reference: Pair | None) -> Float[Tensor, ""]:
        base = (None, None) if reference is None else reference
        margin = policy.chosen.sum - policy.rejected.sum
        other = given(base[0]).sum - given(base[1]).sum
        gap = self.beta * (margin.sort().values - other.sort().values)
        return smoothed_logistic(gap, self.label_smoothing).mean()

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class AOTUnpaired(Batchwise):
    """Alignment via optimal transport, unpaired: chosen rewards dominate rejected ones.

        loss = mean over i of l( beta (sorted(h_w)_i - sorted(h_l)_i) )
           l(z) = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)

    Which chosen response belongs to which rejected one plays no part.

    When:
        good and bad responses do not come in pairs of one prompt; use large batches

    Attributes:
        beta: strength, per nat; 0.01 in the authors' runs.
        label_smoothing: eps, assumed share of flipped labels, in [0, 0.5).

    References:
        Melnyk et al. 2024, arXiv 2406.05882; TRL's `aot_unpaired`.
    """

    beta: float = 0.01
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        share(self, "label_smoothing", self.label_smoothing)

    def __call__(self, policy: Pair, reference: Pair | None) -> Float[Tensor, ""]:
        chosen, rejected = rewards_of(self, policy, reference)
        gap = chosen.sort().values - rejected.sort().values
        return smoothed_logistic(gap, self.label_smoothing).mean()

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class PooledSFT(Batchwise):
    """Supervised fine-tuning on the chosen responses, over the pooled tokens of the batch.

        loss = - sum over pairs log pi(y_w|x) / sum over pairs |y_w|

    A token counts the same in a long and in a short response, unlike in SFT.

    When:
        an SFT term that is to equal the loss of a language-model trainer

    References:
        The usual language-model loss; TRL's `sft`.
    """

    needs_reference = False

    def __call__(self, policy: Pair, reference: Pair | None = None) -> Float[Tensor, ""]:
        return -policy.chosen.sum.sum() / policy.chosen.length.sum().clamp(min=1)

    def rewards(self, policy: Logps, reference: Logps | None = None) -> Float[Tensor, "*shape"]:
        return policy.mean


@dataclass(frozen=True, kw_only=True)
class AlphaDPO(Pairwise):
    """SimPO with a target margin that follows the reference, pair by pair.

        loss = -log sigmoid( beta m - gamma - alpha beta sg[(g - mean g) / std g] )
           m = log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|,   g = m - the same of the reference

    Mean and (unbiased) standard deviation are those of the batch; the authors' code keeps moving
    averages of them that start at 0, so that its first steps divide by a tenth of the deviation;
    an objective here has no state. A batch without spread gets the plain margin gamma. In the
    authors' code alpha is multiplied by beta, as here; in the paper as remembered it is not:
    divide that alpha by beta. alpha = 0 is SimPO.

    When:
        SimPO's margin suits some pairs and not others, and a reference is at hand

    Attributes:
        beta: reward scale, per nat per token; 2.5 to 10 in the authors' runs.
        gamma: target margin, in units of reward (their gamma is gamma / beta).
        alpha: strength of the personal margin, in standard deviations; 0.05 to 0.2.

    References:
        Wu et al. 2024, arXiv 2410.10148; defaults as in the authors' code for Llama 3 8B.
    """

    beta: float = 2.5
    gamma: float = 1.5
    alpha: float = 0.2
    couples_batch = True

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "2.5 to 10")
        require(self, "gamma", self.gamma, self.gamma >= 0, "0 or more (usual: 0.15 to 0.6 beta)")
        require(self, "alpha", self.alpha, self.alpha >= 0, "0 or more (usual: 0.05 to 0.2)")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        chosen, rejected = (None, None) if reference is None else reference
        base = Rewards(given(chosen).mean, given(rejected).mean)
        margin = pair_margin(self, policy, reference)
        gap = (margin / self.beta - base.margin).detach()
        spread = gap.std() if len(gap) > 1 else gap.new_zeros(())
        standard = (gap - gap.mean()) / spread.clamp(min=1e-6)
        return -logsigmoid(margin - self.gamma - self.alpha * self.beta * standard)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * policy.mean
