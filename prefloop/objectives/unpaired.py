"""Objectives on single responses that somebody called good or bad.

A label is 1 (good), 0 (bad) or -1 (nobody said). They read ranked comparisons too: the best rank
is good, everything below it is bad.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.objectives.checks import one_of, positive, require
from prefloop.objectives.family import Objective, Unpaired, log_ratio
from prefloop.objectives.wrapped import Sum
from prefloop.types import Logps, UserError

__all__ = ["BCO", "KTO", "needs_mismatched"]


@dataclass(frozen=True, kw_only=True)
class KTO(Unpaired):
    """Kahneman-Tversky optimization: each response against a reference point of the batch.

        good: desirable (1 - sigmoid( beta (h - z0) ))
        bad:  undesirable (1 - sigmoid( beta (z0 - h) ))
        z0 = sg[ max(0, mean of h over mismatched responses) ],   h = log pi/pi_ref, summed

    z0 estimates the KL divergence on prompts paired with other prompts' responses: unlabelled
    responses (label -1), which `pairing.with_mismatched` adds to the rows ("mismatched"; the
    paper, and TRL). "matched" takes the labelled responses themselves, at no cost and with a bias;
    "zero" takes 0, which is the unpaired form of APOZero (TRL's `apo_zero_unpaired`).

    When:
        thumbs up and down on single responses

    Attributes:
        beta: reward scale, per nat.
        desirable: weight of good responses; keep desirable n_good / (undesirable n_bad) in
            [1, 4/3] (or 3/2, by version of the paper; remembered).
        undesirable: weight of bad responses.
        baseline: where z0 comes from: "mismatched", "matched" or "zero".

    References:
        Ethayarajh et al. 2024, arXiv 2402.01306, Eq. 7.
    """

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    baseline: Literal["mismatched", "matched", "zero"] = "mismatched"

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")
        for name, weight in (("desirable", self.desirable), ("undesirable", self.undesirable)):
            require(self, name, weight, weight >= 0, "0 or more (usual: 1)")
        one_of(self, "baseline", self.baseline, "mismatched", "matched", "zero")

    def __call__(
        self, policy: Logps, reference: Logps | None, label: Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        rewards = self.rewards(policy, reference)
        base = self._baseline(rewards.detach(), label, policy.exists)
        good = self.desirable * (base - rewards).sigmoid()
        bad = self.undesirable * (rewards - base).sigmoid()
        return by_label(label, good, bad)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)

    def _baseline(
        self,
        rewards: Float[Tensor, "*shape"],
        label: Int[Tensor, "*shape"],
        exists: Bool[Tensor, "*shape"],
    ) -> Float[Tensor, ""]:
        if self.baseline == "zero":
            return rewards.new_zeros(())
        used = exists & ((label < 0) if self.baseline == "mismatched" else (label >= 0))
        if not used.any():
            raise UserError(
                "KTO estimates its baseline from mismatched responses (unlabelled ones), and the "
                "batch has none; add them with prefloop.pairing.with_mismatched, or choose "
                'baseline="matched" or "zero"'
            )
        return rewards[used].mean().clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class BCO(Unpaired):
    """Binary classifier optimization: a classifier on rewards, shifted to their middle.

        good: -log sigmoid(r - delta),   bad: -log sigmoid(-(r - delta)),   r = beta log pi/pi_ref
        delta = sg[ (mean r of good + mean r of bad) / 2 ], over the batch

    The authors' delta is a running mean over batches; an objective here has no state, so it is the
    batch's. A batch with one kind only takes that kind's mean. The density-ratio weights for
    prompts that differ between good and bad go into the `weight` column. Without the shift, on
    pairs: BCOPair.

    When:
        as KTO, without mismatched responses to score

    Attributes:
        beta: reward scale, per nat.

    References:
        Jung et al. 2024, arXiv 2404.04656.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "beta", self.beta, "0.01 to 0.5")

    def __call__(
        self, policy: Logps, reference: Logps | None, label: Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        rewards = self.rewards(policy, reference)
        sides = [rewards[label == kind].detach() for kind in (0, 1)]
        delta = torch.stack([side.mean() for side in sides if side.numel()]).mean()
        return by_label(label, -logsigmoid(rewards - delta), -logsigmoid(delta - rewards))

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * log_ratio(policy, reference)


def needs_mismatched(objective: Objective) -> bool:
    """Whether the rows want mismatched responses, which `pairing.with_mismatched` adds."""
    if isinstance(objective, Sum):
        return any(needs_mismatched(part) for part in objective.objectives)
    return isinstance(objective, KTO) and objective.baseline == "mismatched"


def by_label(
    label: Int[Tensor, "*shape"], good: Float[Tensor, "*shape"], bad: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The loss for the label that each response has; 0 without one."""
    return torch.where(label == 1, good, torch.where(label == 0, bad, 0.0))
