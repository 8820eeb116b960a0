"""Linear rewards on frozen features as a start of EM: what they find, what they must equal."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from prefloop import em
from prefloop.heads.linear import maximum
from prefloop.mixture import Clusters, HeldOut, LinearRewards, Votes
from prefloop.mixture.starts import vote_directions
from prefloop.tabular import comparison_rows
from prefloop.types import UserError

ANSWERS = 60


def world(seed: int, annotators: int = 24, each: int = 8, noise: int = 20):
    """Two opposite tastes about the first of 1 + noise features of 60 answers."""
    rng = torch.Generator().manual_seed(seed)
    table = torch.randn(ANSWERS, 1 + noise, generator=rng).double()
    truth = torch.arange(annotators) % 2
    who = torch.arange(annotators).repeat_interleave(each)
    shown = torch.stack([torch.randperm(ANSWERS, generator=rng)[:2] for _ in who])
    margin = table[shown[:, 0], 0] - table[shown[:, 1], 0]
    taste = torch.where(truth[who] == 0, 2.0, -2.0)
    first = torch.rand(len(who), generator=rng) < (taste * margin).sigmoid()
    rank = torch.where(first.unsqueeze(-1), torch.tensor([1, 2]), torch.tensor([2, 1]))
    rows = comparison_rows(torch.zeros(len(who), 1, dtype=torch.long), shown, rank)
    named = [replace(row, annotator=f"a{i}") for row, i in zip(rows, who.tolist(), strict=True)]

    def features(rows) -> torch.Tensor:
        return table[torch.tensor([[answer[0] for answer in row.responses] for row in rows])]

    return Votes.of(named), truth, features


def test_linear_rewards_put_more_people_into_their_type_than_the_clusters_they_start_from():
    gained = []
    for seed in range(3):
        votes, truth, features = world(seed, annotators=32, each=4)
        found = LinearRewards()(votes, 2, seed, features)
        torch.testing.assert_close(found.sum(-1), torch.ones(len(truth), dtype=torch.float64))
        clusters = Clusters()(votes, 2, seed, features)
        gained.append((em.type_accuracy(truth, clusters), em.type_accuracy(truth, found)))
    before, after = (sum(column) / 3 for column in zip(*gained, strict=True))
    assert after > before + 0.05


def test_one_round_scores_people_by_rewards_fitted_to_the_clusters_of_the_others():
    votes, _, features = world(0, annotators=6, each=4, noise=2)
    start = Clusters()(votes, 2, 0, features)
    found = LinearRewards(ridges=(2.0,), rounds=1, folds=3)(votes, 2, 0, features)
    direction, row = vote_directions(votes, features)
    total = torch.zeros(6, 2, dtype=torch.float64)
    for part in HeldOut(folds=3)(votes, 0, 0):
        for kind in (0, 1):
            weight = start[votes.annotator[row], kind] * part.trained[row]
            reward = maximum(direction, weight, 2.0, torch.zeros(3, dtype=torch.float64))
            for annotator in votes.annotator[part.scored].unique().tolist():
                own = direction[votes.annotator[row] == annotator]
                total[annotator, kind] = logsigmoid(own @ reward).sum()
    expected = (total + start.mean(0).log()).softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_of_several_ridges_the_one_that_predicts_people_left_out_is_kept():
    votes, truth, features = world(0)
    useless, good = 1e6, 10.0  # rewards of nothing leave everybody at the shares
    both = LinearRewards(ridges=(useless, good))(votes, 2, 0, features)
    alone = LinearRewards(ridges=(good,))(votes, 2, 0, features)
    assert torch.equal(both, alone)
    nothing = LinearRewards(ridges=(useless,))(votes, 2, 0, features)
    assert (nothing.max(-1).values - nothing.mean(0).max()).abs().max() < 0.05
    assert em.type_accuracy(truth, alone) > 0.9


def test_where_linear_rewards_leave_a_type_without_people_the_clusters_stay():
    votes, _, features = world(0, annotators=4, each=1)
    found = LinearRewards(ridges=(1.0, 10.0))(votes, 2, 0, features)  # 0.17 and 0.21 people
    assert torch.equal(found, Clusters()(votes, 2, 0, features))
    assert found.sum(0).tolist() == [1.0, 3.0]


def test_rankings_are_taken_apart_and_one_type_is_everybody():
    rows = comparison_rows(
        torch.zeros(2, 1, dtype=torch.long),
        torch.tensor([[0, 1, 2], [3, 4, 5]]),
        torch.tensor([[1, 2, 3], [2, 1, 2]]),
    )
    votes = Votes.of([replace(row, annotator=who) for row, who in zip(rows, "ab", strict=True)])
    table = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()

    def features(rows) -> torch.Tensor:
        return table[torch.tensor([[answer[0] for answer in row.responses] for row in rows])]

    direction, row = vote_directions(votes, features)
    assert row.tolist() == [0, 0, 0, 1, 1]  # 0 > 1, 0 > 2, 1 > 2; 4 > 3, 4 > 5
    raw = table[[0, 0, 1, 4, 4]] - table[[1, 2, 2, 3, 5]]
    torch.testing.assert_close(direction, raw / raw.std(0, unbiased=False))
    assert LinearRewards()(votes, 1, 0, features).tolist() == [[1.0], [1.0]]
    assert LinearRewards(folds=4)(votes, 2, 0, features).shape == (2, 2)  # two people, two folds


def test_bad_numbers_of_linear_rewards_say_what_is_allowed():
    with pytest.raises(UserError, match="ridges must be positive numbers"):
        LinearRewards(ridges=(1.0, 0.0))
    with pytest.raises(UserError, match="folds must be 2 or more, got 1"):
        LinearRewards(folds=1)
