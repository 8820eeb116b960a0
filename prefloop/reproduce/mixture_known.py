"""E3: which data can tell hidden types apart, and which cannot however much there is of it."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from prefloop.reproduce import mixture_identify as identify
from prefloop.reproduce.claims import Claim, Reproduction, Table, at_least, at_most, near
from prefloop.reproduce.mixture_items import KINDS, Kind, best_of_three, pairs

RANKS = {
    ("pairs", False): (3, 6, 9, 11),
    ("pairs", True): (3, 4, 5, 6),
    ("best of three", False): (2, 7, 9, 11),
    ("best of three", True): (2, 7, 9, 11),
    ("rankings", False): (5, 7, 9, 11),
    ("rankings", True): (5, 7, 9, 11),
    ("two pairs by one annotator", False): (5, 7, 9, 11),
    ("two pairs by one annotator", True): (5, 7, 9, 11),
}
"""Expected Jacobian ranks for n = 3 to 6 items, of 2 (n - 1) + 1 parameters."""


def identifiability(seed: int) -> Reproduction:
    """The golden counter-example, the table of ranks, and fits of exact probabilities."""
    ranks, rank_table = rank_claims()
    fits, fit_table = fit_claims(seed)
    return Reproduction(
        name="mixture",
        claims=(*counter_example(), *ranks, *fits),
        tables=(rank_table, fit_table),
    )


def counter_example() -> list[Claim]:
    """Lemma 4.1: half the annotators like b . x, half -b . x; pairs say .5 whatever b is."""
    scalar = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    golden = {0: (0.3333, 0.3333, 0.3333), 1: (0.3737, 0.1868, 0.4395), 2: (0.4407, 0.0684, 0.4909)}
    off = 0.0
    for taste, known in golden.items():
        b = torch.tensor([float(taste)], dtype=torch.float64)
        found = identify.choice_probabilities(best_of_three(3), scalar, b)
        off = max(off, float((found - torch.tensor(known)).abs().max()))
    rng = np.random.default_rng(0)  # the specification's tastes and triples
    strong, weak = rng.standard_normal(3) * 1.5, rng.standard_normal(3) * 0.4
    tastes = torch.from_numpy(np.stack([strong, weak, np.zeros(3)]))
    triples = torch.from_numpy(rng.standard_normal((2000, 3, 3)))

    def choices(make: Callable[[int], Kind]) -> list[Tensor]:
        return [identify.choice_probabilities(make(3), triples, b) for b in tastes]

    binary, ternary = choices(pairs), choices(best_of_three)
    blind = max(float((chance - 0.5).abs().max()) for chance in binary)
    apart = float((ternary[0] - ternary[2]).abs().max())
    closer = float((ternary[0] - ternary[1]).abs().max())
    source = "Lemma 4.1, spec E3"
    return [
        at_most(
            "features 0, 1, 3: best-of-three probabilities, error", off, 5e-5, source, "derived"
        ),
        at_most("opposite tastes: pair probabilities off 1/2", blind, 2e-16, source, "third party"),
        near("best of three: strong taste against none", apart, 0.26, 0.005, source, "derived"),
        near("best of three: strong against weak taste", closer, 0.23, 0.005, source, "derived"),
    ]


def rank_claims() -> tuple[list[Claim], Table]:
    """Ranks of the Jacobian of all observable probabilities, two types over n items."""
    claims, rows = [], []
    for (name, symmetric), golden in RANKS.items():
        found = []
        for items, rank in zip((3, 4, 5, 6), golden, strict=True):
            point = identify.random_types(items, symmetric, seed=0)
            seen = identify.jacobian_rank(identify.observables(items)[name], items, point)
            found.append(seen)
            assert seen.parameters == 2 * items - 1, rank
        kind = "opposite types" if symmetric else "generic types"
        ranks = tuple(seen.rank for seen in found)
        rows.append((name, kind, *(f"{seen.rank}/{seen.parameters}" for seen in found)))
        claims.append(
            Claim(
                name=f"{name}, {kind}: Jacobian ranks for n = 3, 4, 5, 6",
                source="spec E3",
                provenance="derived",
                expected=str(golden),
                measured=str(ranks),
                holds=ranks == golden,
            )
        )
    columns = ("data", "types", "n = 3", "n = 4", "n = 5", "n = 6")
    title = "Jacobian rank / parameters: full rank means locally identified"
    return claims, Table(title=title, columns=columns, rows=tuple(rows))


def fit_claims(seed: int, starts: int = 16) -> tuple[list[Claim], Table]:
    """Fits that reproduce all probabilities exactly: are they the truth?"""
    found = {
        (types, items, name): _exact_errors(types == "opposite", items, name, (starts, seed))
        for types in ("opposite", "generic")
        for items in (3, 4, 5)
        for name in KINDS
    }
    rows = tuple((*case, *errors) for case, errors in found.items())
    table = Table(
        title="Exact fits of exact probabilities: error of the rewards",
        columns=("types", "items", "data", f"exact of {starts}", "smallest error", "largest error"),
        rows=rows,
    )
    source, claims = "spec E3 (d)", []
    for items in (4, 5):
        title = f"opposite types, {items} items: largest error of exact fits to"
        pair, best, full = (found["opposite", items, name][-1] for name in KINDS)
        claims += [
            at_least(f"{title} pairs", pair, 1.0, source, "derived"),
            at_most(f"{title} best of three", best, 2e-5, source, "derived"),
            at_most(f"{title} rankings", full, 2e-7, source, "derived"),
        ]
    rescued = at_most(
        "generic types, 5 items: smallest error of exact fits to pairs",
        found["generic", 5, "pairs"][1],
        1e-5,
        source,
        "derived",
    )
    note = "generic types are found even from pairs: the lemma is about a special case"
    return [*claims, rescued.noting(note)], table


def _exact_errors(
    opposite: bool, items: int, name: str, draws: tuple[int, int]
) -> tuple[int, float, float]:
    """How many fits are exact, and the smallest and largest error of their rewards."""
    rng = np.random.default_rng(items)
    first = rng.standard_normal(items) * 1.5
    second = -first if opposite else rng.standard_normal(items) * 1.5
    truth = torch.from_numpy(np.stack([first, second]))
    share = 0.5 if opposite else 0.35
    shares = torch.tensor([share, 1 - share], dtype=torch.float64)
    starts, seed = draws
    exact = identify.population_fits(KINDS[name](items), truth, shares, starts, seed).exact
    return len(exact), float(exact.min()), float(exact.max())
