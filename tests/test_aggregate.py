"""Regret by hand and from samples, the min-max game against its closed form, policy forms."""

import math

import pytest
import torch

from prefloop.aggregate import (
    choose_policy,
    evaluate_weights,
    geometric,
    max_min_reward,
    min_max_regret,
    mixture,
    multiplicative_weights,
    next_token,
    regret_matrix,
    sampled_regret,
    two_type_weights,
)
from prefloop.tabular import random_logp
from prefloop.types import UserError


def matrix(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random_types(types: int, responses: int, seed: int, beta: float = 1.0):
    """(reward, reference, policies) of types whose policies are optimal for their rewards."""
    rng = torch.Generator().manual_seed(seed)
    reference = random_logp((responses,), rng)
    reward = 2 * torch.randn((types, responses), generator=rng, dtype=torch.float64)
    return reward, reference, (reference + reward / beta).log_softmax(-1)


def test_regret_by_hand():
    # pi_1 = (3/4, 1/4), pi_2 = (1/4, 3/4), uniform reference, beta 2: h_1 = 2 (log 1.5, log .5).
    # R[1, 2] = (3/4 - 1/4)(h_1(1) - h_1(2)) = 1/2 * 2 log 3 = log 3.
    policies = matrix((0.75, 0.25), (0.25, 0.75)).log()
    regret = regret_matrix(policies, matrix((0.5, 0.5))[0].log(), beta=2.0)
    torch.testing.assert_close(regret, matrix((0.0, math.log(3)), (math.log(3), 0.0)))


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_implicit_regret_is_regret_in_true_reward_when_policies_are_optimal(beta):
    reward, reference, policies = random_types(4, 9, seed=0, beta=beta)
    value = reward @ policies.exp().mT
    true = value.diagonal().unsqueeze(-1) - value
    torch.testing.assert_close(regret_matrix(policies, reference, beta), true)
    assert (true.diagonal() == 0).all()


def test_regret_from_samples_covers_the_exact_one_and_says_how_well():
    _, reference, policies = random_types(3, 6, seed=1)
    exact = regret_matrix(policies, reference, 1.0)
    rng = torch.Generator().manual_seed(0)
    answers = torch.multinomial(policies.exp(), 4000 * 2, replacement=True, generator=rng)
    ratio = (policies - reference)[:, answers].transpose(0, 1)  # (i, u, samples)
    estimate = sampled_regret(ratio.unflatten(-1, (4000, 2)), 1.0)
    off = ~torch.eye(3, dtype=torch.bool)
    score = (estimate.matrix - exact)[off] / estimate.standard_error[off]
    assert score.abs().max() < 4
    assert 0.2 < score.square().mean().sqrt() < 2
    assert (estimate.matrix.diagonal() == 0).all()
    assert (estimate.standard_error.diagonal() == 0).all()


def test_standard_error_by_hand():
    # Type 1's ratio is 1 and 3 on its own answers of two prompts, 0 on the other policy's: gaps
    # beta (1, 3) with beta = 2 are (2, 6): mean 4, standard deviation sqrt(8), error sqrt(8 / 2).
    ratio = torch.zeros(2, 2, 2, 1)
    ratio[0, 0, :, 0] = torch.tensor([1.0, 3.0])
    estimate = sampled_regret(ratio, 2.0)
    assert estimate.matrix[0, 1].item() == pytest.approx(4.0)
    assert estimate.standard_error[0, 1].item() == pytest.approx(2.0)


@pytest.mark.parametrize("importance", [(1.0, 1.0), (4.0, 1.0), (1.0, 8.0)])
def test_two_types_agree_with_the_closed_form(importance):
    regret = matrix((0.0, 1.3), (0.4, 0.0))
    weights, value = two_type_weights(1.3, 0.4, importance)
    found = min_max_regret(regret, torch.tensor(importance))
    assert found.weights.tolist() == pytest.approx(weights, abs=1e-9)
    assert found.worst == pytest.approx(value, abs=1e-9)


def test_importance_by_hand():
    # A symmetric game with c = (4, 1): w_1 = 4 / 5; with (8, 1): 8 / 9.
    assert two_type_weights(1.0, 1.0, (4.0, 1.0))[0][0] == pytest.approx(0.8)
    assert two_type_weights(1.0, 1.0, (8.0, 1.0))[0][0] == pytest.approx(8 / 9)
    # a = 3, b = 1: w = (3/4, 1/4), value 3/4.
    assert two_type_weights(3.0, 1.0) == ((0.75, 0.25), 0.75)


@pytest.mark.parametrize("seed", range(6))
def test_the_program_proves_its_value_and_beats_simple_weights(seed):
    types = 2 + seed % 3
    _, reference, policies = random_types(types, 8, seed)
    regret = regret_matrix(policies, reference, 1.0)
    found = min_max_regret(regret)
    assert -1e-12 <= found.gap < 1e-9
    assert found.weights.sum().item() == pytest.approx(1.0)
    uniform = torch.full((types,), 1 / types, dtype=torch.float64)
    skewed = torch.tensor([0.8] + [0.2 / (types - 1)] * (types - 1), dtype=torch.float64)
    assert found.worst <= evaluate_weights(regret, uniform) + 1e-12
    assert found.worst <= evaluate_weights(regret, skewed) + 1e-12
    approximate = multiplicative_weights(regret, steps=5000)
    # 3e-3 on the six games of the specification; one of these has value 0 and converges slower.
    assert abs(approximate.worst - found.worst) < 5e-3
    assert approximate.bound <= found.worst + 1e-12


def test_a_policy_that_nobody_minds_gets_all_the_weight():
    # Column 2 is <= 0 for every type: the value is 0, not negative.
    found = min_max_regret(matrix((0.0, -0.5), (1.0, 0.0)))
    assert found.worst == 0.0
    assert found.weights[1].item() > 0.5
    assert found.bound == pytest.approx(0.0, abs=1e-12)


def test_permuting_types_permutes_weights():
    _, reference, policies = random_types(4, 10, seed=3)
    order = torch.tensor([2, 0, 3, 1])
    weights = min_max_regret(regret_matrix(policies, reference, 1.0)).weights
    permuted = min_max_regret(regret_matrix(policies[order], reference, 1.0)).weights
    torch.testing.assert_close(permuted, weights[order], atol=1e-9, rtol=0)


def test_a_mixture_adds_probabilities():
    logps = matrix((0.5, 0.1), (0.1, 0.7)).log()
    mixed = mixture(logps, torch.tensor([0.25, 0.75]))
    assert mixed.exp().tolist() == pytest.approx([0.2, 0.55])
    personal = mixture(logps, matrix((1.0, 0.5), (0.0, 0.5)))
    assert personal.exp().tolist() == pytest.approx([0.5, 0.4])


def test_a_geometric_pool_averages_rewards():
    reward, reference, policies = random_types(2, 5, seed=0)
    pooled = geometric(policies, reference, torch.tensor([0.3, 0.7]).double()).log_softmax(-1)
    weighted = 0.3 * reward[0] + 0.7 * reward[1]
    torch.testing.assert_close(pooled, (reference + weighted).log_softmax(-1))


def test_a_geometric_pool_of_one_policy_is_that_policy_and_of_none_the_reference():
    _, reference, policies = random_types(2, 5, seed=0)
    assert torch.equal(geometric(policies, reference, torch.tensor([1.0, 0.0])), policies[0])
    assert torch.equal(geometric(policies, reference, torch.zeros(2)), reference)
    same = geometric(reference.expand(2, -1), reference, torch.tensor([1.5, -0.7]))
    torch.testing.assert_close(same, reference)


def test_max_min_reward_by_hand():
    # Rewards of type 1: (2, 0), of type 2: (0, 1). Equal at 2 w = 1 - w: w = 1/3, both get 2/3.
    found = max_min_reward(matrix((2.0, 0.0), (0.0, 1.0)))
    torch.testing.assert_close(found.weights, matrix((1 / 3, 2 / 3))[0])
    assert found.least == pytest.approx(2 / 3)
    assert found.bound == pytest.approx(2 / 3)  # nobody can do better
    # A type that gets little from every policy decides alone; regret would not let it.
    rewards = matrix((5.0, 1.0), (0.1, 0.2))
    assert max_min_reward(rewards).weights.tolist() == [0, 1]
    regret = rewards.diagonal().unsqueeze(-1) - rewards
    assert min_max_regret(regret).weights[0] > 0.9
    with pytest.raises(UserError, match="rewards must be finite, 1 of 4"):
        max_min_reward(matrix((0.0, math.inf), (1.0, 0.0)))


def test_the_next_token_of_a_mixture_is_that_of_whole_responses():
    # Two policies over two tokens, two long. Weights 1/2. After token 0, whose probability was
    # 0.8 and 0.2, the first policy counts for 0.8: p(0 | 0) = 0.8 * 0.5 + 0.2 * 0.1 = 0.42.
    logits = torch.tensor([[[0.5, 0.5]], [[0.1, 0.9]]]).log()  # (K, M, V)
    before = torch.tensor([[0.8], [0.2]]).log()
    found = next_token(logits, before, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(found, torch.tensor([[0.42, 0.58]]))
    # That is p(00) / p(0) = (0.5 * 0.8 * 0.5 + 0.5 * 0.2 * 0.1) / (0.5 * 0.8 + 0.5 * 0.2).
    assert float(found[0, 0]) == pytest.approx((0.2 + 0.01) / 0.5)
    alone = next_token(logits, before, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(alone, torch.tensor([[0.1, 0.9]]))


def test_policies_are_chosen_as_often_as_their_weights():
    weights = torch.tensor([0.1, 0.9])
    chosen = choose_policy(weights, 10_000, torch.Generator().manual_seed(0))
    assert chosen.double().mean().item() == pytest.approx(0.9, abs=0.015)  # 5 standard errors
    assert torch.equal(chosen, choose_policy(weights, 10_000, torch.Generator().manual_seed(0)))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="needs two prompts, got 1"):
        sampled_regret(torch.zeros(2, 2, 1, 3), 1.0)
    with pytest.raises(UserError, match="1 of 4 are not"):
        min_max_regret(matrix((0.0, math.inf), (1.0, 0.0)))
    with pytest.raises(UserError, match=r"positive and finite, got \[1.0, 0.0\]"):
        min_max_regret(matrix((0.0, 1.0), (1.0, 0.0)), torch.tensor([1.0, 0.0]))
    with pytest.raises(UserError, match=r"two positive regrets, got -1.0 and 2.0"):
        two_type_weights(-1.0, 2.0)
    with pytest.raises(UserError, match="sum to 1"):
        mixture(torch.zeros(2, 3), torch.tensor([0.5, 0.6]))
