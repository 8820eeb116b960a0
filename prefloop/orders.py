"""In which order the epochs of a training see their rows; an order's repr is its configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Order(Protocol):
    """Row numbers of an epoch, each once; it follows from (seed, epoch) and has no state."""

    def __call__(self, rows: int, shuffled: Callable[[], list[int]]) -> Sequence[int]:
        """Numbers of `rows` rows; `shuffled` gives the permutation of this seed and epoch."""
        ...


@dataclass(frozen=True)
class Shuffled:
    """Every epoch in an order of its own."""

    def __call__(self, rows: int, shuffled: Callable[[], list[int]]) -> Sequence[int]:
        """The permutation of this seed and epoch."""
        return shuffled()


@dataclass(frozen=True)
class AsGiven:
    """Every epoch in the order of the data: a curriculum, where the data are sorted."""

    def __call__(self, rows: int, shuffled: Callable[[], list[int]]) -> Sequence[int]:
        """0 .. rows - 1."""
        return range(rows)


ORDERS = (Shuffled, AsGiven)
