"""The E-step by hand, the loop around an exact M-step, starts, splits, identifiability."""

import math
from itertools import pairwise

import pytest
import torch

from prefloop.em import (
    adjusted_rand_index,
    averaged,
    by_annotator,
    dirichlet_start,
    effective_types,
    given_start,
    halves,
    kmeans,
    local_identifiability,
    match_types,
    penalized_loglik,
    responsibilities,
    rounds,
    type_accuracy,
    type_shares,
    vote_features,
)
from prefloop.types import UserError


def test_the_e_step_by_hand():
    # Shares (.25, .75), likelihoods (.6, .2): .15 / (.15 + .15) = 1/2 and evidence log .3.
    # Likelihoods (0.1, 0.9): .025 / .7 = 1/28.
    loglik = torch.tensor([[0.6, 0.2], [0.1, 0.9]], dtype=torch.float64).log()
    belief = responsibilities(loglik, torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert belief.responsibilities[:, 0].tolist() == pytest.approx([0.5, 1 / 28])
    assert belief.evidence.tolist() == pytest.approx([math.log(0.3), math.log(0.7)])


def test_hundreds_of_judgements_do_not_underflow():
    loglik = torch.tensor([[-5000.0, -5001.0]], dtype=torch.float64)
    belief = responsibilities(loglik, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert belief.responsibilities[0, 0].item() == pytest.approx(1 / (1 + math.exp(-1)))
    assert belief.evidence.item() == pytest.approx(-5000 + math.log(0.5) + math.log1p(math.exp(-1)))


def test_an_annotator_without_judgements_gets_the_shares_and_a_dead_type_stays_dead():
    shares = torch.tensor([0.3, 0.7, 0.0], dtype=torch.float64)
    belief = responsibilities(torch.zeros(1, 3, dtype=torch.float64), shares)
    assert belief.responsibilities[0].tolist() == pytest.approx([0.3, 0.7, 0.0])
    assert belief.evidence.item() == pytest.approx(0.0)


def test_log_likelihoods_are_averaged_over_rounds_by_hand():
    told = [torch.tensor([[value]]) for value in (8.0, 4.0, 0.0, 6.0)]
    plain, two, long = (averaged(lambda gamma, t: told[t], over) for over in (1, 2, 9))
    nobody = torch.zeros(1, 1)
    assert [float(plain(nobody, t)) for t in range(4)] == [8, 4, 0, 6]
    assert [float(two(nobody, t)) for t in range(4)] == [8, 6, 3, 4.5]  # steps 1, 1/2, 1/2, 1/2
    assert [float(long(nobody, t)) for t in range(4)] == [8, 6, 4, 4.5]  # the mean so far


def test_judgements_are_added_up_by_annotator():
    loglik = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]])
    total = by_annotator(loglik, torch.tensor([2, 0, 2]), 3)
    assert total.tolist() == [[-3.0, -4.0], [0.0, 0.0], [-6.0, -8.0]]
    assert total.dtype == torch.float64


def coins(rng_seed: int, annotators: int = 60, flips: int = 8) -> torch.Tensor:
    """Heads of each annotator: types with probability .8 and .3, half each."""
    rng = torch.Generator().manual_seed(rng_seed)
    bias = torch.where(torch.arange(annotators) < annotators // 2, 0.8, 0.3)
    return (torch.rand(annotators, flips, generator=rng) < bias[:, None]).double().sum(-1)


def fit_coins(heads: torch.Tensor, flips: int = 8):
    """The exact M-step of a binomial mixture, and its log-likelihood."""

    def fit(gamma: torch.Tensor, number: int) -> torch.Tensor:
        bias = (gamma * heads[:, None]).sum(0) / (flips * gamma.sum(0))
        return heads[:, None] * bias.log() + (flips - heads[:, None]) * (1 - bias).log()

    return fit


@pytest.mark.parametrize("seed", range(5))
def test_the_likelihood_never_falls_when_the_m_step_is_exact(seed):
    heads = coins(seed)
    start = dirichlet_start(len(heads), (10.0, 5.0), seed)
    history = [
        penalized_loglik(done.belief.evidence, torch.tensor(0.0, dtype=torch.float64)).item()
        for done in rounds(fit_coins(heads), start, 40)
    ]
    assert all(later >= earlier - 1e-11 for earlier, later in pairwise(history))
    assert history[-1] > history[0] + 1


def test_em_finds_two_kinds_of_coins():
    heads = coins(0, annotators=2000)
    *_, last = rounds(fit_coins(heads), dirichlet_start(2000, (10.0, 5.0), 0), 100)
    assert sorted(last.shares.tolist()) == pytest.approx([0.5, 0.5], abs=0.05)
    truth = (torch.arange(2000) >= 1000).long()
    assert type_accuracy(truth, last.belief.responsibilities) > 0.8
    torch.testing.assert_close(
        last.belief.responsibilities.sum(-1), torch.ones(2000).double(), rtol=0, atol=1e-12
    )


def test_permuting_the_types_permutes_the_outcome():
    heads = coins(1)
    start = dirichlet_start(len(heads), (2.0, 1.0), 1)
    *_, last = rounds(fit_coins(heads), start, 10)
    *_, flipped = rounds(fit_coins(heads), start.flip(-1), 10)
    torch.testing.assert_close(flipped.shares.flip(-1), last.shares)
    torch.testing.assert_close(
        flipped.belief.responsibilities.flip(-1), last.belief.responsibilities
    )


def test_a_uniform_start_is_a_saddle_that_em_never_leaves():
    heads = coins(2)
    uniform = torch.full((len(heads), 2), 0.5, dtype=torch.float64)
    for done in rounds(fit_coins(heads), uniform, 5):
        assert torch.equal(done.belief.responsibilities, uniform)


def test_the_e_step_uses_the_shares_of_the_responsibilities_before_it():
    start = torch.tensor([[0.2, 0.8], [0.4, 0.6]], dtype=torch.float64)
    same = lambda gamma, number: torch.zeros_like(gamma)  # noqa: E731
    first, second = rounds(same, start, 2)
    assert first.shares.tolist() == pytest.approx([0.3, 0.7])
    assert first.belief.responsibilities[0].tolist() == pytest.approx([0.3, 0.7])
    assert second.shares.tolist() == pytest.approx([0.3, 0.7])
    assert (first.number, second.number) == (0, 1)


def test_problems_side_by_side_are_independent():
    rng = torch.Generator().manual_seed(0)
    loglik = -torch.rand((3, 7, 2), generator=rng, dtype=torch.float64)
    shares = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    together = responsibilities(loglik, shares)
    for place in range(3):
        alone = responsibilities(loglik[place], shares[place])
        torch.testing.assert_close(together.responsibilities[place], alone.responsibilities)
    torch.testing.assert_close(
        type_shares(together.responsibilities)[1], together.responsibilities[1].mean(0)
    )


def test_effective_types_counts_what_is_alive():
    shares = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.9, 0.05, 0.05]]).double()
    # The last: entropy .9 log(1/.9) + .1 log 20 = .0948 + .2996 = .3944, exp = 1.4835.
    assert effective_types(shares).tolist() == pytest.approx([2.0, 1.0, 1.4835], abs=1e-4)


def test_starts():
    soft = dirichlet_start(500, (10.0, 5.0), 0)
    assert soft.sum(-1).tolist() == pytest.approx([1.0] * 500)
    assert soft.mean(0).tolist() == pytest.approx([2 / 3, 1 / 3], abs=0.03)
    assert torch.equal(soft, dirichlet_start(500, (10.0, 5.0), 0))
    assert given_start(torch.tensor([1, 0]), 2).tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_starts_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match=r"concentration for each type, got \(1.0, 0.0\)"):
        dirichlet_start(3, (1.0, 0.0), 0)
    with pytest.raises(UserError, match="must be 0 to 1, found 0 to 2"):
        given_start(torch.tensor([0, 2]), 2)
    with pytest.raises(UserError, match="cannot make 4 clusters of 3 annotators"):
        kmeans(torch.zeros(3, 2), 4, 0)


def test_kmeans_finds_clouds_that_are_far_apart():
    rng = torch.Generator().manual_seed(0)
    truth = torch.arange(90) % 3
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = centers[truth] + torch.randn(90, 2, generator=rng)
    labels = kmeans(points, 3, seed=0)
    assert type_accuracy(truth, given_start(labels, 3)) == 1.0
    assert torch.equal(labels, kmeans(points, 3, seed=0))


def test_kmeans_of_equal_points_does_not_fail():
    assert kmeans(torch.ones(5, 2), 3, seed=0).shape == (5,)


def test_vote_features_point_where_an_annotator_votes():
    # Annotator 0 prefers item 0 to 1 and 0 to 2: (+2, -1, -1). Annotator 1: item 2 to 0.
    item = torch.eye(3)
    direction = item[torch.tensor([0, 0, 2])] - item[torch.tensor([1, 2, 0])]
    features = vote_features(direction, torch.tensor([0, 0, 1]), 2)
    assert features.tolist() == [[2.0, -1.0, -1.0], [-1.0, 0.0, 1.0]]


def test_halves_split_every_annotator_evenly():
    rng = torch.Generator().manual_seed(0)
    annotator = torch.randint(5, (101,), generator=rng)
    half = halves(annotator, seed=3)
    total = torch.bincount(annotator, minlength=5)
    inside = torch.bincount(annotator[half], minlength=5)
    assert torch.equal(inside, (total + 1) // 2)
    assert torch.equal(half, halves(annotator, seed=3))
    assert not torch.equal(half, halves(annotator, seed=4))


def test_types_are_matched_whatever_their_names():
    truth = torch.tensor([0, 0, 1, 2, 2, 2])
    renamed = torch.tensor([1, 2, 0])[truth]
    gamma = given_start(renamed, 3)
    assert match_types(given_start(truth, 3), gamma).tolist() == [1, 2, 0]
    assert type_accuracy(truth, gamma) == 1.0
    gamma[0] = torch.tensor([1.0, 0.0, 0.0])
    assert type_accuracy(truth, gamma) == pytest.approx(5 / 6)


def test_the_rank_counts_directions_that_can_be_seen():
    # Only x + y and z^2 are observed: rank 2 of 3, and z is blind at 0.
    observe = lambda v: torch.stack([v[0] + v[1], v[2] ** 2])  # noqa: E731
    seen = local_identifiability(observe, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert (seen.rank, seen.parameters, seen.locally_identified) == (2, 3, False)
    assert seen.singular_values.tolist() == pytest.approx([6.0, math.sqrt(2.0), 0.0])
    blind = local_identifiability(observe, torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    assert blind.rank == 1
    square = local_identifiability(lambda v: v**3, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert square.locally_identified


def test_the_adjusted_rand_index_by_hand():
    # sizes 3, 2 and 4, 1; together 3, 1, 1: 3 pairs of 10 are together in both, 4 and 6 in each.
    # By chance 4 * 6 / 10 = 2.4; at most (4 + 6) / 2: (3 - 2.4) / (5 - 2.4)
    first, second = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 0, 1])
    assert adjusted_rand_index(first, second) == pytest.approx(0.6 / 2.6)


def test_one_cluster_holds_everybody():
    assert kmeans(torch.randn(4, 2), 1, seed=0).tolist() == [0, 0, 0, 0]
