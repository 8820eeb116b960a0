"""Rows, sheets, masks and buckets, against pictures drawn by hand."""

import itertools

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.logps import Masked, attention, buckets
from prefloop.logps.layout import (
    CALL,
    LONG,
    Row,
    additive_mask,
    lay,
    response_mask,
    separate,
    shared,
    table_shape,
)
from prefloop.types import Tokenized

ROW = Tokenized(prompt=(10, 11, 12), responses=((20, 21), (30, 31, 32)))
OTHER = Tokenized(prompt=(40,), responses=((50,),))


def test_a_row_holds_the_prompt_once_and_every_response():
    sheet = lay([ROW], shared(0, ROW), (1, 2, 3), padded=True)
    assert sheet.tokens.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32]]
    assert sheet.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert sheet.segment.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert sheet.pieces == [(0, 3), (1, 2), (2, 3)]
    # the prompt's last token (at 2) predicts the first token of both responses
    assert sheet.source.tolist() == [2, 3, 2, 5, 6]
    assert sheet.target.tolist() == [20, 21, 30, 31, 32]
    assert sheet.place.tolist() == [0, 1, 3, 4, 5]  # of a table of 1 x 2 x 3


def test_rows_share_a_line_or_are_padded_on_the_right():
    batch, shape = [ROW, OTHER], (2, 2, 3)
    rows = [*shared(0, ROW), *shared(1, OTHER)]
    line = lay(batch, rows, shape, padded=False)
    assert line.tokens.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32, 40, 50]]
    assert line.source.tolist() == [2, 3, 2, 5, 6, 8]
    padded = lay(batch, rows, shape, padded=True)
    assert padded.tokens.tolist()[1] == [40, 50, 0, 0, 0, 0, 0, 0]
    assert padded.segment.tolist()[1] == [0, 1, -1, -1, -1, -1, -1, -1]
    assert padded.source.tolist() == [2, 3, 2, 5, 6, 8]
    assert line.place.tolist() == padded.place.tolist() == [0, 1, 3, 4, 5, 6]


def test_separate_rows_repeat_the_prompt():
    rows = separate(0, ROW)
    assert rows == [Row(0, (0,), 5), Row(0, (1,), 6)]
    sheet = lay([ROW], rows, (1, 2, 3), padded=True)
    assert sheet.tokens.tolist() == [[10, 11, 12, 20, 21, 0], [10, 11, 12, 30, 31, 32]]
    assert sheet.source.tolist() == [2, 3, 8, 9, 10]


def test_the_table_is_as_wide_as_the_most_responses_and_the_longest():
    assert table_shape([ROW, OTHER]) == (2, 2, 3)
    mask = response_mask([ROW, OTHER])
    assert mask.int().tolist() == [[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [0, 0, 0]]]


SEGMENT = torch.tensor([[0, 0, 1, 1, 2, 2, -1]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 2, 3, 0]])
SEEN = """
    x......
    xx.....
    xxx....
    xxxx...
    xx..x..
    xx..xx.
    xx....x
"""
SEEN_IN_A_WINDOW_OF_2 = """
    x......
    xx.....
    .xx....
    ..xx...
    .x..x..
    ....xx.
    xx....x
"""


@pytest.mark.parametrize(("window", "picture"), [(None, SEEN), (2, SEEN_IN_A_WINDOW_OF_2)])
def test_a_token_sees_the_prompt_and_its_own_response(window, picture):
    mask = additive_mask(SEGMENT, POSITIONS, torch.float32, window)
    expected = [[mark == "x" for mark in line] for line in picture.split()]
    assert mask.shape == (1, 1, 7, 7)
    assert mask[0, 0].eq(0).tolist() == expected
    assert mask[0, 0][~mask[0, 0].eq(0)].eq(torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("window", [None, 2, 3])
def test_the_masks_of_pieces_are_the_blocks_of_the_whole_mask(window):
    pieces = [(0, 5), (1, 2), (2, 4)]
    query = torch.zeros(1, 1, 11, 4)
    masks = attention._masks(pieces, window, query)
    segment = torch.tensor([[0] * 5 + [1] * 2 + [2] * 4])
    positions = torch.tensor([[*range(5), 5, 6, 5, 6, 7, 8]])
    whole = additive_mask(segment, positions, torch.float32, window)[0, 0]
    second = [*range(5), *range(7, 11)]
    assert torch.equal(masks.of(1, 2, 7)[0, 0], whole[5:7, :7])
    assert torch.equal(masks.of(2, 4, 9)[0, 0], whole[7:][:, second])
    if window is not None:
        assert torch.equal(masks.of(0, 5, 5)[0, 0], whole[:5, :5])


def test_long_responses_to_a_short_prompt_are_cheaper_apart_under_a_mask():
    short_prompt, long_prompt = tiny.row(10, [400] * 5), tiny.row(400, [20] * 5)
    way = Masked(width=128)
    # together: 2010 + 2010^2 / 384 = 12531; apart: 5 (410 + 410^2 / 384) = 4239
    assert way.rows(0, short_prompt) == separate(0, short_prompt)
    # together: 500 + 500^2 / 384 = 1151; apart: 5 (420 + 420^2 / 384) = 4397
    assert way.rows(0, long_prompt) == shared(0, long_prompt)


lengths = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1, max_size=4)),
    min_size=1,
    max_size=7,
)


def batch_of(sizes):
    return [tiny.row(prompt, responses, seed=i) for i, (prompt, responses) in enumerate(sizes)]


def cost(group, batch, padded, budget):
    """What a bucket costs, or infinity where it is not allowed."""
    rows = [row for index in group for row in (separate if padded else shared)(index, batch[index])]
    longest = max(row.length for row in rows)
    tokens = longest * len(rows) if padded else sum(row.length for row in rows)
    return tokens + CALL if tokens <= budget or len(group) == 1 else float("inf")


@given(lengths, st.integers(1, 400), st.booleans())
@settings(max_examples=60, deadline=None)
def test_buckets_hold_every_comparison_once_within_the_budget_at_the_least_cost(
    sizes, budget, padded
):
    batch = batch_of(sizes)
    rows = separate if padded else shared
    found = buckets(batch, budget, rows, padded=padded)
    assert sorted(itertools.chain(*found)) == list(range(len(batch)))
    assert found == buckets(batch, budget, rows, padded=padded)
    best = sum(cost(group, batch, padded, budget) for group in found)
    assert best < float("inf")
    order = list(itertools.chain(*found))
    for cuts in itertools.product([False, True], repeat=len(batch) - 1):
        borders = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(batch)]
        groups = [order[a:b] for a, b in itertools.pairwise(borders)]
        assert best <= sum(cost(group, batch, padded, budget) for group in groups)


def test_a_bucket_sent_again_stays_one_bucket():
    batch = tiny.batch(40, longest=60)
    for padded, rows in ((True, separate), (False, shared)):
        for group in buckets(batch, 300, rows, padded=padded):
            again = buckets([batch[i] for i in group], 300, rows, padded=padded)
            assert len(again) == 1


def test_padded_rows_beyond_the_long_length_count_for_more():
    batch = [tiny.row(LONG * 2 - 1, [1], seed=i) for i in range(4)]
    # each row: 2 LONG tokens, counted twice
    assert len(buckets(batch, 8 * LONG, separate, padded=True)) == 2
    assert len(buckets(batch, 8 * LONG, shared)) == 1
