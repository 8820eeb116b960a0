"""DPO-PG in our working version, against DPO: single steps, and runs on clustered responses."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefloop import did
from prefloop.objectives import DPO
from prefloop.objectives.family import PairLoss
from prefloop.tabular import as_logps, kl, log_linear, random_logp
from prefloop.types import Pair

MODES = ("DPO", "DPO-PG per pair", "DPO-PG per batch")


class Steps(NamedTuple):
    """Small steps on single pairs: how many lowered what."""

    pairs: int
    projected_lowers_chosen: int
    projected_lowers_margin: int
    plain_lowers_chosen: int


class Path(NamedTuple):
    """What happened along training, recorded on a grid of steps; each (records, modes, seeds).

    `moved` is KL(pi || pi_ref); `chosen` and `rejected` are mean changes of the log-likelihood of
    the batch at hand.
    """

    moved: Float[Tensor, "S M R"]
    entropy: Float[Tensor, "S M R"]
    chosen: Float[Tensor, "S M R"]
    rejected: Float[Tensor, "S M R"]


class World(NamedTuple):
    """Clustered responses of a long-tailed reference, and a reward linear in their features."""

    features: Float[Tensor, "R Y D"]
    reference: Float[Tensor, "R Y"]
    reward: Float[Tensor, "R Y"]


def loss_slopes(
    objective: PairLoss,
    policy: tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]],
    reference: tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]],
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """d loss / d log pi of the chosen and of the rejected response of each pair."""
    sides = [logp.detach().flatten().requires_grad_() for logp in policy]
    base = Pair(*(as_logps(logp.flatten()) for logp in reference))
    losses = objective(Pair(*(as_logps(side) for side in sides)), base)
    chosen, rejected = torch.autograd.grad(losses.sum(), sides)
    return chosen.reshape(policy[0].shape), rejected.reshape(policy[0].shape)


def single_pair_steps(rng: torch.Generator, each: int = 500) -> Steps:
    """One small step on one pair from the reference; half of the pairs have alike features."""
    counts, sizes = torch.zeros(3, dtype=torch.long), (3, 6, 10, 16, 25, 39)
    for size in sizes:
        features, base = _pairs_at_zero_and_one(rng, each, size)
        sides = (base[:, 0], base[:, 1])
        slopes = loss_slopes(DPO(beta=0.1), sides, sides)
        score = features[:, :2] - (base.exp().unsqueeze(-1) * features).sum(-2, keepdim=True)
        toward = -slopes[0].unsqueeze(-1) * score[:, 0]
        away = -slopes[1].unsqueeze(-1) * score[:, 1]
        projected = _change(features, base, did.project_out_conflict(toward, away))
        plain = _change(features, base, toward + away)
        counts += torch.stack(
            [
                (projected[:, 0] < -1e-13).sum(),
                (projected[:, 0] - projected[:, 1] < -1e-13).sum(),
                (plain[:, 0] < -1e-13).sum(),
            ]
        )
    return Steps(each * len(sizes), *counts.tolist())


def _pairs_at_zero_and_one(
    rng: torch.Generator, each: int, size: int
) -> tuple[Float[Tensor, "R Y D"], Float[Tensor, "R Y"]]:
    """Features of up to 9 dimensions; in the first half response 1 resembles response 0."""
    used = torch.arange(9) < torch.randint(2, 10, (each, 1, 1), generator=rng)
    features = torch.randn((each, size, 9), generator=rng, dtype=torch.float64) * used
    noise = torch.randn((each, 9), generator=rng, dtype=torch.float64) * used[:, 0]
    scale = 0.3 + 2.7 * torch.rand((each, 1), generator=rng, dtype=torch.float64)
    half = each // 2
    features[:half, 1] = (features[:, 0] * scale + 0.3 * noise)[:half]
    return features, random_logp((each, size), rng)


def _change(
    features: Float[Tensor, "R Y D"], base: Float[Tensor, "R Y"], direction: Float[Tensor, "R D"]
) -> Float[Tensor, "R Y"]:
    """Change of log pi after a small step along a direction."""
    unit = direction / direction.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    return (base + log_linear(features, 1e-6 * unit)).log_softmax(-1) - base


def clustered_world(rng: torch.Generator, seeds: int, responses: int = 1000) -> World:
    """50 clusters in 24 dimensions; the reference prefers low-numbered clusters, Zipf-like."""

    def normal(*shape: int) -> Tensor:
        return torch.randn((seeds, *shape), generator=rng, dtype=torch.float64)

    cluster = torch.randint(0, 50, (seeds, responses), generator=rng)
    centers = normal(50, 24)
    own = centers.gather(1, cluster.unsqueeze(-1).expand(-1, -1, 24))
    features = (1.5 * own + normal(responses, 24)) / math.sqrt(24)
    reference = (-1.2 * (1 + cluster).double().log() + 0.5 * normal(responses)).log_softmax(-1)
    reward = 2 * log_linear(features, normal(24))
    return World(features, reference, reward)


def train(
    rng: torch.Generator, world: World, steps: int = 1500, batch: int = 32, rate: float = 0.2
) -> Path:
    """Train all of `MODES` on the same Bradley-Terry pairs of the reference, step by step.

    Plain gradient ascent on log-linear policies, beta 0.1.
    """
    seeds, _, dimensions = world.features.shape
    weight = torch.zeros((len(MODES), seeds, dimensions), dtype=torch.float64)
    records = []
    for step in range(steps):
        logp = torch.einsum("ryd,mrd->mry", world.features, weight)
        logp = (world.reference + logp).log_softmax(-1)
        pair = _labelled_pair(rng, world, batch)
        if step % 20 == 0:
            records.append(_record(world, logp, pair))
        weight = weight + rate * _directions(world, logp, pair)
    return Path(*(torch.stack(column) for column in zip(*records, strict=True)))


def _labelled_pair(
    rng: torch.Generator, world: World, batch: int
) -> tuple[Int[Tensor, "R C"], Int[Tensor, "R C"]]:
    drawn = torch.multinomial(world.reference.exp(), 2 * batch, replacement=True, generator=rng)
    first, second = drawn.tensor_split(2, dim=-1)
    gap = world.reward.gather(-1, first) - world.reward.gather(-1, second)
    wins = torch.rand(gap.shape, generator=rng, dtype=gap.dtype) < gap.sigmoid()
    return torch.where(wins, first, second), torch.where(wins, second, first)


def _directions(
    world: World,
    logp: Float[Tensor, "M R Y"],
    pair: tuple[Int[Tensor, "R C"], Int[Tensor, "R C"]],
) -> Float[Tensor, "M R D"]:
    """The ascent direction of each mode: DPO, projected a pair, projected once for the batch."""
    sides = [_at(logp, index) for index in pair]
    bases = [world.reference.gather(-1, index).expand_as(sides[0]) for index in pair]
    slopes = loss_slopes(DPO(beta=0.1), (sides[0], sides[1]), (bases[0], bases[1]))
    mean = torch.einsum("mry,ryd->mrd", logp.exp(), world.features).unsqueeze(-2)
    toward, away = (
        -slope.unsqueeze(-1) * (_features_at(world, index) - mean)
        for slope, index in zip(slopes, pair, strict=True)
    )
    return torch.stack(
        [
            (toward[0] + away[0]).mean(-2),
            did.project_out_conflict(toward[1], away[1]).mean(-2),
            did.project_out_conflict(toward[2].mean(-2), away[2].mean(-2)),
        ]
    )


def _record(
    world: World,
    logp: Float[Tensor, "M R Y"],
    pair: tuple[Int[Tensor, "R C"], Int[Tensor, "R C"]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    change = logp - world.reference
    chosen, rejected = (_at(change, index).mean(-1) for index in pair)
    moved = kl(logp, world.reference.expand_as(logp))
    return moved, did.did_entropy(change), chosen, rejected


def _at(table: Float[Tensor, "M R Y"], index: Int[Tensor, "R C"]) -> Float[Tensor, "M R C"]:
    return table.gather(-1, index.expand(len(table), -1, -1))


def _features_at(world: World, index: Int[Tensor, "R C"]) -> Float[Tensor, "R C D"]:
    place = index.unsqueeze(-1).expand(-1, -1, world.features.shape[-1])
    return world.features.gather(1, place)


def entropy_at_equal_size(path: Path, divergence: float) -> Float[Tensor, "M R"]:
    """DID entropy where KL(pi || pi_ref) first reaches a value, interpolated; NaN if never."""
    reached = path.moved.cummax(0).values
    after = (reached < divergence).sum(0)  # (M, R): first record at or beyond
    inside = (after > 0) & (after < len(reached))
    high = after.clamp(1, len(reached) - 1).unsqueeze(0)
    low = high - 1
    start, end = reached.gather(0, low), reached.gather(0, high)
    share = (divergence - start) / (end - start)
    first, last = path.entropy.gather(0, low), path.entropy.gather(0, high)
    return torch.where(inside, (first + share * (last - first)).squeeze(0), float("nan"))
