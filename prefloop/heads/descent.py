"""Heads trained by gradient descent: PAL's prototypes, and general preference embeddings."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from prefloop.heads.votes import PairVotes
from prefloop.objectives import skew_score
from prefloop.types import UserError

BATCH = 512
"""Votes an optimizer step."""


@dataclass(frozen=True, kw_only=True)
class Descent:
    """AdamW over all votes in random order, the learning rate falling to 0 along a cosine.

    Attributes:
        epochs: passes over the votes.
        lr: peak learning rate.
        weight_decay: decoupled.
    """

    epochs: int = 10
    lr: float = 3e-3
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("epochs", "lr"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")


class Module(nn.Module):
    """What both heads are to `trained`: the log-odds of votes, and a penalty on them."""

    def log_odds(self, votes: PairVotes) -> Float[Tensor, " P"]:
        """Log-odds that each annotator prefers the answer that they did prefer."""
        raise AssertionError("every head says its own")

    def penalty(self) -> Float[Tensor, ""]:
        """Nats to add to the loss of all votes."""
        return torch.zeros(())


@dataclass(frozen=True, eq=False)
class Trained:
    """A head after descent; see `Predictor`."""

    module: Module

    @property
    def parameters(self) -> int:
        """Every number that was trained, those of annotators too."""
        return sum(value.numel() for value in self.module.parameters())

    @torch.no_grad()
    def probability(self, votes: PairVotes) -> Float[Tensor, " P"]:
        """sigmoid of the log-odds."""
        return self.module.log_odds(votes).sigmoid()


def trained(make: Callable[[], Module], votes: PairVotes, descent: Descent, seed: int) -> Trained:
    """Minimise the mean of -log sigmoid(log-odds) plus the penalty a vote."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # modules draw their first weights from the global generator
        module = make()
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=descent.lr, weight_decay=descent.weight_decay, fused=True
    )
    steps = descent.epochs * -(-len(votes) // BATCH)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(descent.epochs):
        order = torch.randperm(len(votes), generator=rng)
        for places in order.split(BATCH):
            loss = -logsigmoid(module.log_odds(votes.at(places))).mean()
            loss = loss + module.penalty() / len(votes)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            falling.step()
    return Trained(module.eval())


@dataclass(frozen=True, kw_only=True)
class PrototypeMixture:
    """PAL: every annotator's ideal point is a mixture of K shared prototypes.

        a_i = sum_k softmax(c_i)_k p_k,   log-odds = |f(worse) - a_i| - |f(better) - a_i|

    Model A of the paper: one ideal point an annotator, whatever the prompt; logistic loss. The
    distance is not squared, as in the authors' code. f is a perceptron of one hidden layer.

    Attributes:
        types: K, prototypes.
        hidden: width of the hidden layer of f.
        out: dimensions of the space of ideal points.
        spread: of the normal prior on each number of c_i, which keeps those who voted little near
            the average; ours, in place of the code's weights by 1 / votes.
        descent: how it is trained.

    References:
        Chen et al. 2024, "PAL: Pluralistic Alignment Framework for Learning from Heterogeneous
        Preferences", arXiv 2406.08469, after the authors' public code.
    """

    types: int = 2
    hidden: int = 64
    out: int = 32
    spread: float = 1.0
    descent: Descent = Descent()

    def __post_init__(self) -> None:
        for name in ("types", "hidden", "out"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.spread <= 0:
            raise UserError(f"spread must be positive, got {self.spread}")

    def __call__(self, votes: PairVotes, seed: int) -> Trained:
        """Fit to `votes`."""
        return trained(lambda: _Prototypes(self, votes), votes, self.descent, seed)


class _Prototypes(Module):
    def __init__(self, head: PrototypeMixture, votes: PairVotes) -> None:
        super().__init__()
        self.spread = head.spread
        self.project = _perceptron(votes.features.shape[-1], head.hidden, head.out)
        self.prototypes = nn.Parameter(torch.randn(head.types, head.out))
        # One prototype mixes to itself, whatever the coefficient.
        self.mix = nn.Parameter(torch.zeros(len(votes.names), head.types))

    def log_odds(self, votes: PairVotes) -> Float[Tensor, " P"]:
        ideal = self.mix[votes.annotator].softmax(-1) @ self.prototypes  # (P, out)
        better, worse = (
            _distance(self.project(votes.features[side].float()), ideal)
            for side in (votes.better, votes.worse)
        )
        return worse - better

    def penalty(self) -> Float[Tensor, ""]:
        return self.mix.square().sum() / (2 * self.spread**2)


@dataclass(frozen=True, kw_only=True)
class GeneralPreference:
    """GPM: one population, whose preferences need not come from a reward and may run in circles.

        log-odds = S(v(better) over v(worse)) / tau,   S as in `objectives.skew_score`

    v is a perceptron of one hidden layer; its outputs are not normalised to length 1.

    Attributes:
        blocks: pairs of dimensions of the embedding.
        hidden: width of the hidden layer of v.
        tau: temperature, in units of the score.
        descent: how it is trained.

    References:
        Zhang et al. 2024, arXiv 2410.02197; as in the authors' code.
    """

    blocks: int = 4
    hidden: int = 64
    tau: float = 0.1
    descent: Descent = Descent()

    def __post_init__(self) -> None:
        for name in ("blocks", "hidden"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tau <= 0:
            raise UserError(f"tau must be positive, got {self.tau}")

    def __call__(self, votes: PairVotes, seed: int) -> Trained:
        """Fit to `votes`; who voted is not read."""
        return trained(lambda: _General(self, votes), votes, self.descent, seed)


class _General(Module):
    def __init__(self, head: GeneralPreference, votes: PairVotes) -> None:
        super().__init__()
        self.tau = head.tau
        self.embed = _perceptron(votes.features.shape[-1], head.hidden, 2 * head.blocks)

    def log_odds(self, votes: PairVotes) -> Float[Tensor, " P"]:
        better, worse = (
            self.embed(votes.features[side].float()) for side in (votes.better, votes.worse)
        )
        return skew_score(better, worse) / self.tau


def _perceptron(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


def _distance(first: Float[Tensor, "P D"], second: Float[Tensor, "P D"]) -> Float[Tensor, " P"]:
    """Euclidean; a length of 0 has no gradient, so a little is added."""
    return ((first - second).square().sum(-1) + 1e-8).sqrt()
