"""Comparisons that a model might have scored, for tests of objectives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from prefloop import objectives as o
from prefloop.types import Judgement, Logps

U = torch.tensor([1.0, -1.0], dtype=torch.float64)
"""How a token's log-probability moves with its two-dimensional input embedding."""

LN = {p: math.log(p) for p in (0.2, 0.5, 0.68, 0.8, 0.16)}


@dataclass(frozen=True)
class World:
    """Comparisons as a model would score them: tables (B, N, T), judged."""

    policy: Logps
    reference: Logps
    judged: Judgement

    def scored(self) -> tuple[Logps, torch.Tensor]:
        """The policy's log-probabilities, in the graph of a leaf (the tokens) and of embeddings."""
        leaf = self.policy.token.clone().requires_grad_()
        direction = U.to(leaf.dtype)
        embeddings = torch.zeros(*leaf.shape, 2, dtype=leaf.dtype).requires_grad_()
        token = torch.where(self.policy.mask, leaf + embeddings @ direction, 0.0)
        return Logps(token, self.policy.mask, self.policy.collision, embeddings), leaf

    def losses(self, objective: o.Objective) -> torch.Tensor:
        return objective.per_comparison(self.scored()[0], self.reference, self.judged)

    def gradient(self, objective: o.Objective) -> torch.Tensor:
        """Gradient of the summed losses by the log-probability of each token."""
        policy, leaf = self.scored()
        objective.per_comparison(policy, self.reference, self.judged).sum().backward()
        return leaf.grad


def table(rows: Sequence[Sequence[Sequence[float]]], fill: float = 0.0) -> Logps:
    """Comparisons, responses, tokens; shorter lists are padded, as a collator would."""
    wide, long = max(map(len, rows)), max(len(r) for row in rows for r in row)
    token = torch.full((len(rows), wide, long), fill, dtype=torch.float64)
    mask = torch.zeros_like(token, dtype=torch.bool)
    for b, row in enumerate(rows):
        for n, response in enumerate(row):
            token[b, n, : len(response)] = torch.tensor(response, dtype=torch.float64)
            mask[b, n, : len(response)] = True
    return Logps(token, mask)


def world(
    policy: Sequence[Sequence[Sequence[float]]],
    reference: Sequence[Sequence[Sequence[float]]],
    rank: list[list[int]] | None = None,
    scores: list[list[float]] | None = None,
    label: list[list[int]] | None = None,
    ensemble: list[list[list[float]]] | None = None,
    collision: Sequence[Sequence[Sequence[float]]] | None = None,
) -> World:
    """Judged comparisons; without a rank the first response is best and the others follow."""
    ours, theirs = table(policy), table(reference)
    if collision is not None:
        ours = replace(ours, collision=table(collision).token)
    shape = ours.token.shape[:2]
    nothing = torch.full(shape, torch.nan, dtype=torch.float64)
    ordered = [[n + 1 if n < len(row) else 0 for n in range(shape[1])] for row in policy]
    judged = Judgement(
        rank=torch.tensor(rank or ordered),
        scores=nothing if scores is None else torch.tensor(scores, dtype=torch.float64),
        label=torch.full(shape, -1) if label is None else torch.tensor(label),
        weight=torch.ones(shape[0]),
        ensemble=None if ensemble is None else torch.tensor(ensemble, dtype=torch.float64),
    )
    return World(ours, theirs, judged)


def ratios(*rows: Sequence[float], **judged) -> World:
    """Comparisons given by log pi/pi_ref of their one-token responses; the reference says -5."""
    policy = [[[h - 5.0] for h in row] for row in rows]
    return world(policy, [[[-5.0] for _ in row] for row in rows], **judged)


def fixture(chosen: float = -4.0, rejected: float = -6.0, **judged) -> World:
    """Fixture F: 4 and 2 tokens, reference -5 and -5.

    With the sums -4 and -6: h = (1, -1), d = 2, log-probabilities per token (-1, -3), log-ratios
    per token (0.25, -0.5).
    """
    return world([[[chosen / 4] * 4, [rejected / 2] * 2]], [[[-1.25] * 4, [-2.5] * 2]], **judged)


def random_world(best: int = 2) -> World:
    """Four comparisons of 5, 5, 4 and 5 responses, `best` of them of the first rank."""
    rng = torch.Generator().manual_seed(4)
    shape = (4, 5, 6)
    mask = torch.arange(6) < torch.randint(2, 7, (4, 5, 1), generator=rng)
    mask[2, 4] = False  # the third comparison has four responses
    token = torch.where(
        mask, -3 * torch.rand(shape, generator=rng, dtype=torch.float64) - 0.05, 0.0
    )
    noise = torch.randn(shape, generator=rng, dtype=torch.float64)
    exists = mask.any(-1)
    rank = torch.stack([torch.randperm(5, generator=rng) for _ in range(4)])
    rank[2] = torch.tensor([1, 3, 0, 2, 4])
    rank = torch.where(rank < best, 1, 2).masked_fill(~exists, 0)
    nothing = torch.tensor(math.nan, dtype=torch.float64)
    scores = torch.randn(4, 5, generator=rng, dtype=torch.float64)
    ensemble = torch.randn(4, 5, 3, generator=rng, dtype=torch.float64)
    label = torch.tensor([[1, 0, -1, 1, 0], [0, 1, 1, -1, 0], [-1, 0, 1, 1, -1], [1, 0, 0, -1, -1]])
    collision = torch.where(mask, -torch.rand(shape, generator=rng, dtype=torch.float64), 0.0)
    return World(
        policy=Logps(token, mask, collision),
        reference=Logps(torch.where(mask, token + 0.3 * noise, 0.0), mask),
        judged=Judgement(
            rank=rank,
            scores=torch.where(exists, scores, nothing),
            label=label,
            weight=torch.ones(4),
            ensemble=torch.where(exists.unsqueeze(-1), ensemble, nothing),
        ),
    )


def world_for(objective: o.Objective) -> World:
    """BestOfN refuses two best responses; MIPO(unbiased=True) refuses one."""
    return random_world(best=1 if isinstance(objective, o.BestOfN) else 2)


def rearranged(world: World, pick) -> World:
    """The world with `pick` applied to every tensor that has the axes (B, N, ...)."""

    def side(logps: Logps) -> Logps:
        collision = None if logps.collision is None else pick(logps.collision)
        return Logps(pick(logps.token), pick(logps.mask), collision)

    judged = world.judged
    assert judged.ensemble is not None
    return World(
        side(world.policy),
        side(world.reference),
        replace(
            judged,
            rank=(rank := pick(judged.rank)),
            weight=torch.ones(len(rank)),
            scores=pick(judged.scores),
            label=pick(judged.label),
            ensemble=pick(judged.ensemble),
        ),
    )


def pad(tensor: torch.Tensor, width: list[int], value: float = 0) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, width, value=value)
