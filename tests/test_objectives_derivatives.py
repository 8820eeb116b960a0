"""Derivatives of every objective: true, twice there, and finite where margins are huge."""

from dataclasses import replace

import pytest
import torch
from objective_cases import each
from objective_world import World, ratios, rearranged, world_for
from torch.testing import assert_close

from prefloop import objectives as o
from prefloop.types import Judgement, Logps

STOPPED = (o.StraightThroughDPO, o.KLDPO, o.AlphaDPO, o.KTO, o.BCO, o.WPO)
"""Their equations stop a gradient, so finite differences of the loss see more than autograd."""


@each
def test_first_and_second_derivatives_agree_with_finite_differences(objective):
    if isinstance(objective, STOPPED):
        return
    world = rearranged(world_for(objective), lambda tensor: tensor[:2])
    policy, _ = world.scored()
    assert policy.embeddings is not None

    def loss(shift: torch.Tensor) -> torch.Tensor:
        embeddings = torch.zeros_like(policy.embeddings).requires_grad_()
        moved = world.policy.token + shift.unsqueeze(-1) + embeddings.sum(-1)
        token = torch.where(world.policy.mask, moved, 0.0)
        ours = Logps(token, world.policy.mask, world.policy.collision, embeddings)
        return objective.per_comparison(ours, world.reference, world.judged).sum()

    shift = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, shift, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, shift, fast_mode=True)


@each
def test_functional_gradients_are_the_same(objective):
    if isinstance(objective, o.WassersteinDPO):
        return  # differentiates inside, by a leaf of the model's own
    world = world_for(objective)

    def loss(token: torch.Tensor) -> torch.Tensor:
        policy = Logps(torch.where(world.policy.mask, token, 0.0), world.policy.mask)
        policy = replace(policy, collision=world.policy.collision)
        return objective.per_comparison(policy, world.reference, world.judged).sum()

    assert_close(torch.func.grad(loss)(world.policy.token), world.gradient(objective))


@each
@pytest.mark.parametrize("size", [50.0, 1e4])
def test_huge_margins_stay_finite_both_ways(objective, size):
    judged = {
        "scores": [[1.0, 0.25, 0.0]],
        "label": [[1, 0, -1]],
        "ensemble": [[[1.0, 0.0], [0.0, 0.5], [0.25, 0.25]]],
    }
    if isinstance(objective, o.MIPO) and objective.unbiased:
        return  # a group of one
    for h in (size, -size):
        world = ratios([h, -h, 0.0], rank=[[1, 2, 2]], **judged)
        collision = torch.zeros_like(world.policy.token)
        single = World(
            Logps(world.policy.token.float(), world.policy.mask, collision.float()),
            Logps(world.reference.token.float(), world.reference.mask),
            world.judged,
        )
        if isinstance(objective, o.WPO):
            # exp(log p) of a positive "log-probability" means nothing
            single = replace(single, policy=replace(single.policy, collision=single.policy.token))
        assert single.losses(objective).isfinite().all()
        assert single.gradient(objective).isfinite().all()


def test_a_certain_policy_has_finite_odds():
    world = World(
        Logps(torch.zeros(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.bool)),
        Logps(torch.zeros(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.bool)),
        Judgement(
            torch.tensor([[1, 2]]), torch.zeros(1, 2), torch.ones(1, 2).long(), torch.ones(1)
        ),
    )
    assert world.losses(o.ORPO()).isfinite().all()
    assert world.gradient(o.ORPO()).isfinite().all()
