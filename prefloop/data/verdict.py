"""Can this data be trained on, and what is in it? Every row is read."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefloop.data.columns import Columns
from prefloop.data.evidence import TypeEvidence, TypeEvidences
from prefloop.data.files import iterate, unique
from prefloop.data.keys import Digest, digest, prompt_key
from prefloop.data.tallies import (
    Agreement,
    Agreements,
    AnnotatorRows,
    Annotators,
    LengthBias,
    LengthBiases,
    Shape,
    Shapes,
    TokenCounts,
    TokenLengths,
)
from prefloop.data.tokens import (
    Empty,
    Encoder,
    Overlong,
    chunks,
    empty_response,
    encoder,
    fit,
    has_empty,
)
from prefloop.types import Comparison, Tokenized, UserError


@dataclass(frozen=True, kw_only=True)
class Handling:
    """How the rows would be tokenised: the choices of `tokenize`, with its defaults."""

    max_length: int | None = None
    overlong: Overlong = Overlong.refuse
    chat: bool | None = None
    empty: Empty = Empty.refuse


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `check` found.

    Attributes:
        source: the file or data set.
        rows: rows read, bad ones included.
        errors: everything that keeps the data from being trained on, each with its place.
        shape: how many rows of which kind.
        agreement: duplicates, and votes that contradict each other.
        length_bias: how often the longer response wins; None where nothing is ordered.
        annotators: who judged how much; None where no row names an annotator.
        types: whether types of annotators can be told apart; None where none of them ranked.
        tokens: lengths in tokens; None without a tokenizer.
    """

    source: str
    rows: int
    errors: tuple[str, ...]
    shape: Shape
    agreement: Agreement
    length_bias: LengthBias | None = None
    annotators: Annotators | None = None
    types: TypeEvidence | None = None
    tokens: TokenLengths | None = None

    def as_json(self) -> dict[str, Any]:
        """The verdict as plain values, ready for JSON."""
        return asdict(self)


def check(
    source: str | Path,
    columns: Columns | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    handling: Handling | None = None,
) -> Verdict:
    """Read every row of `source` and say what is in it, and what is wrong with it.

    Nothing of a row is kept but digests and lengths, so files larger than memory can be checked.

    Args:
        source, columns: as in `read`.
        tokenizer: of the model to train, for lengths in tokens and for rows past the limit.
        handling: how the rows would be tokenised; what it refuses is an error of the verdict.

    Raises:
        UserError: the source cannot be read at all. What is wrong with its rows is in `errors`.
    """
    coder = None if tokenizer is None else encoder(tokenizer, handling.chat if handling else None)
    checking = _Checking(coder, handling or Handling())
    rows = unique(iterate(source, columns, checking.refuse), checking.refuse)
    for chunk in chunks(rows):
        checking.add(chunk)
    return checking.verdict(str(source))


@dataclass
class _Checking:
    """The counts of one run of `check`."""

    coder: Encoder | None
    handling: Handling
    errors: list[str] = field(default_factory=list)
    bad_rows: int = 0
    rows: int = 0
    prompts: dict[Digest, int] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=Shapes)
    agreements: Agreements = field(default_factory=Agreements)
    length_biases: LengthBiases = field(default_factory=LengthBiases)
    annotator_rows: AnnotatorRows = field(default_factory=AnnotatorRows)
    type_evidences: TypeEvidences = field(default_factory=TypeEvidences)
    token_counts: TokenCounts = field(init=False)

    def __post_init__(self) -> None:
        special = [] if self.coder is None else self.coder.special_texts()
        self.token_counts = TokenCounts(self.handling.max_length, special)

    def refuse(self, error: UserError) -> None:
        """Note the error of a row that could not be read."""
        self.errors.append(str(error))
        self.bad_rows += 1

    def add(self, chunk: Sequence[Comparison]) -> None:
        """Count rows that could be read."""
        self.rows += len(chunk)
        people = (self.annotator_rows, self.type_evidences)
        tallies = (self.shapes, self.agreements, self.length_biases, *people)
        for row in chunk:
            prompt = self.prompts.setdefault(digest(prompt_key(row.prompt)), len(self.prompts))
            for tally in tallies:
                tally.add(row, prompt)
        speaking = list(self._speaking(chunk))
        if self.coder is not None:
            for row, tokens in self._encoded(self.coder, speaking):
                self.token_counts.add(row, tokens)

    def verdict(self, source: str) -> Verdict:
        """The counts so far."""
        shape = self.shapes.result()
        rows = self.rows + self.bad_rows
        if not rows:
            self.errors.append(f"{source}: holds no row; at least one is needed")
        elif self.rows and not shape.pairs and not shape.labelled:
            self.errors.append(
                f"{source}: there is nothing to learn: no row puts one response before another or "
                "labels one. Add rank, scores or label; prefloop score adds scores"
            )
        return Verdict(
            source=source,
            rows=rows,
            errors=tuple(self.errors),
            shape=shape,
            agreement=self.agreements.result(),
            length_bias=self.length_biases.result(),
            annotators=self.annotator_rows.result(),
            types=self.type_evidences.result(),
            tokens=self.token_counts.result(),
        )

    def _speaking(self, chunk: Iterable[Comparison]) -> Iterator[Comparison]:
        """The rows without an empty response; under `refuse` the others are errors."""
        for row in chunk:
            if not has_empty(row):
                yield row
            elif self.handling.empty is Empty.refuse:
                blank = [not text.strip() for text in row.responses]
                self.errors.append(str(empty_response(row, blank.index(True) + 1)))

    def _encoded(
        self, coder: Encoder, chunk: Sequence[Comparison]
    ) -> Iterator[tuple[Comparison, Tokenized]]:
        """Rows with their tokens; what cannot be encoded or is too long is noted."""
        try:
            encoded = list(zip(chunk, coder.encode(chunk), strict=True))
        except UserError:  # one bad row spoils the chunk: find it, row by row
            encoded = []
            for row in chunk:
                try:
                    encoded.append((row, *coder.encode([row])))
                except UserError as error:
                    self.errors.append(str(error))
        for row, tokens in encoded:
            try:
                fit(tokens, self.handling.max_length, self.handling.overlong)
            except UserError as error:
                self.errors.append(str(error))
            yield row, tokens
