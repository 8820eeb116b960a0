"""What the judgements of annotators can teach about types of annotators."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from prefloop.data.keys import Digest, digest
from prefloop.types import Comparison


@dataclass(frozen=True, kw_only=True)
class TypeEvidence:
    """Whether types of annotators can be told apart from what each of them judged.

    With one judgement between two responses each, half wanting one thing and half the opposite look
    like nobody caring (arXiv 2510.15716, Lemma 4.1); a second judgement, or one among three
    responses, tells them apart (Theorem 4.2), if the sets of responses differ.

    Attributes:
        annotators: who judged anything.
        informative: of them, those with two judgements or more, or one of three responses or more.
        judged: number of responses that were judged together -> judgements.
        sets: different sets of responses; one set shown to everybody teaches little.
    """

    annotators: int
    informative: int
    judged: Mapping[int, int]
    sets: int

    def __str__(self) -> str:
        """The verdict in one sentence."""
        if self.annotators < 2:
            return "no: one annotator has one type"
        if not self.informative:
            return (
                "no: one judgement between two responses each cannot tell opposite tastes from no "
                "taste; collect a second vote of each, or the best of three"
            )
        poor = "" if self.sets > 1 else "; but all saw the same responses, show others too"
        return f"yes, by {self.informative:,} of {self.annotators:,} annotators{poor}"


class TypeEvidences:
    """Counts `TypeEvidence`; keeps a digest a set of responses."""

    def __init__(self) -> None:
        self._judgements: Counter[str] = Counter()
        self._richer: set[str] = set()
        self._judged: Counter[int] = Counter()
        self._sets: set[Digest] = set()

    def add(self, row: Comparison, prompt: int) -> None:
        """Count one row."""
        judged = sum(rank is not None for rank in row.rank or ())
        ordered = len({rank for rank in row.rank or () if rank is not None}) > 1
        if row.annotator is None or not ordered:
            return
        self._judgements[row.annotator] += 1
        self._judged[judged] += 1
        if judged > 2:
            self._richer.add(row.annotator)
        self._sets.add(digest("\0".join([str(prompt), *sorted(row.responses)])))

    def result(self) -> TypeEvidence | None:
        """The counts so far; None where no row with a name puts one response before another."""
        if not self._judgements:
            return None
        repeated = {name for name, count in self._judgements.items() if count > 1}
        return TypeEvidence(
            annotators=len(self._judgements),
            informative=len(repeated | self._richer),
            judged=dict(sorted(self._judged.items())),
            sets=len(self._sets),
        )
