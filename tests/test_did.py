"""Differential information: B1 to B10 of its specification, and the diagnostics for pairs."""

import itertools
import math

import pytest
import torch

from prefloop import did
from prefloop.objectives import DPO, IPO, SimPO
from prefloop.reproduce import did_experiments, did_projected, did_theory
from prefloop.tabular import (
    as_logps,
    independent_pairs,
    jensen_shannon,
    kl,
    population_optimum,
    random_logp,
    sequence_logp,
)
from prefloop.types import Pair, UserError


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def test_the_information_of_a_coin_is_its_normalized_ratio():
    # pi = (3/4, 1/4), ref = (1/2, 1/2): ratios 3/2 and 1/2, q = (3/4, 1/4)
    # pi = (1/2, 1/2), ref = (4/5, 1/5): ratios 5/8 and 5/2, q = (1/5, 4/5)
    policy = table([3 / 4, 1 / 4], [1 / 2, 1 / 2]).log()
    reference = table([1 / 2, 1 / 2], [4 / 5, 1 / 5]).log()
    torch.testing.assert_close(
        did.log_did(policy, reference).exp(), table([3 / 4, 1 / 4], [1 / 5, 4 / 5])
    )


def test_the_algebra_holds_on_random_policies_of_every_size(rng):  # B1, B2, B4
    errors = did_theory.identity_errors(rng, each=40)
    assert max(errors.values()) < 1e-12, errors
    assert len(errors) == 8


def test_the_information_is_uniform_exactly_when_nothing_was_learned(rng):  # B1, B7
    reference = random_logp((30, 12), rng)
    same = did.log_did(reference, reference)
    torch.testing.assert_close(same, torch.full_like(same, -math.log(12)))
    moved = did.did_entropy(random_logp((30, 12), rng) - reference)
    assert (moved < math.log(12)).all()


def test_one_beta_explains_power_law_pairs_and_no_other(rng):  # B2
    taught = did_theory.lesson(rng, 5, 8, beta=0.3)
    margins = [did_theory.margins_of(p) for p in (taught.target, taught.reference, taught.rejected)]
    law = did.fit_power_law(*margins)
    assert law.beta == pytest.approx(0.3, abs=1e-12)
    assert law.matching == 1
    assert law.spread < 1e-10
    assert law.pairs == 5 * 28


def test_a_pair_has_its_own_beta_when_both_margins_move_alike():  # B5
    # m_* - m_ref = 2, 1, -1;  m_ref - m_l = 1, -1, -3: betas 0.5, -1, 3
    policy, reference, rejected = table(3, 2, 0), table(1, 1, 1), table(0, 2, 4)
    betas = did.pairwise_beta(policy, reference, rejected)
    torch.testing.assert_close(betas, table(0.5, -1, 3))
    law = did.fit_power_law(policy, reference, rejected)
    assert law.matching == pytest.approx(2 / 3)
    # slope (2*1 - 1*1 + 1*3) / (4 + 1 + 1) = 2/3
    assert law.beta == pytest.approx(2 / 3)
    # logs of 0.5 and 3: torch's median of two is the lower; deviations 0 and log 6
    assert law.spread == 0.0
    # m_* > m_ref > m_l holds for the first pair only
    assert did.ordered_margins(policy, reference, rejected) == pytest.approx(1 / 3)


def test_the_spread_is_the_median_deviation_of_log_beta():
    # betas 1, 2, 8: median of logs is log 2, deviations log 2, 0, log 4, so their median is log 2
    learned = table(1, 1, 1)
    law = did.fit_power_law(learned, 0 * learned, -table(1, 2, 8))
    assert law.spread == pytest.approx(math.log(2))


def test_a_policy_that_learned_nothing_has_no_power_law():
    margin = table(1.0, 2.0)
    with pytest.raises(UserError, match="no exponent can be fitted: over 2 pairs"):
        did.fit_power_law(margin, margin, 0 * margin)


def test_unrelated_margins_have_no_spread_to_report():
    law = did.fit_power_law(table(1.0), table(0.0), table(1.0))
    assert law.matching == 0
    assert math.isnan(law.spread)


def test_pair_probabilities_are_those_of_drawing_one_from_each(rng):  # B2
    chosen, rejected = table([0.6, 0.4]).log(), table([0.1, 0.9]).log()
    # (0, 1): w(0) l(1) / (w(0) l(1) + w(1) l(0)) = .54 / (.54 + .04)
    found = did.preference(chosen, rejected)
    torch.testing.assert_close(found[0, 0, 1], torch.tensor(0.54 / 0.58, dtype=torch.float64))
    torch.testing.assert_close(found + found.mT, torch.ones_like(found))


def test_dpo_reaches_the_target_and_log_pi_reaches_the_information(rng):  # B3
    taught = did_theory.lesson(rng, 4, 10, beta=0.5)
    q = did.log_did(taught.target, taught.reference)
    reached = {
        name: population_optimum(objective, taught.reference, taught.weight)
        for name, objective in {
            "DPO": DPO(beta=0.5),
            "log pi": SimPO(beta=0.5, gamma=0.0),
            "IPO": IPO(beta=0.5, log_ratios="sum"),
        }.items()
    }
    assert jensen_shannon(reached["DPO"], taught.target).max() < 1e-10
    assert jensen_shannon(reached["log pi"], q).max() < 1e-10
    assert jensen_shannon(reached["log pi"], taught.target).min() > 1e-3
    assert jensen_shannon(reached["IPO"], taught.target).max() > 1e-3


def test_a_wrong_beta_learns_the_power_of_the_ratio(rng):  # B3
    taught = did_theory.lesson(rng, 4, 10, beta=0.25)
    found = population_optimum(DPO(beta=0.5), taught.reference, taught.weight)
    law = (taught.reference + 0.5 * (taught.target - taught.reference)).log_softmax(-1)
    assert jensen_shannon(found, law).max() < 1e-12


def test_the_rejected_distribution_of_a_coin_is_the_closed_form():  # B4
    # ref (1/2, 1/2), target (4/5, 1/5), beta 1: pi_l ~ (1/2 * 5/8, 1/2 * 5/2) = (1/5, 4/5)
    half, target = table([0.5, 0.5]).log(), table([0.8, 0.2]).log()
    found = did.optimal_rejected(half, target, half, 1.0)
    torch.testing.assert_close(found.exp(), table([0.2, 0.8]))
    torch.testing.assert_close(did.learned_target(half, found, half, 1.0), target)


def test_resampling_chosen_responses_gives_the_optimal_rejected(rng):
    taught = did_theory.lesson(rng, 3, 6, beta=0.5)
    drawn = torch.multinomial(taught.reference.exp(), 200_000, replacement=True, generator=rng)
    weight = did.rejected_log_weights(
        taught.target.gather(-1, drawn), taught.reference.gather(-1, drawn), 0.5
    ).exp()
    torch.testing.assert_close(weight.sum(-1), torch.ones(3, dtype=torch.float64))
    found = torch.zeros_like(taught.reference).scatter_add(-1, drawn, weight)
    torch.testing.assert_close(found, taught.rejected.exp(), atol=5e-3, rtol=0)


def test_likelihood_changes_follow_their_closed_forms(rng):  # B6
    found = did_theory.dynamics_errors(rng, each=60)
    assert max(value for name, value in found.items() if name.startswith("C")) < 1e-10
    assert found["wrong signs"] == 0
    assert found["chosen falls, beta < 1"] > found["chosen rises, beta < 1"] > 0


def test_the_law_of_the_rejected_at_beta_one_is_plain_kl(rng):  # B6, the Renyi limit
    reference, target = random_logp((4, 7), rng), random_logp((4, 7), rng)
    law = did.change_when_rejected_is_reference(target, reference, target, 1.0)
    torch.testing.assert_close(law.chosen, kl(target, reference))


def test_the_chosen_never_rises_along_the_flow_when_drawn_from_the_reference(rng):  # C4
    ((first, second),) = did_theory.flows(rng, problems=3, betas=(1.0,), steps=120)
    assert first.chosen.max() < 1e-9
    assert torch.cat([first.rejected, second.rejected], 1).max() < 1e-9
    assert (second.chosen[-1] > 0).all()


def test_the_entropy_of_the_information_is_that_of_its_distribution(rng):  # B7
    policy, reference = random_logp((20, 9), rng), random_logp((20, 9), rng)
    q = did.log_did(policy, reference)
    torch.testing.assert_close(did.did_entropy(policy - reference), -(q.exp() * q).sum(-1))


def test_a_small_update_has_the_second_order_entropy(rng):  # B7
    ratio = 0.05 * torch.randn(4000, generator=rng, dtype=torch.float64)
    second = did.did_entropy_of_small_update(ratio)
    # log 4000 - 0.0025 / 2, and third-order terms of about 1e-5
    assert second == pytest.approx(math.log(4000) - 0.00125, abs=1e-4)
    assert did.did_entropy(ratio) == pytest.approx(float(second), abs=2e-5)


def test_a_uniform_proposal_over_all_responses_is_exact(rng):  # B8
    ratio = torch.randn((3, 50), generator=rng, dtype=torch.float64)
    uniform = torch.full_like(ratio, -math.log(50))
    estimate = did.estimate_did_entropy(ratio, uniform)
    torch.testing.assert_close(estimate.entropy, did.did_entropy(ratio))
    torch.testing.assert_close(estimate.log_normalizer, ratio.logsumexp(-1))


def test_the_estimate_converges_as_samples_grow(rng):  # B8
    ratio = torch.randn(50, generator=rng, dtype=torch.float64)
    exact = did.did_entropy(ratio)
    uniform = torch.full_like(ratio, -math.log(50))
    errors = []
    for samples in (10, 1000, 100_000):
        drawn = torch.randint(50, (40, samples), generator=rng)
        estimate = did.estimate_did_entropy(ratio[drawn], uniform[drawn])
        errors.append(float((estimate.entropy - exact).abs().mean()))
        assert (estimate.effective_samples >= 1).all()
        assert (estimate.effective_samples <= samples + 1e-9).all()
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


@pytest.mark.parametrize("kind", ["small", "reinforce"])
def test_sequential_samples_estimate_the_entropy_of_whole_responses(rng, kind):  # B8
    found = did_experiments.entropy_estimates(rng, kind)
    assert found["sequential"].unbiased
    assert not found["reference"].unbiased
    assert 1 <= found["sequential"].effective_samples <= 32
    assert found["sequential"].effective_samples > found["reference"].effective_samples


def test_sequential_weights_are_the_ratio_over_the_proposal(rng):
    # every one of the 8 sequences: f - log proposal, the proposal being the product of the q_t
    nodes = torch.randn((7, 2), generator=rng, dtype=torch.float64)
    ratio, weight = did.sample_did(nodes, 3, (4000,), rng)
    table_ratio = sequence_logp(nodes, 3)
    table_proposal = sequence_logp(nodes.log_softmax(-1), 3)
    which = (ratio.unsqueeze(-1) - table_ratio).abs().argmin(-1)
    assert set(which.tolist()) == set(range(8))
    torch.testing.assert_close(weight, (table_ratio - table_proposal)[which])
    share = torch.bincount(which, minlength=8) / 4000
    torch.testing.assert_close(share.double(), table_proposal.exp(), atol=0.03, rtol=0)


def test_token_entropies_do_not_add_up_to_the_entropy_of_responses(rng):
    policy, reference = random_logp((7, 2), rng, 2.0), random_logp((7, 2), rng, 2.0)
    at_tokens = did.token_did_entropy(policy, reference)
    assert at_tokens.shape == (7,)
    q = sequence_logp((policy - reference).log_softmax(-1), 3).exp().unflatten(0, (2, 2, 2))
    reached = torch.stack(
        [torch.tensor(1.0), *q.sum((1, 2)), *q.sum(2).flatten()]
    )  # probability of each prefix under the product of token-level distributions
    added = float((reached * at_tokens).sum())
    exact = float(did.did_entropy(sequence_logp(policy - reference, 3)))
    assert abs(added - exact) > 0.01


def test_smoothing_has_the_higher_entropy_at_equal_size_on_long_tails(rng):  # B9
    share, gap = did_experiments.smoothing_beats_reinforcing(rng, "Zipf 1.5", trials=5)
    assert share == 1
    assert gap > 0.2


def test_and_the_lower_one_when_the_rarest_responses_are_very_rare(rng):  # B9, its failure
    share, gap = did_experiments.smoothing_beats_reinforcing(
        rng, "long lower tail (gamma)", trials=5
    )
    assert share < 0.2
    assert gap < 0


def test_a_tilt_is_solved_for_the_divergence_asked_for(rng):
    reference = random_logp((4, 30), rng, 2.0)
    wanted = table(0.01, 0.05, 0.1, 0.2)
    for far in (0.0, 60.0):
        power = did_experiments.solve_tilt(reference, wanted, 1.0, far)
        tilted = (power.unsqueeze(-1) * reference).log_softmax(-1)
        torch.testing.assert_close(kl(reference, tilted), wanted)


def test_projecting_removes_only_what_lowers_the_chosen():  # B10
    toward = table([1.0, 0.0], [2.0, 0.0], [0.0, 0.0])
    away = table([-3.0, 1.0], [3.0, 1.0], [1.0, 1.0])
    # first: the conflicting -3 goes; second: no conflict; third: nothing to protect
    expected = table([1.0, 1.0], [5.0, 1.0], [1.0, 1.0])
    torch.testing.assert_close(did.project_out_conflict(toward, away), expected)


def test_a_small_projected_step_never_lowers_the_chosen(rng):  # B10
    steps = did_projected.single_pair_steps(rng, each=100)
    assert steps.pairs == 600
    assert steps.projected_lowers_chosen == 0
    assert steps.plain_lowers_chosen > 100  # so that the test has teeth
    assert steps.projected_lowers_margin > 50  # the margin is not protected


def test_slopes_of_a_loss_are_those_of_the_objective():
    # DPO at pi = ref: slope -beta/2 on the chosen, +beta/2 on the rejected
    sides = (table(-1.0, -2.0), table(-3.0, -1.0))
    chosen, rejected = did_projected.loss_slopes(DPO(beta=0.4), sides, sides)
    torch.testing.assert_close(chosen, table(-0.2, -0.2))
    torch.testing.assert_close(rejected, table(0.2, 0.2))


def test_log_odds_and_probability_gap_are_what_they_say():
    policy = Pair(as_logps(table(0.8).log()), as_logps(table(0.5).log()))
    reference = Pair(as_logps(table(0.4).log()), as_logps(table(0.4).log()))
    # odds 4 and 1: -log sigmoid(0.5 log 4) = -log(2/3)
    odds = did_theory.LogOdds(beta=0.5)(policy, None)
    torch.testing.assert_close(odds, table(math.log(3 / 2)))
    # 5 (0.4 - 0.1) = 1.5
    gap = did_theory.ProbabilityGap(scale=5.0)(policy, reference)
    torch.testing.assert_close(gap, table(math.log1p(math.exp(-1.5))))


def test_markov_tables_are_copied_to_every_prefix(rng):
    logits = torch.randn((3, 2, 2), generator=rng, dtype=torch.float64)
    logp = logits.log_softmax(-1)
    found = sequence_logp(did_experiments.markov_nodes(logits).log_softmax(-1), 3)
    for number, (a, b, c) in enumerate(itertools.product(range(2), repeat=3)):
        torch.testing.assert_close(found[number], logp[0, 0, a] + logp[1, a, b] + logp[2, b, c])


def test_rejected_weights_of_equal_policies_are_uniform(rng):
    logp = random_logp((2, 4), rng)
    weight = did.rejected_log_weights(logp, logp, 0.3).exp()
    torch.testing.assert_close(weight, torch.full_like(weight, 0.25))


def test_pairs_of_a_lesson_sum_to_one(rng):
    taught = did_theory.lesson(rng, 3, 5, beta=0.5)
    torch.testing.assert_close(taught.weight.sum((-1, -2)), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(taught.weight, independent_pairs(taught.reference, taught.rejected))
