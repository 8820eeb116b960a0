"""Every rule and filter: numbers by hand, laws, what they refuse."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.selection import (
    CHES,
    FILTERS,
    RULES,
    AlignmentPotential,
    DIDEntropy,
    Different,
    FirstOfPrompt,
    LargestImplicitGap,
    LearningOrder,
    Length,
    OnlinePVar,
    Ordered,
    PredictiveEntropy,
    PreferenceCertainty,
    PVar,
    Random,
    ReferenceFreePotential,
    Responses,
    RewardGap,
    SmallestImplicitGap,
    best_worst,
    calibrated_scale,
    k_centres,
    validation_loss,
)
from prefloop.types import UserError

NAN = math.nan


def table(**columns: list) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in columns.items()}


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# Two prompts: two responses of log-ratios +1 and -1 (the fixture of the neighbours' equations), and
# three of log-ratio -1.
TABLE = table(
    count=[2, 3],
    scores=[[0, 2, NAN], [1, 1, 0]],
    order=[[2, 1, NAN], [1, 2, 3]],
    policy_logps=[[-6, -4, NAN], [-2, -2, -2]],
    reference_logps=[[-5, -5, NAN], [-1, -1, -1]],
    drawn_logps=[[-6, -4, NAN], [-2, -2, -2]],
    tokens=[[2, 4, NAN], [1, 2, 2]],
    validation_loss=[0.5, 0.25],
    hidden_gram=[
        [[4, 2, NAN], [2, 2, NAN], [NAN, NAN, NAN]],  # E_l = (2, 0), E_w = (1, 1)
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    ],
)
VARIANCE = (2 * (sigmoid(1) - 0.5) ** 2) / 3  # of rewards 1, 1, 0: two of the three pairs differ
# Weights exp(f)/proposal of the first prompt: f = -1, +1, proposal -6, -4: both e^5, so q = 1/2 and
# H = log Z - E f = 5 - 0.
CASES = [
    (PVar(), [(sigmoid(2) - 0.5) ** 2, VARIANCE]),
    (PVar(scale=0.5), [(sigmoid(1) - 0.5) ** 2, (2 * (sigmoid(0.5) - 0.5) ** 2) / 3]),
    (OnlinePVar(beta=1.0), [(sigmoid(2) - 0.5) ** 2, 0.0]),
    (RewardGap(), [2.0, 1.0]),
    (LargestImplicitGap(beta=0.1), [0.2, 0.0]),
    (SmallestImplicitGap(beta=0.1), [-0.2, 0.0]),
    (AlignmentPotential(), [0.0, 0.0]),  # margins 2, 1 and 2, 0: z = +1, -1 in both
    (AlignmentPotential(weight=0.5), [0.5, -0.5]),
    (ReferenceFreePotential(), [0.0, 0.0]),  # |-1 - -3| = 2, |-2 - -1| = 1: z = +1, -1 again
    (PredictiveEntropy(), [5.0, 2.0]),
    (PredictiveEntropy(per_token=True), [2.0, (2 + 1 + 1) / 3]),
    (PreferenceCertainty(beta=0.1), [0.2, 0.0]),
    (LearningOrder(), [-0.5, -0.25]),
    (CHES(), [-(2 / 8 - 2 / 16), 1.0]),  # second: E of length 1, unlike the other: 0 - 1
    (CHES(per_token=False), [0.0, 1.0]),
    (DIDEntropy(), [5.0, 2.0]),  # second: f = -1, weights e^(-1 + 2): log Z = 1, H = 1 - (-1)
]


@pytest.mark.parametrize(("rule", "expected"), CASES, ids=lambda value: str(value)[:30])
def test_a_rule_gives_the_number_worked_out_by_hand(rule, expected):
    assert rule(TABLE).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_sign_of_the_smallest_gap_brings_the_mislabelled_first():
    gaps = {**TABLE, "order": torch.tensor([[1.0, 2.0, NAN], [1.0, 2.0, 3.0]])}
    assert SmallestImplicitGap(absolute=False)(gaps).tolist() == pytest.approx([0.2, 0.0])
    assert SmallestImplicitGap(absolute=True)(gaps).tolist() == pytest.approx([-0.2, 0.0])


def test_potential_is_as_in_the_public_code():
    # reward gaps 3, 1, 2; |gaps of log-probability per token| 0.5, 0.1, 0.9
    columns = table(
        scores=[[3, 0], [1, 0], [2, 0]],
        order=[[1, 2]] * 3,
        policy_logps=[[-1, -1.5], [-1, -1.1], [-1, -1.9]],
        reference_logps=[[-1, -1]] * 3,
        tokens=[[1, 1]] * 3,
    )
    expected = [1.224745, 0.0, -1.224745]
    assert ReferenceFreePotential()(columns).tolist() == pytest.approx(expected, abs=1e-6)
    assert AlignmentPotential()(columns).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rule", [rule for rule, _ in CASES], ids=lambda rule: str(rule)[:30])
def test_a_rule_reads_only_its_columns_and_names_what_it_measures(rule):
    measured = rule.measure({name: TABLE[name] for name in rule.columns})
    assert measured.shape == (2, len(rule.measures))


def test_every_rule_and_every_filter_has_a_case():
    assert {type(rule) for rule, _ in CASES} | {Random} == set(RULES)
    assert {type(one) for one, *_ in FILTER_CASES} == set(FILTERS)
    assert len({measure for rule in RULES for measure in rule.measures}) >= len(RULES) - 3


SHIFTED = [PVar(), RewardGap(), OnlinePVar(), PreferenceCertainty(), AlignmentPotential()]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(-5, 5), st.permutations(range(4)))
def test_a_constant_of_a_prompt_and_the_order_of_its_responses_change_nothing(seed, shift, order):
    rng = torch.Generator().manual_seed(seed)
    names = ("scores", "policy_logps", "reference_logps")
    columns = {name: torch.randn(3, 4, generator=rng, dtype=torch.float64) for name in names}
    columns["order"] = columns["scores"].argsort(-1).argsort(-1).double() + 1
    moved = {name: values[:, order] for name, values in columns.items()}
    for name in names:
        moved[name] = moved[name] + shift
    for rule in SHIFTED:
        torch.testing.assert_close(rule(moved), rule(columns), rtol=0, atol=1e-9)


def test_online_rules_see_nothing_while_the_policy_is_its_reference():
    same = {**TABLE, "reference_logps": TABLE["policy_logps"]}
    for rule in (OnlinePVar(), PreferenceCertainty(), LargestImplicitGap(), SmallestImplicitGap()):
        assert rule(same).abs().max() == 0


def test_equal_responses_have_no_hidden_similarity_to_fear():
    columns = table(hidden_gram=[[[2, 2], [2, 2]]], tokens=[[3, 3]], order=[[1, 2]])
    assert CHES()(columns).item() == 0


def test_validation_loss_is_the_dpo_loss_of_the_fixture():
    loss = validation_loss(torch.tensor([2.0]), torch.tensor([0.0]), beta=0.1)
    assert loss.item() == pytest.approx(0.598139, abs=1e-6)


def test_best_is_the_first_of_the_best_and_worst_the_last_of_the_worst():
    found = best_worst(torch.tensor([[2.0, 1.0, 1.0, 2.0, NAN], [NAN, 3.0, NAN, 1.0, 2.0]]))
    assert found.best.tolist() == [1, 3]
    assert found.worst.tolist() == [3, 1]


def test_ranks_that_order_nothing_are_refused_with_the_filter_that_helps():
    with pytest.raises(UserError, match=r"prompts \[1, 2\] order no two.*Ordered"):
        best_worst(torch.tensor([[1.0, 2.0], [1.0, 1.0], [NAN, NAN]]))


@pytest.mark.parametrize(
    "rule", [OnlinePVar, LargestImplicitGap, SmallestImplicitGap, PreferenceCertainty]
)
def test_a_beta_that_is_not_positive_is_refused(rule):
    with pytest.raises(UserError, match="beta must be positive"):
        rule(beta=0.0)


FILTER_CASES = [
    (Ordered(), table(order=[[1, 2], [1, 1], [1, NAN], [NAN, NAN]]), [1, 0, 0, 0]),
    (Length(shortest=2), table(response_characters=[[2, 3], [1, 3], [2, NAN]]), [1, 0, 1]),
    (Length(longest=3), table(response_characters=[[2, 3], [1, 4]]), [1, 0]),
    (Length(shortest=0, ratio=2.0), table(response_characters=[[2, 4], [2, 5], [0, 2]]), [1, 0, 1]),
    (Different(), table(different=[1, 2]), [0, 1]),
    (Responses(least=3), table(count=[2, 3]), [0, 1]),
    (FirstOfPrompt(), {"prompt_key": torch.tensor([5, -7, 5, 0, 0])}, [1, 1, 0, 1, 0]),
]


@pytest.mark.parametrize(("chosen", "columns", "expected"), FILTER_CASES)
def test_a_filter_keeps_what_it_says(chosen, columns, expected):
    marks = chosen.mark({name: columns[name] for name in chosen.columns})
    assert chosen.keeps(marks).int().tolist() == expected


def test_lengths_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="shortest 5 and longest 4"):
        Length(shortest=5, longest=4)
    with pytest.raises(UserError, match="ratio must be 1 or more"):
        Length(ratio=0.5)


def test_centres_go_to_the_farthest_direction_and_leave_copies_for_last():
    points = torch.tensor([[1.0, 0.0], [5.0, 0.1], [0.0, 2.0], [-1.0, 0.0], [1.0, 0.0]])
    assert k_centres(points, 5).tolist() == [0, 3, 2, 1, 4]


def test_centres_cover_within_twice_the_best_cover():
    rng = torch.Generator().manual_seed(1)
    points = torch.nn.functional.normalize(torch.randn(9, 2, generator=rng), dim=-1)

    def radius(centres: list[int]) -> float:
        return float(torch.cdist(points, points[centres]).amin(-1).max())

    best = min(radius([a, b, c]) for a in range(9) for b in range(a) for c in range(b))
    assert radius(k_centres(points, 3).tolist()) <= 2 * best


def test_centres_that_are_too_many_or_no_numbers_are_refused():
    with pytest.raises(UserError, match="cannot take 3 of 2"):
        k_centres(torch.ones(2, 2), 3)
    with pytest.raises(UserError, match="NaN"):
        k_centres(torch.tensor([[NAN, 1.0]]), 1)


def votes(scale: float, count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    rewards = torch.randn(count, 2, generator=rng, dtype=torch.float64)
    wins = torch.rand(count, generator=rng) < torch.sigmoid(
        scale * (rewards @ torch.tensor([1.0, -1]).double())
    )
    return rewards, torch.where(wins.unsqueeze(-1), torch.tensor([1, 2]), torch.tensor([2, 1]))


def test_the_scale_that_made_the_votes_is_found_within_its_error():
    rewards, rank = votes(2.5)
    found = calibrated_scale(rewards, rank)
    assert abs(found.value - 2.5) < 3 * found.error
    assert found.after > found.before
    assert found.votes == 4000


def test_calibration_undoes_a_change_of_units():
    rewards, rank = votes(2.5, 500)
    found = calibrated_scale(rewards, rank).value
    assert calibrated_scale(1000 * rewards, rank).value == pytest.approx(found / 1000, rel=1e-8)
    scaled = PVar(scale=found)({"scores": rewards})
    again = PVar(scale=found / 1000)({"scores": 1000 * rewards})
    torch.testing.assert_close(scaled, again)


def test_two_to_one_votes_at_one_gap_have_a_scale_by_hand():
    # three votes at gap 1, two of them right: sigmoid(s) = 2/3, s = log 2; information 3 * 2/9
    rewards = torch.tensor([[0.0, 1.0]]).repeat(3, 1)
    found = calibrated_scale(rewards, torch.tensor([[2, 1], [2, 1], [1, 2]]))
    assert found.value == pytest.approx(math.log(2), rel=1e-9)
    assert found.error == pytest.approx((3 * 2 / 9) ** -0.5, rel=1e-6)


def test_votes_that_fix_no_scale_are_refused():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    right, tied = torch.tensor([[2, 1], [2, 1]]), torch.tensor([[1, 1], [1, 1]])
    with pytest.raises(UserError, match="agrees with all 2 votes"):
        calibrated_scale(rewards, right)
    with pytest.raises(UserError, match="disagrees with the 2 votes"):
        calibrated_scale(-rewards, right)
    with pytest.raises(UserError, match="order no two"):
        calibrated_scale(rewards, tied)
    with pytest.raises(UserError, match="has no reward"):
        calibrated_scale(torch.tensor([[0.0, NAN], [0.0, 1.0]]), right)


def test_a_rule_is_its_own_text():
    rule = PVar(scale=2.0)
    assert repr(replace(rule)) == "PVar(scale=2.0)"
