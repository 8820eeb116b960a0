"""Scores of prompts and the rules that keep some: numbers by hand, laws, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.selection import (
    Random,
    above,
    bottom,
    preference_variance,
    reward_gap,
    top,
    variance_and_error,
)
from prefloop.types import UserError


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("gap", [0.5, 1.0, 2.0, 5.0, 50.0])
def test_two_responses_give_the_squared_distance_of_their_preference_from_one_half(gap):
    # the two ordered pairs have the same square, divided by n (n - 1) = 2
    found = preference_variance(torch.tensor([[0.0, gap]], dtype=torch.float64)).item()
    assert found == pytest.approx((sigmoid(gap) - 0.5) ** 2, abs=1e-12)


def test_the_golden_value_leaves_the_diagonal_out():
    rewards = torch.tensor([[0.0, 1.0, 3.0, -2.0]], dtype=torch.float64)
    assert preference_variance(rewards).item() == pytest.approx(0.1660665866, abs=1e-10)
    with_diagonal = torch.sigmoid(rewards.unsqueeze(-1) - rewards.unsqueeze(-2)).var(
        dim=(-1, -2), correction=0
    )
    assert with_diagonal.item() == pytest.approx(0.124550, abs=1e-6)  # the common mistake


rewards_of_a_prompt = st.lists(st.floats(-30, 30), min_size=2, max_size=7)


@settings(max_examples=60, deadline=None)
@given(rewards_of_a_prompt, st.floats(-20, 20), st.floats(1.0, 4.0))
def test_variance_is_bounded_and_blind_to_shift_order_and_sign_but_not_to_scale(r, shift, scale):
    rewards = torch.tensor([r], dtype=torch.float64)
    value = preference_variance(rewards)
    assert 0 <= value <= 0.25
    for same in (rewards + shift, rewards.flip(-1), -rewards):
        torch.testing.assert_close(preference_variance(same), value, rtol=0, atol=1e-9)
    assert preference_variance(rewards, scale=scale) >= value - 1e-12


def test_variance_is_zero_exactly_when_all_rewards_are_equal():
    assert preference_variance(torch.full((1, 5), 3.7)).item() == 0.0
    assert preference_variance(torch.tensor([[1.0, 1.0, 1.0 + 1e-3]])).item() > 0.0


@pytest.mark.parametrize("score", [preference_variance, reward_gap])
def test_a_ragged_prompt_is_scored_by_the_responses_it_has(score):
    rewards = torch.tensor([[0.0, 1.0, 9.0], [0.0, 1.0, 3.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    alone = score(rewards[:1, :2])
    torch.testing.assert_close(score(rewards, mask)[:1], alone)
    torch.testing.assert_close(score(rewards, mask)[1:], score(rewards[1:]))


def test_padding_may_hold_anything():
    rewards = torch.tensor([[0.0, 1.0, math.nan]])
    mask = torch.tensor([[True, True, False]])
    assert preference_variance(rewards, mask).isfinite().all()
    assert reward_gap(rewards.nan_to_num(math.inf), mask).item() == 1.0


@pytest.mark.parametrize("score", [preference_variance, reward_gap])
def test_bad_rewards_are_refused_by_prompt(score):
    with pytest.raises(UserError, match=r"\[1\]"):
        score(torch.tensor([[0.0, 1.0], [0.0, math.nan]]))
    with pytest.raises(UserError, match=r"\[1\].*fewer"):
        score(torch.zeros(2, 3), torch.tensor([[True, True, True], [True, False, False]]))


def test_the_standard_error_is_the_jackknife_of_the_responses():
    rewards = torch.tensor([[0.0, 1.0, 3.0, -2.0]], dtype=torch.float64)
    without = [preference_variance(rewards[:, [i for i in range(4) if i != k]]) for k in range(4)]
    left = torch.stack(without)
    by_hand = (3 / 4 * (left - left.mean()).square().sum()).sqrt()
    found = variance_and_error(rewards)[1]
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_two_responses_have_no_standard_error_and_padding_does_not_count():
    rewards = torch.tensor([[0.0, 1.0, math.nan], [0.0, 1.0, 5.0]], dtype=torch.float64)
    error = variance_and_error(rewards, ~rewards.isnan())[1]
    assert error[0].isnan()
    assert error[1] == variance_and_error(rewards[1:])[1]


def test_the_standard_error_is_the_spread_over_draws_of_the_responses():
    rng = torch.Generator().manual_seed(0)
    rewards = 2 * torch.randn(4000, 8, generator=rng, dtype=torch.float64)
    variance, error = variance_and_error(rewards)
    # the spec's sampling noise at s = 2, n = 8 is 0.027; the jackknife is a little too large
    assert variance.std().item() == pytest.approx(0.027, abs=0.002)
    assert 1.0 < error.square().mean().sqrt().item() / variance.std().item() < 1.25


SCORES = torch.tensor([0.3, 0.9, 0.3, 0.1])


def test_top_keeps_the_highest_in_data_order_and_the_earlier_of_equals():
    assert top(SCORES, 2).tolist() == [0, 1]
    assert bottom(SCORES, 2).tolist() == [2, 3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=20))
def test_the_top_and_the_bottom_half_never_overlap_and_miss_nothing(values):
    scores = torch.tensor(values, dtype=torch.float64)
    half = len(values) // 2
    kept = top(scores, half).tolist() + bottom(scores, len(values) - half).tolist()
    assert sorted(kept) == list(range(len(values)))


def test_random_follows_from_its_seed_and_threshold_keeps_equals():
    table = {"scores": torch.zeros(4, 2)}
    kept = [tuple(top(Random(seed=seed)(table), 2).tolist()) for seed in range(60)]
    assert kept[1] == tuple(top(Random(seed=1)(table), 2).tolist())
    assert len(set(kept)) == 6  # all pairs of four turn up
    assert above(SCORES, 0.3).tolist() == [0, 1, 2]


def test_scores_that_are_no_number_and_counts_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="NaN"):
        top(torch.tensor([0.1, math.nan]), 1)
    with pytest.raises(UserError, match="cannot keep 9 of 4"):
        bottom(SCORES, 9)


def test_prompts_may_stand_in_more_than_one_axis():
    rewards = torch.randn((2, 3, 5), generator=torch.Generator().manual_seed(4))
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    mask[1, 2, 3:] = False
    flat, flat_mask = rewards.flatten(0, 1), mask.flatten(0, 1)
    for given_mask, one in ((None, None), (mask, flat_mask)):
        found, error = variance_and_error(rewards, given_mask)
        expected, expected_error = variance_and_error(flat, one)
        torch.testing.assert_close(found.flatten(), expected)
        torch.testing.assert_close(error.flatten(), expected_error)
        torch.testing.assert_close(preference_variance(rewards, given_mask), found)
        torch.testing.assert_close(reward_gap(rewards, given_mask).flatten(), reward_gap(flat, one))
