"""Votes on pairs as numbers: features of the answers, who preferred which, asked what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefloop.types import Comparison, UserError


@dataclass(frozen=True, eq=False)
class PairVotes:
    """Who preferred which of two answers.

    Attributes:
        features: of each of A different answers; the last column is the log of the length.
        better, worse: index into `features` of the two answers of each vote.
        annotator: index into `names` of who voted.
        prompt: the same number where the answers were to the same prompt.
        names: the annotators, in order of first appearance.
    """

    features: Float[Tensor, "A D"]
    better: Int[Tensor, " P"]
    worse: Int[Tensor, " P"]
    annotator: Int[Tensor, " P"]
    prompt: Int[Tensor, " P"]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.better)

    @property
    def question(self) -> Int[Tensor, " P"]:
        """The same number where the same two answers to the same prompt were shown."""
        low = torch.minimum(self.better, self.worse)
        asked = torch.stack([self.prompt, low, self.better + self.worse - low], -1)
        return asked.unique(dim=0, return_inverse=True)[1]

    @property
    def direction(self) -> Float[Tensor, "P D"]:
        """Features of the better answer less those of the worse."""
        return self.features[self.better] - self.features[self.worse]

    @property
    def longer_won(self) -> Float[Tensor, " P"]:
        """1 where the longer answer was preferred, 0 where the shorter, 1/2 at equal length."""
        return (self.direction[:, -1].sign() + 1) / 2

    def at(self, places: Int[Tensor, " Q"]) -> "PairVotes":
        """The votes at `places`; annotators and answers keep their numbers."""
        return PairVotes(
            self.features,
            self.better[places],
            self.worse[places],
            self.annotator[places],
            self.prompt[places],
            self.names,
        )

    def where(self, kept: Bool[Tensor, " P"]) -> "PairVotes":
        """The votes where `kept` is True."""
        return self.at(kept.nonzero().flatten())


@runtime_checkable
class Predictor(Protocol):
    """A fitted head."""

    @property
    def parameters(self) -> int:
        """How many numbers were fitted."""
        ...

    def probability(self, votes: PairVotes) -> Float[Tensor, " P"]:
        """Probability that each annotator prefers the answer that they did prefer."""
        ...


def pair_votes(
    rows: Sequence[Comparison], features: Callable[[Sequence[str]], Tensor]
) -> PairVotes:
    """Every strictly ordered pair of every judgement, and features of the answers.

    Args:
        rows: comparisons that all name an annotator; ties and answers nobody judged are left out.
        features: texts -> (A, D); called once, with all different answers.

    Raises:
        UserError: nobody prefers anything.
    """
    texts: dict[str, int] = {}
    names: dict[str | None, int] = {}
    prompts: dict[str, int] = {}
    found: list[tuple[int, int, int, int]] = []
    for row in rows:
        who = names.setdefault(row.annotator, len(names))
        for first, second in permutations(range(len(row.responses)), 2):
            if not _above(row, first, second):
                continue
            better, worse = (
                texts.setdefault(row.responses[place], len(texts)) for place in (first, second)
            )
            asked = prompts.setdefault(str(row.prompt), len(prompts))
            found.append((better, worse, who, asked))
    if not found:
        raise UserError(
            f"none of {len(rows)} rows puts one response before another; ranks are needed"
        )
    better, worse, annotator, prompt = torch.tensor(found).unbind(-1)
    return PairVotes(
        features=features(list(texts)),
        better=better,
        worse=worse,
        annotator=annotator,
        prompt=prompt,
        names=tuple(str(name) for name in names),
    )


def _above(row: Comparison, first: int, second: int) -> bool:
    ranks = row.rank or (None,) * len(row.responses)
    high, low = ranks[first], ranks[second]
    return high is not None and low is not None and high < low
