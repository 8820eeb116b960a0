"""DPO for labels or prompts that are not what they should be."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.objectives.checks import given, positive, require, share
from prefloop.objectives.family import (
    Batchwise,
    Listwise,
    Objective,
    Pairwise,
    log_ratio,
    over_pairs,
    pair_margin,
)
from prefloop.objectives.pairwise import DPO
from prefloop.objectives.wrapped import Sum
from prefloop.types import Logps, Pair, PerComparison, PerPair, UserError

__all__ = ["KLDPO", "DrDPO", "RobustDPO", "WassersteinDPO", "needs_embeddings"]


@dataclass(frozen=True, kw_only=True)
class RobustDPO(Pairwise):
    """DPO with the noise of flipped labels taken out of the expectation.

        loss = -( (1 - eps) log sigmoid(z) - eps log sigmoid(-z) ) / (1 - 2 eps),
           z = beta (h_w - h_l)

    If a share eps of the labels is flipped at random, its expectation is DPO's on clean labels.
    Unlike label smoothing it stays monotone, and its values may be negative.

    When:
        a known share of labels is flipped at random

    Attributes:
        beta: strength of the KL constraint, per nat.
        label_smoothing: eps, the share of flipped labels, in [0, 0.5).

    References:
        Ray Chowdhury et al. 2024, arXiv 2403.00409; TRL's `robust`.
    """

    beta: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        share(self, "label_smoothing", self.label_smoothing)

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        margin = pair_margin(self, policy, reference)
        eps = self.label_smoothing
        return ((eps - 1) * logsigmoid(margin) + eps * logsigmoid(-margin)) / (1 - 2 * eps)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class KLDPO(Pairwise):
    """DPO against the worst distribution in a KL ball around the data: hard pairs count more.

        loss_i = sg[w_i] l_i,   w_i = min(cap, exp((l_i - mean l) / tau)),   l = DPO's losses

    The weights are detached and not normalised, as in the authors' code, so the mean weight is 1
    or more; the exact dual, tau log mean exp(l / tau), would normalise them. It amplifies label
    noise as well. The mean is over the batch that the objective sees.

    When:
        test prompts may be distributed unlike the training prompts, and labels are clean

    Attributes:
        beta: strength of the KL constraint on the policy, per nat.
        tau: temperature of the weights, in units of the loss; large values give DPO.
        cap: largest weight.

    References:
        Xu et al. 2025, arXiv 2502.01930; as in the authors' code.
    """

    beta: float = 0.01
    tau: float = 1.0
    cap: float = 10.0
    couples_batch = True

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.1")
        positive(self, "tau", self.tau, "0.1 to 1")
        require(self, "cap", self.cap, self.cap >= 1, "1 or more (usual: 10)")

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        losses = -logsigmoid(pair_margin(self, policy, reference))
        apart = (losses - losses.mean()).detach() / self.tau
        # the cap is taken before exp as well, which could overflow
        return apart.clamp(max=100.0).exp().clamp(max=self.cap) * losses

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class DrDPO(Batchwise):
    """Distributionally robustified DPO: pairs of large loss, likely mislabelled, count less.

        loss = -temperature log mean exp(-l_i / temperature),   l = DPO's losses

    The mirror image of KLDPO. One number for the batch.

    When:
        labels are noisy and no share of flips is known; use large batches

    Attributes:
        beta: strength of the KL constraint, per nat.
        temperature: the paper's beta', in units of the loss; large values give DPO.

    References:
        Wu et al. 2024, arXiv 2407.07880 (number remembered).
    """

    beta: float = 0.1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        positive(self, "temperature", self.temperature, "1")

    def __call__(self, policy: Pair, reference: Pair | None) -> Float[Tensor, ""]:
        losses = DPO(beta=self.beta)(policy, reference)
        log_mean = (-losses / self.temperature).logsumexp(0) - torch.log(
            losses.new_tensor(len(losses))
        )
        return -self.temperature * log_mean

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


@dataclass(frozen=True, kw_only=True)
class WassersteinDPO(Listwise):
    """DPO against the worst inputs nearby: a penalty on the gradient by the input embeddings.

        loss = l + rho sum over responses ||grad_e l||^2,   l = DPO's loss of the comparison,
           e = input embeddings of a response and of its own copy of the prompt, squares summed
               over positions and dimensions

    Reads `Logps.embeddings` of the policy, in its graph, and differentiates twice: training takes
    `logps.EmbeddedScorer`, a row a response under SDPA's math kernel, which needs more time and
    memory than shared prompts; no activation checkpointing, no sharded weights. Where gradients
    are off (evaluation) there is nothing to differentiate, and the value is l alone. The theory
    takes the square root of the mean squared norm (remembered); the authors' code, and this, do
    not. With more than two responses l is the mean over the ordered pairs.

    When:
        inputs at test time are perturbed, the model is small, and second derivatives are affordable

    Attributes:
        beta: strength of the KL constraint, per nat.
        rho: weight of the penalty, per unit of squared gradient.

    References:
        Xu et al. 2025, arXiv 2502.01930; as in the authors' code.
    """

    beta: float = 0.1
    rho: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.1")
        require(self, "rho", self.rho, self.rho >= 0, "0 or more (usual: 1)")

    def __call__(
        self, policy: Logps, reference: Logps | None, rank: Int[Tensor, "B N"]
    ) -> PerComparison:
        losses = over_pairs(DPO(beta=self.beta))(policy, reference, rank)
        if not torch.is_grad_enabled():
            return losses
        if policy.embeddings is None:
            raise UserError(
                "WassersteinDPO differentiates by the input embeddings, but the policy's Logps has "
                "none; use logps.EmbeddedScorer, or KLDPO, which needs only log-probabilities"
            )
        (gradient,) = torch.autograd.grad(losses.sum(), policy.embeddings, create_graph=True)
        return losses + self.rho * gradient.square().sum((-1, -2, -3))

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, given(reference))


def needs_embeddings(objective: Objective) -> bool:
    """Whether the policy's `Logps` needs input embeddings, as `logps.EmbeddedScorer` gives them."""
    if isinstance(objective, Sum):
        return any(needs_embeddings(part) for part in objective.objectives)
    return isinstance(objective, WassersteinDPO)
