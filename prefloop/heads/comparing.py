"""Heads on votes that were held out: likelihood, BIC, and whether seeds find the same types.

Prompts are dealt into folds, so that a held-out vote is about answers that no vote of the training
part was about; or questions, so that the pair is new but its answers may be known from others. Each
annotator's other votes say of which type they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefloop import em
from prefloop.heads.descent import GeneralPreference, PrototypeMixture
from prefloop.heads.linear import FittedTypes, LinearTypes
from prefloop.heads.votes import PairVotes, Predictor
from prefloop.intervals import Estimate, mean
from prefloop.types import UserError

ENOUGH = 5
"""Votes from which on an annotator's type is compared between seeds."""

Head = Callable[[PairVotes, int], Predictor]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """How well a head predicts votes that it was not fitted to.

    Attributes:
        loglik: log-likelihood of a held-out vote, in nats; -log 2 is a coin. Mean over seeds;
            the interval is over annotators.
        accuracy: share of held-out votes that were the likelier ones.
        seeds: log-likelihood of a held-out vote with each seed.
        gain: log-likelihood of a held-out vote less that of the first head, with its interval.
        parameters: numbers fitted.
        bic: parameters log(votes) - 2 log-likelihood of all votes, fitted to all; the head of the
            lowest is what BIC takes.
    """

    loglik: Estimate
    accuracy: Estimate
    seeds: tuple[float, ...]
    gain: Estimate
    parameters: int
    bic: float

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Compared":
        """What `dataclasses.asdict` made of one, by way of JSON."""
        estimates = {name: Estimate(**told[name]) for name in ("loglik", "accuracy", "gain")}
        numbers = {"parameters": told["parameters"], "bic": told["bic"]}
        return cls(seeds=tuple(told["seeds"]), **estimates, **numbers)

    def __str__(self) -> str:
        return (
            f"{self.loglik.value:8.4f} nats a held-out vote [{self.loglik.low:.4f}, "
            f"{self.loglik.high:.4f}], gain {self.gain.value:+.4f} [{self.gain.low:+.4f}, "
            f"{self.gain.high:+.4f}], accuracy {self.accuracy.value:.4f}, "
            f"{self.parameters:,} parameters, BIC {self.bic:,.0f}"
        )


@dataclass(frozen=True, kw_only=True)
class Told:
    """What K types that were fitted to all votes look like.

    Attributes:
        stability: mean adjusted Rand index of the types of two seeds, over annotators with
            `ENOUGH` votes; 1 is the same types, 0 chance. None with one seed.
        shares: of each type among the annotators.
        longer_won: share of each type's votes that went to the longer answer.
        length_weight: of the log of the length, in spreads.
        sharpness: length of each type's weights: 0 votes by coin.
        votes: expected votes of each type.
        gamma: responsibilities of the best fit.
    """

    stability: float | None
    shares: list[float]
    longer_won: list[float]
    length_weight: list[float]
    sharpness: list[float]
    votes: list[float]
    gamma: Float[Tensor, "I K"]


@dataclass(frozen=True, kw_only=True)
class Folds:
    """How votes are held out.

    Attributes:
        count: parts; each is held out once.
        by: what is dealt into the parts: "prompt", or "pair" of answers.
    """

    count: int = 4
    by: Literal["prompt", "pair"] = "prompt"

    def __call__(self, votes: PairVotes, seed: int) -> Int[Tensor, " P"]:
        """The fold of each vote; votes on the same thing share one."""
        thing = votes.prompt if self.by == "prompt" else votes.question
        things = int(thing.max()) + 1
        if not 2 <= self.count <= things:
            raise UserError(
                f"--folds must be 2 to {things}, the different {self.by}s of the votes, got "
                f"{self.count}; with few prompts hold out pairs, --hold-out pair"
            )
        rng = torch.Generator().manual_seed(seed)
        fold = torch.empty(things, dtype=torch.long)
        fold[torch.randperm(things, generator=rng)] = torch.arange(things) % self.count
        return fold[thing]


def line_up(types: int, restarts: int, crossfit: bool) -> dict[str, Head]:
    """The heads of `prefloop heads`: linear types and PAL, 1 to `types` of each, and GPM."""
    counts = range(1, types + 1)
    linear = {
        f"LinearTypes {k}": LinearTypes(types=k, restarts=restarts, crossfit=crossfit)
        for k in counts
    }
    prototypes = {f"PAL {k}": PrototypeMixture(types=k) for k in counts}
    return {**linear, **prototypes, "GPM": GeneralPreference()}


def compare(
    heads: Mapping[str, Head],
    votes: PairVotes,
    folds: Folds,
    seeds: Sequence[int],
    known: Mapping[str, Compared] = MappingProxyType({}),
    on_found: Callable[[str, Compared], None] = lambda name, one: None,
) -> dict[str, Compared]:
    """Cross-validated likelihood of each head; gains are over the first of `heads`.

    Args:
        heads: name -> head.
        votes: all of them.
        folds: how they are held out.
        seeds: of the folds and of the heads.
        known: what an earlier call found, but for the first head, which is always fitted: the
            gains of the others need its votes one by one.
        on_found: told of each head when it is done.
    """
    found: dict[str, Compared] = {}
    first = None
    for name, head in heads.items():
        if name in known and first is not None:
            found[name] = known[name]
            continue
        chances = torch.stack([held_out(head, votes, folds, seed) for seed in seeds])
        first = chances.log() if first is None else first
        found[name] = _compared(head(votes, seeds[0]), votes, chances, first)
        on_found(name, found[name])
    return found


def held_out(head: Head, votes: PairVotes, folds: Folds, seed: int) -> Float[Tensor, " P"]:
    """Probability of each vote by the head that was fitted without the vote's fold."""
    fold = folds(votes, seed)
    chance = torch.empty(len(votes), dtype=torch.float64)
    for number in range(folds.count):
        fitted = head(votes.where(fold != number), seed)
        chance[fold == number] = fitted.probability(votes.where(fold == number)).double()
    return chance.clamp(min=1e-12)


def _compared(fitted: Predictor, votes: PairVotes, chances: Tensor, first: Tensor) -> Compared:
    """What the held-out `chances` (seeds, P) of a head come to; `fitted` saw all votes."""
    loglik = chances.log()
    correct = (chances > 0.5).double() + (chances == 0.5).double() / 2
    everything = float(fitted.probability(votes).log().sum())
    if isinstance(fitted, FittedTypes):
        everything = fitted.loglik  # over who is of which type
    return Compared(
        loglik=mean(loglik.mean(0), votes.annotator),
        accuracy=mean(correct.mean(0), votes.annotator),
        seeds=tuple(loglik.mean(-1).tolist()),
        gain=mean((loglik - first).mean(0), votes.annotator),
        parameters=fitted.parameters,
        bic=fitted.parameters * log(len(votes)) - 2 * everything,
    )


def told(votes: PairVotes, fits: Sequence[FittedTypes]) -> Told:
    """What types fitted to all `votes`, one fit a seed, look like."""
    best = max(fits, key=lambda one: one.penalized)
    count = torch.bincount(votes.annotator, minlength=len(votes.names))
    known = count >= min(ENOUGH, int(count.max()))
    labels = [one.gamma[known].argmax(-1) for one in fits]
    agreed = [em.adjusted_rand_index(a, b) for a, b in combinations(labels, 2)]
    belonging = best.gamma[votes.annotator]  # (P, K)
    mass = belonging.sum(0)
    longer = (belonging * votes.longer_won.double().unsqueeze(-1)).sum(0) / mass.clamp(min=1e-9)
    return Told(
        stability=sum(agreed) / len(agreed) if agreed else None,
        shares=em.type_shares(best.gamma).tolist(),
        longer_won=longer.tolist(),
        length_weight=best.weights[:, -1].tolist(),
        sharpness=best.weights.norm(dim=-1).tolist(),
        votes=mass.tolist(),
        gamma=best.gamma,
    )
