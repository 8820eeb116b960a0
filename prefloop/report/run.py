"""The files of a run folder, read back; a report sees nothing else of a run.

Every file is optional. What is there but cannot be read is a user error that names the place.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefloop.report.section import Section
from prefloop.report.section_json import read_section
from prefloop.runs import read_json, read_jsonl
from prefloop.types import UserError

FILES = {
    "config.json": ("settings and versions", "every command"),
    "metrics.jsonl": ("training curves", "prefloop train"),
    "evaluation.json": ("results with intervals, reward against KL", "prefloop evaluate"),
    "samples.jsonl": ("answers before and after", "prefloop evaluate"),
    "selection.json": ("which prompts were kept", "prefloop select"),
    "diagnosis.json": ("what training did to the probabilities", "prefloop diagnose"),
    "reproduction.json": ("claims of a paper, checked", "prefloop reproduce"),
}
"""File -> (what the report shows of it, what writes it)."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder as plain data; empty where a file is absent.

    Attributes:
        folder: where it is.
        name: what the report calls it: the shortest end of its path that no other run has.
        config: {"command", "settings", "provenance"}.
        metrics: one row a step, in order; rows of one step are one, the later line wins.
        evaluation: {"result": [...], "reward_kl": [...]}.
        selection: {"rule", "cut", "kept", "total", "values", "why", "examples", ...}.
        diagnosis: {"verdict": [...], "numbers": {...}, "sections": [...]}.
        reproduction: {"name", "claims", "tables", "figures"}.
        sections: of every `*.section.json`, by file name.
        absent: names of `FILES` that are not there.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    evaluation: Mapping[str, Any]
    selection: Mapping[str, Any]
    diagnosis: Mapping[str, Any]
    reproduction: Mapping[str, Any]
    sections: tuple[Section, ...]
    absent: tuple[str, ...]

    def metric(self, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Steps and values of the rows that have the metric `name`."""
        rows = [row for row in self.metrics if isinstance(row.get(name), int | float)]
        return tuple(float(row["step"]) for row in rows), tuple(float(row[name]) for row in rows)

    def rows(self, file: str) -> Iterator[Mapping[str, Any]]:
        """The rows of a JSON-lines file of this run, one at a time; none where it is absent."""
        path = self.folder / file
        return rows_of(path) if path.exists() else iter(())


def read_runs(folders: Sequence[Path]) -> tuple[Run, ...]:
    """The runs in `folders`.

    Raises:
        UserError: no folder, one that is not there, is no run, or is given twice.
    """
    if not folders:
        raise UserError("there is no run to report on; give one run folder or more")
    whole = [Path(folder).resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        raise UserError("the same run folder is given twice; give each run once")
    names = _names(whole)
    return tuple(_read_run(Path(folder), name) for folder, name in zip(folders, names, strict=True))


def rows_of(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a JSON-lines file; a torn last line is left out, a bad line is a user error."""
    number = 0
    try:
        for number, row in enumerate(read_jsonl(path), start=1):
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: a row must be an object; found {row!r:.60}")
            yield row
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{number + 1}: not JSON: {error.msg}; mend or remove that line"
        ) from None


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "there is no such folder"
        raise UserError(f"{folder}: {what}; give the folder of a run, as `prefloop train` makes it")
    absent = tuple(file for file in FILES if not (folder / file).is_file())
    extra = sorted(folder.glob("*.section.json"))
    if len(absent) == len(FILES) and not extra:
        raise UserError(
            f"{folder}: this is not a run folder; it has none of {', '.join(FILES)} and no "
            "*.section.json"
        )

    def document(file: str) -> Mapping[str, Any]:
        return {} if not (folder / file).is_file() else _document(folder / file)

    return Run(
        folder=folder,
        name=name,
        config=document("config.json"),
        metrics=_metrics(folder / "metrics.jsonl"),
        evaluation=document("evaluation.json"),
        selection=document("selection.json"),
        diagnosis=document("diagnosis.json"),
        reproduction=document("reproduction.json"),
        sections=tuple(read_section(path) for path in extra),
        absent=absent,
    )


def _document(path: Path) -> Mapping[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; found {value!r:.60}")
    return value


def _metrics(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Rows by step. A run that was killed and resumed has some steps twice: the later line wins."""
    steps: dict[float, dict[str, Any]] = {}
    if path.is_file():
        for number, row in enumerate(rows_of(path), start=1):
            step = row.get("step")
            if isinstance(step, bool) or not isinstance(step, int | float):
                raise UserError(f"{path}:{number}: a row needs a step, a number; found {step!r}")
            steps[step] = {**steps.get(step, {}), **row}
    return tuple(steps[step] for step in sorted(steps))


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; folders called `run` get a parent."""
    depth = 2 if any(folder.name == "run" for folder in folders) else 1
    while True:
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
        depth += 1
