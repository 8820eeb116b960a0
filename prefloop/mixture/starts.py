"""Where EM begins: who is of which type before any policy was trained.

A start is a frozen dataclass, called with the votes, the number of types, a seed and the features
of responses. To add one: the class, and its name in `STARTS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop import em
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


STARTS = (Clusters, Dirichlet, Given)


@torch.no_grad()
def vote_means(votes: Votes, features: Features) -> Float[Tensor, "I D"]:
    """Mean direction of each annotator's votes: features of the better less those of the worse."""
    table = features(votes.rows)  # (J, N, D)
    row, better, worse = ordered_pairs(judgement(votes.rows).rank)
    table = table.double().cpu()
    direction = table[row, better] - table[row, worse]
    spread = direction.std(0, unbiased=False)
    direction = direction / torch.where(spread > 0, spread, 1.0)
    total = em.vote_features(direction, votes.annotator[row], len(votes.names))
    pairs = torch.bincount(votes.annotator[row], minlength=len(votes.names))
    return total / pairs.clamp(min=1).unsqueeze(-1)


def _simplex(gamma: object, types: int) -> bool:
    if not isinstance(gamma, list) or len(gamma) != types:
        return False
    numbers = [value for value in gamma if isinstance(value, int | float) and value >= 0]
    return len(numbers) == types and abs(sum(numbers) - 1) < 1e-4
