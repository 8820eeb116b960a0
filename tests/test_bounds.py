"""What preference variance bounds: A3 to A7 of its specification, with bounds that are attained."""

import math

import pytest
import torch

from prefloop import bounds
from prefloop.reproduce import pvar_theory as theory
from prefloop.selection import preference_variance
from prefloop.tabular import random_logp


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def problems():
    return theory.random_problems(seed=1, groups=20, each=25)


def test_the_population_value_of_a_coin_is_worked_out_by_hand():
    # two responses 1/4 and 3/4, gap g: unequal with probability 2 * 3/16, (sigmoid(g) - 1/2)^2
    rewards, logp = table(0.0, math.log(3)), table(0.25, 0.75).log()
    # sigmoid(log 3) = 3/4
    assert bounds.expected_preference_variance(rewards, logp) == pytest.approx(3 / 8 / 16)


def test_the_estimator_averages_to_the_population_value_over_all_draws(rng):  # A2
    rewards = 2 * torch.randn(4, generator=rng, dtype=torch.float64)
    logp = random_logp((4,), rng)
    population = float(bounds.expected_preference_variance(rewards, logp))
    for samples in (2, 3, 5):
        assert theory.enumerated_mean(rewards, logp, samples) == pytest.approx(population)


def test_gaussian_rewards_give_the_golden_values():  # A1, A2
    found = theory.gaussian_preference_variance(theory.GAUSSIAN_SPREADS)
    golden = [0.007363, 0.025377, 0.068419, 0.129994, 0.182763, 0.215180, 0.232425, 0.241192]
    assert found == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize("samples", [2, 3, 5, 8])
def test_estimates_have_no_bias_at_any_number_of_samples(samples):  # A2
    drawn = theory.estimates(2.0, samples, prompts=20000, seed=samples)
    error = float(drawn.std()) / math.sqrt(len(drawn))
    assert abs(float(drawn.mean()) - 0.129994) < 4 * error


def test_online_variance_is_blind_at_the_reference(rng):  # A3
    logp = random_logp((50, 6), rng)
    assert (preference_variance(0.1 * (logp - logp)) == 0).all()


def test_gradients_stay_under_their_bounds_and_one_bound_is_attained(problems):  # A4
    ratios = theory.gradient_ratios(problems)
    assert len(ratios.variance) == 500
    assert ratios.cube_root.max() < 0.15
    assert ratios.cauchy_schwarz.max() <= 1 + 1e-9
    assert ratios.martingale.max() <= 1
    assert ratios.cauchy_schwarz.max() > 0.99  # the cube-root bound would pass almost anything


def test_gradients_of_autoregressive_networks_stay_under_them_too():  # A4
    ratios = theory.autoregressive_ratios(seed=1, each=6)
    assert len(ratios.variance) == 48
    assert ratios.cube_root.max() < 0.15
    assert ratios.cauchy_schwarz.max() <= 1 + 1e-9
    assert 0.1 < ratios.martingale.max() <= 1


def test_the_jacobian_norm_is_that_of_the_logits(rng):
    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    network = theory.Network(normal(2, 3, 3), normal(2, 3, 3), normal(2, 2, 3))

    def logits(hidden, output, problem, node):
        return output @ torch.tanh(hidden @ network.embedding[problem, node])

    expected = []
    for problem in range(2):
        norms = []
        for node in range(3):
            parts = torch.autograd.functional.jacobian(
                lambda a, b, p=problem, n=node: logits(a, b, p, n),
                (network.hidden[problem], network.output[problem]),
            )
            flat = torch.cat([part.flatten(1) for part in parts], 1)
            norms.append(torch.linalg.matrix_norm(flat, ord=2))
        expected.append(torch.stack(norms).max())
    torch.testing.assert_close(network.jacobian_norm(), torch.stack(expected))


def test_labelled_gradients_noise_and_drift_stay_under_their_bounds(problems):  # A5, A7
    ratios = theory.labelled_ratios(problems)
    assert 0.99 < ratios.gradient.max() <= 1 + 1e-9
    assert 0.99 < ratios.signal_to_noise.max() <= 1 + 1e-9
    assert ratios.drift.max() <= 1
    assert ratios.split_drift.max() <= 1


def test_the_drift_bound_counts_its_terms():
    # rhat - r = 1 and 0 with weights 1/4 and 3/4: median 0, E|.| = 1/4; TV(1/4 3/4, 1/2 1/2) = 1/4
    logp, start = table(0.25, 0.75).log(), table(0.5, 0.5).log()
    found = bounds.drift_bound(table(1.0, 0.0), table(0.0, 0.0), logp, start)
    assert found == pytest.approx(0.5 * 0.25 + 0.5 * 0.25)
    # a reward model off by 2 everywhere adds 1/2 E|2| = 1
    split = bounds.split_drift_bound(table(1.0, 0.0), table(0.0, 0.0), table(2.0, 2.0), logp, start)
    assert split == pytest.approx(0.25 + 1.0)


def test_the_weighted_median_splits_the_mass():
    # 0.2, 0.3, 0.5 at values 5, 1, 3: sorted 1 (.3), 3 (.8): the median is 3
    assert bounds.weighted_median(table(5.0, 1.0, 3.0), table(0.2, 0.3, 0.5).log()) == 3.0


def test_the_score_spread_is_the_mean_over_pairs(rng):
    scores = torch.randn((4, 3), generator=rng, dtype=torch.float64)
    logp = random_logp((4,), rng)
    chance = logp.exp()
    pairs = sum(
        chance[i] * chance[j] * (scores[i] - scores[j]).square().sum()
        for i in range(4)
        for j in range(4)
    )
    torch.testing.assert_close(bounds.score_spread(scores, logp), pairs)


def test_the_bounds_are_their_formulas():
    variance, beta, length, norm, spread = (table(v) for v in (0.001, 0.1, 4.0, 2.0, 9.0))
    # 8 * .1 * 4 * 2 * .1
    assert bounds.cube_root_bound(variance, beta, length, norm) == pytest.approx(0.64)
    # sqrt(8) * .1 * 2 * sqrt(.001)
    assert bounds.martingale_bound(variance, beta, length, norm) == pytest.approx(
        math.sqrt(8 * 0.001) * 0.2
    )
    assert bounds.cauchy_schwarz_bound(variance, beta, spread) == pytest.approx(
        0.3 * math.sqrt(0.001)
    )
    # .1 (sqrt .001 + sqrt .004) 3
    assert bounds.labelled_bound(variance, 4 * variance, beta, spread) == pytest.approx(
        0.9 * math.sqrt(0.001)
    )
    assert bounds.signal_to_noise_bound(table(0.125)) == pytest.approx(1.0)


def test_hard_labels_pull_while_online_variance_sees_nothing():  # A6
    rewards = 1e-3 * table(0.3, 0.1, -0.1, -0.3)
    assert theory.hard_label_gradient(rewards, beta=0.1) == pytest.approx(0.028, abs=1e-4)
    assert preference_variance(rewards) < 1e-8


def test_labels_of_the_policy_itself_do_not_pull(rng):  # A6
    logits = 2 * torch.randn((40, 5), generator=rng, dtype=torch.float64)
    assert theory.self_labelled_gradient(logits, beta=0.3) < 1e-14
