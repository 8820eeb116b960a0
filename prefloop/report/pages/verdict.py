"""What training did to the probabilities: `diagnosis.json`."""

from collections.abc import Sequence

from prefloop.report.run import Run
from prefloop.report.section import Section, Table, of_run
from prefloop.report.section_json import section
from prefloop.types import UserError


def verdict(runs: Sequence[Run]) -> list[Section]:
    """The verdict in words, of several runs one under the other; the numbers behind it folded."""
    told = {run.name: _sentences(run) for run in runs if run.diagnosis}
    if not told:
        return []
    numbers = tuple(
        Table(title=of_run("The numbers behind it", run.name, runs), columns=COLUMNS, rows=rows)
        for run in runs
        if (rows := _numbers(run))
    )
    if len(runs) == 1:
        return [Section(title="Verdict", paragraphs=told[runs[0].name], folded=numbers)]
    rows = tuple((name, " ".join(sentences)) for name, sentences in told.items())
    table = Table(columns=("run", "verdict"), rows=rows)
    return [Section(title="Verdict", tables=(table,), folded=numbers)]


def diagnosis(runs: Sequence[Run]) -> list[Section]:
    """The sections that came with the verdict."""
    found = []
    for run in runs:
        place = f"{run.folder / 'diagnosis.json'}: sections"
        parts = run.diagnosis.get("sections", [])
        if not isinstance(parts, list):
            raise UserError(f"{place} must be a list")
        found += [
            section(part, f"{place}[{index}]").under(run.name, runs)
            for index, part in enumerate(parts)
        ]
    return found


COLUMNS = ("number", "value")


def _sentences(run: Run) -> tuple[str, ...]:
    sentences = run.diagnosis.get("verdict", [])
    if not isinstance(sentences, list):
        raise UserError(f"{run.folder / 'diagnosis.json'}: verdict must be a list of sentences")
    return tuple(map(str, sentences))


def _numbers(run: Run) -> tuple[tuple[str, str | int | float | None], ...]:
    numbers = run.diagnosis.get("numbers", {})
    if not isinstance(numbers, dict):
        raise UserError(f"{run.folder / 'diagnosis.json'}: numbers must be an object")
    return tuple(
        (key, value)
        for key, value in numbers.items()
        if value is None or isinstance(value, int | float | str)
    )
