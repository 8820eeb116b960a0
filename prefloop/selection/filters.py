"""What leaves a row out before any rule looks at it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from prefloop.selection.rule import BEST_WORST, ROWS, Table
from prefloop.types import UserError

PROMPT_KEY = "prompt_key"
"""64 bits that stand for the prompt's text, (P,)."""

LENGTHS = "response_characters"
"""Characters of each response, (P, N)."""

DIFFERENT = "different"
"""How many responses of a row differ from each other, (P,)."""


class Filter(ABC):
    """Which rows may be selected at all.

    Attributes:
        columns: what the filter reads.
        because: why a row is left out, after "left out: ".
    """

    columns: ClassVar[tuple[str, ...]]
    because: ClassVar[str]

    @abstractmethod
    def mark(self, table: Table) -> Int[Tensor, " P"]:
        """A number a row, from the row alone: 0 leaves it out."""

    def keeps(self, marks: Int[Tensor, " P"]) -> Bool[Tensor, " P"]:
        """Which rows stay, from the marks of all that every row-by-row filter leaves."""
        return marks != 0


@dataclass(frozen=True, kw_only=True)
class Ordered(Filter):
    """Rows whose ranks (or scores, where nobody ranked) order two responses."""

    columns: ClassVar[tuple[str, ...]] = (BEST_WORST,)
    because: ClassVar[str] = "it orders no two responses"

    def mark(self, table: Table) -> Int[Tensor, " P"]:
        order = table[BEST_WORST]
        judged = ~order.isnan()
        low = order.masked_fill(~judged, torch.inf).amin(-1)
        return (low < order.masked_fill(~judged, -torch.inf).amax(-1)).long()


@dataclass(frozen=True, kw_only=True)
class Length(Filter):
    """Rows whose responses are of reasonable length, and not too different in length.

    Attributes:
        shortest, longest: characters that every response must have.
        ratio: most characters of the longest response over those of the shortest.
    """

    shortest: int = 1
    longest: int = 20_000
    ratio: float = float("inf")
    columns: ClassVar[tuple[str, ...]] = (LENGTHS,)
    because: ClassVar[str] = "a response is too short, too long, or lengths differ too much"

    def __post_init__(self) -> None:
        if not 0 <= self.shortest <= self.longest:
            raise UserError(
                f"Length: shortest {self.shortest} and longest {self.longest} characters; 0 <= "
                "shortest <= longest is needed"
            )
        if not self.ratio >= 1:
            raise UserError(f"Length.ratio must be 1 or more, got {self.ratio}")

    def mark(self, table: Table) -> Int[Tensor, " P"]:
        length = table[LENGTHS]
        exists = ~length.isnan()
        longest = length.masked_fill(~exists, -torch.inf).amax(-1)
        shortest = length.masked_fill(~exists, torch.inf).amin(-1)
        fits = (shortest >= self.shortest) & (longest <= self.longest)
        return (fits & (longest <= self.ratio * shortest.clamp(min=1))).long()


@dataclass(frozen=True, kw_only=True)
class Different(Filter):
    """Rows with two different responses or more."""

    columns: ClassVar[tuple[str, ...]] = (DIFFERENT,)
    because: ClassVar[str] = "its responses are all the same"

    def mark(self, table: Table) -> Int[Tensor, " P"]:
        return (table[DIFFERENT] > 1).long()


@dataclass(frozen=True, kw_only=True)
class FirstOfPrompt(Filter):
    """The first row of each prompt; prompts are equal that are the same text or messages.

    Prompts are compared by 64 bits of a hash: ten million different ones collide with a chance of
    3 in a million.
    """

    columns: ClassVar[tuple[str, ...]] = (PROMPT_KEY,)
    because: ClassVar[str] = "its prompt stands in an earlier row"

    def mark(self, table: Table) -> Int[Tensor, " P"]:
        key = table[PROMPT_KEY]
        return torch.where(key == 0, 1, key)

    def keeps(self, marks: Int[Tensor, " P"]) -> Bool[Tensor, " P"]:
        found = torch.zeros(len(marks), dtype=torch.bool)
        first = torch.from_numpy(np.unique(marks.numpy(), return_index=True)[1])
        found[first] = True
        return found & (marks != 0)


@dataclass(frozen=True, kw_only=True)
class Responses(Filter):
    """Rows with enough responses.

    Attributes:
        least: how many a row needs.
    """

    least: int = 2
    columns: ClassVar[tuple[str, ...]] = (ROWS,)
    because: ClassVar[str] = "it has too few responses"

    def mark(self, table: Table) -> Int[Tensor, " P"]:
        return (table[ROWS] >= self.least).long()


FILTERS: tuple[type[Filter], ...] = (Ordered, Length, Different, FirstOfPrompt, Responses)
"""Every filter, for the command line and the test table."""
