"""Exact policies: what they score, their expectations, and that objectives take them."""

import itertools
import math

import pytest
import torch

from prefloop.objectives import DPO, SimPO
from prefloop.tabular import (
    AutoregressivePolicy,
    LogLinearPolicy,
    TabularPolicy,
    all_pairs,
    anneal,
    as_logps,
    comparison_rows,
    entropy,
    expected_loss,
    independent_pairs,
    jensen_shannon,
    kl,
    labelled_pairs,
    pair_of,
    population_optimum,
    random_logp,
    renyi,
)
from prefloop.types import Pair, Tokenized, judgement, score


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def test_a_tabular_policy_scores_rows_of_its_prompts():
    # softmax(0, log 3) = (1/4, 3/4); softmax(0, 0) = (1/2, 1/2)
    policy = TabularPolicy(table([0, math.log(3)], [0, 0]))
    rows = comparison_rows(
        torch.tensor([[0], [1]]), torch.tensor([[0, 1], [1, 0]]), torch.tensor([[2, 1], [1, 2]])
    )
    expected = table([1 / 4, 3 / 4], [1 / 2, 1 / 2]).log()
    torch.testing.assert_close(score(policy, rows).sum, expected)
    assert rows[0].rank == (2, 1)


def test_a_short_row_is_padded_with_responses_that_do_not_exist():
    policy = TabularPolicy(table([0, 0, 0]))
    rows = [
        Tokenized(prompt=(0,), responses=((0,), (1,), (2,))),
        Tokenized(prompt=(0,), responses=((2,), (0,))),
    ]
    logps = score(policy, rows)
    assert logps.exists.tolist() == [[True, True, True], [True, True, False]]
    assert logps.sum[1, 2] == 0


def test_a_log_linear_policy_starts_at_its_base_and_shares_its_weight(rng):
    features = torch.randn((3, 4, 2), generator=rng, dtype=torch.float64)
    base = random_logp((3, 4), rng)
    policy = LogLinearPolicy(features, base, torch.zeros((1, 2), dtype=torch.float64))
    torch.testing.assert_close(policy.logp(), base)
    policy.logp()[:, 0].sum().backward()
    # d log pi(0|x) / d weight = features[x, 0] - sum_y base[x, y] features[x, y], summed over x
    score_of_first = features[:, 0] - (base.exp().unsqueeze(-1) * features).sum(1)
    torch.testing.assert_close(policy.weight.grad, score_of_first.sum(0, keepdim=True))


def test_an_autoregressive_policy_enumerates_every_sequence(rng):
    policy = AutoregressivePolicy(
        torch.randn((2, 1 + 3 + 9, 3), generator=rng, dtype=torch.float64), length=3
    )
    sequences = list(itertools.product(range(3), repeat=3))
    batch = [Tokenized(prompt=(problem,), responses=tuple(sequences)) for problem in (0, 1)]
    logps = score(policy, batch)
    assert logps.token.shape == (2, 27, 3)
    torch.testing.assert_close(logps.sum, policy.logp())
    torch.testing.assert_close(policy.logp().exp().sum(-1), table(1.0, 1.0))
    # (2, 0, 1) walks through nodes 0, 1 + 2, 4 + 6 and is number 18 + 0 + 1
    walked = policy.logits[1].log_softmax(-1)[[0, 3, 10], [2, 0, 1]].sum()
    torch.testing.assert_close(policy.logp()[1, 19], walked)


def test_lengths_spread_a_log_probability_over_equal_tokens():
    logps = as_logps(table(-6.0, -2.0), torch.tensor([3, 1]))
    assert logps.length.tolist() == [3, 1]
    torch.testing.assert_close(logps.sum, table(-6.0, -2.0))
    torch.testing.assert_close(logps.mean, table(-2.0, -2.0))


def test_an_expected_loss_is_the_weighted_sum_over_all_pairs():
    # policy = reference, so that every pair costs log 2; the weights sum to 1
    logp = table([0.5, 0.3, 0.2]).log()
    weight = independent_pairs(logp, logp)
    loss = expected_loss(DPO(beta=0.7), logp, logp, weight)
    torch.testing.assert_close(loss, table(math.log(2)))


def test_an_expected_loss_agrees_with_a_loop_over_pairs(rng):
    policy, reference = random_logp((2, 4), rng), random_logp((2, 4), rng)
    weight = torch.rand((2, 4, 4), generator=rng, dtype=torch.float64)
    length = torch.tensor([[1, 2, 3, 4], [4, 1, 1, 2]])
    objective = SimPO(beta=2.0, gamma=0.5)
    total = torch.zeros(2, dtype=torch.float64)
    for problem, first, second in itertools.product(range(2), range(4), range(4)):
        margin = 2 * (
            policy[problem, first] / length[problem, first]
            - policy[problem, second] / length[problem, second]
        )
        loss = torch.log1p(torch.exp(-(margin - 0.5)))
        total[problem] += weight[problem, first, second] * loss
    found = expected_loss(objective, policy, reference, weight, length)
    torch.testing.assert_close(found, total)


def test_pairs_at_indices_are_those_of_the_square(rng):
    logp = random_logp((2, 3), rng)
    chosen, rejected = torch.tensor([[0, 2], [1, 1]]), torch.tensor([[1, 0], [2, 0]])
    some, every = pair_of(logp, chosen, rejected), all_pairs(logp)
    at = torch.tensor([0 * 9 + 0 * 3 + 1, 0 * 9 + 2 * 3 + 0, 9 + 1 * 3 + 2, 9 + 1 * 3 + 0])
    torch.testing.assert_close(some.chosen.sum, every.chosen.sum[at])
    torch.testing.assert_close(some.rejected.sum, every.rejected.sum[at])


def test_labelled_pairs_share_a_shown_pair_between_its_two_orders():
    # one pair (0, 1) shown always; sigmoid(log 3) = 3/4 of the labels say 0 > 1
    shown = table([0, 1], [0, 0])
    weight = labelled_pairs(shown, table(math.log(3), 0.0))
    torch.testing.assert_close(weight, table([0, 3 / 4], [1 / 4, 0]))


def test_sampled_dpo_gradients_average_to_the_expected_one(rng):
    logits, reference = table([0.3, -0.2, 0.6]), random_logp((3,), rng)
    reward = table(1.0, 0.0, -1.0)
    weight = labelled_pairs(independent_pairs(reference, reference), reward)
    policy = TabularPolicy(logits.squeeze(0))
    loss = expected_loss(DPO(beta=0.5), policy.logp(), reference, weight)
    (exact,) = torch.autograd.grad(loss, policy.logits)
    pairs = torch.multinomial(weight.flatten(), 200_000, replacement=True, generator=rng)
    chosen, rejected = pairs // 3, pairs % 3
    sampled = DPO(beta=0.5)(
        pair_of(policy.logp(), chosen, rejected), pair_of(reference, chosen, rejected)
    )
    (estimate,) = torch.autograd.grad(sampled.mean(), policy.logits)
    torch.testing.assert_close(estimate, exact, atol=2e-3, rtol=0)


def test_divergences_of_a_coin_are_those_worked_out_by_hand():
    fair, biased = table([0.5, 0.5]).log(), table([0.25, 0.75]).log()
    # KL(fair || biased) = .5 log 2 + .5 log(2/3) = .5 log(4/3)
    torch.testing.assert_close(kl(fair, biased), table(0.5 * math.log(4 / 3)))
    torch.testing.assert_close(entropy(fair), table(math.log(2)))
    # order 2: log(.25/.25 + .25/.75) = log(4/3)
    torch.testing.assert_close(renyi(fair, biased, table(2.0)), table(math.log(4 / 3)))
    torch.testing.assert_close(renyi(fair, biased, table(1.0)), kl(fair, biased))
    # mixture (3/8, 5/8)
    expected = 0.5 * (0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625))
    expected += 0.5 * (0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625))
    torch.testing.assert_close(jensen_shannon(fair, biased), table(expected))


def test_jensen_shannon_of_disjoint_policies_is_log_two():
    first, second = table([0.0, -800.0]), table([-800.0, 0.0])
    torch.testing.assert_close(jensen_shannon(first, second), table(math.log(2)))


def test_the_population_optimum_of_dpo_is_the_closed_form(rng):
    # pi ~ ref exp(r / beta) when Bradley-Terry labels of r order the pairs
    reference = random_logp((4, 6), rng)
    reward = torch.randn((4, 6), generator=rng, dtype=torch.float64)
    weight = labelled_pairs(independent_pairs(reference, reference), reward)
    found = population_optimum(DPO(beta=0.5), reference, weight)
    closed = (reference + reward / 0.5).log_softmax(-1)
    torch.testing.assert_close(found, closed, atol=1e-5, rtol=0)


def test_annealing_goes_where_the_optimum_is(rng):
    reference = random_logp((5,), rng)
    weight = labelled_pairs(independent_pairs(reference, reference), table(1, 0, 0, 0, -1.0))
    policy = TabularPolicy(reference)
    anneal(
        policy,
        lambda step: expected_loss(DPO(beta=1.0), policy.logp(), reference, weight),
        steps=150,
        lr=0.1,
    )
    best = population_optimum(DPO(beta=1.0), reference, weight)
    assert jensen_shannon(policy.logp().detach(), best) < 1e-6


def test_a_tabular_policy_is_a_scorer_that_an_objective_of_the_trainer_reads(rng):
    reference = random_logp((3, 4), rng)
    policy = TabularPolicy(reference)
    responses = torch.tensor([[0, 1, 2], [3, 0, 1], [2, 3, 0]])
    rows = comparison_rows(
        torch.tensor([[0], [1], [2]]), responses, torch.tensor([[1, 2, 2], [1, 2, 3], [2, 1, 2]])
    )
    frozen = score(TabularPolicy(reference), rows).detach()
    losses = DPO(beta=0.1).per_comparison(score(policy, rows), frozen, judgement(rows))
    torch.testing.assert_close(losses, torch.full((3,), math.log(2), dtype=torch.float64))
    losses.sum().backward()
    # the best response of the first prompt goes up, the others it beat go down
    assert policy.logits.grad[0, 0] < 0
    assert (policy.logits.grad[0, 1:3] > 0).all()


def test_pairs_of_a_pair_type_are_what_objectives_take(rng):
    logp = random_logp((4,), rng)
    assert isinstance(all_pairs(logp), Pair)
    assert len(all_pairs(logp).chosen.sum) == 16
