"""Run folders -> one self-contained HTML page.

run           the files of a run, read back        section   what a page is made of
pages/        runs -> sections                     drawing   figures -> SVG
page          sections -> HTML                     words     numbers and text to read
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefloop.report.page import render
from prefloop.report.pages import sections
from prefloop.report.run import Run, read_runs
from prefloop.runs import write_text


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run, or of several side by side; returns where it is.

    Args:
        folders: run folders. Only files in them are read; see `prefloop.report.run.FILES`.
        out: the page; `report.html` in the first folder when None. An older report is replaced.

    Raises:
        UserError: a folder that is not a run, or a file in it that cannot be read.
    """
    page = report(folders)
    path = Path(folders[0]) / "report.html" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def report(folders: Sequence[Path]) -> str:
    """The page of `write_report` as text; the same files give the same text."""
    runs = read_runs([Path(folder) for folder in folders])
    return render(_title(runs), _subtitle(runs), list(sections(runs)))


def _title(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    if len(names) > 3:
        return f"{len(names)} runs"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _subtitle(runs: Sequence[Run]) -> str:
    """What was trained on what, of a single run."""
    if len(runs) > 1:
        return "side by side" if len(runs) <= 3 else ", ".join(run.name for run in runs)
    config = runs[0].config
    settings: Any = config.get("settings", {})
    parts = [f"prefloop {config['command']}"] if "command" in config else []
    if isinstance(settings, Mapping):
        told = [settings.get(key) for key in ("model", "data", "objective")]
        parts += [_shown(value) for value in told if isinstance(value, str) and value]
    return " \u00b7 ".join(parts)


def _shown(value: str) -> str:
    """A path from the root says more of the machine than of the run: its last name is enough."""
    return Path(value).name if Path(value).is_absolute() else value
