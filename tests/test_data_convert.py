"""Scores to ranks, rankings to pairs, pairs to labels, votes to rankings, and the held-out part."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.data import (
    best_vs_worst,
    drop_ties,
    group,
    ordered,
    rank_from_scores,
    sorted_by,
    split,
    to_pairs,
    unpair,
    with_ranks,
)
from prefloop.errors import UserError
from prefloop.types import Comparison


def row(responses, rank=None, **more):
    return Comparison(**{"prompt": "q", "responses": tuple(responses), "rank": rank, **more})


def vote(a, b, better=1, **more):
    """`a` against `b`: 1 for a, 2 for b, 0 for a tie."""
    rank = {1: (1, 2), 2: (2, 1), 0: (1, 1)}[better]
    return row((a, b), rank, id=f"{a}{b}", **more)


RANKS = [
    ((0.3, 0.9, 0.3), (2, 1, 2)),
    ((-1.0, -2.0, -3.0), (1, 2, 3)),
    ((5, 5), (1, 1)),
    ((), ()),
]


@pytest.mark.parametrize(("scores", "rank"), RANKS)
def test_the_highest_score_ranks_first_and_equal_scores_share_a_rank(scores, rank):
    assert rank_from_scores(scores) == rank


def test_ranks_come_from_scores_only_where_there_are_none():
    rows = with_ranks(
        [row("ab", scores=(1.0, 2.0)), row("ab", (1, 2), scores=(1.0, 2.0)), row("ab")]
    )
    assert [made.rank for made in rows] == [(2, 1), (1, 2), None]


ORDERED = [
    (row("ab", (1, 2)), [(0, 1)]),
    (row("ab", (2, 1)), [(1, 0)]),
    (row("ab", (1, 1)), []),
    (row("abc", (1, 2, 2)), [(0, 1), (0, 2)]),
    (row("abc", (2, None, 1)), [(2, 0)]),
    (row("abc", scores=(0.0, 2.0, 1.0)), [(1, 0), (1, 2), (2, 0)]),
    (row("ab", (1, 1), scores=(0.0, 2.0)), []),  # the rank decides where there is one
    (row("ab"), []),
]


@pytest.mark.parametrize(("made", "pairs"), ORDERED)
def test_strictly_ordered_pairs_are_better_first(made, pairs):
    assert ordered(made) == pairs


def test_a_ranking_becomes_its_ordered_pairs_in_the_order_of_the_file():
    made = row("abc", (2, 1, 2), id="x", weight=0.5, scores=(0.1, 0.9, 0.2), annotator="ann")
    pairs = to_pairs([made])
    assert [(pair.responses, pair.rank, pair.id) for pair in pairs] == [
        (("a", "b"), (2, 1), "x#1-2"),
        (("b", "c"), (1, 2), "x#2-3"),
    ]
    assert [pair.scores for pair in pairs] == [(0.1, 0.9), (0.9, 0.2)]
    assert {(pair.weight, pair.annotator) for pair in pairs} == {(0.5, "ann")}


def test_a_pair_is_its_own_only_pair_and_a_tie_has_none():
    pair, tie = vote("a", "b", 2, extra={"m": [1, 2]}), vote("a", "b", 0)
    assert to_pairs([pair, tie]) == [pair]


def test_a_scored_pair_gets_its_rank_and_keeps_its_id():
    (pair,) = to_pairs([row("ab", scores=(0.0, 1.0), id="x")])
    assert (pair.rank, pair.id) == ((2, 1), "x")


BEST = [
    (row("abc", (2, 1, 3)), ("b", "c"), (1, 2)),
    (row("abc", (3, 2, 1)), ("a", "c"), (2, 1)),
    (row("abcd", (1, 2, 2, 1)), ("a", "c"), (1, 2)),  # first of the best, last of the worst
    (row("abc", scores=(0.0, 1.0, 2.0)), ("a", "c"), (2, 1)),
    (row("abc", (None, 2, 1)), ("b", "c"), (2, 1)),
]


@pytest.mark.parametrize(("made", "responses", "rank"), BEST)
def test_the_best_meets_the_worst(made, responses, rank):
    (pair,) = best_vs_worst([made])
    assert (pair.responses, pair.rank) == (responses, rank)
    assert best_vs_worst([row("ab", (1, 1)), row("ab")]) == []


def test_unpaired_rows_call_the_best_good_and_the_worst_bad():
    rows = [vote("a", "b", 2), row("abcd", (2, 1, 3, None)), vote("a", "b", 0)]
    found = unpair(rows)
    assert [(made.responses, made.label, made.rank) for made in found] == [
        (("a", "b"), (False, True), None),
        (("b", "c"), (True, False), None),
    ]


def test_ties_are_dropped_with_a_count_and_labels_are_no_ties():
    rows = [vote("a", "b"), vote("a", "b", 0), row("a", label=(True,)), row("ab")]
    assert drop_ties(rows) == ([rows[0], rows[2]], 2)


def test_votes_that_settle_every_pair_become_one_ranking():
    # a > b, b > c is enough: a > c follows; d ties with c
    rows = [vote("a", "b"), vote("c", "b", 2), vote("c", "d", 0)]
    (made,), alone = group(rows)
    assert dict(zip(made.responses, made.rank, strict=True)) == {"a": 1, "b": 2, "c": 3, "d": 3}
    assert (made.id, alone) == ("ab", 0)


UNMERGED = [
    [vote("a", "b"), vote("c", "d")],  # nobody compared a with c
    [vote("a", "b"), vote("b", "c"), vote("c", "a")],  # a circle
    [vote("a", "b"), vote("a", "b", 2)],  # both ways
    [vote("a", "b"), vote("b", "c", 0), vote("a", "c", 0)],  # a > b = c = a
    [row("ab", scores=(0.0, 1.0)), row("bc", scores=(2.0, 1.0))],  # two scores for b
    [row("a", label=(True,)), row("a", label=(False,))],
    [vote("a", "b", finished=(True, False)), vote("b", "c")],  # b is whole in one row only
]


@pytest.mark.parametrize("rows", UNMERGED)
def test_rows_that_leave_a_pair_open_or_contradict_each_other_stay_apart(rows):
    assert group(rows) == (rows, len(rows))


def test_which_responses_were_cut_follows_them_everywhere():
    made = row("abc", (2, 1, 3), finished=(True, True, False))
    assert [pair.finished for pair in to_pairs([made])] == [
        (True, False),
        (True, True),
        (True, False),
    ]
    assert best_vs_worst([made])[0].finished == (True, False)
    assert unpair([made])[0].finished == (True, False)
    votes = [
        vote("a", "b", finished=(True, False)),
        vote("a", "c"),
        vote("b", "c", finished=(False, True)),
    ]
    (merged,), _ = group(votes)
    assert merged.finished == (True, False, True)


def test_rows_of_different_prompts_annotators_or_weights_are_never_merged():
    rows = [
        vote("a", "b"),
        vote("b", "c", annotator="x"),
        vote("b", "c", weight=2.0),
        vote("b", "c", prompt="other"),
        vote("b", "c", prompt=({"role": "user", "content": "q"},)),
    ]
    assert group(rows) == (rows, 0)


def test_scores_and_labels_are_gathered():
    scored = [row("ab", scores=(0.0, 1.0), id="1"), row("bc", scores=(1.0, 3.0), id="2")]
    labelled = [row("a", label=(True,), id="3"), row("b", label=(False,), id="4")]
    (scores, labels), alone = group([*scored, *labelled])
    assert (scores.responses, scores.scores) == (("a", "b", "c"), (0.0, 1.0, 3.0))
    assert (labels.responses, labels.label) == (("a", "b"), (True, False))
    assert alone == 0


def test_a_merged_row_keeps_the_extra_columns_on_which_all_agree():
    rows = [
        vote("a", "b", extra={"topic": "x", "models": ["m1", "m2"]}),
        vote("b", "c", extra={"topic": "x", "models": ["m2", "m3"]}),
    ]
    assert group(rows)[0][0].extra == {"topic": "x"}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_the_pairs_of_a_ranking_and_its_ties_lead_back_to_it(ranks, random):
    responses = "abcde"[: len(ranks)]
    pairs = [
        vote(responses[i], responses[j], 0 if ranks[i] == ranks[j] else 1 + (ranks[i] > ranks[j]))
        for i in range(len(ranks))
        for j in range(i)
    ]
    random.shuffle(pairs)
    (made,), _ = group(pairs)
    dense = [sorted(set(ranks)).index(rank) + 1 for rank in ranks]
    assert dict(zip(made.responses, made.rank, strict=True)) == dict(
        zip(responses, dense, strict=True)
    )


ROWS = [
    vote("a", "b", prompt=f"q{number % 20}", annotator=f"w{number % 7}") for number in range(60)
]


def test_a_prompt_is_held_out_with_all_its_rows_or_not_at_all():
    train, held_out = split(ROWS, 0.25, seed=0)
    assert len(train) + len(held_out) == 60
    assert len({made.prompt for made in held_out}) == 5  # a quarter of 20 prompts
    assert not {made.prompt for made in train} & {made.prompt for made in held_out}


def test_the_held_out_part_follows_from_the_seed_not_from_the_order():
    prompts = {made.prompt for made in split(ROWS, 0.25, seed=0)[1]}
    assert {made.prompt for made in split(ROWS[::-1], 0.25, seed=0)[1]} == prompts
    assert {made.prompt for made in split(ROWS, 0.25, seed=1)[1]} != prompts
    chosen = {made.prompt for made in split([*ROWS, vote("a", "b", prompt="new")], 0.25, 0)[1]}
    assert len(prompts - chosen) <= 1


def test_the_rows_of_both_parts_keep_their_order():
    numbered = [replace(made, id=f"{number:02}") for number, made in enumerate(ROWS)]
    for part in split(numbered, 0.25, seed=0):
        assert [made.id for made in part] == sorted(made.id for made in part)


def test_rows_are_sorted_by_a_column_of_numbers_and_unselected_ones_come_last():
    def made(name: str, weight: float = 1.0, **extra) -> Comparison:
        return row("ab", (1, 2), weight=weight, id=name, extra=extra)

    rows = [made("out", 0.0), made("c", place=3), made("a", place=-1.5), made("d", place=3)]
    assert [one.id for one in sorted_by(rows, "place")] == ["a", "c", "d", "out"]
    with pytest.raises(UserError, match=r"comparison 'x': there is no column 'place'.*it has loss"):
        sorted_by([*rows, made("x", loss=1.0)], "place")
    for bad in ("1", None, float("nan"), True):
        with pytest.raises(UserError, match="rows are sorted by finite numbers"):
            sorted_by([made("x", place=bad)], "place")


def test_annotators_can_be_held_out_instead():
    train, held_out = split(ROWS, 0.3, seed=0, by="annotator")
    assert len({made.annotator for made in held_out}) == 2  # 0.3 * 7 = 2.1
    assert not {made.annotator for made in train} & {made.annotator for made in held_out}


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_neither_part_is_ever_empty(fraction):
    assert all(split(ROWS, fraction, seed=0))


def test_a_split_that_cannot_be_made_is_refused():
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="must lie between 0 and 1, got"):
            split(ROWS, fraction, seed=0)
    with pytest.raises(UserError, match="cannot hold out a part of 1 prompt"):
        split([vote("a", "b")], 0.5, seed=0)
    with pytest.raises(UserError, match="comparison 'ab': no annotator, so the data cannot"):
        split([vote("a", "b")], 0.5, seed=0, by="annotator")


def test_the_scores_of_an_ensemble_follow_their_responses():
    row = Comparison("q", ("a", "b", "c"), rank=(2, 1, 2), ensemble=((1.0,), (2.0,), (3.0,)))
    assert [pair.ensemble for pair in to_pairs([row])] == [((1.0,), (2.0,)), ((2.0,), (3.0,))]
    rows = [
        Comparison("q", ("a", "b"), scores=(1.0, 0.0), ensemble=((1.0,), (2.0,)), id="1"),
        Comparison("q", ("b", "c"), scores=(0.0, 2.0), ensemble=((2.0,), (3.0,)), id="2"),
    ]
    assert group(rows)[0][0].ensemble == ((1.0,), (2.0,), (3.0,))
