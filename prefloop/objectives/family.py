"""What an objective is, and the families they come in.

An objective is a frozen dataclass: its fields are its hyper-parameters, `__call__` is its equation.
Reduction, weights, logging and devices are the trainer's business. A family turns the equation
into one loss a comparison:

    Pairwise   __call__(policy: Pair, reference: Pair | None) -> (P,)
    Tied       the same, and `tie(policy, reference) -> (P,)` for two responses of equal rank
    Wrapped    the same, around another pairwise objective
    Batchwise  __call__(policy: Pair, reference: Pair | None) -> (), one loss for all the pairs
    Listwise   __call__(policy: Logps, reference: Logps | None, rank) -> (B,)
    Scored     __call__(policy: Logps, reference: Logps | None, scores) -> (B,)
    Unpaired   __call__(policy: Logps, reference: Logps | None, label) -> one loss a response

    Ensemble   __call__(policy: Logps, reference: Logps | None, ensemble) -> (B,)

Each has `rewards(policy, reference)`, the implicit reward of any response, for logs. What a family
needs of the data and of the trainer is said once in its first lines; an objective that differs
assigns the name again, without an annotation, so that it does not become a hyper-parameter.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, overload, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefloop.objectives.checks import (
    given,
    refuse_unequal,
    refuse_unlabelled,
    refuse_unordered,
    refuse_unscored,
)
from prefloop.types import (
    Judgement,
    Logps,
    Pair,
    PerComparison,
    PerPair,
    Rewards,
    UserError,
    ordered_pairs,
)

__all__ = [
    "Batchwise",
    "Ensemble",
    "Listwise",
    "Objective",
    "PairLoss",
    "PairObjective",
    "Pairwise",
    "Scored",
    "Tied",
    "Unpaired",
    "Wrapped",
    "log_ratio",
    "mean_log_ratio",
    "over_pairs",
]


@runtime_checkable
class Objective(Protocol):
    """What the trainer knows of an objective, whatever its family."""

    @property
    def needs_reference(self) -> bool:
        """Whether the equation reads the reference policy."""
        ...

    @property
    def couples_batch(self) -> bool:
        """Whether a loss depends on the other comparisons, so that a batch is never split."""
        ...

    @property
    def uses_ties(self) -> bool:
        """Whether two responses of equal rank are an observation (a tie), not a gap."""
        ...

    @property
    def needs_collision(self) -> bool:
        """Whether the equation reads `Logps.collision` of the policy."""
        ...

    @property
    def data(self) -> tuple[str, ...]:
        """Which columns of the judgement are read: "rank", "scores", "label", "ensemble"."""
        ...

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        """Implicit reward of each response, for logs; of any leading shape."""
        ...

    def per_comparison(
        self, policy: Logps, reference: Logps | None, judgement: Judgement
    ) -> PerComparison:
        """One loss a comparison, unweighted."""
        ...


@runtime_checkable
class PairLoss(Protocol):
    """Anything that gives one loss a pair."""

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair: ...


@runtime_checkable
class PairObjective(Objective, PairLoss, Protocol):
    """An objective that is also a pairwise loss: what a wrapper takes."""


class Pairwise(ABC):
    """Objectives that compare a chosen with a rejected response."""

    needs_reference: bool = True
    couples_batch: bool = False
    uses_ties: bool = False
    needs_collision: bool = False
    data: tuple[str, ...] = ("rank",)

    @abstractmethod
    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        """The equation: one loss a pair."""

    @abstractmethod
    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        """Implicit reward of each response."""

    def per_comparison(
        self, policy: Logps, reference: Logps | None, judgement: Judgement
    ) -> PerComparison:
        """Mean loss over the strictly ordered pairs of each comparison."""
        return over_pairs(self)(policy, reference, judgement.rank)


class Listwise(ABC):
    """Objectives that read the whole ranking of a comparison at once."""

    needs_reference: bool = True
    couples_batch: bool = False
    uses_ties: bool = False
    needs_collision: bool = False
    data: tuple[str, ...] = ("rank",)

    @abstractmethod
    def __call__(
        self, policy: Logps, reference: Logps | None, rank: Int[Tensor, "B N"]
    ) -> PerComparison:
        """The equation: one loss a comparison."""

    @abstractmethod
    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        """Implicit reward of each response."""

    def per_comparison(
        self, policy: Logps, reference: Logps | None, judgement: Judgement
    ) -> PerComparison:
        """The loss of each comparison; one that orders no two responses is refused."""
        rank = judgement.rank
        ordered = (rank.unsqueeze(-1) < rank.unsqueeze(-2)) & (rank > 0).unsqueeze(-1)
        refuse_unordered(ordered.any((-1, -2)))
        return self(policy, reference, rank)


class Scored(ABC):
    """Objectives that read a number a response (a reward) instead of a ranking."""

    needs_reference: bool = True
    couples_batch: bool = False
    uses_ties: bool = False
    needs_collision: bool = False
    data: tuple[str, ...] = ("scores",)

    @abstractmethod
    def __call__(
        self,
        policy: Logps,
        reference: Logps | None,
        scores: Float[Tensor, "B N"],
    ) -> PerComparison:
        """The equation: one loss a comparison; a response with a NaN score is left out."""

    @abstractmethod
    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        """Implicit reward of each response."""

    def per_comparison(
        self, policy: Logps, reference: Logps | None, judgement: Judgement
    ) -> PerComparison:
        """The loss of each comparison; one with fewer than two scores is refused."""
        scores = judgement.scores
        refuse_unscored((~scores.isnan()).sum(-1) >= 2)
        return self(policy, reference, scores)


class Ensemble(ABC):
    """Objectives that read what each of K reward models gives a response."""

    needs_reference: bool = True
    couples_batch: bool = True
    uses_ties: bool = False
    needs_collision: bool = False
    data: tuple[str, ...] = ("ensemble",)

    @abstractmethod
    def __call__(
        self, policy: Logps, reference: Logps | None, ensemble: Float[Tensor, "B N K"]
    ) -> PerComparison:
        """The equation: one loss a comparison; a response with a NaN score is left out."""

    @abstractmethod
    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        """Implicit reward of each response."""

    def per_comparison(
        self, policy: Logps, reference: Logps | None, judgement: Judgement
    ) -> PerComparison:
        """The loss of each comparison; all of them need two responses scored by every model."""
        ensemble = judgement.ensemble
        if ensemble is None:
            raise UserError(
                "this objective reads the scores of several reward models (`ensemble`), and not "
                "every comparison of the batch has them; give each response a list with one score "
                "a model, or use RewardDistillation, which reads one score a response"
            )
        refuse_unscored((~ensemble.isnan().any(-1)).sum(-1) >= 2)
        return self(policy, reference, ensemble)


class Tied(ABC):
    """Objectives with a likelihood for ties: equal ranks are an observation, not a gap."""

    needs_reference: bool = True
    couples_batch: bool = False
    uses_ties: bool = True
    needs_collision: bool = False
    data: tuple[str, ...] = ("rank",)

    @abstractmethod
    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        """The equation for pairs with a winner: one loss a pair."""

    @abstractmethod
    def tie(self, policy: Pair, reference: Pair | None) -> PerPair:
        """The equation for ties: one loss a pair, whichever of the two is called chosen."""

    @abstractmethod
    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        """Implicit reward of each response."""

    def per_comparison(
        self, policy: Logps, reference: Logps | None, judgement: Judgement
    ) -> PerComparison:
        """Mean loss over the pairs of judged responses of each comparison, ordered or tied."""
        row, chosen, rejected = ordered_pairs(judgement.rank)
        tied_row, first, second = tied_pairs(judgement.rank)
        rows = torch.cat([row, tied_row])
        refuse_unordered(torch.bincount(rows, minlength=len(judgement.rank)) > 0)
        clear = self(
            pair_at(policy, row, chosen, rejected), pair_at(reference, row, chosen, rejected)
        )
        tied = self.tie(
            pair_at(policy, tied_row, first, second), pair_at(reference, tied_row, first, second)
        )
        return mean_by_row(torch.cat([clear, tied]), rows, len(judgement.rank))


class Batchwise(ABC):
    """Objectives that are one number for all the pairs of a batch (they sort or pool)."""

    needs_reference: bool = True
    couples_batch: bool = True
    uses_ties: bool = False
    needs_collision: bool = False
    data: tuple[str, ...] = ("rank",)

    @abstractmethod
    def __call__(self, policy: Pair, reference: Pair | None) -> Float[Tensor, ""]:
        """The equation: one loss for all the pairs."""

    @abstractmethod
    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        """Implicit reward of each response."""

    def per_comparison(
        self, policy: Logps, reference: Logps | None, judgement: Judgement
    ) -> PerComparison:
        """The loss of the batch, said for every comparison; a weight of 0 takes one out of it."""
        counted = judgement.weight > 0
        refuse_unequal(judgement.weight, type(self).__name__)
        row, chosen, rejected = ordered_pairs(judgement.rank * counted.unsqueeze(-1))
        refuse_unordered((torch.bincount(row, minlength=len(counted)) > 0) | ~counted)
        if not counted.any():
            return 0.0 * policy.sum.sum(-1)
        loss = self(
            pair_at(policy, row, chosen, rejected), pair_at(reference, row, chosen, rejected)
        )
        return loss.expand(len(counted))


class Unpaired(ABC):
    """Objectives on single responses that somebody called good or bad."""

    needs_reference: bool = True
    couples_batch: bool = True
    uses_ties: bool = False
    needs_collision: bool = False
    data: tuple[str, ...] = ("label", "rank")

    @abstractmethod
    def __call__(
        self, policy: Logps, reference: Logps | None, label: Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """The equation: one loss a response; 0 where the label is -1 (nobody labelled it)."""

    @abstractmethod
    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        """Implicit reward of each response."""

    def per_comparison(
        self, policy: Logps, reference: Logps | None, judgement: Judgement
    ) -> PerComparison:
        """Mean loss over the labelled responses of each comparison.

        A comparison without labels is read from its ranks: the best rank is good, whatever is
        ranked below it is bad.
        """
        label = labels(judgement)
        count = (label >= 0).sum(-1)
        refuse_unlabelled(count > 0)
        return self(policy, reference, label).sum(-1) / count


class Wrapped(ABC):
    """Pairwise objectives around another one, which answers for what it needs."""

    weighs_by_collision: bool = False

    @property
    @abstractmethod
    def inner(self) -> PairObjective:
        """The objective inside."""

    @abstractmethod
    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        """The equation: one loss a pair."""

    @property
    def needs_reference(self) -> bool:
        """Whether the objective inside reads the reference."""
        return self.inner.needs_reference

    @property
    def couples_batch(self) -> bool:
        """Whether the objective inside couples the batch."""
        return self.inner.couples_batch

    @property
    def uses_ties(self) -> bool:
        """Never: only ordered pairs are formed."""
        return False

    @property
    def needs_collision(self) -> bool:
        """Whether the wrapper or the objective inside reads the collision probability."""
        return self.weighs_by_collision or self.inner.needs_collision

    @property
    def data(self) -> tuple[str, ...]:
        """The columns that the objective inside reads."""
        return self.inner.data

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        """Implicit reward of each response under the objective inside."""
        return self.inner.rewards(policy, reference)

    def per_comparison(
        self, policy: Logps, reference: Logps | None, judgement: Judgement
    ) -> PerComparison:
        """Mean loss over the strictly ordered pairs of each comparison."""
        return over_pairs(self)(policy, reference, judgement.rank)


FAMILIES = (Pairwise, Tied, Wrapped, Batchwise, Listwise, Scored, Ensemble, Unpaired)


def over_pairs(
    objective: PairLoss,
) -> Callable[[Logps, Logps | None, Int[Tensor, "B N"]], PerComparison]:
    """Lift a pairwise loss to comparisons of N ranked responses.

    The log-probabilities are computed once; every strictly ordered pair is formed by indexing, and
    the mean is taken over the pairs of a comparison, so that a comparison counts once however many
    responses it has.
    """

    def lifted(policy: Logps, reference: Logps | None, rank: Int[Tensor, "B N"]) -> PerComparison:
        row, chosen, rejected = ordered_pairs(rank)
        refuse_unordered(torch.bincount(row, minlength=len(rank)) > 0)
        losses = objective(
            pair_at(policy, row, chosen, rejected), pair_at(reference, row, chosen, rejected)
        )
        return mean_by_row(losses, row, len(rank))

    return lifted


def rewards_of(objective: Objective, policy: Pair, reference: Pair | None) -> Rewards:
    """Implicit rewards of the chosen and of the rejected responses."""
    chosen, rejected = (None, None) if reference is None else reference
    return Rewards(
        objective.rewards(policy.chosen, chosen), objective.rewards(policy.rejected, rejected)
    )


def pair_margin(objective: Objective, policy: Pair, reference: Pair | None) -> PerPair:
    """Implicit reward of the chosen minus that of the rejected response."""
    return rewards_of(objective, policy, reference).margin


def log_ratio(policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
    """log pi(y|x) - log pi_ref(y|x) of each response, in nats."""
    return policy.sum - given(reference).sum


def mean_log_ratio(policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
    """(log pi(y|x) - log pi_ref(y|x)) / |y| of each response, in nats per token."""
    return policy.mean - given(reference).mean


@overload
def pair_at(logps: Logps, row: Tensor, chosen: Tensor, rejected: Tensor) -> Pair: ...
@overload
def pair_at(logps: None, row: Tensor, chosen: Tensor, rejected: Tensor) -> None: ...
@overload
def pair_at(logps: Logps | None, row: Tensor, chosen: Tensor, rejected: Tensor) -> Pair | None: ...
def pair_at(
    logps: Logps | None,
    row: Int[Tensor, " P"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
) -> Pair | None:
    """The pairs (row, chosen), (row, rejected) of scored comparisons; None of no log-probs."""
    if logps is None:
        return None
    return Pair(logps.at(row, chosen), logps.at(row, rejected))


def mean_by_row(values: Float[Tensor, " P"], row: Int[Tensor, " P"], rows: int) -> PerComparison:
    """Mean of the values of each row; 0 for a row that has none."""
    total = values.new_zeros(rows).index_add(0, row, values)
    return total / torch.bincount(row, minlength=rows).clamp(min=1)


def tied_pairs(
    rank: Int[Tensor, "B N"],
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Every pair of judged responses of equal rank, once: (comparison, first, second)."""
    judged = (rank > 0).unsqueeze(-1)
    equal = ((rank.unsqueeze(-1) == rank.unsqueeze(-2)) & judged).triu(1)
    row, first, second = equal.nonzero(as_tuple=True)
    return row, first, second


def labels(judgement: Judgement) -> Int[Tensor, "B N"]:
    """Good (1), bad (0) or unlabelled (-1), from the labels, or from the ranks without any."""
    rank = judgement.rank
    judged = rank > 0
    best = rank.masked_fill(~judged, rank.max().item() + 1).amin(-1, keepdim=True)
    ranked = (rank == best).long().masked_fill(~judged, -1)
    ordered = (judged & (rank > best)).any(-1, keepdim=True)
    ranked = ranked.masked_fill(~ordered, -1)  # all equal: neither good nor bad
    labelled = (judgement.label >= 0).any(-1, keepdim=True)
    return torch.where(labelled, judgement.label, ranked)
