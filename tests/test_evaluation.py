"""Evaluation against arithmetic by hand, exact enumeration, and laws."""

import dataclasses
import json
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.evaluation import (
    RIDGE,
    by_group,
    calibration,
    gini,
    kl,
    length_controlled_win_rate,
    outcomes,
    preference_accuracy,
    win_rate,
)
from prefloop.types import Logps, UserError


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Accuracy -----------------------------------------------------------------------------------------


def test_accuracy_counts_a_tie_half_and_says_how_many():
    found = preference_accuracy(tensor(2, 0.1, -1, 0))  # (1 + 1 + 0 + 1/2) / 4
    assert found.accuracy.value == 0.625
    assert (found.correct, found.wrong, found.tied) == (2, 1, 1)


def test_a_policy_that_equals_its_reference_is_right_half_the_time():
    assert preference_accuracy(torch.zeros(7)).accuracy.value == 0.5


def test_accuracy_of_flipped_labels_is_the_rest():
    margin = normal(50)
    total = preference_accuracy(margin).accuracy.value + preference_accuracy(-margin).accuracy.value
    assert total == pytest.approx(1)


# Win rate -----------------------------------------------------------------------------------------


def test_win_rate_compares_all_answers_to_the_same_prompt_only():
    # Prompt 1: A 3, 1 against B 2: win, loss. Prompt 2: A 5, 9 against B 9: loss, tie.
    found = win_rate(torch.tensor([[3.0, 1.0], [5.0, 9.0]]), torch.tensor([[2.0], [9.0]]))
    assert (found.wins, found.ties, found.losses) == (1, 1, 2)
    assert found.rate.value == pytest.approx((1 + 0 + 0 + 0.5) / 4)
    assert found.rate.clusters == 2


def test_outcomes_stay_with_their_answers():
    found = outcomes(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 3.0, 0.0]]))
    assert found.tolist() == [[[0, 0, 1], [1, 0.5, 1]]]


def test_equal_infinite_rewards_are_a_tie():
    inf = torch.full((3, 1), torch.inf)
    assert win_rate(inf, inf).ties == 3


def test_win_rate_of_a_against_b_and_of_b_against_a_make_one():
    first, second = normal(20, 4, seed=1), normal(20, 3, seed=2)
    ahead, behind = win_rate(first, second).rate, win_rate(second, first).rate
    assert ahead.value + behind.value == pytest.approx(1)
    assert ahead.low == pytest.approx(1 - behind.high)


def test_more_answers_to_the_same_prompts_do_not_shrink_the_interval_to_nothing():
    level = normal(12, 1)  # a prompt decides everything: its answers agree
    one = win_rate(level, torch.zeros_like(level)).rate
    many = win_rate(level.expand(12, 8), torch.zeros(12, 8, dtype=torch.float64)).rate
    assert many.high - many.low == pytest.approx(one.high - one.low)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(0.5, 3), st.floats(-4, 4))
def test_win_rate_sees_the_order_of_rewards_only(values, scale, shift):
    first = torch.tensor([values], dtype=torch.float64).T.round(decimals=3)
    second = first.flip(0)
    moved = [torch.sinh(scale * part) + shift for part in (first, second)]
    assert win_rate(*moved).rate.value == win_rate(first, second).rate.value


# Length control -----------------------------------------------------------------------------------


def test_without_a_length_difference_length_control_changes_nothing():
    credit = tensor(*([1] * 30 + [0] * 10))
    found = length_controlled_win_rate(credit, torch.zeros(40))
    # The penalty moves log 3 = 1.0986 by 0.01 * 1.0986 / (40 * 3/16) = 0.0015 of log-odds.
    assert found.rate.value == pytest.approx(0.75, abs=5e-4)
    assert (found.raw, found.scale) == (0.75, 0)
    # Then only the intercept is left, with the error of a share: sqrt(3/16 / 40), times 40 / 39.
    assert found.rate.error == pytest.approx(math.sqrt(3 / 16 / 39), rel=2e-3)


def test_the_interval_of_length_control_is_students_on_the_log_odds():
    credit = tensor(*([1] * 30 + [0] * 10))
    found = length_controlled_win_rate(credit, torch.zeros(40)).rate
    logit = math.log(found.value / (1 - found.value))
    half = 2.0227 * found.error / (found.value * (1 - found.value))  # t, 39 degrees of freedom
    low, high = (1 / (1 + math.exp(-logit - side * half)) for side in (-1, 1))
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))


def test_two_prompts_are_enough_for_an_interval_and_one_is_not():
    credit, length = tensor(1, 0, 1, 1), tensor(3.0, -1.0, 0.0, 2.0)
    two = length_controlled_win_rate(credit, length, torch.tensor([0, 0, 1, 1])).rate
    assert two.low < two.value < two.high
    assert math.isnan(length_controlled_win_rate(credit, length, torch.zeros(4).long()).rate.low)


def test_a_judge_who_only_counts_words_is_worth_one_half():
    length = normal(400, seed=3) + 1.0  # A is longer by one standard deviation on average
    credit = (length > 0).double()
    found = length_controlled_win_rate(credit, length)
    assert found.raw > 0.8
    assert found.rate.value == pytest.approx(0.5, abs=0.1)
    assert found.slope > 5


def test_length_control_recovers_the_model_it_assumes():
    rng = torch.Generator().manual_seed(4)
    length = 30 * torch.randn(20_000, generator=rng, dtype=torch.float64) + 20
    logit = 0.4 + 1.5 * torch.tanh(length / length.std())
    credit = (torch.rand(20_000, generator=rng, dtype=torch.float64) < logit.sigmoid()).double()
    found = length_controlled_win_rate(credit, length)
    assert found.rate.value == pytest.approx(1 / (1 + math.exp(-0.4)), abs=0.012)
    assert found.slope == pytest.approx(1.5, abs=0.08)
    assert found.rate.low < 1 / (1 + math.exp(-0.4)) < found.rate.high
    assert found.rate.high - found.rate.low < 0.03


def test_the_fit_is_where_the_gradient_is_zero():
    credit, length = tensor(1, 1, 0, 1, 0.5, 0), tensor(5, 3, -2, 1, 4, -6)
    found = length_controlled_win_rate(credit, length)
    feature = torch.tanh(length / length.std())
    intercept = torch.tensor(found.rate.value, dtype=torch.float64).logit()
    miss = (intercept + found.slope * feature).sigmoid() - credit
    assert float(miss.sum() + RIDGE * intercept) == pytest.approx(0, abs=1e-6)
    assert float((miss * feature).sum() + RIDGE * found.slope) == pytest.approx(0, abs=1e-6)


def test_length_control_is_unchanged_by_the_unit_of_length_and_mirrored_by_the_sides():
    credit, length = tensor(1, 1, 0, 1, 0.5, 0), tensor(5, 3, -2, 1, 4, -6)
    found = length_controlled_win_rate(credit, length)
    in_characters = length_controlled_win_rate(credit, 6 * length)
    mirrored = length_controlled_win_rate(1 - credit, -length)
    assert in_characters.rate.value == pytest.approx(found.rate.value, abs=1e-6)
    assert mirrored.rate.value == pytest.approx(1 - found.rate.value, abs=1e-6)
    assert mirrored.rate.low == pytest.approx(1 - found.rate.high, abs=1e-6)


def test_length_control_without_a_single_loss_stays_finite():
    found = length_controlled_win_rate(torch.ones(20), torch.arange(20.0) - 10)
    assert 0.9 < found.rate.value < 1
    assert math.isfinite(found.rate.low)


def test_length_control_counts_a_prompt_once():
    credit, length, prompt = tensor(1, 1, 0, 1, 0.5, 0), tensor(5, 3, -2, 1, 4, -6), torch.arange(6)
    once = length_controlled_win_rate(credit, length, prompt)
    copies = length_controlled_win_rate(credit.repeat(50), length.repeat(50), prompt.repeat(50))
    alone = length_controlled_win_rate(credit.repeat(50), length.repeat(50))
    assert copies.rate.clusters == 6
    assert copies.rate.error == pytest.approx(once.rate.error, rel=0.15)
    assert alone.rate.error < once.rate.error / 5


# KL -----------------------------------------------------------------------------------------------


def logps(*rows: list[float]) -> Logps:
    """(1, N, T) from the token log-probabilities of N responses, padded with zeros."""
    width = max(map(len, rows))
    token = torch.tensor([[row + [0.0] * (width - len(row)) for row in rows]]).double()
    mask = torch.tensor([[[True] * len(row) + [False] * (width - len(row)) for row in rows]])
    return Logps(token, mask)


def test_kl_sums_log_ratios_of_a_sequence_and_divides_by_tokens_once():
    # Log-ratios: (0.5, -0.2) and (0.9). Sums 0.3 and 0.9: mean 0.6 a sequence, 1.2 / 3 a token.
    found = kl(logps([-1.0, -1.2], [-0.1]), logps([-1.5, -1.0], [-1.0]))
    assert found.sequence.value == pytest.approx(0.6)
    assert found.token.value == pytest.approx(0.4)
    assert found.tokens == 3
    # k3 = e^-l - 1 + l: .5 -> .106531, -.2 -> .021403, .9 -> .306570.
    assert found.sequence_k3.value == pytest.approx((0.106531 + 0.021403 + 0.306570) / 2, abs=1e-6)
    assert found.token_k3.value == pytest.approx((0.106531 + 0.021403 + 0.306570) / 3, abs=1e-6)


def test_kl_of_a_policy_with_itself_is_zero_without_error():
    same = Logps(-normal(3, 2, 4).abs(), torch.ones(3, 2, 4, dtype=torch.bool))
    found = kl(same, same)
    assert (found.sequence.value, found.sequence_k3.value, found.sequence.error) == (0, 0, 0)


def test_answers_to_one_prompt_are_one_cluster_of_the_kl():
    token = -normal(3, 2, 4).abs()
    mask = torch.ones(3, 2, 4, dtype=torch.bool)
    found = kl(Logps(token, mask), Logps(token - 0.1, mask))
    assert (found.sequence.clusters, found.sequence.values) == (3, 6)
    assert found.token.clusters == found.token_k3.clusters == 3


def test_padding_and_absent_responses_change_nothing():
    policy, reference = logps([-1.0, -1.2], [-0.1]), logps([-1.5, -1.0], [-1.0])
    padded = [
        Logps(
            torch.nn.functional.pad(part.token, (0, 3, 0, 2)),
            torch.nn.functional.pad(part.mask, (0, 3, 0, 2)),
        )
        for part in (policy, reference)
    ]
    before, after = dataclasses.asdict(kl(policy, reference)), dataclasses.asdict(kl(*padded))
    assert before.pop("tokens") == after.pop("tokens")
    for name, estimate in before.items():
        assert after[name]["value"] == pytest.approx(estimate["value"])
        assert after[name]["values"] == estimate["values"]


def markov(seed: int) -> torch.Tensor:
    """log p(next | previous) of three tokens, the first row for the start; 0 ends a sequence."""
    return torch.log_softmax(normal(4, 3, seed=seed), dim=-1)


def enumerated(length: int) -> list[tuple[int, ...]]:
    """All sequences that end with the first 0 or at `length` tokens."""
    found = []
    for size in range(1, length + 1):
        for body in product((1, 2), repeat=size - 1):
            found += [(*body, last) for last in ((0,) if size < length else (0, 1, 2))]
    return found


def test_both_kl_estimators_are_unbiased_by_exact_enumeration():
    tables, sequences = (markov(6), markov(7)), enumerated(4)

    def scored(table: torch.Tensor) -> Logps:
        rows = [
            [
                float(table[0 if t == 0 else 1 + sequence[t - 1], token])
                for t, token in enumerate(sequence)
            ]
            for sequence in sequences
        ]
        return logps(*rows)

    policy, reference = (scored(table) for table in tables)
    chance = policy.sum.exp()[0]
    assert float(chance.sum()) == pytest.approx(1)
    exact = float((chance * (policy.sum - reference.sum)[0]).sum())

    # Each sequence alone, weighted by its chance: the expectation of what `kl` reports.
    alone = [
        kl(
            Logps(policy.token[:, i : i + 1], policy.mask[:, i : i + 1]),
            Logps(reference.token[:, i : i + 1], reference.mask[:, i : i + 1]),
        )
        for i in range(len(sequences))
    ]
    for name in ("sequence", "sequence_k3"):
        values = torch.tensor([dataclasses.asdict(found)[name]["value"] for found in alone])
        assert float((chance * values).sum()) == pytest.approx(exact, abs=1e-6)
    assert all(found.sequence_k3.value >= 0 for found in alone)
    assert any(found.sequence.value < 0 for found in alone)


def test_k3_has_the_smaller_error_where_policies_are_close():
    gap = 0.1 * normal(500, 1, 20, seed=8)
    # Samples of the policy have E[exp(-gap)] = 1 a token; normal log-ratios need mean var / 2.
    gap = gap + 0.005
    mask = torch.ones(500, 1, 20, dtype=torch.bool)
    found = kl(Logps(gap - 2, mask), Logps(torch.full_like(gap, -2.0), mask))
    assert found.sequence_k3.error < found.sequence.error / 5
    assert found.sequence_k3.value == pytest.approx(20 * 0.005, rel=0.05)  # var / 2 a token
    assert abs(found.sequence.value - 0.1) < 4 * found.sequence.error


# Calibration --------------------------------------------------------------------------------------


def test_calibration_by_hand():
    # Margins log 3 and -log 3: both 3/4 sure; the first is right, the second wrong. Accuracy 1/2.
    found = calibration(tensor(math.log(3), -math.log(3)))
    assert found.ece == pytest.approx(0.25)
    assert found.overconfidence == pytest.approx(0.25)
    assert found.brier == pytest.approx((0.0625 + 0.5625) / 2)
    assert found.nll == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert [(row.low, row.high, row.pairs) for row in found.bins] == [(0.75, 0.8, 2)]
    assert (found.bins[0].confidence, found.bins[0].accuracy) == (pytest.approx(0.75), 0.5)


def test_a_model_that_never_decides_is_calibrated_and_worth_log_two():
    found = calibration(torch.zeros(5))
    assert (found.ece, found.brier) == (0, 0.25)
    assert found.nll == pytest.approx(math.log(2))


def test_true_probabilities_are_calibrated_and_doubled_margins_too_sure():
    logit = 2 * normal(20_000, seed=9)
    won = (
        torch.rand(20_000, generator=torch.Generator().manual_seed(9)) < logit.sigmoid()
    ).double()
    honest, loud = calibration(logit, won), calibration(2 * logit, won)
    assert honest.ece < 0.012
    assert abs(honest.overconfidence) < 0.01
    assert loud.ece > 0.05
    assert loud.overconfidence > 0.05
    assert honest.brier < loud.brier
    assert honest.nll < loud.nll


def test_turning_every_pair_round_changes_no_calibration():
    logit = normal(200, seed=10)
    won = (normal(200, seed=11) > 0).double()
    there, back = calibration(logit, won), calibration(-logit, 1 - won)
    assert [row.pairs for row in there.bins] == [row.pairs for row in back.bins]
    for name in ("ece", "brier", "nll", "overconfidence"):
        expected = dataclasses.asdict(there)[name]
        assert dataclasses.asdict(back)[name] == pytest.approx(expected)


def test_the_bins_hold_every_pair_once():
    found = calibration(torch.cat([normal(300), tensor(0, 50, -50)]), bins=7)
    assert sum(row.pairs for row in found.bins) == 303
    assert all(row.low <= row.confidence <= row.high + 1e-12 for row in found.bins)


# Groups -------------------------------------------------------------------------------------------


def test_groups_by_hand():
    # ann 1, 3 -> 2; bob 6 -> 6. Average 4, pooled 10/3, gini (4 + 4) / (2 * 2 * 8) = 1/4.
    found = by_group(tensor(1, 6, 3), ["ann", "bob", "ann"])
    assert {name: estimate.value for name, estimate in found.groups.items()} == {"ann": 2, "bob": 6}
    assert found.worst == "ann"
    assert (found.average, found.pooled) == (4, pytest.approx(10 / 3))
    assert found.gini == pytest.approx(0.25)


def test_gini_of_equal_groups_is_zero_and_of_one_rich_group_is_one_minus_one_over_k():
    assert gini(tensor(2, 2, 2)) == 0
    assert gini(tensor(0, 0, 0, 5)) == pytest.approx(0.75)
    assert gini(tensor(1, 2, 3)) == pytest.approx(gini(tensor(10, 20, 30)))
    assert gini(tensor(-1, 2)) is None
    assert gini(tensor(0, 0)) is None


def test_results_are_plain_json():
    margin = tensor(1, -1, 0, 2)
    results = [
        preference_accuracy(margin),
        win_rate(normal(3, 2), normal(3, 2, seed=1)),
        length_controlled_win_rate(tensor(1, 0, 1, 0.5), tensor(3, 1, -2, 5)),
        kl(logps([-1.0], [-2.0]), logps([-1.5], [-1.0])),
        calibration(margin),
        by_group(margin, ["a", "b", "a", "b"]),
    ]
    for result in results:
        assert json.loads(json.dumps(dataclasses.asdict(result)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preference_accuracy(tensor(1, math.nan)), r"1 of 2 margins are NaN.*\(1,\)"),
        (
            lambda: win_rate(torch.tensor([[math.nan]]), torch.ones(1, 1)),
            r"rewards are NaN.*\(0, 0",
        ),
        (lambda: length_controlled_win_rate(tensor(1), tensor(2)), "two outcomes or more"),
        (lambda: length_controlled_win_rate(tensor(1, 0), tensor(2, 2)), "always 2 longer"),
        (lambda: length_controlled_win_rate(tensor(3, 0), tensor(2, 1)), "credit lies in"),
        (lambda: kl(logps([-1.0]), logps([-1.0, -1.0])), "scored different tokens"),
        (lambda: kl(logps([math.nan]), logps([-1.0])), "log-probabilities are NaN"),
        (lambda: calibration(tensor()), "needs pairs and bins; found 0 and 10"),
        (lambda: calibration(tensor(1), tensor(2)), "outcome is a share of votes"),
        (lambda: by_group(tensor(1, 2), ["a"]), "2 values but 1 group names"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
