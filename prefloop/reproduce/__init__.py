"""The five papers' claims, checked exactly, through the objectives and scores of the package.

To add a paper: a module with `reproduce(seed) -> Reproduction`, and a row in `PAPERS`.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from prefloop.reproduce.claims import Reproduction, save
from prefloop.runs import create_run
from prefloop.types import UserError

PAPERS = {
    "pvar": "prefloop.reproduce.pvar",
    "did": "prefloop.reproduce.did",
    "samplers": "prefloop.reproduce.samplers",
    "stable": "prefloop.reproduce.stable",
    "mixture": "prefloop.reproduce.mixture",
}


def papers_of(name: str) -> list[str]:
    """The papers that `name` asks for: one of `PAPERS`, or all of them."""
    if name == "all":
        return list(PAPERS)
    if name not in PAPERS:
        raise UserError(
            f"there is nothing to reproduce under {name!r}; choose one of "
            f"{', '.join(PAPERS)}, or all"
        )
    return [name]


def reproduce(name: str, out: Path | None = None, seed: int = 0) -> Iterator[Reproduction]:
    """Run the checks of one paper or of all, one after the other.

    Args:
        name: one of `PAPERS`, or "all".
        out: a new folder; each paper's JSON and figures go into out/PAPER as soon as it is done.
            Nothing is written when None.
        seed: of every random draw.
    """
    papers = papers_of(name)
    folder = None if out is None else create_run(out)
    for paper in papers:
        result: Reproduction = import_module(PAPERS[paper]).reproduce(seed)
        if folder is not None:
            save(result, create_run(folder / paper))
        yield result
