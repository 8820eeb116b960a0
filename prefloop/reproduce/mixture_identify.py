"""What anonymous judgements tell of hidden types: exact probabilities, Jacobians, exact fits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.em import Identifiability, local_identifiability
from prefloop.reproduce.mixture_items import (
    KINDS,
    Kind,
    outcome_loglik,
    pairs,
    reward_error,
    row_losses,
)

Observed = Callable[[Tensor, Tensor], Tensor]
"""(rewards (*G, K, Y), shares (*G, K)) -> probabilities of all that can be observed (*G, O)."""


def one_answer(kind: Kind) -> Observed:
    """One judgement an annotator: probabilities of every answer to every question."""

    def observe(reward: Tensor, shares: Tensor) -> Tensor:
        return (shares.unsqueeze(-1) * outcome_loglik(kind, reward).exp()).sum(-2)

    return observe


def two_answers(items: int) -> Observed:
    """Two different pairs judged by the same annotator: joint probabilities of both answers."""
    kind = pairs(items)
    first, second = zip(
        *(
            (a, b)
            for a, b in combinations(range(len(kind.sets)), 2)
            if kind.sets[a] != kind.sets[b]
        ),
        strict=True,
    )

    def observe(reward: Tensor, shares: Tensor) -> Tensor:
        loglik = outcome_loglik(kind, reward)
        both = loglik[..., list(first)] + loglik[..., list(second)]
        return (shares.unsqueeze(-1) * both.exp()).sum(-2)

    return observe


def observables(items: int) -> Mapping[str, Observed]:
    """Kinds of data, by name."""
    single = {name: one_answer(make(items)) for name, make in KINDS.items()}
    return {**single, "two pairs by one annotator": two_answers(items)}


def unpack(parameters: Float[Tensor, "*G D"], items: int) -> tuple[Tensor, Tensor]:
    """2 (n - 1) reward differences and the first type's share, as rewards and shares."""
    free = parameters[..., :-1].unflatten(-1, (2, items - 1))
    reward = torch.cat([torch.zeros_like(free[..., :1]), free], -1)
    share = parameters[..., -1:]
    return reward, torch.cat([share, 1 - share], -1)


def random_types(items: int, symmetric: bool, seed: int) -> Float[Tensor, " D"]:
    """Parameters of two random types: opposite and equally common, or anything."""
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((2, items)) * 1.3
    second = -first if symmetric else second
    share = 0.5 if symmetric else rng.dirichlet([5.0, 5.0])[0]
    return torch.from_numpy(np.r_[first[1:] - first[0], second[1:] - second[0], share])


def jacobian_rank(
    observe: Observed, items: int, parameters: Float[Tensor, " D"]
) -> Identifiability:
    """Local identifiability of two types over n items from one kind of data."""
    return local_identifiability(lambda point: observe(*unpack(point, items)), parameters, 1e-9)


@dataclass(frozen=True)
class PopulationFits:
    """Least-squares fits of exact probabilities from random starts.

    Attributes:
        divergence: KL(truth || fit) a question, for each start.
        error: largest error of a centered reward, under the best naming.
    """

    divergence: Float[Tensor, " G"]
    error: Float[Tensor, " G"]

    @property
    def exact(self) -> Float[Tensor, " E"]:
        """Errors of the fits that no amount of such data can tell from the truth."""
        return self.error[self.divergence < 1e-8]


def population_fits(
    kind: Kind,
    truth: Float[Tensor, "2 Y"],
    shares: Float[Tensor, " 2"],
    starts: int,
    seed: int,
    steps: int = 300,
) -> PopulationFits:
    """Fit two types to the exact answer probabilities, from many random starts at once.

    Levenberg-Marquardt on (Q - P) / sqrt(P), whose square is KL to second order.
    """
    items = truth.shape[-1]
    target = one_answer(kind)(truth, shares)
    rng = torch.Generator().manual_seed(seed)
    point = torch.randn((starts, 2 * items - 1), generator=rng, dtype=torch.float64)
    damping = torch.full((starts,), 1e-2, dtype=torch.float64)
    value, slope = _probabilities(kind, point, items)
    for _ in range(steps):
        residual = (value - target) / target.sqrt()
        jacobian = slope / target.sqrt().unsqueeze(-1)  # (G, O, D)
        square = jacobian.mT @ jacobian
        eye = torch.eye(square.shape[-1], dtype=square.dtype)
        damped = square + damping[:, None, None] * (
            eye + torch.diag_embed(square.diagonal(dim1=-2, dim2=-1))
        )
        move = torch.linalg.solve(damped, (jacobian.mT @ residual.unsqueeze(-1)).squeeze(-1))
        tried, tried_slope = _probabilities(kind, point - move, items)
        before, after = residual.square().sum(-1), ((tried - target).square() / target).sum(-1)
        better = after < before
        point = torch.where(better.unsqueeze(-1), point - move, point)
        value = torch.where(better.unsqueeze(-1), tried, value)
        slope = torch.where(better[:, None, None], tried_slope, slope)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-15, 1e6)
    sets = int(kind.sets.max()) + 1
    divergence = (target * (target.log() - value.log())).sum(-1) / sets
    reward, _ = unpack(point, items)
    return PopulationFits(divergence, reward_error(truth, reward).amax((-1, -2)))


def _probabilities(kind: Kind, point: Float[Tensor, "G D"], items: int) -> tuple[Tensor, Tensor]:
    """Answer probabilities (G, O) and their derivatives (G, O, D) in reward differences and logit.

    An answer's loss reads only its own row of rewards, so one backward pass through the objective
    gives the derivatives of all of them.
    """
    share = point[:, -1].sigmoid()
    reward, shares = unpack(torch.cat([point[:, :-1], share.unsqueeze(-1)], -1), items)
    spread = reward.unsqueeze(-2).repeat(1, 1, len(kind.sets), 1).requires_grad_()  # (G, K, O, Y)
    picked = spread.gather(-1, kind.responses.expand(*spread.shape[:-1], -1))
    loglik = _row_loglik(kind, picked)
    (slope,) = torch.autograd.grad(loglik.sum(), spread)
    each = shares.unsqueeze(-1) * loglik.detach().exp()  # (G, K, O)
    by_reward = (each.unsqueeze(-1) * slope)[..., 1:]  # (G, K, O, Y - 1)
    by_share = (loglik.detach().exp()[:, 0] - loglik.detach().exp()[:, 1]) * (share * (1 - share))[
        :, None
    ]
    parts = [by_reward[:, 0], by_reward[:, 1], by_share.unsqueeze(-1)]
    return each.sum(-2), torch.cat(parts, -1)


def _row_loglik(kind: Kind, picked: Float[Tensor, "G K O N"]) -> Float[Tensor, "G K O"]:
    return -row_losses(kind, picked.flatten(0, -2)).reshape(picked.shape[:-1])


def choice_probabilities(
    kind: Kind, features: Float[Tensor, "*G Y D"], taste: Float[Tensor, " D"]
) -> Float[Tensor, "*G O"]:
    """Answers of a population of which half likes b . x and half -b . x."""
    reward = features @ taste
    both = torch.stack([reward, -reward], -2)
    return outcome_loglik(kind, both).exp().mean(-2)
