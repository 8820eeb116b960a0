"""The rules that read what a policy says of its responses; `prefloop score --policy` writes that.

`policy_logps` and `reference_logps` are sums over a response's tokens, in nats; `tokens` counts
them. The implicit reward of a response is beta (log pi - log pi_ref).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from prefloop.did import estimate_did_entropy
from prefloop.selection.rule import BEST_WORST, Rule, Table, best_worst, standardised
from prefloop.selection.variance import reward_gap, variance_and_error
from prefloop.types import UserError

RATIO = ("policy_logps", "reference_logps")


@dataclass(frozen=True, kw_only=True)
class OnlinePVar(Rule):
    """Preference variance of the implicit reward; 0 for every prompt while policy = reference.

    Attributes:
        beta: of the implicit reward beta log pi/pi_ref, per nat.
    """

    beta: float = 0.1
    columns: ClassVar[tuple[str, ...]] = RATIO
    measures: ClassVar[tuple[str, ...]] = ("online_pvar", "online_pvar_se")

    def __post_init__(self) -> None:
        _refuse_bad_beta(self)

    def measure(self, table: Table) -> Float[Tensor, "P C"]:
        rewards = self.beta * _log_ratio(table)
        return torch.stack(variance_and_error(rewards, ~rewards.isnan()), dim=-1)


@dataclass(frozen=True, kw_only=True)
class _ImplicitGap(Rule):
    """Implicit reward of the best response minus that of the worst; its rules say which end."""

    beta: float = 0.1
    columns: ClassVar[tuple[str, ...]] = (*RATIO, BEST_WORST)
    measures: ClassVar[tuple[str, ...]] = ("implicit_gap",)

    def __post_init__(self) -> None:
        _refuse_bad_beta(self)

    def measure(self, table: Table) -> Float[Tensor, "P C"]:
        gap = best_worst(table[BEST_WORST]).margin(_log_ratio(table))
        return (self.beta * gap).unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class LargestImplicitGap(_ImplicitGap):
    """Implicit reward of the best response minus that of the worst, the largest first.

    A pair that the policy already orders as labelled, by a wide margin.

    Attributes:
        beta: of the implicit reward, per nat.
    """


@dataclass(frozen=True, kw_only=True)
class SmallestImplicitGap(_ImplicitGap):
    """Implicit reward of the best response minus that of the worst, the smallest first.

    Difficulty-based selection keeps the smallest tenth. Whether the sign counts is not settled
    there: with it, mislabelled pairs come first too.

    Attributes:
        beta: of the implicit reward, per nat.
        absolute: take |gap|, so that pairs near 0 come first; otherwise the most negative do.

    References:
        Difficulty-based selection, arXiv 2508.04149.
    """

    absolute: bool = True

    def scores(self, measured: Float[Tensor, "P C"]) -> Float[Tensor, " P"]:
        gap = measured[:, 0]
        return -(gap.abs() if self.absolute else gap)


@dataclass(frozen=True, kw_only=True)
class AlignmentPotential(Rule):
    """Large reward margin, small implicit margin: what the reward knows and the policy does not.

        z(|r_w - r_l|) - weight z(|h_w - h_l|),   h = log pi - log pi_ref

    w is the best response and l the worst; z standardises over the prompts of the file, which
    makes beta of the implicit reward immaterial. 0 takes the place of z where all are equal.

    Attributes:
        weight: of the implicit margin.

    References:
        Alignment potential M_AP, arXiv 2503.01864: the margins of the paper as remembered, the
        standardisation of its code.
    """

    weight: float = 1.0
    columns: ClassVar[tuple[str, ...]] = ("scores", *RATIO, BEST_WORST)
    measures: ClassVar[tuple[str, ...]] = ("reward_margin", "log_ratio_margin")

    def measure(self, table: Table) -> Float[Tensor, "P C"]:
        pair = best_worst(table[BEST_WORST])
        margins = pair.margin(table["scores"]), pair.margin(_log_ratio(table))
        return torch.stack(margins, dim=-1).abs()

    def scores(self, measured: Float[Tensor, "P C"]) -> Float[Tensor, " P"]:
        return standardised(measured[:, 0]) - self.weight * standardised(measured[:, 1])


@dataclass(frozen=True, kw_only=True)
class ReferenceFreePotential(Rule):
    """Alignment potential as its public code has it: no reference, log-probabilities per token.

        z(max r - min r) - weight z(|log pi(y_w) / |y_w| - log pi(y_l) / |y_l||)

    Attributes:
        weight: of the implicit margin; 1 in the code, which keeps the highest 40 %.

    References:
        Alignment potential M_AP, arXiv 2503.01864 (as in its public code).
    """

    weight: float = 1.0
    columns: ClassVar[tuple[str, ...]] = ("scores", "policy_logps", "tokens", BEST_WORST)
    measures: ClassVar[tuple[str, ...]] = ("reward_gap", "logp_per_token_margin")

    def measure(self, table: Table) -> Float[Tensor, "P C"]:
        per_token = table["policy_logps"] / table["tokens"]
        implicit = best_worst(table[BEST_WORST]).margin(per_token).abs()
        rewards = table["scores"]
        return torch.stack((reward_gap(rewards, ~rewards.isnan()), implicit), dim=-1)

    def scores(self, measured: Float[Tensor, "P C"]) -> Float[Tensor, " P"]:
        return standardised(measured[:, 0]) - self.weight * standardised(measured[:, 1])


@dataclass(frozen=True, kw_only=True)
class PredictiveEntropy(Rule):
    """How unsure the policy is of its answer: minus the mean log-probability of sampled answers.

        H = - 1/N sum_n log pi(y_n | x)

    An estimate of the entropy for answers drawn from the policy itself at temperature 1. It grows
    with the length of the answers.

    Attributes:
        per_token: divide each answer's log-probability by its tokens: nats a token.

    References:
        Muldrew et al., "Active Preference Learning for Large Language Models", arXiv 2402.08114.
        One public baseline keeps the lowest entropy; the definition keeps the highest.
    """

    per_token: bool = False
    columns: ClassVar[tuple[str, ...]] = ("policy_logps", "tokens")
    measures: ClassVar[tuple[str, ...]] = ("entropy",)

    def measure(self, table: Table) -> Float[Tensor, "P C"]:
        logps = table["policy_logps"]
        logps = logps / table["tokens"] if self.per_token else logps
        return -logps.nanmean(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class PreferenceCertainty(Rule):
    """How sure the implicit reward is which answer wins, whoever is right: nobody has judged yet.

        max_n r_n - min_n r_n,   r = beta (log pi - log pi_ref);   |r_1 - r_2| of two answers

    The largest are kept: confidently wrong pairs teach most. 0 for every prompt while the policy
    equals its reference. For more than two answers the widest pair is our reading.

    Attributes:
        beta: of the implicit reward, per nat.

    References:
        Muldrew et al., "Active Preference Learning for Large Language Models", arXiv 2402.08114.
    """

    beta: float = 0.1
    columns: ClassVar[tuple[str, ...]] = RATIO
    measures: ClassVar[tuple[str, ...]] = ("certainty",)

    def __post_init__(self) -> None:
        _refuse_bad_beta(self)

    def measure(self, table: Table) -> Float[Tensor, "P C"]:
        rewards = self.beta * _log_ratio(table)
        return reward_gap(rewards, ~rewards.isnan()).unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class LearningOrder(Rule):
    """The easiest first: minus the validation loss of models that did not train on the row.

    SelectiveDPO trains on one half, takes the DPO loss of the other, swaps, over several seeds; it
    keeps the easiest half and trains on it in ascending order. `prefloop score --learning-order`
    writes the column.

    References:
        SelectiveDPO, arXiv 2502.09650 (as in its public code).
    """

    columns: ClassVar[tuple[str, ...]] = ("validation_loss",)
    measures: ClassVar[tuple[str, ...]] = ("validation_loss",)

    def measure(self, table: Table) -> Float[Tensor, "P C"]:
        return table["validation_loss"].unsqueeze(-1)

    def scores(self, measured: Float[Tensor, "P C"]) -> Float[Tensor, " P"]:
        return -measured[:, 0]


@dataclass(frozen=True, kw_only=True)
class CHES(Rule):
    """The pairs that displace least first: minus the centered hidden embedding similarity.

        CHES = <E_w, E_l> / (n_w n_l) - |E_w|^2 / n_w^2

    E is the sum of the last hidden states that predict a response, n its tokens, w the best
    response and l the worst. High CHES foretells that training lowers the chosen response too, so
    those pairs are dropped. `hidden_gram` holds the products <E_i, E_j> of a row's responses.

    Attributes:
        per_token: the length-normalised form; the other is dominated by length.

    References:
        Razin et al., "Unintentional Unalignment", arXiv 2410.08847 (as in its public code, with
        states of padding left out).
    """

    per_token: bool = True
    columns: ClassVar[tuple[str, ...]] = ("hidden_gram", "tokens", BEST_WORST)
    measures: ClassVar[tuple[str, ...]] = ("ches",)

    def measure(self, table: Table) -> Float[Tensor, "P C"]:
        pair = best_worst(table[BEST_WORST])
        rows = torch.arange(len(pair.best))
        gram, tokens = table["hidden_gram"], table["tokens"]
        if not self.per_token:
            tokens = torch.ones_like(tokens)
        chosen, rejected = tokens[rows, pair.best], tokens[rows, pair.worst]
        across = gram[rows, pair.best, pair.worst] / (chosen * rejected)
        within = gram[rows, pair.best, pair.best] / chosen.square()
        return (across - within).unsqueeze(-1)

    def scores(self, measured: Float[Tensor, "P C"]) -> Float[Tensor, " P"]:
        return -measured[:, 0]


@dataclass(frozen=True, kw_only=True)
class DIDEntropy(Rule):
    """Entropy of the differential information between policy and reference, the highest first.

    Estimated from sampled answers with importance weights, see `did.estimate_did_entropy`: with a
    few answers it is far from exact, and `did_samples` says how many of them count. That high
    entropy should be kept is our choice; `--keep bottom` keeps the lowest.

    References:
        "Differential Information Distribution: A Bayesian Perspective on DPO", arXiv 2505.23761.
        As a selection rule: ours.
    """

    columns: ClassVar[tuple[str, ...]] = (*RATIO, "drawn_logps")
    measures: ClassVar[tuple[str, ...]] = ("did_entropy", "did_samples")

    def measure(self, table: Table) -> Float[Tensor, "P C"]:
        ratio, drawn = _log_ratio(table), table["drawn_logps"]
        count = (~ratio.isnan()).sum(-1)
        found = ratio.new_zeros(len(ratio), 2)
        for size in count.unique().tolist():  # the estimate knows no padding
            rows = (count == size).nonzero().flatten()
            part = estimate_did_entropy(ratio[rows, :size], drawn[rows, :size])
            found[rows] = torch.stack((part.entropy, part.effective_samples), dim=-1)
        return found


def validation_loss(
    policy_margin: Float[Tensor, " P"], reference_margin: Float[Tensor, " P"], beta: float
) -> Float[Tensor, " P"]:
    """DPO loss of pairs under a model that did not train on them: what `LearningOrder` orders by.

    softplus(-beta ((log pi_w - log pi_l) - (log ref_w - log ref_l)))
    """
    return softplus(-beta * (policy_margin - reference_margin))


def _log_ratio(table: Table) -> Float[Tensor, "P N"]:
    return table["policy_logps"] - table["reference_logps"]


def _refuse_bad_beta(
    rule: OnlinePVar | _ImplicitGap | PreferenceCertainty,
) -> None:
    if not 0 < rule.beta < float("inf"):
        raise UserError(
            f"{type(rule).__name__}.beta must be positive and finite, got {rule.beta}; 0.1 is usual"
        )
