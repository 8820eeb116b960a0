"""From the measures of all rows to what is kept, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefloop.data.blocks import Sizes, blocks
from prefloop.selecting.columns import table_of
from prefloop.selecting.cut import Candidates, Cut
from prefloop.selecting.scanning import Measured
from prefloop.selection import Filter, Rule, k_centres, overlap

KEPT, BEYOND, QUOTA, NEARER, FILTERED = range(5)
"""Why: kept; beyond the cut; a quota was full; nearer to a kept prompt than others; + the number of
the filter."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What became of each row; P rows of the file.

    Attributes:
        scores: of each rule, the one that selects first; NaN where a filter left the row out.
        weight: 1 kept, 0 left out; or any weight, where weights were asked for.
        order: rows that passed the filters, the most wanted first.
        place: in the order of wanting, from 1; 0 where a filter left the row out, or it fell below
            the threshold.
        why: one of the codes above.
        overlap: of the rows that each rule keeps by the same cut, the share that each other one
            keeps too.
        labels: labels that what is kept costs.
    """

    scores: tuple[Float[Tensor, " P"], ...]
    weight: Float[Tensor, " P"]
    order: Int[Tensor, " C"]
    place: Int[Tensor, " P"]
    why: Int[Tensor, " P"]
    overlap: tuple[tuple[float, ...], ...]
    labels: int

    @property
    def kept(self) -> Bool[Tensor, " P"]:
        """Which rows are kept."""
        return self.why == KEPT


def choose(
    source: Path, measured: Measured, rules: Sequence[Rule], cut: Cut, weights: bool
) -> Choice:
    """What `cut` keeps of the rows that passed, by the first of `rules`.

    Args:
        source: read again for the embeddings of what `cut.spread` chooses from.
        weights: keep every row, with a weight.
    """
    rows = measured.passed.nonzero().flatten()
    total = len(measured.passed)
    count = measured.count[rows]
    groups = tuple(group[rows] for group in measured.groups)
    found = [
        Candidates(rule.scores(values[rows]), count, groups)
        for rule, values in zip(rules, measured.measures, strict=True)
    ]
    why = torch.where(measured.passed, BEYOND, FILTERED - 1 + measured.refused.to(torch.int16))
    weight = torch.zeros(total, dtype=torch.float64)
    place = torch.zeros(total, dtype=torch.long)
    whole = cut.order(found[0])
    order = cut.within(whole, found[0])
    place[rows[order]] = torch.arange(1, len(order) + 1)
    if weights:
        weight[rows] = cut.weights(found[0].scores)
        why[rows] = KEPT
        labels = len(rows)
        shared: tuple[tuple[float, ...], ...] = ()
    else:
        kept, refused, nearer = _taken(source, rows, order, cut, found[0])
        why[rows[refused]], why[rows[nearer]], why[rows[kept]] = QUOTA, NEARER, KEPT
        weight[rows[kept]] = 1.0
        labels = int(cut.costs(count)[kept].sum())
        shared = _overlaps(found, cut, why[rows] == KEPT)
    return Choice(
        scores=tuple(_spread_out(one.scores.double(), rows, total) for one in found),
        weight=weight,
        order=rows[whole],
        place=place,
        why=why,
        overlap=shared,
        labels=labels,
    )


def reasons(filters: Sequence[Filter], cut: Cut) -> dict[int, str]:
    """Each code of `Choice.why` in words."""
    quotas = ", ".join(map(str, cut.quotas))
    return {
        KEPT: "kept",
        BEYOND: "left out: beyond the cut",
        QUOTA: f"left out: a quota was full ({quotas})",
        NEARER: "left out: nearer to a kept prompt than others are",
    } | {
        FILTERED + number: f"left out: {one.because} ({one!r})"
        for number, one in enumerate(filters)
    }


def _taken(
    source: Path, rows: Tensor, order: Tensor, cut: Cut, found: Candidates
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates that are kept, kept out by a quota, and passed over for being near others."""
    pool, refused = cut.pool(order, found)
    if cut.spread == 1 or not len(pool):
        return pool, refused, pool[:0]
    points = embeddings(source, rows[pool])
    kept = pool[k_centres(points, len(pool), cut.purse(found, pool))]
    return kept, refused, pool[~torch.isin(pool, kept)]


def embeddings(source: Path, rows: Int[Tensor, " C"]) -> Float[Tensor, "C D"]:
    """The column `embedding` of the rows at these places of the file, in the order asked for."""
    place = {row: at for at, row in enumerate(rows.tolist())}
    found: list[Tensor | None] = [None] * len(place)
    for block in blocks(source, ["embedding"], sizes=Sizes(text=8192, columns=8192)):
        inside = (rows >= block.start) & (rows < block.start + len(block))
        if inside.any():
            table = table_of(block, ["embedding"])["embedding"].float()
            for row in rows[inside].tolist():
                found[place[row]] = table[row - block.start].clone()
    return torch.stack([one for one in found if one is not None])


def _overlaps(
    found: Sequence[Candidates], cut: Cut, kept: Bool[Tensor, " P"]
) -> tuple[tuple[float, ...], ...]:
    """For each rule the share of what it keeps that each rule keeps; the first as it was cut."""
    masks = [kept, *(cut.kept(one) for one in found[1:])]
    return tuple(tuple(overlap(first, second) for second in masks) for first in masks)


def _spread_out(values: Tensor, rows: Tensor, total: int) -> Tensor:
    whole = torch.full((total,), torch.nan, dtype=values.dtype)
    whole[rows] = values
    return whole
