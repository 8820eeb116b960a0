"""What a reproduction says: claims with their origin, tables, figures; printed and saved.

A claim that must hold fails the command when it does not. A finding that is negative or depends on
conditions is a claim too, made `conditional`: it is shown, and never fails.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import matplotlib
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from prefloop.runs import write_json

Provenance = Literal[
    "reported", "reviewed", "figure", "code", "third party", "derived", "guessed", "choice"
]
"""Where a statement comes from.

    reported     the paper says so, seen through its abstract or a published summary
    reviewed     public reviewers say so of the paper, second hand
    figure       read off a plot of the authors
    code         read in the authors' public code
    third party  somebody else's notes about the paper
    derived      our own mathematics, checked with numbers
    guessed      an unverified reading or memory
    choice       a decision of ours where the paper is unknown
"""


Number: TypeAlias = float | int
Quantity: TypeAlias = Number | str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement, what it predicts and what was measured.

    Attributes:
        name: the statement, in words.
        source: paper and theorem, equation or section of the specification.
        provenance: how well founded it is, see `Provenance`.
        expected, measured: numbers, or words where numbers would not do.
        holds: whether `measured` agrees with `expected`.
        must_hold: whether the command fails when it does not.
        note: condition, caveat or explanation.
    """

    name: str
    source: str
    provenance: Provenance
    expected: Quantity
    measured: Quantity
    holds: bool
    must_hold: bool = True
    note: str = ""

    def __post_init__(self) -> None:
        assert self.provenance in get_args(Provenance), self.provenance

    @property
    def failed(self) -> bool:
        """Whether this claim alone makes the command exit with 1."""
        return self.must_hold and not self.holds

    @property
    def verdict(self) -> str:
        """holds, FAILS, or (for a conditional finding) holds here / does not hold here."""
        if self.must_hold:
            return "holds" if self.holds else "FAILS"
        return "holds here" if self.holds else "does not hold here"

    def conditional(self, note: str) -> "Claim":
        """The same claim as a finding that may come out either way, with the reason."""
        return replace(self, must_hold=False, note=note)

    def noting(self, note: str) -> "Claim":
        """The same claim with a remark."""
        return replace(self, note=note)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers worth printing that are not claims."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Quantity, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Everything one paper's checks produced; `figures` maps a file's stem to the figure."""

    name: str
    claims: tuple[Claim, ...]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()

    @property
    def failed(self) -> tuple[Claim, ...]:
        """Claims that had to hold and do not."""
        return tuple(claim for claim in self.claims if claim.failed)


def joined(name: str, parts: Sequence[Reproduction]) -> Reproduction:
    """One reproduction from several parts of a paper, in order."""
    return Reproduction(
        name=name,
        claims=tuple(claim for part in parts for claim in part.claims),
        figures={stem: figure for part in parts for stem, figure in part.figures.items()},
        tables=tuple(table for part in parts for table in part.tables),
    )


def near(
    name: str,
    measured: Number,
    expected: Number,
    within: Number,
    source: str,
    provenance: Provenance,
) -> Claim:
    """Claim that |measured - expected| <= within."""
    return Claim(
        name=name,
        source=source,
        provenance=provenance,
        expected=f"{number(expected)} +- {number(within)}",
        measured=measured,
        holds=abs(measured - expected) <= within,
    )


def at_most(
    name: str, measured: Number, bound: Number, source: str, provenance: Provenance
) -> Claim:
    """Claim that measured <= bound."""
    return Claim(
        name=name,
        source=source,
        provenance=provenance,
        expected=f"<= {number(bound)}",
        measured=measured,
        holds=measured <= bound,
    )


def at_least(
    name: str, measured: Number, bound: Number, source: str, provenance: Provenance
) -> Claim:
    """Claim that measured >= bound."""
    return Claim(
        name=name,
        source=source,
        provenance=provenance,
        expected=f">= {number(bound)}",
        measured=measured,
        holds=measured >= bound,
    )


def in_order(
    name: str, measured: Mapping[str, float], source: str, provenance: Provenance
) -> Claim:
    """Claim that the named numbers fall strictly: first > second > ... as listed."""
    values = list(measured.values())
    return Claim(
        name=name,
        source=source,
        provenance=provenance,
        expected=" > ".join(measured),
        measured=", ".join(f"{key} {number(value)}" for key, value in measured.items()),
        holds=all(high > low for high, low in pairwise(values)),
    )


def mean_and_error(values: Float[Tensor, " S"]) -> tuple[float, float]:
    """Mean over seeds (worlds, problems) and its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def number(value: Quantity) -> str:
    """A number in four significant digits; words as they are."""
    return value if isinstance(value, str) else f"{value:.4g}"


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[Quantity]]) -> str:
    """A plain-text table, columns padded to their widest cell."""
    cells = [list(columns), *([number(cell) for cell in row] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([title, lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def claims_table(reproduction: Reproduction) -> str:
    """The claims as text: claim, where from, expected, measured, holds or not, then the notes."""
    rows = [
        (
            claim.name,
            f"{claim.source} [{claim.provenance}]",
            claim.expected,
            claim.measured,
            claim.verdict,
        )
        for claim in reproduction.claims
    ]
    columns = ("claim", "where from", "expected", "measured", "verdict")
    text = render(f"{reproduction.name}: claims", columns, rows)
    notes = [f"  {claim.name}: {claim.note}" for claim in reproduction.claims if claim.note]
    return "\n".join([text, *(["notes", *notes] if notes else [])])


def save(reproduction: Reproduction, out: Path) -> None:
    """Write `reproduction.json` and one SVG a figure into `out`, which exists.

    The JSON is {name, claims: [...], figures: [file names], tables: [{title, columns, rows}]}.
    """
    files = [f"{stem}.svg" for stem in reproduction.figures]
    for file, figure in zip(files, reproduction.figures.values(), strict=True):
        # A fixed salt and no date: the same numbers give the same file.
        with matplotlib.rc_context({"svg.hashsalt": file, "svg.fonttype": "none"}):
            figure.savefig(out / file, format="svg", metadata={"Date": None})
    write_json(out / "reproduction.json", as_json(reproduction, files))


def as_json(reproduction: Reproduction, files: Sequence[str]) -> dict[str, Any]:
    """The plain form that reports read."""
    return {
        "name": reproduction.name,
        "claims": [asdict(claim) for claim in reproduction.claims],
        "figures": list(files),
        "tables": [asdict(table) for table in reproduction.tables],
    }
