"""The rank of what a design can observe: the known table of small designs, and `prefloop check`."""

import random

import pytest

from prefloop.cli import main
from prefloop.identifying import design_of, observable_rank
from prefloop.runs import read_json, write_jsonl
from prefloop.types import Comparison

RANKS = {"pairs": (1, 2), "best of three": (1, 2, 2), "rankings": (1, 2, 3)}


def judged(items: int, kind: str, each: int, people: int = 120) -> list[Comparison]:
    """Every annotator judges `each` random sets of so many items."""
    rng = random.Random(0)
    return [
        Comparison(
            "p",
            tuple(f"r{item}" for item in rng.sample(range(items), len(RANKS[kind]))),
            RANKS[kind],
            annotator=f"a{person}",
        )
        for person in range(people)
        for _ in range(each)
    ]


@pytest.mark.parametrize(
    ("kind", "each", "random_ranks", "opposite_ranks"),
    [
        # Of 2 (n - 1) + 1 parameters, for n = 3, 4, 5: table E3 of the specification.
        ("pairs", 1, (3, 6, 9), (3, 4, 5)),
        ("best of three", 1, (2, 7, 9), (2, 7, 9)),
        ("rankings", 1, (5, 7, 9), (5, 7, 9)),
        ("pairs", 2, (5, 7, 9), (5, 7, 9)),
    ],
)
def test_ranks_of_small_designs_are_those_of_the_table(kind, each, random_ranks, opposite_ranks):
    for items, expected, opposite in zip((3, 4, 5), random_ranks, opposite_ranks, strict=True):
        design = design_of(judged(items, kind, each))
        assert design is not None
        assert design.parameters(2) == 2 * (items - 1) + 1
        assert observable_rank(design).rank == expected
        assert observable_rank(design, opposite=True).rank == opposite


def test_prompts_that_one_annotator_links_are_told_together():
    # Five prompts of two responses. One judgement each: five shares for 2 * 5 + 1 parameters.
    alone = [
        Comparison(f"p{n}", ("a", "b"), (1, 2), annotator=f"{n}-{who}")
        for n in range(5)
        for who in range(9)
    ]
    design = design_of(alone)
    assert design is not None
    assert (observable_rank(design).rank, design.parameters(2)) == (5, 11)
    # Everybody judges all five: their joint answers have full rank.
    linked = [
        Comparison(f"p{n}", ("a", "b"), (1, 2), annotator=str(who))
        for who in range(9)
        for n in range(5)
    ]
    design = design_of(linked)
    assert design is not None
    assert observable_rank(design).locally_identified
    assert design.judgements == 45


def test_few_people_who_judged_much_are_looked_at_with_all_they_judged():
    # One annotator, the 28 pairs of eight responses: 15 parameters of two types, all observable.
    rows = [
        Comparison("p", (f"r{a}", f"r{b}"), (1, 2), annotator="x")
        for a in range(8)
        for b in range(a)
    ]
    design = design_of(rows)
    assert design is not None
    assert len({question for group in design.groups for question in group}) == 28
    assert observable_rank(design).locally_identified


def test_what_has_no_observable_answer_is_left_out():
    tie_above = Comparison("p", ("a", "b", "c"), (1, 1, 2), annotator="x")
    long = Comparison("p", tuple("abcde"), (1, 2, 3, 4, 5), annotator="x")
    nobody = Comparison("p", ("a", "b"), (1, 2))
    tied = Comparison("p", ("a", "b"), (1, 1), annotator="x")
    assert design_of([tie_above, long, nobody, tied]) is None
    unjudged = Comparison("p", ("a", "b", "c"), (4, None, 9), annotator="x")  # a pair
    design = design_of([unjudged])
    assert design is not None
    assert design.groups[0][0].ranks == (1, 2)


def test_only_the_most_judged_prompts_are_looked_at():
    rows = [
        Comparison(f"p{n}", (f"{n}a", f"{n}b"), (1, 2), annotator=f"x{time}")
        for n in range(100)
        for time in range(2 if n == 77 else 1)
    ]
    design = design_of(rows, types=2)
    assert design is not None
    assert 77 in design.responses
    assert len(design.responses) == 40  # 80 parameters, two types, one difference a prompt
    assert design.prompts == 100


def test_check_says_the_rank_and_what_to_collect(tmp_path, capsys):
    path, told = tmp_path / "votes.jsonl", tmp_path / "told.json"
    rows = [
        {
            "prompt": "p",
            "responses": list(row.responses),
            "rank": list(row.rank or ()),
            "annotator": row.annotator,
        }
        for row in judged(5, "pairs", 1, 60)
    ]
    write_jsonl(path, rows)
    assert main(["check", str(path), "--json", str(told)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "9 of 9 at random tastes, 5 at opposite ones" in said
    assert "Opposite tastes can hide" in said
    found = read_json(told)["observable"]
    assert (found["rank"], found["rank_opposite"], found["parameters"]) == (9, 5, 9)
    assert main(["check", str(path), "--types", "0"]) == 0
    assert "at random tastes" not in capsys.readouterr().out
