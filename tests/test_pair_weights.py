"""Pair weights of the samplers: closed forms, hand numbers, laws, and the sampling form."""

import math

import pytest
import torch

from prefloop.objectives import DPO
from prefloop.pair_weights import (
    BASE,
    BY_POLICY,
    BY_REWARD,
    MIX_P,
    MIX_P_CLIPPED,
    MIX_R,
    UNIFORM,
    Arms,
    Couple,
    FixedMixture,
    PairSampler,
    PairWeights,
    Tilt,
    arms,
    draw_pairs,
    joint,
    shares,
)
from prefloop.tabular import expected_loss
from prefloop.types import UserError

MIXTURES = [UNIFORM, MIX_R, MIX_P]
EVERY = [*MIXTURES, MIX_P_CLIPPED, FixedMixture((BASE, BY_REWARD), (0.5, 0.5))]


def random_arms(problems: int = 7, responses: int = 5, seed: int = 0) -> Arms:
    rng = torch.Generator().manual_seed(seed)
    shape = (2, problems, responses)
    reward, implicit = torch.randn(shape, generator=rng, dtype=torch.float64)
    return arms(reward, implicit)


def gaps(values: torch.Tensor) -> torch.Tensor:
    return values.unsqueeze(-1) - values.unsqueeze(-2)


def slope(gap: torch.Tensor) -> torch.Tensor:
    return gap.sigmoid() * (-gap).sigmoid()


def test_two_responses_have_weights_worked_out_by_hand():
    # r = (log 3, 0), so e^D = 3 and 2 + 3 + 1/3 = 16/3; h = (log 2, 0): 2 + 2 + 1/2 = 9/2.
    reward = torch.tensor([math.log(3.0), 0.0], dtype=torch.float64)
    implicit = torch.tensor([math.log(2.0), 0.0], dtype=torch.float64)
    known = arms(reward, implicit)
    assert UNIFORM(known).tolist() == [[4.0, 4.0], [4.0, 4.0]]
    assert MIX_R(known)[0, 1].item() == pytest.approx(16 / 3, abs=1e-12)
    assert MIX_P(known)[0, 1].item() == pytest.approx(4.5, abs=1e-12)
    assert MIX_R(known)[0, 0].item() == pytest.approx(4.0, abs=1e-12)


def test_the_mixtures_are_one_over_the_slope_of_the_sigmoid():
    known = random_arms()
    torch.testing.assert_close(MIX_R(known), 1 / slope(gaps(known.reward)))
    torch.testing.assert_close(MIX_P(known), 1 / slope(gaps(known.implicit)))


@pytest.mark.parametrize("sampler", MIXTURES)
def test_weights_are_the_sum_of_what_the_couples_draw(sampler):
    known = random_arms()
    total = torch.zeros(7, 5, 5, dtype=torch.float64)
    for part in sampler.components(known):
        ordered = part.first.unsqueeze(-1) * part.second.unsqueeze(-2)
        total += part.alpha[:, None, None] * (ordered + ordered.mT)
    torch.testing.assert_close(sampler(known), total)


def test_coefficients_are_those_of_the_paper():
    # alpha_1 = n^2 = 25; alpha_2 = sum over (y, y') of e^{r(y) - r(y')}; uniform alone 2 n^2 = 50.
    known = random_arms()
    base, tilted = MIX_R.components(known)
    torch.testing.assert_close(base.alpha, torch.full((7,), 25.0, dtype=torch.float64))
    torch.testing.assert_close(tilted.alpha, gaps(known.reward).exp().sum((-1, -2)))
    torch.testing.assert_close(tilted.first, known.reward.softmax(-1))
    torch.testing.assert_close(tilted.second, (-known.reward).softmax(-1))
    assert UNIFORM.components(known)[0].alpha.tolist() == pytest.approx([50.0] * 7)
    torch.testing.assert_close(
        shares(MIX_R.components(known))[:, 1], tilted.alpha / (25 + tilted.alpha)
    )


def test_drawing_a_couple_first_gives_the_joint_probability():
    known = random_arms()
    components = MIX_P.components(known)
    drawn = sum(
        share[:, None, None] * part.first.unsqueeze(-1) * part.second.unsqueeze(-2)
        for share, part in zip(shares(components).unbind(-1), components, strict=True)
    )
    assert isinstance(drawn, torch.Tensor)
    torch.testing.assert_close((drawn + drawn.mT) / 2, joint(MIX_P(known)))


@pytest.mark.parametrize("sampler", EVERY)
def test_weights_are_symmetric_positive_and_carry_no_gradient(sampler):
    known = random_arms()
    live = arms(known.reward, known.implicit.requires_grad_())
    weight = sampler(live)
    torch.testing.assert_close(weight, weight.mT)
    assert (weight > 0).all()
    assert not weight.requires_grad
    assert isinstance(sampler, PairWeights)


@pytest.mark.parametrize("sampler", EVERY)
def test_constants_change_nothing_and_relabelling_permutes(sampler):
    known = random_arms()
    moved = arms(known.reward + 3.0, known.implicit - 2.0)
    torch.testing.assert_close(sampler(moved), sampler(known))
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = arms(known.reward[:, order], known.implicit[:, order])
    torch.testing.assert_close(sampler(permuted), sampler(known)[:, order][:, :, order])


@pytest.mark.parametrize("sampler", EVERY)
def test_a_response_that_does_not_exist_is_never_shown(sampler):
    known = random_arms(responses=4)
    pad = torch.full((7, 1), 50.0, dtype=torch.float64)
    base = torch.zeros(7, 5, dtype=torch.float64)
    base[:, -1] = -torch.inf
    padded = arms(torch.cat([known.reward, pad], -1), torch.cat([known.implicit, pad], -1), base)
    weight = sampler(padded)
    torch.testing.assert_close(weight[:, :-1, :-1], sampler(known))
    assert (weight[:, -1] == 0).all()
    assert (weight[:, :, -1] == 0).all()


def test_the_cap_is_the_weight_of_the_widest_reward_gap():
    # Rm = 2: the cap is 2 + e^2 + e^-2 = 9.524391; h = (0, 5, 1) has gaps beyond and below it.
    known = arms(
        torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64),
        torch.tensor([0.0, 5.0, 1.0], dtype=torch.float64),
    )
    weight = MIX_P_CLIPPED(known)
    assert weight[0, 1].item() == pytest.approx(9.524391382167263, abs=1e-12)
    assert weight[0, 2].item() == pytest.approx(2 + math.e + 1 / math.e, abs=1e-12)


def test_tilts_over_a_base_are_the_policy_of_the_bandit():
    # pi* is proportional to pi_ref exp(r / beta) and pi to pi_ref exp(h / beta).
    known = random_arms()
    base = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    known = arms(known.reward, known.implicit, base)
    sampler = PairSampler((Couple(Tilt(reward=0.5), Tilt(implicit=0.5)),), (1.0,))
    (part,) = sampler.components(known)
    torch.testing.assert_close(part.first, (base + known.reward / 2).softmax(-1))
    torch.testing.assert_close(part.second, (base + known.implicit / 2).softmax(-1))


@pytest.mark.parametrize("sampler", EVERY)
def test_the_expected_gradient_of_dpo_is_the_papers_update(sampler):
    beta = 0.7
    known = random_arms()
    logits = (known.implicit / beta).requires_grad_()
    preferred = gaps(known.reward).sigmoid()
    weight = sampler(known)
    uniform = torch.zeros_like(logits).log_softmax(-1)
    loss = expected_loss(DPO(beta=beta), logits.log_softmax(-1), uniform, weight * preferred)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    update = beta * weight * (preferred - gaps(known.implicit).sigmoid())
    torch.testing.assert_close(-gradient, update.sum(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(7).double(), rtol=0, atol=1e-12)


def test_drawn_pairs_follow_the_joint_probability():
    known = random_arms(problems=2, responses=3)
    probability = joint(MIX_R(known))
    first, second = draw_pairs(probability, 200_000, torch.Generator().manual_seed(0))
    counts = torch.zeros(2, 9, dtype=torch.float64)
    counts.scatter_add_(1, first * 3 + second, torch.ones_like(first, dtype=torch.float64))
    # The standard error of a share is below sqrt(.25 / 200000) = .0011.
    torch.testing.assert_close(counts / 200_000, probability.flatten(-2), rtol=0, atol=5 * 0.0011)
    again, _ = draw_pairs(probability, 200_000, torch.Generator().manual_seed(0))
    assert torch.equal(first, again)


def test_a_multiple_scales_its_couple():
    known = random_arms()
    once, twice = (PairSampler((BY_POLICY,), (factor,)) for factor in (1.0, 2.0))
    torch.testing.assert_close(twice(known), 2 * once(known))
    with pytest.raises(UserError, match="1 couples and 2 multiples"):
        PairSampler((BY_POLICY,), (1.0, 2.0))


def test_a_fixed_mixture_is_a_probability_and_refuses_shares_that_are_not():
    known = random_arms()
    mixture = FixedMixture((BASE, BY_REWARD), (0.3, 0.7))
    torch.testing.assert_close(mixture(known).sum((-1, -2)), torch.full((7,), 2.0).double())
    with pytest.raises(UserError, match=r"2 numbers that sum to 1, got \(0.5, 0.6\)"):
        FixedMixture((BASE, BY_REWARD), (0.5, 0.6))
