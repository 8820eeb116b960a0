"""Rules that make pairs: numbers by hand, the laws of each, and what they refuse."""

import math
from collections import Counter

import pytest

from prefloop.pairing import (
    best_worst,
    first_round,
    paired,
    rejection_sample,
    threshold_pairs,
    tournament,
    with_mismatched,
)
from prefloop.types import Comparison, Tokenized, UserError, judgement

SCORES = [0.3, -1.0, 2.0, 0.3, 1.5, -0.7, 0.9]


def test_best_against_worst_takes_the_first_best_and_the_last_worst():
    assert best_worst([1.0, 3.0, 0.0, 3.0, 0.0]) == [(1, 4)]


def test_equal_scores_make_no_pair():
    assert best_worst([2.0, 2.0, 2.0]) == []
    assert tournament([2.0, 2.0], [0, 1]) == []
    assert threshold_pairs([2.0, 2.0], threshold=0.5) == []


def test_threshold_pairs_are_the_confident_ones():
    # sigmoid(1) = .7311, sigmoid(3) = .9526, sigmoid(2) = .8808
    assert threshold_pairs([2.0, 1.0, -1.0], threshold=0.85) == [(0, 2), (1, 2)]
    assert threshold_pairs([2.0, 1.0, -1.0], threshold=0.7) == [(0, 1), (0, 2), (1, 2)]


def test_the_temperature_of_threshold_pairs_is_in_units_of_the_scores():
    scaled = [10 * score for score in SCORES]
    assert threshold_pairs(scaled, temperature=10.0) == threshold_pairs(SCORES)


def test_a_cap_draws_some_of_the_pairs_and_the_same_ones_for_a_seed():
    every = threshold_pairs(SCORES, threshold=0.6)
    some = threshold_pairs(SCORES, threshold=0.6, cap=3, seed=7)
    assert len(every) > 3
    assert len(set(some)) == 3
    assert set(some) < set(every)
    assert some == threshold_pairs(SCORES, threshold=0.6, cap=3, seed=7)
    assert len({tuple(threshold_pairs(SCORES, 0.6, cap=3, seed=seed)) for seed in range(9)}) > 1


def test_rejection_sampling_accepts_with_the_stated_probability():
    # R = 1, .5, 0 at .5: 1, e^-1 = .367879, e^-2 = .135335 in the first pass. One is kept, and a
    # random order is read: the chance of each is the mean over the six orders of being the first
    # accepted one, given that a pass always accepts the best.
    b, c = math.exp(-1), math.exp(-2)
    first = [
        # of the orders abc, acb, bac, bca, cab, cba
        (1 + 1 + (1 - b) + (1 - b) * (1 - c) + (1 - c) + (1 - c) * (1 - b)) / 6,
        (0 + 0 + b + b + 0 + (1 - c) * b) / 6,
        (0 + 0 + 0 + (1 - b) * c + c + c) / 6,
    ]
    assert sum(first) == pytest.approx(1.0)
    draws = 20_000
    count = Counter(
        rejection_sample([1.0, 0.5, 0.0], keep=1, temperature=0.5, seed=seed)[0]
        for seed in range(draws)
    )
    for at in range(3):  # four standard errors
        error = 4 * math.sqrt(first[at] * (1 - first[at]) / draws)
        assert count[at] / draws == pytest.approx(first[at], abs=error)


def test_a_low_temperature_keeps_the_top_and_a_high_one_keeps_anything():
    top = sorted(range(len(SCORES)), key=lambda at: -SCORES[at])[:3]
    for seed in range(20):
        assert sorted(rejection_sample(SCORES, 3, temperature=1e-3, seed=seed)) == sorted(top)
    anything = Counter(
        at for seed in range(300) for at in rejection_sample(SCORES, 3, 1e9, seed=seed)
    )
    assert set(anything) == set(range(len(SCORES)))
    assert min(anything.values()) > 80  # 300 x 3 / 7 = 129, eleven is one standard deviation


def test_rejection_sampling_keeps_each_candidate_once_and_can_keep_all():
    assert sorted(rejection_sample(SCORES, keep=len(SCORES))) == list(range(len(SCORES)))


def test_a_tournament_knocks_out_all_but_the_best():
    for seed in range(20):
        pairs = tournament([0.0, 1.0, 2.0, 3.0, 4.0], [0, 1, 2, 3, 4], seed)
        assert sorted(loser for _, loser in pairs) == [0, 1, 2, 3]
        assert all(better > worse for better, worse in pairs)


def test_a_first_round_pairs_each_candidate_once():
    pairs = first_round([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0, 2, 3, 5], seed=1)
    assert sorted(at for pair in pairs for at in pair) == [0, 2, 3, 5]
    assert all(better > worse for better, worse in pairs)


def test_paired_rows_carry_what_belongs_to_their_two_responses():
    row = Comparison(
        "p",
        ("a", "b", "c"),
        scores=(0.0, 2.0, 1.0),
        id="r",
        ensemble=((0.0,), (2.0,), (1.0,)),
        finished=(False, True, True),
    )
    assert row.scores is not None
    pair = paired(row, best_worst(row.scores))
    assert [(p.responses, p.rank, p.scores, p.ensemble, p.finished, p.id) for p in pair] == [
        (("b", "a"), (1, 2), (2.0, 0.0), ((2.0,), (0.0,)), (True, False), "r#2-1")
    ]


def test_a_mismatched_response_comes_from_the_next_other_prompt_and_is_not_judged():
    rows = [
        Tokenized((1,), ((10,), (11,)), rank=(1, 2)),
        Tokenized((1,), ((12,),), label=(True,)),
        Tokenized((2,), ((13,),), label=(False,), scores=(0.5,), ensemble=((1.0, 2.0),)),
    ]
    more = with_mismatched(rows)
    assert [row.responses[-1] for row in more] == [(13,), (13,), (10,)]
    judged = judgement(more)
    assert judged.rank.tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert judged.label.tolist() == [[-1, -1, -1], [1, -1, -1], [0, -1, -1]]
    assert judged.scores[2, 1].isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_worst([1.0]), "a pair needs two responses, got 1"),
        (lambda: best_worst([1.0, math.nan]), r"responses \[2\] have a score that is NaN"),
        (lambda: tournament([1.0, math.inf], [0, 1]), "scores must be finite"),
        (lambda: first_round([1.0, math.inf], [0, 1]), "scores must be finite"),
        (lambda: threshold_pairs([1.0, 2.0], threshold=0.4), r"threshold must be in \[0.5, 1\)"),
        (lambda: threshold_pairs([1.0, 2.0], temperature=0.0), "temperature must be positive"),
        (lambda: threshold_pairs([1.0, 9.0], cap=0), "cap must be 1 or more, got 0"),
        (lambda: rejection_sample([1.0, 2.0], keep=3), "cannot keep 3 of 2 candidates"),
        (lambda: rejection_sample([1.0, 2.0], keep=1, temperature=-1.0), "must be positive"),
        (lambda: with_mismatched([Tokenized((1,), ((2,),))] * 2), "all rows have the same prompt"),
    ],
)
def test_a_mistake_is_refused_with_the_value(call, message):
    with pytest.raises(UserError, match=message):
        call()
