"""`prefloop reproduce`: the five papers' claims, checked on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Check the papers' claims exactly: print expected against measured, draw the figures.

    Exits with 1 when a claim that must hold does not.
    """

    name: Annotated[
        Literal["pvar", "did", "samplers", "stable", "mixture", "all"], tyro.conf.Positional
    ]
    """Which paper, or all five."""
    out: Path | None = None
    """New folder for JSON, figures and one HTML page; nothing is written without it."""
    seed: int = 0
    """Seed of every random draw."""

    def __call__(self) -> None:
        from prefloop.report import write_report
        from prefloop.reproduce import reproduce
        from prefloop.reproduce.claims import claims_table, render

        papers, failed = [], 0
        for result in reproduce(self.name, self.out, self.seed):
            print(claims_table(result), end="\n\n")
            for table in result.tables:
                print(render(table.title, table.columns, table.rows), end="\n\n")
            papers.append(result.name)
            failed += len(result.failed)
        if self.out is not None:
            page = write_report([self.out / paper for paper in papers], self.out / "report.html")
            print(f"report: {page}")
        if failed:
            print(f"{failed} claims that must hold do not")
            raise SystemExit(1)
