"""Intervals and paired tests against arithmetic by hand and against the truth they claim."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.intervals import bootstrap, mean, paired, ratio, share, wilson
from prefloop.types import UserError


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_mean_has_the_textbook_standard_error_and_t_interval():
    # 1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14, s^2 = 14/3, error = sqrt(14/3/4) = 1.0801.
    # t(0.975, 3 degrees) = 3.1824, half width 3.4374.
    found = mean(tensor(1, 2, 3, 6))
    assert found.value == 3
    assert found.error == pytest.approx(math.sqrt(14 / 12))
    assert found.low == pytest.approx(3 - 3.4374, abs=1e-3)
    assert found.high == pytest.approx(3 + 3.4374, abs=1e-3)
    assert (found.clusters, found.values) == (4, 4)


def test_values_of_one_cluster_count_together():
    # Clusters {1, 2}, {3, 6}: sums about the mean 3 are -3 and 3, so error^2 = 2/1 (9 + 9) / 16.
    found = mean(tensor(1, 2, 3, 6), torch.tensor([7, 7, 9, 9]))
    assert found.value == 3
    assert found.error == pytest.approx(1.5)
    assert found.clusters == 2


def test_copies_of_the_data_under_the_same_clusters_add_no_certainty():
    values = tensor(1, 2, 3, 6)
    twice = mean(values.repeat(2), torch.arange(4).repeat(2))
    assert twice.error == pytest.approx(mean(values).error)


def test_a_ratio_weighs_long_sequences_more():
    # Sums 2 and 8 over 1 and 4 tokens: 10 / 5 = 2 a token; residuals 0 and 0, so no error at all.
    assert ratio(tensor(2, 8), tensor(1, 4)).value == 2
    assert ratio(tensor(2, 8), tensor(1, 4)).error == 0
    # 3 and 8 over 1 and 4: R = 2.2, residuals 0.8 and -0.8, error^2 = 2 * 1.28 / 25.
    assert ratio(tensor(3, 8), tensor(1, 4)).error == pytest.approx(math.sqrt(2.56 / 25))


def test_one_cluster_has_a_mean_and_no_interval():
    for found in (mean(tensor(1, 3), torch.tensor([0, 0])), bootstrap(tensor(2))):
        assert found.value == 2
        assert math.isnan(found.low)
        assert math.isnan(found.error)


def test_wilson_at_the_ends_is_not_certain():
    # k = n: low = n / (n + z^2) with z = 1.95996; 24 / 27.8415 = 0.86202.
    found = wilson(24, 24)
    assert found.low == pytest.approx(24 / (24 + 1.959964**2), abs=1e-6)
    assert found.high == pytest.approx(1)
    # 5 of 10: centre 1/2, half width z / (2 sqrt(n + z^2)) = 0.26341.
    assert wilson(5, 10).low == pytest.approx(0.5 - 1.959964 / (2 * math.sqrt(10 + 3.841459)))


def test_a_share_uses_wilson_only_where_the_bootstrap_would_claim_certainty():
    assert share(torch.ones(24)).method == "Wilson"
    assert share(torch.ones(24), torch.arange(24) // 4).low == pytest.approx(wilson(6, 6).low)
    assert share(torch.zeros(5, dtype=torch.bool)).high == pytest.approx(wilson(0, 5).high)
    mixed = share(tensor(1, 1, 0.5))
    assert mixed.method == "bootstrap"
    assert mixed.value == pytest.approx(2.5 / 3)
    all_tied = share(tensor(0.5, 0.5, 0.5))
    assert (all_tied.low, all_tied.value, all_tied.high) == (0.5, 0.5, 0.5)


def test_the_bootstrap_agrees_with_the_normal_theory_on_many_values():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn, exact = bootstrap(values), mean(values)
    assert drawn.error == pytest.approx(exact.error, rel=0.06)
    assert drawn.low == pytest.approx(exact.low, abs=0.2 * exact.error)
    assert drawn.high == pytest.approx(exact.high, abs=0.2 * exact.error)


def test_the_bootstrap_draws_whole_clusters():
    values = torch.tensor([0.0, 1.0]).repeat_interleave(50)
    clusters = torch.arange(2).repeat_interleave(50)
    # Two clusters of means 0 and 1: a resample is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4.
    found = bootstrap(values, clusters)
    assert (found.low, found.high) == (0, 1)
    assert found.error == pytest.approx(math.sqrt(1 / 8), rel=0.05)
    assert bootstrap(values).error < 0.06


def test_the_bootstrap_is_the_same_for_the_same_seed_only():
    values = torch.randn(30, generator=torch.Generator().manual_seed(1))
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3).low != bootstrap(values, seed=4).low


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = torch.Generator().manual_seed(5)
    covered = {"t": 0, "bootstrap": 0, "Wilson": 0}
    for _ in range(300):
        values = torch.rand(40, generator=rng, dtype=torch.float64)
        hits = int((torch.rand(40, generator=rng) < 0.9).sum())
        for found, truth in (
            (mean(values, confidence=0.9), 0.5),
            (bootstrap(values, confidence=0.9, resamples=400), 0.5),
            (wilson(hits, 40, 0.9), 0.9),
        ):
            covered[found.method] += found.low <= truth <= found.high
    for method, count in covered.items():  # 270 +- 5.2 expected
        assert 250 <= count <= 290, method


def test_a_paired_test_sees_a_small_steady_difference_that_pooled_intervals_miss():
    base = torch.arange(12, dtype=torch.float64) * 10
    noise = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.1
    found = paired(base + 1 + noise, base)
    assert found.difference.low > 0.8
    assert found.t_p < 1e-6
    assert found.wilcoxon_p == pytest.approx(2 / 2**12)  # all twelve signs equal: 2 of 4096
    assert mean(base + 1).low < mean(base).high


def test_paired_tests_on_five_seeds_are_exact():
    # Differences 1, 2, 3, 4, 5: t = 3 / (sqrt(2.5) / sqrt 5) = 4.2426 with 4 degrees: p = 0.01324.
    found = paired(tensor(1, 2, 3, 4, 5), tensor(0, 0, 0, 0, 0))
    assert found.wilcoxon_p == pytest.approx(1 / 16)
    assert found.t_p == pytest.approx(0.01324, abs=1e-4)


def test_paired_tests_without_any_difference_say_so():
    same = paired(tensor(1, 2, 3), tensor(1, 2, 3))
    assert (same.difference.value, same.t_p, same.wilcoxon_p) == (0, 1, 1)
    assert paired(tensor(2, 3, 4), tensor(1, 2, 3)).t_p == 0  # exactly 1 each time


def test_paired_tests_count_a_prompt_once():
    first, clusters = tensor(1, 2, 3, 4, 5), torch.arange(5)
    once = paired(first, torch.zeros(5, dtype=torch.float64), clusters)
    again = paired(first.repeat(3), torch.zeros(15, dtype=torch.float64), clusters.repeat(3))
    assert again.t_p == pytest.approx(once.t_p)
    assert again.wilcoxon_p == once.wilcoxon_p


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100), min_size=2, max_size=8),
    shift=st.floats(-50, 50),
    scale=st.floats(0.1, 10),
)
def test_intervals_move_and_stretch_with_the_data(values, shift, scale):
    data = torch.tensor(values, dtype=torch.float64)
    for make in (mean, bootstrap):
        before, after = make(data), make(scale * data + shift)
        for name in ("value", "low", "high"):
            expected = scale * before.row("x")[name] + shift
            assert after.row("x")[name] == pytest.approx(expected, abs=1e-6)
        assert after.error == pytest.approx(scale * before.error, abs=1e-6)
        assert before.low <= before.value + 1e-9
        assert before.value <= before.high + 1e-9


def test_a_row_for_the_report_has_the_names_of_the_contract():
    row = mean(tensor(1, 3)).row("mean reward", "reward")
    assert list(row) == ["name", "value", "low", "high", "error", "n", "unit"]
    assert (row["name"], row["value"], row["n"], row["unit"]) == ("mean reward", 2, 2, "reward")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean(tensor()), "no value to average"),
        (lambda: mean(tensor(1, math.nan, math.inf)), "2 of 3 values are NaN or infinite.*index 1"),
        (lambda: mean(tensor(1, 2), confidence=95.0), "must lie in .0, 1.; found 95"),
        (lambda: ratio(tensor(1, 2), tensor(0, 0)), "total of 0"),
        (lambda: bootstrap(tensor(1, 2), resamples=10), "10 resamples are too few"),
        (lambda: wilson(5, 4), "5 successes in 4 trials"),
        (lambda: wilson(0, 0), "0 successes in 0 trials"),
        (lambda: share(tensor(0, 2)), r"credit lies in \[0, 1\]; found 0 to 2"),
        (lambda: paired(tensor(1), tensor(2)), "two units or more; found 1"),
    ],
)
def test_what_has_no_interval_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
