"""`prefloop report`: run folders -> one self-contained HTML page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page about one run, or about several side by side.

    The page is made from the files in the run folders alone. It needs no network and runs no
    script; what a run does not have is said at its end.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, as `prefloop train` and its neighbours write them."""
    out: Path | None = None
    """The page; report.html in the first run folder when not given. An older page is replaced."""

    def __call__(self) -> None:
        from prefloop.report import write_report

        print(f"report: {write_report(self.runs, self.out)}")
