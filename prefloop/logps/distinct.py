"""Each answer once: many judgements of a few answers need few forward passes.

Votes of many people are about the same answers again and again. The log-probability of an answer
depends neither on who judged it nor on what it was compared with, so every different answer goes
through the model once, beside the other answers to its prompt.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefloop.logps.layout import buckets, by_buckets, response_mask, table_shape
from prefloop.types import Logps, Tokenized, score

Tokens = tuple[int, ...]


class Distinct(NamedTuple):
    """The different answers of some rows.

    Attributes:
        rows: a prompt and different answers to it; a prompt with many answers has several rows.
        row, place: where each response of each given row stands in `rows`; 0 where a row has fewer
            responses than another.
    """

    rows: list[Tokenized]
    row: Int[Tensor, "B N"]
    place: Int[Tensor, "B N"]


def distinct(rows: Sequence[Tokenized], token_budget: int) -> Distinct:
    """The different answers of `rows`, in order of appearance, at most `token_budget` tokens a row.

    An answer that does not fit is alone in its row.
    """
    shared = _Rows(token_budget)
    row, place = torch.zeros(2, *table_shape(rows)[:2], dtype=torch.long)
    for number, one in enumerate(rows):
        for index, response in enumerate(one.responses):
            row[number, index], place[number, index] = shared.seat(one.prompt, response)
    return Distinct(shared.made(), row, place)


class _Rows:
    """Rows while answers are seated in them."""

    def __init__(self, token_budget: int) -> None:
        self.token_budget = token_budget
        self.prompts: list[Tokens] = []
        self.answers: list[list[Tokens]] = []
        self.room: list[int] = []
        self.seats: dict[tuple[Tokens, Tokens], tuple[int, int]] = {}
        self.last: dict[Tokens, int] = {}  # prompt -> its newest row

    def seat(self, prompt: Tokens, response: Tokens) -> tuple[int, int]:
        """The row and the place in it of an answer."""
        key = prompt, response
        if key not in self.seats:
            row = self.last.get(prompt)
            if row is None or self.room[row] < len(response):
                row = self.last[prompt] = len(self.prompts)
                self.prompts.append(prompt)
                self.answers.append([])
                self.room.append(self.token_budget - len(prompt))
            self.seats[key] = row, len(self.answers[row])
            self.answers[row].append(response)
            self.room[row] -= len(response)
        return self.seats[key]

    def made(self) -> list[Tokenized]:
        """The rows."""
        return [
            Tokenized(prompt=prompt, responses=tuple(given))
            for prompt, given in zip(self.prompts, self.answers, strict=True)
        ]


@torch.no_grad()
def logps_once(
    scorer: nn.Module, rows: Sequence[Tokenized], token_budget: int
) -> Iterator[tuple[list[int], Logps]]:
    """`Logps` (B, N, T) of all `rows`, in parts: which rows, and theirs, on the CPU.

    Args:
        scorer: asked once for every different answer.
        rows: any; parts hold about `token_budget` tokens of them.
        token_budget: tokens of one forward pass.
    """
    once = distinct(rows, token_budget)
    token: list[Float[Tensor, "N T"]] = by_buckets(
        lambda batch: score(scorer, batch).token.float().cpu(), once.rows, token_budget
    )
    for part in buckets(rows, token_budget):
        batch = [rows[index] for index in part]
        table = torch.zeros(table_shape(batch))
        for number, index in enumerate(part):
            for place, response in enumerate(rows[index].responses):
                seat = int(once.row[index, place]), int(once.place[index, place])
                table[number, place, : len(response)] = token[seat[0]][seat[1], : len(response)]
        yield part, Logps(table, response_mask(batch))
