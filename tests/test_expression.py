"""Objects as text: what repr writes, parse reads; anything else is refused with a hint."""

from dataclasses import dataclass

import pytest

from prefloop.expression import parse
from prefloop.types import UserError


@dataclass(frozen=True, kw_only=True)
class Leaf:
    size: float = 1.0
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Branch:
    leaves: tuple[Leaf, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.leaves) != len(self.weights):
            raise UserError("Branch needs one weight a leaf")


@dataclass(frozen=True, kw_only=True)
class Counted:
    times: int = 1
    twice: bool = False


KNOWN = (Leaf, Branch)


@pytest.mark.parametrize(
    "made",
    [
        Leaf(),
        Leaf(size=-0.5, name="a'b"),
        Leaf(size=float("inf")),
        Branch(leaves=(Leaf(), Leaf(size=2.0)), weights=(0.5, 1e-3)),
    ],
)
def test_what_repr_writes_parse_reads(made):
    assert parse(repr(made), KNOWN) == made


def test_a_bare_name_and_any_case_are_fine():
    assert parse("leaf", KNOWN) == Leaf()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Lef(size=1)", "perhaps you meant Leaf"),
        ("Leaf(sise=1)", "perhaps you meant size"),
        ("Leaf(1)", "name each value"),
        ("Leaf(size=", "cannot read"),
        ("Leaf(size=__import__('os').system('true'))", "only names, numbers"),
        ("Leaf(size=(lambda: 1)())", "only names, numbers"),
        ("Branch(leaves=[Leaf()])", "one weight a leaf"),
    ],
)
def test_anything_else_is_refused_with_a_hint(text, said):
    with pytest.raises(UserError, match=said):
        parse(text, KNOWN)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Leaf(size='x')", r"Leaf.size must be a number, got 'x'"),
        ("Leaf(size=True)", r"Leaf.size must be a number, got True"),
        ("Counted(times=1.5)", r"Counted.times must be a whole number, got 1.5"),
        ("Counted(twice='no')", r"Counted.twice must be True or False, got 'no'"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(text, said):
    with pytest.raises(UserError, match=said):
        parse(text, (Leaf, Counted))


def test_a_whole_number_is_a_number_and_a_kind_that_is_not_plain_is_left_to_the_object():
    assert parse("Leaf(size=2, name=None)", KNOWN) == Leaf(size=2)
