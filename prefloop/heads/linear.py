"""Types of annotators as linear rewards on features: EM whose M-steps are solved, not descended.

P(i prefers y to z) = sum_k gamma_ik sigmoid(w_k . (phi(y) - phi(z)))
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop import em
from prefloop.heads.votes import PairVotes
from prefloop.types import UserError


class FittedTypes(NamedTuple):
    """Types that were found.

    Attributes:
        weights: w_k of each type, per spread of a feature.
        gamma: responsibilities.
        loglik: observed log-likelihood of the votes it was fitted to, in nats.
        penalized: the same less the ridge penalty; what restarts are compared by.
    """

    weights: Float[Tensor, "K D"]
    gamma: Float[Tensor, "I K"]
    loglik: float
    penalized: float

    @property
    def parameters(self) -> int:
        """Weights of every type, and the shares."""
        return self.weights.numel() + len(self.weights) - 1

    def probability(self, votes: PairVotes) -> Float[Tensor, " P"]:
        """sum_k gamma_ik sigmoid(w_k . direction); see `Predictor`."""
        margin = votes.direction.double() @ self.weights.mT
        return (self.gamma[votes.annotator] * margin.sigmoid()).sum(-1)


@dataclass(frozen=True, kw_only=True)
class LinearTypes:
    """K linear rewards; one type is Bradley-Terry logistic regression.

    Attributes:
        types: K.
        ridge: penalty ridge / 2 sum of squares of each type's weights, in nats.
        rounds: of EM; it stops before, once the penalised likelihood moves by less than 1e-6 a
            vote.
        restarts: starts by k-means with seeds of their own; the best penalised likelihood is kept.
        crossfit: score in each round the half of each annotator's votes that was not fitted. The
            last round fits and scores all.
    """

    types: int = 2
    ridge: float = 1.0
    rounds: int = 30
    restarts: int = 2
    crossfit: bool = False

    def __post_init__(self) -> None:
        for name in ("types", "rounds", "restarts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.ridge <= 0:
            raise UserError(f"ridge must be positive, got {self.ridge}; without it weights diverge")

    def __call__(self, votes: PairVotes, seed: int) -> FittedTypes:
        """Fit to `votes`; the best of `restarts` starts."""
        if self.types == 1:
            return self.once(votes, seed)
        found = [self.once(votes, seed * self.restarts + n) for n in range(self.restarts)]
        return max(found, key=lambda one: one.penalized)

    def once(self, votes: PairVotes, seed: int) -> FittedTypes:
        """EM from one k-means start."""
        fitting = _Fitting(self, votes, seed)
        history = []
        for done in em.rounds(fitting.fit, self._start(votes, seed), self.rounds):
            history.append(fitting.found(done))
            if len(history) > 1 and _still(history[-2], history[-1], len(votes)):
                break
        if not self.crossfit:
            return history[-1]
        everything = _Fitting(replace(self, crossfit=False), votes, seed)
        return everything.found(next(em.rounds(everything.fit, history[-1].gamma, 1)))

    def _start(self, votes: PairVotes, seed: int) -> Tensor:
        voted = em.vote_features(votes.direction, votes.annotator, len(votes.names))
        count = torch.bincount(votes.annotator, minlength=len(votes.names)).clamp(min=1)
        # A sum over sqrt(n) keeps the noise of everybody alike: rare voters do not stand out.
        return em.given_start(
            em.kmeans(voted / count.sqrt().unsqueeze(-1), self.types, seed, restarts=5), self.types
        )


@dataclass
class _Fitting:
    """M-steps that go on from the weights of the round before."""

    head: LinearTypes
    votes: PairVotes
    seed: int

    def __post_init__(self) -> None:
        self.direction = self.votes.direction.double()
        self.weights = torch.zeros(self.head.types, self.direction.shape[-1], dtype=torch.float64)
        self.half = em.halves(self.votes.annotator, self.seed)

    def fit(self, gamma: Tensor, number: int) -> Float[Tensor, "I K"]:
        """Maximise each type's penalised likelihood; the log-likelihoods that follow."""
        belonging = gamma[self.votes.annotator]
        fitted = scored = torch.ones(len(self.votes), dtype=torch.bool)
        if self.head.crossfit:
            fitted, scored = (self.half, ~self.half) if number % 2 else (~self.half, self.half)
        rows = self.direction[fitted]
        for index in range(self.head.types):
            weight = belonging[fitted, index]
            self.weights[index] = maximum(rows, weight, self.head.ridge, self.weights[index])
        loglik = logsigmoid(self.direction @ self.weights.mT) * scored.unsqueeze(-1)
        return em.by_annotator(loglik, self.votes.annotator, len(self.votes.names))

    def found(self, done: em.Round) -> FittedTypes:
        """What this round came to."""
        loglik = done.belief.evidence.sum()
        penalty = self.head.ridge / 2 * self.weights.square().sum()
        return FittedTypes(
            weights=self.weights.clone(),
            gamma=done.belief.responsibilities,
            loglik=float(loglik),
            penalized=float(em.penalized_loglik(done.belief.evidence, penalty)),
        )


def maximum(
    direction: Float[Tensor, "P D"],
    weight: Float[Tensor, " P"],
    ridge: float,
    start: Float[Tensor, " D"],
    steps: int = 50,
) -> Float[Tensor, " D"]:
    """Weights of the highest penalised likelihood, by Newton's method with halved steps.

    argmax over w of  sum_j weight_j log sigmoid(w . direction_j) - ridge / 2 |w|^2
    """
    point, kept = start.clone(), weight > 1e-6
    rows, weight = direction[kept], weight[kept]

    def value(at: Tensor) -> Tensor:
        return (weight * logsigmoid(rows @ at)).sum() - ridge / 2 * at.square().sum()

    best = value(point)
    for _ in range(steps):
        chance = (rows @ point).sigmoid()
        slope = rows.mT @ (weight * (1 - chance)) - ridge * point
        bend = (rows * (weight * chance * (1 - chance)).unsqueeze(-1)).mT @ rows
        move = torch.linalg.solve(bend + ridge * torch.eye(len(point), dtype=point.dtype), slope)
        reached = value(point + move)
        while reached < best and move.abs().max() > 1e-10:
            move = move / 2
            reached = value(point + move)
        if not reached > best:
            break
        gained, best, point = float(reached - best), reached, point + move
        if gained < 1e-8 * len(rows):
            break
    return point


def _still(before: FittedTypes, after: FittedTypes, votes: int) -> bool:
    return abs(after.penalized - before.penalized) < 1e-6 * votes
