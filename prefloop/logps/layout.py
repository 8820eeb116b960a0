"""Rows of a forward pass: which tokens share a row, who sees whom, which rows are padded together.

A row holds a prompt and one or more of its responses:

    tokens      p p p p a a a b b b b . .      "." is padding, at the end
    positions   0 1 2 3 4 5 6 4 5 6 7 0 0      they start again after the prompt
    block       0 0 0 0 1 1 1 2 2 2 2 -1 -1    a token sees the prompt and its own block, backwards

To add a layout: write a function from a `Tokenized` to its rows; everything below works on rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefloop.types import Tokenized

PADDING = -1
CALL = 64  # what starting one more forward pass costs, in padded tokens
LONG = 2048  # rows longer than this count for more: their masks grow with the square


@dataclass(frozen=True)
class Row:
    """A prompt and some of its responses (`responses`: their places), `length` tokens in all."""

    comparison: int
    responses: tuple[int, ...]
    length: int


Layout: TypeAlias = Callable[[int, Tokenized], list[Row]]


def shared(comparison: int, tokenized: Tokenized) -> list[Row]:
    """One row: the prompt once, then every response."""
    length = len(tokenized.prompt) + sum(map(len, tokenized.responses))
    return [Row(comparison, tuple(range(len(tokenized.responses))), length)]


def separate(comparison: int, tokenized: Tokenized) -> list[Row]:
    """One row a response, the prompt in each: the plain way."""
    return [
        Row(comparison, (place,), len(tokenized.prompt) + len(response))
        for place, response in enumerate(tokenized.responses)
    ]


@dataclass(frozen=True)
class Cheapest:
    """`shared` or `separate`, whichever is estimated to cost less for this comparison.

        cost of a row of L tokens = L + attention * L^2

    counted twice over for the attention of shared rows, whose mask cannot skip the upper triangle.

    Attributes:
        attention: cost of attending to one token, in units of a token's own matrix products.
    """

    attention: float

    def __call__(self, comparison: int, tokenized: Tokenized) -> list[Row]:
        together, apart = shared(comparison, tokenized), separate(comparison, tokenized)
        if len(apart) == 1:
            return apart
        cost_together = sum(row.length + 2 * self.attention * row.length**2 for row in together)
        cost_apart = sum(row.length + self.attention * row.length**2 for row in apart)
        return together if cost_together <= cost_apart else apart


def buckets(
    batch: Sequence[Tokenized], token_budget: int, layout: Layout = shared
) -> list[list[int]]:
    """Indices of the comparisons to send through the model together, shortest rows first.

    Every index is in exactly one bucket. The rows of a bucket, padded to its longest row, hold at
    most `token_budget` tokens (padding counted; rows over 2048 tokens count for more); a
    comparison that is larger than that is alone in its bucket. Among such partitions the one with
    the least padding is taken. Depends on the lengths only.
    """
    sizes = []
    for index, tokenized in enumerate(batch):
        rows = layout(index, tokenized)
        sizes.append((max(row.length for row in rows), len(rows)))
    order = sorted(range(len(batch)), key=lambda index: (sizes[index], index))
    cuts = _best_cuts([sizes[index] for index in order], token_budget)
    return [order[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]


def _best_cuts(sizes: list[tuple[int, int]], token_budget: int) -> list[int]:
    """Borders of the cheapest partition into runs; `sizes` are (length, rows), ascending."""
    best = [0] + [0] * len(sizes)  # cost of the first k, and where their last run starts
    start = [0] * (len(sizes) + 1)
    for end in range(1, len(sizes) + 1):
        length = sizes[end - 1][0]
        cost_best, rows = None, 0
        for begin in range(end - 1, -1, -1):
            rows += sizes[begin][1]
            if begin < end - 1 and rows * length * max(1, length / LONG) > token_budget:
                break
            cost = best[begin] + rows * length + CALL
            if cost_best is None or cost <= cost_best:
                cost_best, start[end] = cost, begin
        assert cost_best is not None
        best[end] = cost_best
    cuts = [len(sizes)]
    while cuts[-1] > 0:
        cuts.append(start[cuts[-1]])
    return cuts[::-1]


@dataclass(frozen=True)
class Padded:
    """Rows of one forward pass as tensors, and where their log-probabilities belong.

    Attributes:
        tokens, positions, block: as in the module's picture.
        source: for each response token, the flat index into (R, L) of the token predicting it.
        target: the response token itself.
        place: where its log-probability goes, a flat index into (B, N, T).
        plain: every row holds a single response, so an ordinary causal mask is right.
    """

    tokens: Int[Tensor, "R L"]
    positions: Int[Tensor, "R L"]
    block: Int[Tensor, "R L"]
    source: Int[Tensor, " M"]
    target: Int[Tensor, " M"]
    place: Int[Tensor, " M"]
    plain: bool


def pad(
    batch: Sequence[Tokenized], rows: Sequence[Row], shape: tuple[int, int, int], pad_token: int = 0
) -> Padded:
    """Lay `rows` of `batch` out; `shape` is the (B, N, T) of the table they are scored into."""
    longest = max(row.length for row in rows)
    tokens = torch.full((len(rows), longest), pad_token)
    positions = torch.zeros((len(rows), longest), dtype=torch.long)
    block = torch.full((len(rows), longest), PADDING)
    source: list[int] = []
    target: list[int] = []
    place: list[int] = []
    for index, row in enumerate(rows):
        prompt = batch[row.comparison].prompt
        ids, spots, owner = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for mark, response_place in enumerate(row.responses, start=1):
            response = batch[row.comparison].responses[response_place]
            if response:
                first = index * longest + len(ids)
                last_of_prompt = index * longest + len(prompt) - 1
                source.extend([last_of_prompt, *range(first, first + len(response) - 1)])
                target.extend(response)
                corner = (row.comparison * shape[1] + response_place) * shape[2]
                place.extend(range(corner, corner + len(response)))
            ids.extend(response)
            spots.extend(range(len(prompt), len(prompt) + len(response)))
            owner.extend([mark] * len(response))
        tokens[index, : row.length] = torch.tensor(ids)
        positions[index, : row.length] = torch.tensor(spots)
        block[index, : row.length] = torch.tensor(owner)
    return Padded(
        tokens=tokens,
        positions=positions,
        block=block,
        source=torch.tensor(source, dtype=torch.long),
        target=torch.tensor(target, dtype=torch.long),
        place=torch.tensor(place, dtype=torch.long),
        plain=all(len(row.responses) == 1 for row in rows),
    )


def additive_mask(
    block: Int[Tensor, "R L"],
    positions: Int[Tensor, "R L"],
    dtype: torch.dtype,
    window: int | None = None,
) -> Float[Tensor, "R 1 L L"]:
    """0 where a token may look, the most negative number elsewhere.

    A token sees the prompt and its own response up to itself; with a sliding `window`, only what
    is fewer than `window` POSITIONS back: neighbours in a row may be far apart in the text.
    Padding sees the prompt and padding before it, so that no softmax is empty.
    """
    length = block.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=block.device).tril()
    keys = block.unsqueeze(1)
    seen = causal & ((keys == 0) | (keys == block.unsqueeze(2)))
    if window is not None:
        seen &= positions.unsqueeze(2) - positions.unsqueeze(1) < window
        seen |= torch.eye(length, dtype=torch.bool, device=block.device)
    mask = torch.zeros(seen.shape, dtype=dtype, device=block.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
