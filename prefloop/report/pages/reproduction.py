"""Claims of a paper, checked: `reproduction.json` and the figures beside it."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefloop.report.run import Run
from prefloop.report.section import Picture, Section, Table
from prefloop.report.section_json import table
from prefloop.types import UserError

KINDS = {".svg": "image/svg+xml", ".png": "image/png"}


def reproduction(runs: Sequence[Run]) -> list[Section]:
    """One section a paper: how many claims hold, each claim with its origin, tables, figures."""
    return [_of_run(run) for run in runs if run.reproduction]


def _of_run(run: Run) -> Section:
    place = run.folder / "reproduction.json"
    claims = run.reproduction.get("claims", [])
    if not isinstance(claims, list) or not all(isinstance(claim, dict) for claim in claims):
        raise UserError(f"{place}: claims must be a list of objects")
    failed = frozenset(index for index, claim in enumerate(claims) if _verdict(claim) == "fails")
    must = [claim for claim in claims if claim.get("must_hold", True)]
    good = sum(bool(claim.get("holds")) for claim in must)
    rows = tuple(
        (
            str(claim.get("name", "")),
            f"{claim.get('source', '')} [{claim.get('provenance', '')}]",
            _shown(claim.get("expected")),
            _shown(claim.get("measured")),
            _verdict(claim),
            str(claim.get("note") or ""),
        )
        for claim in claims
    )
    columns = ("claim", "where from", "expected", "measured", "verdict", "note")
    tables = run.reproduction.get("tables", [])
    return Section(
        title=f"Reproduction: {run.reproduction.get('name', run.name)}",
        lead=f"{good} of {len(must)} claims that must hold do, of {len(claims)} in all.",
        tables=(
            Table(columns=columns, rows=rows, emphasis=failed),
            *(table(part, f"{place}: tables[{index}]") for index, part in enumerate(tables)),
        ),
        figures=tuple(_picture(run.folder, file) for file in run.reproduction.get("figures", [])),
    )


def _verdict(claim: Mapping[str, Any]) -> str:
    if claim.get("must_hold", True):
        return "holds" if claim.get("holds") else "fails"
    return "holds here" if claim.get("holds") else "does not hold here"


def _shown(value: Any) -> str | int | float | None:
    return value if value is None or isinstance(value, int | float) else str(value)


def _picture(folder: Path, file: str) -> Picture:
    """An image beside the JSON; as an image element it can run no script and load nothing."""
    path = folder / file
    if Path(file).name != file or path.suffix not in KINDS:
        raise UserError(
            f"{folder / 'reproduction.json'}: figures must be {' or '.join(KINDS)} files of that "
            f"folder; found {file!r}"
        )
    if not path.is_file():
        raise UserError(f"{path}: there is no such file, but reproduction.json names it")
    data = base64.b64encode(path.read_bytes()).decode()
    return Picture(
        title=path.stem.replace("_", " "), url=f"data:{KINDS[path.suffix]};base64,{data}"
    )
