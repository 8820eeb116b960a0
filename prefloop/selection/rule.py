"""What a rule is: columns of prompts to one score a prompt."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Table = Mapping[str, Float[Tensor, "P N"]]
"""Columns of P prompts, a number a response; NaN pads a prompt that has fewer responses."""


@runtime_checkable
class Rule(Protocol):
    """A score for each prompt."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What the rule reads of each response."""
        ...

    def __call__(self, table: Table) -> Float[Tensor, " P"]: ...
