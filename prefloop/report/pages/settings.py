"""What made the numbers: settings, versions; and what is not in the report."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefloop.report.run import FILES, Run
from prefloop.report.section import Section, Table


def settings(runs: Sequence[Run]) -> list[Section]:
    """Every setting of every run; of several runs those that differ first, in sight."""
    flat = {run.name: dict(_flat(run.config, "")) for run in runs if run.config}
    if not flat:
        return []
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    rows = {key: tuple(values.get(key) for values in flat.values()) for key in keys}
    differ = [key for key in keys if len(set(rows[key])) > 1]
    columns = ("setting", *(flat if len(flat) > 1 else ("value",)))
    everything = Table(
        title=f"All {len(keys)} settings and versions",
        columns=columns,
        rows=tuple((key, *rows[key]) for key in keys),
    )
    if len(flat) == 1:
        main = [key for key in keys if not key.startswith("provenance.")]
        rest = [key for key in keys if key.startswith("provenance.")]
        shown = Table(columns=columns, rows=tuple((_short(key), *rows[key]) for key in main))
        versions = Table(
            title="Versions and machine",
            columns=("of", "value"),
            rows=tuple((key.removeprefix("provenance."), *rows[key]) for key in rest),
        )
        folded = (versions,) if rest else ()
        return [Section(title="Settings", tables=(shown,) if main else (), folded=folded)]
    lead = f"{len(differ)} of {len(keys)} settings differ." if differ else "No setting differs."
    shown = Table(columns=columns, rows=tuple((_short(key), *rows[key]) for key in differ))
    tables = (shown,) if differ else ()
    return [Section(title="Settings", lead=lead, tables=tables, folded=(everything,))]


def absent(runs: Sequence[Run]) -> list[Section]:
    """Which files the runs do not have, what they would show, and what writes them."""
    rows = tuple(
        (file, shows, writer, ", ".join(run.name for run in runs if file in run.absent))
        for file, (shows, writer) in FILES.items()
        if any(file in run.absent for run in runs)
    )
    if not rows:
        return []
    columns = ("file", "would show", "written by", "absent in")
    drop = -1 if len(runs) == 1 else None
    return [
        Section(
            title="Not in this report",
            note="A run folder need not have every file; these are not there.",
            tables=(Table(columns=columns[:drop], rows=tuple(row[:drop] for row in rows)),),
        )
    ]


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Leaves of a nested object as ("a.b.c", text)."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(key: str) -> str:
    return key.removeprefix("settings.")
