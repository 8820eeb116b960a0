"""Repetition and length of text, by hand and by what they must not mind."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.diagnostics.text import (
    distinct,
    longest_run,
    repeated_share,
    text_statistics,
)
from prefloop.types import UserError


def test_repeated_share_by_hand():
    # a b a b a: bigrams ab, ba, ab, ba: 2 distinct of 4.
    assert repeated_share("ababa", 2) == 0.5
    assert repeated_share("abcde", 2) == 0
    assert repeated_share("a", 2) == 0
    assert repeated_share("aaaa", 1) == 0.75


def test_distinct_counts_across_answers():
    # ab, bc | ab: 2 distinct of 3.
    assert distinct(["abc", "ab"], 2) == pytest.approx(2 / 3)
    assert distinct(["a", ""], 2) == 1


@pytest.mark.parametrize(
    ("answer", "covered"),
    [
        ("", 0),
        ("abc", 0),
        ("aab", 2),
        ("abcbcbd", 5),
        ("xababababy", 8),
        ("abcabc", 6),
        ("aaaaaaaaaa", 10),
        ("abcdefghabcdefgh", 16),  # a block of 8, the longest looked for
        ("abcdefghiabcdefghi", 0),  # a block of 9
    ],
)
def test_the_longest_run_by_hand(answer, covered):
    assert longest_run(answer) == covered


@given(st.lists(st.integers(0, 2), max_size=30))
def test_a_run_fits_its_answer_and_reads_the_same_backwards(answer):
    assert longest_run(answer) <= len(answer)
    assert longest_run(answer) == longest_run(answer[::-1])
    assert longest_run([*answer, 7, 7]) >= longest_run(answer)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 4))
def test_repetition_does_not_mind_which_units_are_repeated(answer, n):
    renamed = [str(unit + 10) for unit in answer]
    assert repeated_share(renamed, n) == repeated_share(answer, n)
    assert 0 <= repeated_share(answer, n) < 1


def test_statistics_of_answers():
    answers = [["the", "sea", "is", "wide"], ("no " * 12).split(), []]
    found = text_statistics(answers, n=2, limit=12)
    assert found.length.value == pytest.approx(16 / 3)
    assert found.repeated.value == pytest.approx((0 + 10 / 11 + 0) / 3)
    assert found.distinct == pytest.approx(4 / 14)  # 3 bigrams and 11 times "no no"
    assert found.longest_run.value == pytest.approx(4)
    assert found.looping.value == pytest.approx(1 / 3)
    assert found.unfinished.value == pytest.approx(1 / 3)
    assert found.empty == 1


def test_a_short_stutter_is_no_loop():
    assert text_statistics([list("aab")], n=4).looping.value == 0
    assert text_statistics([list("abab")], n=2).looping.value == 1


def test_answers_to_one_prompt_are_one_cluster():
    answers = [list("ab"), list("abcd"), list("abcdef"), list("ab")]
    assert text_statistics(answers, prompts=[0, 0, 1, 1]).length.clusters == 2
    assert text_statistics(answers).unfinished is None


@pytest.mark.parametrize(("answers", "n"), [([], 4), (["a"], 0)])
def test_nothing_to_read_is_refused(answers, n):
    with pytest.raises(UserError, match="there must be answers and n >= 1"):
        text_statistics(answers, n=n)
