"""What an objective is, and the families they come in.

An objective is a frozen dataclass: its fields are its hyper-parameters, `__call__` is its equation
and returns one loss an example. Reduction, weights, logging and devices are the trainer's business.
A family turns the equation into one loss a comparison:

    Pairwise   __call__(policy: Pair, reference: Pair | None) -> (P,)
    Listwise   __call__(policy: Logps, reference: Logps | None, rank) -> (B,)
    Scored     __call__(policy: Logps, reference: Logps | None, scores) -> (B,)

To add an objective: write the class in the file of its theme, name it in that file's `__all__`, and
add a row to `CASES` in `tests/test_objectives.py`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefloop.types import (
    Judgement,
    Logps,
    Pair,
    PerComparison,
    PerPair,
    UserError,
    ordered_pairs,
)

__all__ = [
    "Listwise",
    "Objective",
    "PairLoss",
    "Pairwise",
    "Scored",
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
        """Which columns of the judgement are read: "rank", "scores", "label"."""
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


class Pairwise(ABC):
    """Objectives that compare a chosen with a rejected response."""

    needs_reference: ClassVar[bool] = True
    couples_batch: ClassVar[bool] = False
    uses_ties: ClassVar[bool] = False
    needs_collision: ClassVar[bool] = False
    data: ClassVar[tuple[str, ...]] = ("rank",)

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

    needs_reference: ClassVar[bool] = True
    couples_batch: ClassVar[bool] = False
    uses_ties: ClassVar[bool] = False
    needs_collision: ClassVar[bool] = False
    data: ClassVar[tuple[str, ...]] = ("rank",)

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

    needs_reference: ClassVar[bool] = True
    couples_batch: ClassVar[bool] = False
    uses_ties: ClassVar[bool] = False
    needs_collision: ClassVar[bool] = False
    data: ClassVar[tuple[str, ...]] = ("scores",)

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
        return self(policy, reference, scores.to(policy.token.dtype))


FAMILIES = (Pairwise, Listwise, Scored)


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
            pair_at(policy, row, chosen, rejected),
            None if reference is None else pair_at(reference, row, chosen, rejected),
        )
        return mean_by_row(losses, row, len(rank))

    return lifted


def log_ratio(policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
    """log pi(y|x) - log pi_ref(y|x) of each response, in nats."""
    return policy.sum - given(reference).sum


def mean_log_ratio(policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
    """(log pi(y|x) - log pi_ref(y|x)) / |y| of each response, in nats per token."""
    return policy.mean - given(reference).mean


def given(reference: Logps | None) -> Logps:
    """The reference, or a user error where there is none."""
    if reference is None:
        raise UserError(
            "this objective compares the policy with a reference policy, but reference is None; "
            "pass the reference's log-probabilities, or use an objective without one (SimPO, ORPO, "
            "CPO)"
        )
    return reference


def pair_at(
    logps: Logps,
    row: Int[Tensor, " P"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
) -> Pair:
    """The pairs (row, chosen), (row, rejected) of scored comparisons."""
    return Pair(logps.at(row, chosen), logps.at(row, rejected))


def mean_by_row(values: Float[Tensor, " P"], row: Int[Tensor, " P"], rows: int) -> PerComparison:
    """Mean of the values of each row; 0 for a row that has none."""
    total = values.new_zeros(rows).index_add(0, row, values)
    return total / torch.bincount(row, minlength=rows).clamp(min=1)


def refuse_unordered(ordered: Bool[Tensor, " B"]) -> None:
    """A user error where a comparison orders no two of its responses."""
    if not ordered.all():
        empty = (~ordered).nonzero().flatten().tolist()
        raise UserError(
            f"comparisons {empty[:5]} of the batch order no two responses (all ranks are equal or "
            "missing), so there is no pair to learn from; drop them, or use an objective with a "
            "model of ties (Davidson, RaoKupper)"
        )


def refuse_unscored(scored: Bool[Tensor, " B"]) -> None:
    """A user error where a comparison has fewer than two scores."""
    if not scored.all():
        empty = (~scored).nonzero().flatten().tolist()
        raise UserError(
            f"comparisons {empty[:5]} of the batch have fewer than two scores, and this objective "
            "reads scores; score the responses first (prefloop score), or use an objective that "
            "reads ranks (DPO)"
        )


def require(owner: object, name: str, value: object, holds: bool, rule: str) -> None:
    """A user error that names the field as it was typed, unless the rule holds."""
    if not holds:
        raise UserError(f"{type(owner).__name__}.{name} must be {rule}, got {value}")


def positive(owner: object, name: str, value: float, usual: str) -> None:
    """Require a finite number above zero; `usual` says which values people take."""
    require(owner, name, value, 0 < value < math.inf, f"positive and finite (usual: {usual})")


def share(owner: object, name: str, value: float) -> None:
    """Require a share of flipped labels: in [0, 0.5)."""
    rule = "in [0, 0.5): at 0.5 a label says nothing, above it labels are read backwards"
    require(owner, name, value, 0 <= value < 0.5, rule)
