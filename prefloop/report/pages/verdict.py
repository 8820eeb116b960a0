"""What training did to the probabilities: the sentences and numbers of `diagnosis.json`."""

from collections.abc import Sequence

from prefloop.report.run import Run
from prefloop.report.section import Section, Table, section
from prefloop.types import UserError


def verdict(runs: Sequence[Run]) -> list[Section]:
    """The verdict in words first, the numbers behind it folded, then the sections it came with."""
    found = []
    for run in runs:
        if not run.diagnosis:
            continue
        place = run.folder / "diagnosis.json"
        title = "Verdict" if len(runs) == 1 else f"Verdict on {run.name}"
        sentences = run.diagnosis.get("verdict", [])
        numbers = run.diagnosis.get("numbers", {})
        if not isinstance(sentences, list) or not isinstance(numbers, dict):
            raise UserError(f"{place}: verdict must be a list of sentences, numbers an object")
        rows = tuple((str(key), value) for key, value in numbers.items() if _plain(value))
        found.append(
            Section(
                title=title,
                paragraphs=tuple(map(str, sentences)),
                folded=(Table(title="The numbers behind it", columns=("number", "value"), rows=rows),)
                if rows
                else (),
            )
        )
        sections = run.diagnosis.get("sections", [])
        found += [
            section(part, f"{place}: sections[{index}]") for index, part in enumerate(sections)
        ]
    return found


def _plain(value: object) -> bool:
    return value is None or isinstance(value, int | float | str)
