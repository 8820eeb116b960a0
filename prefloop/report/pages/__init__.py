"""The pages of a report, in reading order.

A page is a function from the runs to sections, none where the runs have nothing for it. To add
one that every run may have: a file here, and a row in `PAGES`. A stage that wants a page of its own
writes a `*.section.json` instead (`prefloop.report.section_json`) and changes nothing here.
"""

from collections.abc import Callable, Iterator, Sequence

from prefloop.report.pages.answers import answers
from prefloop.report.pages.reproduction import reproduction
from prefloop.report.pages.results import results, reward_against_kl
from prefloop.report.pages.selection import selection
from prefloop.report.pages.settings import absent, settings
from prefloop.report.pages.training import training
from prefloop.report.pages.verdict import diagnosis, verdict
from prefloop.report.pages.written import written
from prefloop.report.run import Run
from prefloop.report.section import Section

PAGES: tuple[Callable[[Sequence[Run]], Sequence[Section]], ...] = (
    results,
    verdict,
    reward_against_kl,
    training,
    diagnosis,
    reproduction,
    selection,
    written,
    answers,
    settings,
    absent,
)


def sections(runs: Sequence[Run]) -> Iterator[Section]:
    """Every section that these runs have something for."""
    for page in PAGES:
        yield from page(runs)
