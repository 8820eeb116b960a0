"""Where EM begins: who is of which type before any policy was trained.

A start is a frozen dataclass, called with the votes, the number of types, a seed and the features
of responses. To add one: the class, and its name in `STARTS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop import em
from prefloop.heads.linear import maximum
from prefloop.mixture.evidence import HeldOut
from prefloop.mixture.votes import Votes
from prefloop.runs import read_jsonl
from prefloop.types import Tokenized, UserError, judgement, ordered_pairs

Features = Callable[[Sequence[Tokenized]], Tensor]
"""Rows -> (B, N, D), what the responses are like."""


@runtime_checkable
class Start(Protocol):
    """Responsibilities of the first M-step."""

    def __call__(self, votes: Votes, types: int, seed: int, features: Features) -> Tensor:
        """Responsibilities (I, K); rows sum to 1."""
        ...


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Hard clusters of what annotators vote for, by k-means: cluster-then-DPO is round 1 of it.

    An annotator is the mean over judgements of (features of the better - features of the worse),
    each feature divided by its spread, in the leading directions in which annotators differ.

    Attributes:
        directions: how many leading directions are kept; fewer are less noisy.
    """

    directions: int = 8

    def __post_init__(self) -> None:
        if self.directions < 1:
            raise UserError(f"Clusters.directions must be 1 or more, got {self.directions}")

    def __call__(self, votes: Votes, types: int, seed: int, features: Features) -> Tensor:
        """One-hot responsibilities (I, K)."""
        voted = vote_means(votes, features)
        _, _, leading = torch.linalg.svd(voted - voted.mean(0), full_matrices=False)
        projected = voted @ leading[: self.directions].mT
        return em.given_start(em.kmeans(projected, types, seed), types)


@dataclass(frozen=True, kw_only=True)
class LinearRewards:
    """EM where it is easy, before any policy is trained: linear rewards on frozen features.

        P(i prefers y to z) = sum_k gamma_ik sigmoid(w_k . (phi(y) - phi(z)))

    M-steps are solved (Newton, ridge / 2 |w_k|^2), each annotator is scored by rewards that read
    none of their judgements, and the first responsibilities are `Clusters()`. Of the ridges that
    leave an annotator to each type the one of the highest held-out likelihood is kept; where none
    does, the clusters. Rankings are taken apart into pairs. Nothing but one reading of the
    responses needs the model.

    Attributes:
        ridges: penalties to choose from, in nats; features are divided by their spread.
        directions: how many leading directions of the votes are kept.
        folds: parts of the annotators, see `HeldOut`; never more than there are annotators.
        rounds: of EM.
    """

    ridges: tuple[float, ...] = (3.0, 10.0, 30.0, 100.0)
    directions: int = 64
    folds: int = 4
    rounds: int = 10

    def __post_init__(self) -> None:
        if not self.ridges or min(self.ridges) <= 0:
            raise UserError(f"LinearRewards.ridges must be positive numbers, got {self.ridges}")
        for name, least in (("directions", 1), ("folds", 2), ("rounds", 1)):
            if getattr(self, name) < least:
                raise UserError(
                    f"LinearRewards.{name} must be {least} or more, got {getattr(self, name)}"
                )

    def __call__(self, votes: Votes, types: int, seed: int, features: Features) -> Tensor:
        """Responsibilities (I, K)."""
        start = Clusters()(votes, types, seed, features)
        if types == 1:
            return start
        pairs = vote_directions(votes, features)
        _, _, leading = torch.linalg.svd(pairs.direction, full_matrices=False)
        pairs = pairs._replace(direction=pairs.direction @ leading[: self.directions].mT)
        found = [self._fitted(votes, pairs, start, ridge, seed) for ridge in self.ridges]
        alive = [belief for belief in found if float(belief.responsibilities.sum(0).min()) >= 1]
        best = max(alive, key=lambda belief: float(belief.evidence.sum()), default=None)
        return best.responsibilities if best else start

    def _fitted(
        self, votes: Votes, pairs: "Directions", start: Tensor, ridge: float, seed: int
    ) -> em.Belief:
        """The last round of EM with one ridge."""
        parts = HeldOut(folds=min(self.folds, len(votes.names)))(votes, 0, seed)
        who, types = votes.annotator[pairs.row], start.shape[-1]
        reward = torch.zeros(types, pairs.direction.shape[-1], dtype=torch.float64)

        def fit(gamma: Tensor, number: int) -> Tensor:
            loglik = torch.zeros(len(who), types, dtype=torch.float64)
            for part in parts:
                scored = part.scored[pairs.row]
                for kind in range(types):
                    weight = gamma[who, kind] * part.trained[pairs.row]
                    reward[kind] = maximum(pairs.direction, weight, ridge, reward[kind])
                loglik[scored] = logsigmoid(pairs.direction[scored] @ reward.mT)
            return em.by_annotator(loglik, who, len(votes.names))

        *_, last = em.rounds(fit, start, self.rounds)
        return last.belief


@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """Random responsibilities; unequal concentrations leave the symmetric saddle faster.

    Attributes:
        concentration: one positive number a type; empty is 1 for each.
    """

    concentration: tuple[float, ...] = ()

    def __call__(self, votes: Votes, types: int, seed: int, features: Features) -> Tensor:
        """Random responsibilities (I, K)."""
        given = self.concentration or (1.0,) * types
        if len(given) != types:
            raise UserError(
                f"Dirichlet.concentration has {len(given)} numbers for {types} types; give one a "
                "type, or none"
            )
        return em.dirichlet_start(len(votes.names), given, seed)


@dataclass(frozen=True, kw_only=True)
class Given:
    """Responsibilities from a file, as `prefloop mixture` writes them.

    Attributes:
        path: JSON-lines, each {"annotator": NAME, "gamma": [one number a type]}.
    """

    path: str

    def __call__(self, votes: Votes, types: int, seed: int, features: Features) -> Tensor:
        """The responsibilities (I, K) of the file, in the order of the votes."""
        if not Path(self.path).is_file():
            raise UserError(f"{self.path}: there is no such file of responsibilities")
        told: dict[str, list[float]] = {}
        for number, row in enumerate(read_jsonl(Path(self.path)), 1):
            gamma: list[float] = row.get("gamma") or []
            if "annotator" not in row or not _simplex(gamma, types):
                raise UserError(
                    f"{self.path}:{number}: a row is an annotator and gamma, {types} numbers from "
                    f"0 that sum to 1; found {row}"
                )
            told[str(row["annotator"])] = gamma
        absent = [name for name in votes.names if name not in told]
        if absent:
            raise UserError(
                f"{self.path}: says nothing of annotator {absent[0]!r} and {len(absent) - 1} more; "
                "give a row to each"
            )
        return torch.tensor([told[name] for name in votes.names], dtype=torch.float64)


STARTS = (Clusters, LinearRewards, Dirichlet, Given)


class Directions(NamedTuple):
    """Every strictly ordered pair of every judgement.

    Attributes:
        direction: features of the better less those of the worse, each divided by its spread.
        row: the judgement of each pair.
    """

    direction: Float[Tensor, "P D"]
    row: Int[Tensor, " P"]


@torch.no_grad()
def vote_directions(votes: Votes, features: Features) -> Directions:
    """What was voted for, and in which judgement."""
    table = features(votes.rows).cpu().double()  # (J, N, D)
    row, better, worse = ordered_pairs(judgement(votes.rows).rank)
    direction = table[row, better] - table[row, worse]
    spread = direction.std(0, unbiased=False)
    return Directions(direction / torch.where(spread > 0, spread, 1.0), row)


def vote_means(votes: Votes, features: Features) -> Float[Tensor, "I D"]:
    """Mean direction of each annotator's votes: features of the better less those of the worse."""
    direction, row = vote_directions(votes, features)
    total = em.vote_features(direction, votes.annotator[row], len(votes.names))
    pairs = torch.bincount(votes.annotator[row], minlength=len(votes.names))
    return total / pairs.clamp(min=1).unsqueeze(-1)


def _simplex(gamma: object, types: int) -> bool:
    if not isinstance(gamma, list) or len(gamma) != types:
        return False
    numbers = [value for value in gamma if isinstance(value, int | float) and value >= 0]
    return len(numbers) == types and abs(sum(numbers) - 1) < 1e-4
