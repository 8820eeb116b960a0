"""Laws that every objective of the table must obey, and the known exceptions by name.

They run on four random comparisons of up to five responses, two and two (or three) of a rank, with
scores, labels and all else that some objective reads.
"""

import math
from dataclasses import replace

import pytest
import torch
from objective_cases import KINDS, each
from objective_world import World, pad, random_world, ratios, rearranged, world_for
from torch.testing import assert_close

from prefloop import objectives as o
from prefloop.types import Logps, Pair, UserError


@each
def test_one_finite_loss_a_comparison_with_a_finite_gradient(objective):
    world = world_for(objective)
    losses = world.losses(objective)
    assert losses.shape == (4,)
    assert losses.dtype == torch.float64
    assert losses.isfinite().all()
    assert world.gradient(objective).isfinite().all()


@each
def test_padding_tokens_changes_nothing(objective):
    world = world_for(objective)

    def wider(logps: Logps) -> Logps:
        collision = None if logps.collision is None else pad(logps.collision, [0, 3])
        return Logps(pad(logps.token, [0, 3]), pad(logps.mask, [0, 3]), collision)

    padded = World(wider(world.policy), wider(world.reference), world.judged)
    assert_close(padded.losses(objective), world.losses(objective))
    assert_close(padded.gradient(objective)[..., :-3], world.gradient(objective))


@each
def test_a_response_that_does_not_exist_changes_nothing(objective):
    world = world_for(objective)
    judged = world.judged
    assert judged.ensemble is not None

    def more(logps: Logps) -> Logps:
        collision = None if logps.collision is None else pad(logps.collision, [0, 0, 0, 1])
        return Logps(pad(logps.token, [0, 0, 0, 1]), pad(logps.mask, [0, 0, 0, 1]), collision)

    padded = World(
        more(world.policy),
        more(world.reference),
        replace(
            judged,
            rank=pad(judged.rank, [0, 1]),
            scores=pad(judged.scores, [0, 1], math.nan),
            label=pad(judged.label, [0, 1], -1),
            ensemble=pad(judged.ensemble, [0, 0, 0, 1], math.nan),
        ),
    )
    assert_close(padded.losses(objective), world.losses(objective))
    assert_close(padded.gradient(objective)[:, :-1], world.gradient(objective))


@each
def test_the_order_of_comparisons_does_not_matter(objective):
    world, order = world_for(objective), torch.tensor([2, 0, 3, 1])
    moved = rearranged(world, lambda tensor: tensor[order])
    assert_close(moved.losses(objective), world.losses(objective)[order])


@each
def test_the_order_of_responses_does_not_matter(objective):
    world, order = world_for(objective), torch.tensor([3, 1, 4, 0, 2])
    moved = rearranged(world, lambda tensor: tensor[:, order])
    assert_close(moved.losses(objective), world.losses(objective))


@each
def test_an_objective_that_does_not_couple_the_batch_can_be_split(objective):
    if objective.couples_batch:
        return
    world = world_for(objective)
    parts = [
        rearranged(world, lambda tensor, at=at: tensor[at : at + 1]).losses(objective)
        for at in range(4)
    ]
    assert_close(torch.cat(parts), world.losses(objective))


COUPLED = (
    o.KLDPO(),
    o.DrDPO(),
    o.AOT(),
    o.AOTUnpaired(),
    o.AlphaDPO(),
    o.PooledSFT(),
    o.KTO(),
    o.KTO(baseline="matched"),
    o.BCO(),
    o.Sum(objectives=(o.DPO(), o.PooledSFT())),
    o.LD(objective=o.KLDPO()),
)


@pytest.mark.parametrize("objective", COUPLED, ids=repr)
def test_an_objective_whose_loss_depends_on_the_rest_of_the_batch_says_so(objective):
    world = random_world()
    likely = Logps(0.5 * world.policy.token, world.policy.mask)  # above the reference: z0 > 0
    world = replace(world, policy=likely)
    alone = rearranged(world, lambda tensor: tensor[:1])
    assert (alone.losses(objective) - world.losses(objective)[0]).abs().item() > 1e-9
    assert objective.couples_batch


@each
def test_a_pair_is_the_equation_itself(objective):
    world = ratios([1.0, -0.5], [0.25, 2.0])
    policy, reference = (
        Pair(*(Logps(side.token[:, n], side.mask[:, n]) for n in (0, 1)))
        for side in (world.policy, world.reference)
    )
    if isinstance(objective, o.Pairwise | o.Tied):
        assert_close(world.losses(objective), objective(policy, reference))
    if isinstance(objective, o.Batchwise):
        assert_close(world.losses(objective), objective(policy, reference).expand(2))


@each
def test_what_needs_no_reference_does_not_read_it_and_the_rest_refuses_to_go_without(objective):
    world = world_for(objective)
    policy, _ = world.scored()
    if not objective.needs_reference:
        without = objective.per_comparison(policy, None, world.judged)
        assert_close(without, world.losses(objective))
        assert objective.rewards(policy, None).shape == (4, 5)
        return
    with pytest.raises(UserError, match="compares the policy with a reference"):
        objective.per_comparison(policy, None, world.judged)


@each
def test_rewards_are_given_for_any_shape_and_need_no_gradient(objective):
    world = world_for(objective)
    rewards = objective.rewards(world.policy, world.reference)
    one = objective.rewards(world.policy.at(torch.tensor(1)), world.reference.at(torch.tensor(1)))
    assert_close(one, rewards[1])
    assert rewards.isfinite().all()


@each
def test_float32_is_kept_and_agrees_with_float64(objective):
    world = world_for(objective)
    single = rearranged(
        world, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor
    )
    losses = single.losses(objective)
    assert losses.dtype == torch.float32
    assert_close(losses.double(), world.losses(objective), rtol=1e-4, atol=1e-5)


CONSTANT = {
    o.DPO: math.log(2),
    o.Hinge: 1.0,
    o.IPO: 25.0,  # (1 / .2)^2
    o.LengthNormalizedDPO: math.log(2),
    o.DPOP: math.log(2),
    o.StraightThroughDPO: math.log(2),
    o.NCAPair: 2 * math.log(2),
    o.BCOPair: 2 * math.log(2),
    o.APOZero: 1.0,
    o.APODown: 1.0,
    o.EXOPair: -math.log(2) - 0.5 * (math.log(0.999) + math.log(0.001)),
    o.DiscoPOP: 0.5 * math.log(2) + 0.5,
    o.SPPOHard: 50.0,  # 2 (1 / .2)^2
    o.RobustDPO: math.log(2),
    o.KLDPO: math.log(2),
    o.DrDPO: math.log(2),
    o.AOTUnpaired: math.log(2),
    o.PlackettLuce: 2 * math.log(4),  # two of the best, each in front of three others
    o.MDPO: math.log(2),
    o.MIPO: 25.0,
    o.LD: math.log(2),
    o.FDivergence: math.log(2),
    o.ChosenHinge: 0.0,
    o.Pessimism: 0.0,
    o.InfoNCA: math.log(5),  # cross-entropy to the uniform distribution
}


@pytest.mark.parametrize("kind", CONSTANT)
def test_policy_equal_to_reference_gives_the_known_constant(kind):
    objective = next(each for each in KINDS.values() if type(each) is kind)
    world = world_for(objective)
    same = World(world.reference, world.reference, world.judged)
    losses = same.losses(objective)
    full = torch.tensor([0, 1, 3])  # five responses
    assert_close(losses[full], torch.full((3,), CONSTANT[kind], dtype=torch.float64))


def test_two_of_five_tie_with_the_stated_probability_at_the_reference():
    # P(tie) = 1/2 of two equal responses: nll log 2; a win has 1/4: nll log 4. Ranks 1,1,2,2,2:
    # one and three ties, six wins
    world = random_world()
    same = World(world.reference, world.reference, world.judged)
    expected = (4 * math.log(2) + 6 * math.log(4)) / 10
    for objective in (o.RaoKupper(nu=3.0), o.Davidson(nu=1.0)):
        assert same.losses(objective)[0].item() == pytest.approx(expected)


REVERSE = (o.DiscoPOP, o.EXOPair, o.NCAPair, o.APODown, o.SPPOHard, o.IPO, o.Pessimism)
"""Their gradient turns somewhere on purpose, in `neighbours.md` and at each class."""


@each
def test_gradient_raises_the_chosen_and_lowers_the_rejected(objective):
    if not isinstance(objective, o.Pairwise | o.Batchwise | o.Tied) or isinstance(
        objective, REVERSE
    ):
        return
    for chosen, rejected in ((-2.0, 1.0), (0.5, -0.5), (0.1, 0.1), (3.0, -3.0)):
        gradient = ratios([chosen, rejected]).gradient(objective).flatten()
        assert gradient[0] <= 0 <= gradient[1]
        if not isinstance(objective, o.Hinge | o.ChosenHinge):
            assert gradient[0] < 0


MARGIN_ONLY = (
    o.DPO,
    o.Hinge,
    o.StraightThroughDPO,
    o.EXOPair,
    o.DiscoPOP,
    o.RobustDPO,
    o.KLDPO,
    o.DrDPO,
    o.AOT,
    o.AOTUnpaired,
    o.RaoKupper,
    o.Davidson,
    o.PlackettLuce,
    o.TopK,
    o.BestOfN,
    o.MDPO,
    o.LengthNormalizedDPO,
    o.SimPO,
    o.IPO,
    o.MIPO,
    o.SoftLabelDPO,
    o.RewardDistillation,
    o.EXO,
    o.InfoNCA,
)


@each
def test_a_loss_on_margins_ignores_a_shift_and_its_gradients_cancel(objective):
    if not isinstance(objective, MARGIN_ONLY):
        return
    judged = {"scores": [[1.0, 0.25]]}
    for first, second in ((1.0, -1.0), (-0.75, 0.5), (2.0, 1.5)):
        world, shifted = (
            ratios([first, second], **judged),
            ratios([first + 3, second + 3], **judged),
        )
        if isinstance(objective, o.MIPO) and objective.unbiased:
            continue  # a group of one
        assert_close(shifted.losses(objective), world.losses(objective))
        if not isinstance(objective, o.StraightThroughDPO):
            gradient = world.gradient(objective)
            assert_close(gradient.sum(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)


NOT_ON_MARGINS = (o.DPOP, o.RPO, o.CPO, o.ORPO, o.SLiC, o.NCAPair, o.BCOPair, o.SPPOHard, o.KTO)


@each
def test_a_loss_with_an_anchor_notices_a_shift(objective):
    if not isinstance(objective, NOT_ON_MARGINS) or objective == o.CPO(alpha=0.0):
        return
    judged = {"label": [[1, 0, -1]], "rank": [[1, 2, 0]]}
    world, shifted = ratios([-1.0, -3.0, 0.5], **judged), ratios([-2.0, -4.0, 0.5], **judged)
    assert (world.losses(objective) - shifted.losses(objective)).abs().item() > 1e-6
