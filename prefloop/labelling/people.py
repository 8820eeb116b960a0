"""People as the labellers of online training: a round waits until its pairs are judged."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prefloop.data import as_row
from prefloop.labelling.store import Store
from prefloop.labelling.tasks import tasks_of
from prefloop.online.labels import Waiting
from prefloop.runs import write_jsonl
from prefloop.types import Comparison


@dataclass(frozen=True)
class People:
    """Whoever opens `prefloop label` on the round's folder; several people give several labels.

    Attributes:
        answers: most answers to rank at once, 2 or 3.
    """

    answers: int = 3

    def __call__(self, rows: Sequence[Comparison], folder: Path) -> list[Comparison]:
        """The judgements of everybody, an annotator each, once each pair was judged or skipped.

        Writes asked.jsonl; reads labels.sqlite. Pairs of equal answers are not asked about.

        Raises:
            Waiting: a pair that nobody has judged or skipped.
        """
        asked = [replace(row, rank=None) for row in rows if len(set(row.responses)) > 1]
        tasks = tasks_of(asked, self.answers)
        source, base = folder / "asked.jsonl", folder / "labels.sqlite"
        write_jsonl(source, map(as_row, asked))
        store = Store(base)
        try:
            store.add(tasks)
            open_ones = {row.id for row in asked} - store.answered()
            found = list(store.comparisons())
        finally:
            store.close()
        if open_ones:
            raise Waiting(
                f"{len(open_ones)} of {len(asked)} prompts of {folder.name} wait for a person. "
                f"Rank their answers, then go on with --resume:\n  prefloop label --data {source} "
                f"--annotator NAME --out {base} --answers {self.answers}"
            )
        return found
