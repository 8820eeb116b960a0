"""Hidden types over items: likelihoods by hand, exact EM, ranks, the game, the neural bandit."""

import math

import numpy as np
import pytest
import torch

from prefloop.em import dirichlet_start, given_start, kmeans
from prefloop.reproduce import mixture, mixture_known, mixture_one
from prefloop.reproduce import mixture_bandit as bandit
from prefloop.reproduce import mixture_identify as identify
from prefloop.reproduce import mixture_items as items

DOUBLE = torch.float64


def unsettled(claims) -> list[str]:
    return [claim.name for claim in claims if not claim.holds]


def test_likelihoods_of_answers_by_hand():
    # Rewards log(1, 2, 4): item 2 beats item 0 with 4/5, is best of three with 4/7, and the order
    # 2, 1, 0 has 4/7 * 2/3 = 8/21.
    reward = torch.tensor([1.0, 2.0, 4.0], dtype=DOUBLE).log()
    expected = {
        "pairs": ((2, 0), 4 / 5),
        "best of three": ((2, 0, 1), 4 / 7),
        "rankings": ((2, 1, 0), 8 / 21),
    }
    for name, (answer, chance) in expected.items():
        kind = items.KINDS[name](3)
        place = kind.responses.tolist().index(list(answer))
        assert items.outcome_loglik(kind, reward)[place].exp().item() == pytest.approx(chance)


@pytest.mark.parametrize("name", items.KINDS)
def test_the_answers_to_a_question_have_probability_one(name):
    kind = items.KINDS[name](5)
    reward = torch.randn((3, 2, 5), generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    chance = items.outcome_loglik(kind, reward).exp()
    total = torch.zeros(3, 2, int(kind.sets.max()) + 1, dtype=DOUBLE).index_add(
        -1, kind.sets, chance
    )
    torch.testing.assert_close(total, torch.ones_like(total))


def test_newton_finds_the_minimum_of_each_problem():
    goal = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=DOUBLE)
    found = items.newton(
        lambda x: (x - goal).square().sum(-1) + (x - goal).pow(4).sum(-1), 0 * goal
    )
    torch.testing.assert_close(found, goal)


def some_data(kind_name: str = "pairs", seeds: int = 2):
    """(kind, truth, types, counts) of a few seeds: 80 annotators of two opposite types."""
    kind = items.KINDS[kind_name](4)
    first = torch.tensor([2.0, 0.5, -0.5, -2.0], dtype=DOUBLE)
    truth = torch.stack([first, -first])
    rng = torch.Generator().manual_seed(0)
    types = torch.randint(2, (seeds, 80), generator=rng)
    counts = torch.stack([items.ask(kind, truth, z, 10, rng) for z in types])
    return kind, truth, types, counts


def test_one_type_is_vanilla_dpo_and_hard_types_are_dpo_on_each_cluster():
    kind, _, types, counts = some_data()
    alone = items.fit_types(kind, counts, torch.ones(2, 80, 1, dtype=DOUBLE), 3)
    hard = items.fit_types(kind, counts, torch.stack([given_start(z, 2) for z in types]), 1)

    def plain(weight: torch.Tensor) -> torch.Tensor:
        def loss(policy: torch.Tensor) -> torch.Tensor:
            fitted = (weight * items.outcome_loglik(kind, policy)).sum(-1)
            return items.RIDGE * policy.square().sum(-1) - fitted

        return items.newton(loss, torch.zeros(2, 4, dtype=DOUBLE))

    torch.testing.assert_close(alone.reward[:, 0], plain(counts.sum(1)))
    for k in (0, 1):
        members = (types == k).double().unsqueeze(-1)
        torch.testing.assert_close(hard.reward[:, k], plain((counts * members).sum(1)))


def test_em_is_monotone_permutes_and_does_not_leave_the_saddle():
    kind, truth, _, counts = some_data("rankings")
    start = torch.stack([dirichlet_start(80, (2.0, 1.0), seed) for seed in (0, 1)])
    fit = items.fit_types(kind, counts, start, 12)
    assert fit.history.diff(dim=0).min() >= -1e-11
    assert items.reward_error(truth, fit.reward).mean() < 0.3
    flipped = items.fit_types(kind, counts, start.flip(-1), 12)
    torch.testing.assert_close(flipped.reward.flip(1), fit.reward)
    uniform = torch.full((2, 80, 2), 0.5, dtype=DOUBLE)
    saddle = items.fit_types(kind, counts, uniform, 3)
    assert torch.equal(saddle.last.belief.responsibilities, uniform)
    torch.testing.assert_close(saddle.reward[:, 0], saddle.reward[:, 1])


def test_the_best_restart_is_the_likeliest_of_each_seed():
    kind, _, _, counts = some_data()
    starts = torch.stack([dirichlet_start(80, (1.0, 1.0), seed) for seed in range(6)]).reshape(
        2, 3, 80, 2
    )
    every = items.fit_types(kind, counts.unsqueeze(1), starts, 4)
    best = items.best_restart(every)
    torch.testing.assert_close(best.history[-1], every.history[-1].amax(-1))
    assert best.reward.shape == (2, 2, 4)


def test_regret_of_a_fitted_policy_by_hand():
    # Rewards (log 3, 0), (0, log 3): pi = (3/4, 1/4), (1/4, 3/4), regret log(3) / 2 crosswise.
    truth = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]], dtype=DOUBLE)
    regret = items.cross_regret(truth, truth)
    assert regret.flatten().tolist() == pytest.approx([0.0, math.log(3) / 2, math.log(3) / 2, 0.0])


def test_the_counter_example_and_the_table_of_ranks():
    assert unsettled(mixture_known.counter_example()) == []
    claims, table = mixture_known.rank_claims()
    assert unsettled(claims) == []
    assert table.rows[0] == ("pairs", "generic types", "3/5", "6/7", "9/9", "11/11")


def test_derivatives_of_answer_probabilities_are_those_of_a_difference():
    kind = items.rankings(4)
    point = torch.randn((2, 7), generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    _, slope = identify._probabilities(kind, point, 4)
    for place in range(7):
        move = 1e-5 * torch.eye(7, dtype=DOUBLE)[place]
        ahead, _ = identify._probabilities(kind, point + move, 4)
        behind, _ = identify._probabilities(kind, point - move, 4)
        torch.testing.assert_close(slope[..., place], (ahead - behind) / 2e-5, rtol=0, atol=1e-9)


def test_exact_fits_to_pairs_miss_opposite_types_and_rankings_find_them():
    truth = torch.tensor([[1.0, 0.5, -0.2, -1.3], [-1.0, -0.5, 0.2, 1.3]], dtype=DOUBLE)
    half = torch.tensor([0.5, 0.5], dtype=DOUBLE)
    blind = identify.population_fits(items.pairs(4), truth, half, 4, seed=0, steps=60)
    seeing = identify.population_fits(items.rankings(4), truth, half, 4, seed=0, steps=60)
    assert blind.exact.max() > 0.5
    assert seeing.exact.max() < 1e-7


def test_more_judgements_and_richer_ones_say_more():
    first = torch.from_numpy(np.random.default_rng(0).standard_normal(6) * 2)
    truth = torch.stack([first, -first])
    found = {
        (name, times): mixture._recovery(items.KINDS[name](6), truth, times, 1, (1, 1, 12))[0]
        for name, times in (("pairs", 4), ("pairs", 16), ("rankings", 4))
    }
    assert found["pairs", 4] == pytest.approx(0.86, abs=0.04)
    assert found["pairs", 16] == pytest.approx(0.98, abs=0.03)
    assert found["rankings", 4] == pytest.approx(0.94, abs=0.03)


def test_em_beats_clusters_and_clusters_beat_one_policy():
    kind, rng = items.pairs(6), torch.Generator().manual_seed(1)
    truth = 2 * torch.randn((3, 6), generator=rng, dtype=DOUBLE)
    types = torch.multinomial(torch.tensor([0.2, 0.3, 0.5]), 150, replacement=True, generator=rng)
    counts = items.ask(kind, truth, types, 8, rng)
    start = given_start(kmeans(mixture._votes(kind, counts), 3, seed=0), 3)
    alone = torch.ones(150, 1, dtype=DOUBLE)
    fits = (
        items.fit_types(kind, counts, start, 10),
        items.fit_types(kind, counts, start, 1),
        items.fit_types(kind, counts, alone, 1),
    )
    em, cluster, vanilla = (
        float(items.cross_regret(truth, fit.reward).amin(-1).amax()) for fit in fits
    )
    assert em < 0.8 * cluster < 0.4 * vanilla


def test_the_game_and_the_restrictive_class():
    assert unsettled(mixture_one.restrictive_claims()) == []
    claims, _, _ = mixture_one.importance_claims()
    assert unsettled(claims) == []


def test_votes_of_the_bandit_are_what_the_types_like():
    votes = bandit.vote(seed=0)
    share = torch.bincount(votes.types, minlength=3) / 100
    assert share.tolist() == pytest.approx([0.2, 0.0, 0.8], abs=0.1)
    liked = votes.types.unsqueeze(-1)
    shown = (votes.chosen == liked) | (votes.rejected == liked)
    assert (votes.chosen == liked)[shown].double().mean() > 0.99
    assert (votes.chosen != votes.rejected).all()
    assert shown.double().mean().item() == pytest.approx(2 / 3, abs=0.02)


def test_the_bandits_networks_learn_what_each_user_likes():
    votes = bandit.vote(seed=1, users=20, each=20)
    outcome = bandit.train(votes, seed=1, count=3)
    assert bandit.best_arm_accuracy(outcome, votes, seed=1) > 0.9
    assert outcome.game.gap < 1e-9
    again = bandit.train(votes, seed=1, count=3)
    assert torch.equal(again.networks.output, outcome.networks.output)
