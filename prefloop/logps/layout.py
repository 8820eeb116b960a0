"""Which tokens share a line of a forward pass, and which comparisons go through together.

A `Row` is a prompt and one or more of its responses:

    tokens      p p p p a a a b b b b      a response follows the prompt, and sees it
    positions   0 1 2 3 4 5 6 4 5 6 7      they start again after the prompt
    segment     0 0 0 0 1 1 1 2 2 2 2      responses do not see each other

A `Sheet` is rows as tensors: one behind the other in a single line, or a line each and padded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefloop.types import Tokenized, UserError

PADDING = -1
TOKENS = 8192 if torch.accelerator.is_available() else 2048
"""Of one forward pass where nobody says; on a CPU larger passes are fresh pages each time."""
CALL = 64  # what one more forward pass costs, in tokens
LONG = 2048  # padded rows longer than this count for more: their masks grow with the square


@dataclass(frozen=True)
class Row:
    """A prompt and some of its responses (`responses`: their places), `length` tokens in all."""

    comparison: int
    responses: tuple[int, ...]
    length: int


Rows: TypeAlias = Callable[[int, Tokenized], list[Row]]


def shared(comparison: int, tokenized: Tokenized) -> list[Row]:
    """One row: the prompt once, then every response."""
    length = len(tokenized.prompt) + sum(map(len, tokenized.responses))
    return [Row(comparison, tuple(range(len(tokenized.responses))), length)]


def separate(comparison: int, tokenized: Tokenized) -> list[Row]:
    """One row a response, the prompt in each."""
    return [
        Row(comparison, (place,), len(tokenized.prompt) + len(response))
        for place, response in enumerate(tokenized.responses)
    ]


def buckets(
    batch: Sequence[Tokenized], token_budget: int, rows: Rows = shared, *, padded: bool = False
) -> list[list[int]]:
    """Indices of the comparisons to send through the model together, short ones first.

    Every index is in exactly one bucket. A bucket holds at most `token_budget` tokens (when
    `padded`, padding counts, and so does length beyond 2048); a comparison that is larger than
    that is alone in its bucket. Of such partitions the one with the least padding and the fewest
    buckets is taken, a bucket being worth 64 tokens. Depends on the lengths only.
    """
    sizes = []
    for index, tokenized in enumerate(batch):
        made = rows(index, tokenized)
        longest = max(row.length for row in made)
        sizes.append((longest, longest * len(made) if padded else sum(r.length for r in made)))
    order = sorted(range(len(batch)), key=lambda index: (sizes[index], index))
    cuts = _best_cuts([sizes[index] for index in order], token_budget, padded)
    return [order[start:end] for start, end in pairwise(cuts)]


def by_buckets(
    work: Callable[[Sequence[Tokenized]], Tensor], rows: Sequence[Tokenized], token_budget: int
) -> list[Tensor]:
    """What `work` makes of `rows`, a bucket at a time: an entry each, in the order of the rows.

    An entry is as wide as its bucket's largest row.
    """
    found = [torch.empty(0)] * len(rows)
    for part in buckets(rows, token_budget):
        for index, one in zip(part, work([rows[index] for index in part]), strict=True):
            found[index] = one
    return found


def _best_cuts(sizes: list[tuple[int, int]], token_budget: int, padded: bool) -> list[int]:
    """Borders of the cheapest partition into runs; `sizes` are (longest row, tokens), ascending."""
    costs = [0]  # of the first k comparisons; starts: where their last run begins
    starts = [0]
    for end in range(1, len(sizes) + 1):
        longest = sizes[end - 1][0]
        tokens, best, start = 0, None, end - 1
        for begin in range(end - 1, -1, -1):
            own_longest, own = sizes[begin]
            tokens += own // own_longest * longest if padded else own
            weight = max(1.0, longest / LONG) if padded else 1.0
            if begin < end - 1 and tokens * weight > token_budget:
                break
            cost = costs[begin] + tokens + CALL
            if best is None or cost <= best:
                best, start = cost, begin
        assert best is not None
        costs.append(best)
        starts.append(start)
    cuts = [len(sizes)]
    while cuts[-1] > 0:
        cuts.append(starts[cuts[-1]])
    return cuts[::-1]


@dataclass(frozen=True)
class Sheet:
    """Rows of one forward pass as tensors, and where their log-probabilities belong.

    Attributes:
        tokens, positions: as in the module's picture; R is 1 when the rows share a line.
        segment: 0 in a prompt, k in its k-th response, -1 in padding.
        pieces: (0 or k as in `segment`, length) of each prompt and response, in order.
        source: for each response token, the flat index into (R, L) of the token predicting it.
        target: the response token itself.
        place: where its log-probability goes, a flat index into (B, N, T).
    """

    tokens: Int[Tensor, "R L"]
    positions: Int[Tensor, "R L"]
    segment: Int[Tensor, "R L"]
    pieces: list[tuple[int, int]]
    source: Int[Tensor, " M"]
    target: Int[Tensor, " M"]
    place: Int[Tensor, " M"]


def lay(
    batch: Sequence[Tokenized], rows: Sequence[Row], shape: tuple[int, int, int], *, padded: bool
) -> Sheet:
    """`rows` of `batch` as a sheet; `shape` is the (B, N, T) of the table they are scored into."""
    longest = max(row.length for row in rows)
    line = _Line()
    for row in rows:
        tokenized = batch[row.comparison]
        _refuse_nothing(tokenized)
        start = len(line.tokens)
        line.add(tokenized.prompt, 0, 0)
        last_of_prompt = len(line.tokens) - 1
        for segment, place in enumerate(row.responses, start=1):
            response = tokenized.responses[place]
            first = len(line.tokens)
            line.source.extend([last_of_prompt, *range(first, first + len(response) - 1)])
            line.target.extend(response)
            corner = (row.comparison * shape[1] + place) * shape[2]
            line.place.extend(range(corner, corner + len(response)))
            line.add(response, segment, len(tokenized.prompt))
        if padded:
            line.fill(start + longest)
    width = longest if padded else len(line.tokens)
    return Sheet(
        tokens=torch.tensor(line.tokens).reshape(-1, width),
        positions=torch.tensor(line.positions).reshape(-1, width),
        segment=torch.tensor(line.segment).reshape(-1, width),
        pieces=line.pieces,
        source=torch.tensor(line.source),
        target=torch.tensor(line.target),
        place=torch.tensor(line.place),
    )


def table_shape(batch: Sequence[Tokenized]) -> tuple[int, int, int]:
    """(B, N, T) of the table that `batch` is scored into."""
    count = max(len(row.responses) for row in batch)
    longest = max(len(response) for row in batch for response in row.responses)
    return len(batch), count, longest


def response_mask(batch: Sequence[Tokenized]) -> Bool[Tensor, "B N T"]:
    """Where a response has a token."""
    count, responses, longest = table_shape(batch)
    lengths = torch.zeros((count, responses), dtype=torch.long)
    for index, row in enumerate(batch):
        lengths[index, : len(row.responses)] = torch.tensor([len(r) for r in row.responses])
    return torch.arange(longest) < lengths.unsqueeze(-1)


@dataclass
class _Line:
    """A sheet while it is written, flat."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    pieces: list[tuple[int, int]] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    place: list[int] = field(default_factory=list)

    def add(self, tokens: Sequence[int], segment: int, position: int) -> None:
        self.tokens.extend(tokens)
        self.positions.extend(range(position, position + len(tokens)))
        self.segment.extend([segment] * len(tokens))
        self.pieces.append((segment, len(tokens)))

    def fill(self, end: int) -> None:
        missing = end - len(self.tokens)
        self.tokens.extend([0] * missing)
        self.positions.extend([0] * missing)
        self.segment.extend([PADDING] * missing)


def _refuse_nothing(tokenized: Tokenized) -> None:
    if not tokenized.prompt:
        raise UserError(
            f"{tokenized.place or tokenized.id}: the prompt has no token, so nothing predicts the "
            "first token of a response; a prompt needs at least one. Give a prompt, or a tokenizer "
            "that adds a BOS token."
        )
    if not all(tokenized.responses):
        raise UserError(
            f"{tokenized.place or tokenized.id}: a response has no token; each needs at least one. "
            "Drop the row, or end responses with an EOS token."
        )


def additive_mask(
    segment: Int[Tensor, "R L"],
    positions: Int[Tensor, "R L"],
    dtype: torch.dtype,
    window: int | None = None,
) -> Float[Tensor, "R 1 L L"]:
    """0 where a token may look, the most negative number elsewhere.

    A token sees the prompt and its own response up to itself; with a sliding `window`, only what
    is fewer than `window` POSITIONS back: neighbours in a row may be far apart in the text.
    Padding sees the prompt and padding before it, so that no softmax is empty.
    """
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    keys = segment.unsqueeze(1)
    seen = causal & ((keys == 0) | (keys == segment.unsqueeze(2)))
    if window is not None:
        seen &= positions.unsqueeze(2) - positions.unsqueeze(1) < window
        seen |= torch.eye(length, dtype=torch.bool, device=segment.device)
    mask = torch.zeros(seen.shape, dtype=dtype, device=segment.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
