"""Equivalences between objectives, and the pieces that are no loss: references, scores, steps."""

import math
from dataclasses import replace

import pytest
import torch
from objective_cases import GROUPS, F
from objective_world import World, fixture, random_world, ratios, table
from torch.testing import assert_close

from prefloop import objectives as o
from prefloop.types import Logps, Pair, UserError

WORLD = random_world()
PAIRS = ratios([1.0, -1.0], [-0.5, 0.75], [2.0, 2.5], scores=[[1.0, 0.0], [3.0, 0.0], [0.5, 0.0]])


def same(first: o.Objective, second: o.Objective, world: World = WORLD, scale: float = 1.0):
    assert_close(
        first.per_comparison(world.policy, world.reference, world.judged),
        scale * second.per_comparison(world.policy, world.reference, world.judged),
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (o.RPO(beta=0.1, eta=0.0), o.DPO(beta=0.1)),
        (o.DPOP(beta=0.1, penalty=0.0), o.DPO(beta=0.1)),
        (o.StraightThroughDPO(beta=0.1, chosen_scale=1.0, rejected_scale=1.0), o.DPO(beta=0.1)),
        (o.RobustDPO(beta=0.1, label_smoothing=0.0), o.DPO(beta=0.1)),
        (o.KLDPO(beta=0.1, tau=1e9), o.DPO(beta=0.1)),
        (o.LD(objective=o.DPO(), alpha=1.0), o.DPO()),
        (o.AlphaDPO(beta=2.0, gamma=1.0, alpha=0.0), o.SimPO(beta=2.0, gamma=1.0)),
        (o.Sum(objectives=(o.DPO(), o.SFT()), weights=(1.0, 0.0)), o.DPO()),
        (o.Sum(objectives=(o.DPO(), o.SFT()), weights=(1.0, 0.2)),
         o.RPO(beta=0.1, eta=0.2, log_likelihood="mean")),
        (o.Sum(objectives=(o.CPO(alpha=0.0), o.SFT(log_likelihood="sum"))),
         o.CPO(alpha=1.0, log_likelihood="sum")),
        (o.FDivergence(objective=o.DPO(), divergence=o.ReverseKL()), o.DPO()),
        (o.FDivergence(objective=o.IPO(), divergence=o.ReverseKL()), o.IPO()),
        (o.FDivergence(objective=o.DPO(), divergence=o.AlphaDivergence(alpha=1.0)), o.DPO()),
        (o.FDivergence(objective=o.DPO(), divergence=o.AlphaDivergence(alpha=0.0)),
         o.FDivergence(objective=o.DPO(), divergence=o.ForwardKL())),
        (o.TopK(beta=0.1, k=9), o.PlackettLuce(beta=0.1)),
    ],
    ids=repr,
)  # fmt: skip
def test_two_ways_to_the_same_loss(first, second):
    same(first, second)


def test_ties_that_hardly_happen_make_dpo():
    same(o.RaoKupper(beta=0.3, nu=1 + 1e-9), o.DPO(beta=0.3), PAIRS)
    same(o.Davidson(beta=0.3, nu=1e-12), o.DPO(beta=0.3), PAIRS)


@pytest.mark.parametrize("objective", [o.RaoKupper(beta=1.0), o.Davidson(beta=1.0)], ids=repr)
def test_the_three_outcomes_of_a_pair_have_probabilities_that_sum_to_one(objective):
    for d in (-3.0, 0.0, 0.2, 2.0):
        first, second = ratios([d, 0.0]), ratios([0.0, d])
        tie = ratios([d, 0.0], rank=[[1, 1]])
        nll = [world.losses(objective).item() for world in (first, second, tie)]
        assert sum(math.exp(-each) for each in nll) == pytest.approx(1.0)


def test_groups_of_one_are_dpo_and_ipo():
    same(o.MDPO(beta=0.3), o.DPO(beta=0.3), PAIRS)
    same(o.MIPO(beta=0.3), o.IPO(beta=0.3), PAIRS)


def test_the_unbiased_estimate_is_the_square_of_the_means_on_average():
    # all 16 draws of two from {1, 0} and two from {-1, 2}, with replacement: gap .5 - .5, target 5
    total = 0.0
    for draw in range(16):
        bits = [draw >> place & 1 for place in range(4)]
        h = [[0.0, 1.0][bits[0]], [0.0, 1.0][bits[1]], [-1.0, 2.0][bits[2]], [-1.0, 2.0][bits[3]]]
        world = ratios(h, rank=[[1, 1, 2, 2]])
        total += world.losses(o.MIPO(beta=0.1, unbiased=True)).item() / 16
    assert total == pytest.approx((0.5 - 0.5 - 5.0) ** 2)


def test_members_of_a_group_have_equal_gradients():
    gradient = GROUPS.gradient(o.MDPO()).flatten()
    assert_close(gradient[:2], gradient[:1].expand(2))
    assert_close(gradient[2:], gradient[2:3].expand(2))


def test_certain_scores_make_labels():
    sure = replace(PAIRS, judged=replace(PAIRS.judged, scores=1e4 * PAIRS.judged.scores))
    same(o.SoftLabelDPO(beta=0.3), o.DPO(beta=0.3), sure)
    same(o.InfoNCA(beta=0.3), o.DPO(beta=0.3), sure)
    same(o.NCA(beta=0.3), o.NCAPair(beta=0.3), sure)
    same(o.SPPO(beta=0.3), o.SPPOHard(beta=0.3), sure)


def test_exo_on_two_scores_is_exo_on_a_label_with_that_noise():
    gap = math.log(0.999 / 0.001)
    scored = ratios([1.0, -1.0], [0.5, 1.5], scores=[[gap, 0.0]] * 2)
    same(o.EXO(beta=0.1, temperature=1.0), o.EXOPair(beta=0.1, label_smoothing=1e-3), scored)


def test_swapping_two_scored_responses_changes_nothing():
    swapped = ratios([-1.0, 1.0], scores=[[0.0, 1.5]])
    for objective in (o.RewardDistillation(), o.SoftLabelDPO(), o.GPO(), o.SPPO()):
        assert_close(swapped.losses(objective), fixture(scores=[[1.5, 0.0]]).losses(objective))


def test_regression_is_at_rest_on_its_target():
    # d = gap / beta = 2
    gradient = fixture(scores=[[0.2, 0.0]]).gradient(o.RewardDistillation(beta=0.1))
    assert_close(gradient, torch.zeros_like(gradient))


def test_unpaired_objectives_read_a_ranking_as_good_and_bad():
    ranked = ratios([1.0, 0.5, -1.0], rank=[[1, 2, 3]])
    labelled = ratios([1.0, 0.5, -1.0], label=[[1, 0, 0]])
    for objective in (o.BCO(), o.KTO(baseline="zero"), o.KTO(baseline="matched")):
        assert_close(ranked.losses(objective), labelled.losses(objective))


def test_sorting_never_makes_the_loss_larger():
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        world = ratios(*torch.randn(6, 2, generator=rng, dtype=torch.float64).tolist())
        dpo = world.losses(o.DPO(beta=0.5)).mean()
        for objective in (o.AOT(beta=0.5), o.AOTUnpaired(beta=0.5)):
            assert (world.losses(objective)[0] <= dpo + 1e-12).item()


def test_one_pair_sorted_is_dpo():
    for objective in (o.AOT(beta=0.1), o.AOTUnpaired(beta=0.1), o.DrDPO(beta=0.1)):
        same(objective, o.DPO(beta=0.1), F)


def test_discopop_has_the_hump_that_its_docstring_names():
    def slope(z: float) -> float:
        return ratios([z / 0.05, 0.0]).gradient(o.DiscoPOP())[0, 0, 0].item()

    assert slope(0.0) > 0
    for edge, before, after in ((-0.11857, -1, 1), (0.07201, 1, -1)):
        assert before * slope(edge - 1e-4) > 0
        assert after * slope(edge + 1e-4) > 0


def test_dpop_is_at_its_kink_where_training_starts_and_takes_the_flat_side():
    gradient = ratios([0.0, 0.0]).gradient(o.DPOP(beta=0.3))
    assert_close(gradient.flatten(), torch.tensor([-0.15, 0.15], dtype=torch.float64))


def test_dpop_does_not_fall_while_the_chosen_response_falls():
    losses = [ratios([h, h - 2.0]).losses(o.DPOP()).item() for h in (0.0, -0.5, -1.0, -2.0)]
    assert losses == sorted(losses)


def test_a_negative_margin_of_the_reference_is_not_lost_in_the_weights_of_a_sum():
    weighted = o.Sum(objectives=(o.DPO(), o.PlackettLuce()), weights=(0.25, 0.75))
    same(weighted, o.DPO(), PAIRS)


def test_a_sum_needs_what_its_parts_need():
    total = o.Sum(objectives=(o.SimPO(), o.WPO(), o.EXO(), o.AOT(), o.Davidson()))
    assert total.needs_reference
    assert total.couples_batch
    assert total.needs_collision
    assert not total.uses_ties
    assert total.data == ("rank", "scores")
    assert o.Sum(objectives=(o.Davidson(), o.RaoKupper())).uses_ties
    assert not o.WPO(objective=o.SimPO()).needs_reference
    assert o.LD(objective=o.WPO()).needs_collision
    assert o.LD(objective=o.KLDPO()).couples_batch


def test_only_kto_with_its_own_baseline_wants_mismatched_responses():
    assert o.needs_mismatched(o.KTO())
    assert o.needs_mismatched(o.Sum(objectives=(o.DPO(), o.KTO())))
    assert not o.needs_mismatched(o.KTO(baseline="matched"))
    assert not o.needs_mismatched(o.BCO())


# MRPO: a helper and the anchor, with the numbers of the published code's own steps
HELPER = Pair(table([[[-4.8]]]).at(torch.tensor(0)), table([[[-6.0]]]).at(torch.tensor(0)))
ANCHOR = Pair(table([[[-5.0]]]).at(torch.tensor(0)), table([[[-5.5]]]).at(torch.tensor(0)))
POLICY = Pair(table([[[-4.0]]]).at(torch.tensor(0)), table([[[-6.0]]]).at(torch.tensor(0)))


def combined(weights: torch.Tensor) -> Pair:
    clipped = o.clip_reference(HELPER, ANCHOR, eta=0.1)
    return Pair(
        *(o.combine_references(sides, weights) for sides in zip(clipped, ANCHOR, strict=True))
    )


def test_the_combined_reference_is_the_one_worked_out_by_hand():
    # margins 1.2 and .5: 1.2 / 1.7; clip: e_l = .1 x 5.75 / 10.65, -5.5 x 1.053991
    share = o.agreement_weights(HELPER, ANCHOR)
    assert share.item() == pytest.approx(0.705882, abs=1e-6)
    clipped = o.clip_reference(HELPER, ANCHOR, eta=0.1)
    assert clipped.chosen.sum.item() == pytest.approx(-4.8)
    assert clipped.rejected.sum.item() == pytest.approx(-5.796948, abs=1e-6)
    stated = combined(torch.stack([share, 1 - share]))
    assert stated.chosen.sum.item() == pytest.approx(-4.863086, abs=1e-6)
    assert stated.rejected.sum.item() == pytest.approx(-5.718377, abs=1e-6)
    assert o.DPO()(POLICY, stated).item() == pytest.approx(0.637549, abs=1e-6)


def test_the_weights_of_the_published_code_are_the_same_ones_reversed():
    share = o.agreement_weights(HELPER, ANCHOR)
    code = combined(torch.stack([1 - share, share]))
    assert code.chosen.sum.item() == pytest.approx(-4.945212, abs=1e-6)
    assert code.rejected.sum.item() == pytest.approx(-5.596845, abs=1e-6)
    assert o.DPO()(POLICY, code).item() == pytest.approx(0.628000, abs=1e-6)


def test_one_reference_or_equal_ones_combine_to_themselves_to_the_last_bit():
    one = o.combine_references([WORLD.reference, WORLD.policy], torch.tensor([1.0, 0.0]))
    assert_close(one.sum, WORLD.reference.sum, rtol=0, atol=1e-12)
    twice = o.combine_references([WORLD.reference] * 2, torch.tensor([0.3, 0.7]).double())
    assert_close(twice.sum, WORLD.reference.sum, rtol=0, atol=1e-12)
    assert_close(twice.mean, WORLD.reference.mean, rtol=0, atol=1e-12)
    total = torch.randn(4, 5, dtype=torch.float64).masked_fill(~WORLD.policy.exists, 0.0)
    assert torch.equal(o.with_sum(WORLD.policy, total).sum, total)


def test_a_combination_lies_between_its_references():
    between = o.combine_references([WORLD.reference, WORLD.policy], torch.tensor([0.4, 0.6]))
    low = torch.minimum(WORLD.reference.sum, WORLD.policy.sum)
    high = torch.maximum(WORLD.reference.sum, WORLD.policy.sum)
    assert ((between.sum >= low - 1e-6) & (between.sum <= high + 1e-6)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: o.combine_references([], torch.ones(0)), "0 references and 0 weights"),
        (lambda: o.combine_references([F.policy], torch.ones(2)), "1 references and 2 weights"),
        (lambda: o.combine_references([F.policy], torch.tensor([0.5])), "sum to 1"),
        (
            lambda: o.combine_references([F.policy] * 2, torch.tensor([1.5, -0.5])),
            "must be 0 or more",
        ),
        (lambda: o.clip_reference(HELPER, ANCHOR, eta=1.0), r"eta .* must be in \(0, 1\)"),
        (lambda: o.skew_score(torch.ones(3), torch.ones(3)), "even number of dimensions, got 3"),
        (lambda: o.extrapolate({}, {}, strength=1.0), r"strength .* must be in \[0, 1\), got 1.0"),
        (lambda: o.extrapolate({"a": torch.ones(1)}, {}), "only one side has a"),
    ],
)
def test_a_mistake_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def circle(*degrees: float) -> torch.Tensor:
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], -1)


def test_a_general_preference_can_be_a_cycle():
    ahead, behind = circle(0, 120, 240), circle(120, 240, 0)
    assert_close(o.skew_score(ahead, behind), torch.full((3,), 0.8660254037844386).double())
    chance = o.GPM(tau=1.0).probability(ahead, behind)
    assert_close(chance, torch.full((3,), 0.703918, dtype=torch.float64), atol=1e-6, rtol=0)
    sharp = o.GPM(tau=0.1).probability(ahead, behind)
    assert_close(sharp, torch.full((3,), 0.999827, dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(o.GPM(tau=1.0)(ahead, behind), -chance.log())
    shifted = o.GPM(tau=1.0, margin=0.5)(ahead, behind)
    assert_close(shifted, torch.nn.functional.softplus(0.5 - o.skew_score(ahead, behind)))


def test_a_general_preference_is_skew_symmetric_and_turns_with_its_blocks():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    scale = torch.rand(5, 3, generator=rng, dtype=torch.float64)
    assert torch.equal(o.skew_score(a, b, scale), -o.skew_score(b, a, scale))
    assert torch.equal(o.skew_score(a, a), torch.zeros(5, dtype=torch.float64))
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    turned = [(each.unflatten(-1, (-1, 2)) @ turn.T).flatten(-2) for each in (a, b)]
    assert_close(o.skew_score(*turned), o.skew_score(a, b))


def test_a_constant_coordinate_makes_a_scalar_reward():
    reward = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    embedding = torch.stack([reward, torch.ones(3, dtype=torch.float64)], -1)
    gap = reward - reward.roll(1)
    assert_close(o.skew_score(embedding, embedding.roll(1, 0)), gap)


def test_the_average_score_leaves_out_the_response_itself_and_those_that_do_not_exist():
    embeddings = torch.cat([circle(0, 120, 240), torch.full((1, 2), 9.0)]).unsqueeze(0)
    exists = torch.tensor([[True, True, True, False]])
    scores = o.average_score(embeddings, exists)
    assert_close(scores[0, :3], torch.zeros(3, dtype=torch.float64))  # +.866 and -.866
    assert scores[0, 3].isnan()
    two = o.average_score(embeddings, torch.tensor([[True, True, False, False]]))
    assert_close(two[0, :2], torch.tensor([0.8660254, -0.8660254], dtype=torch.float64))
    doubled = o.average_score(embeddings, exists & (torch.arange(4) < 2), torch.tensor([[2.0]]))
    assert_close(doubled[0, :2], 2 * two[0, :2])


def test_extrapolation_is_the_stated_step_and_exact_for_a_log_linear_policy():
    # log of (1/3, 1/3, 1/3) to (.5, .3, .2) by .3: p^1.3 normalised
    before = {"logits": torch.zeros(3), "steps": torch.tensor(3)}
    after = {"logits": torch.tensor([0.5, 0.3, 0.2]).log(), "steps": torch.tensor(5)}
    moved = o.extrapolate(after, before, strength=0.3)
    assert_close(moved["logits"].softmax(-1), torch.tensor([0.549869, 0.283045, 0.167085]))
    assert moved["steps"] == 5
    plain = o.extrapolate(after, before, strength=0.0)
    assert torch.equal(plain["logits"], after["logits"])


def test_extrapolation_of_bfloat16_weights_is_done_in_float32():
    current, previous = torch.tensor([1.0078125]).bfloat16(), torch.tensor([1.0]).bfloat16()
    moved = o.extrapolate({"a": current}, {"a": previous}, strength=0.9)["a"]
    assert moved.dtype == torch.bfloat16
    assert moved.item() == 1.015625  # 1.0078125 + .9 x .0078125 = 1.01484375, to the nearest


def test_logps_at_the_first_token_follow_the_mask():
    mask = torch.tensor([[False, True, True]])
    placed = o.with_sum(Logps(torch.zeros(1, 3), mask), torch.tensor([-2.0]))
    assert placed.token.tolist() == [[0.0, -2.0, 0.0]]
