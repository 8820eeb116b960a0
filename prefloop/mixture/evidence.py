"""What the E-step reads: votes that were trained on, or votes that were not.

A policy of millions of weights remembers the votes it was trained on. Remembered votes say nothing
of an annotator's type, so a round that scores them leaves everybody where they were. Evidence
that a round trains without and then scores is none the worse for it.

Evidence is a frozen dataclass, called with the votes, the number of the round and a seed. To add
one: the class, and its name in `EVIDENCE`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from prefloop import em
from prefloop.mixture.votes import Votes
from prefloop.types import UserError


class Part(NamedTuple):
    """A training of every type: which judgements it reads, and which it scores afterwards."""

    trained: Bool[Tensor, " J"]
    scored: Bool[Tensor, " J"]


@runtime_checkable
class Evidence(Protocol):
    """The parts of a round.

    Attributes:
        unseen: judgements are scored by policies that did not train on them. The policies that are
            kept are then trained once more, on everything, after the last round.
    """

    unseen: ClassVar[bool]

    def __call__(self, votes: Votes, number: int, seed: int) -> Sequence[Part]:
        """The parts of round `number`, the first being 0."""
        ...


@dataclass(frozen=True, kw_only=True)
class Trained:
    """All judgements are trained on and scored, as in the authors' code: plain EM."""

    unseen: ClassVar[bool] = False

    def __call__(self, votes: Votes, number: int, seed: int) -> list[Part]:
        """One part: everything, twice."""
        everything = torch.ones(len(votes.rows), dtype=torch.bool)
        return [Part(everything, everything)]


@dataclass(frozen=True, kw_only=True)
class Halves:
    """Half of each annotator's judgements is trained on, the other half scored; they swap places.

    The cross-fitting of others who ran EM-DPO. A round costs half, and half the evidence is read.
    """

    unseen: ClassVar[bool] = True

    def __call__(self, votes: Votes, number: int, seed: int) -> list[Part]:
        """One part."""
        half = em.halves(votes.annotator, seed)
        return [Part(half, ~half) if number % 2 == 0 else Part(~half, half)]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Every annotator is judged by policies that read none of their judgements; ours.

    Annotators are dealt into folds. Each fold is scored under policies trained on all others, as
    far as those are of each type; types keep their names since all folds train on the same
    responsibilities. An annotator who was put into the wrong type does not pull its policy towards
    their own votes, so that nothing holds them there.

    With exact M-steps that can remember every vote it puts 88 to 99 % of annotators into their type
    from a random start, where votes that were trained on put 63 to 83 %; two folds are not enough
    there (`scripts/mixture_remembering.py`). A round costs folds - 1 trainings on everything.

    Attributes:
        folds: parts of the annotators, the same in all rounds.
    """

    folds: int = 4
    unseen: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise UserError(f"HeldOut.folds must be 2 or more, got {self.folds}")

    def __call__(self, votes: Votes, number: int, seed: int) -> list[Part]:
        """A part a fold."""
        if self.folds > len(votes.names):
            raise UserError(
                f"HeldOut.folds is {self.folds}, more than the {len(votes.names)} annotators"
            )
        fold = deal_annotators(len(votes.names), self.folds, seed)[votes.annotator]
        return [Part(fold != place, fold == place) for place in range(self.folds)]


EVIDENCE = (Trained, Halves, HeldOut)


def deal_annotators(annotators: int, folds: int, seed: int) -> Int[Tensor, " I"]:
    """The fold of each annotator; folds are equally large, to one."""
    rng = torch.Generator().manual_seed(seed)
    fold = torch.empty(annotators, dtype=torch.long)
    fold[torch.randperm(annotators, generator=rng)] = torch.arange(annotators) % folds
    return fold
