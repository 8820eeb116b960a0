"""Sections that stages wrote themselves, as `*.section.json`."""

from collections.abc import Sequence

from prefloop.report.run import Run
from prefloop.report.section import Section


def written(runs: Sequence[Run]) -> list[Section]:
    """Each as it stands; of several runs with the run's name in its title."""
    return [part.under(run.name, runs) for run in runs for part in run.sections]
