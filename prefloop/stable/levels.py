"""Where v* comes from, the lowest SFT loss that the safe region is measured from.

To add one: a frozen dataclass with `of` and `after`, and its name in `LEVELS`. What a level
remembers is a `Memory`, which a checkpoint of the run keeps.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from prefloop.errors import UserError
from prefloop.stable.bilevel import Bilevel, Params, sft_optimum


class Memory(NamedTuple):
    """A decaying sum of SFT losses and of their weights; both 0 before the first step."""

    total: float = 0.0
    weight: float = 0.0


@runtime_checkable
class Level(Protocol):
    """v* of the mean SFT loss of a step, in nats a response."""

    def of(self, problem: Bilevel, params: Params, share: float, memory: Memory) -> float | None:
        """v*; None for that of the reference on the same comparisons.

        Args:
            problem: both losses of the step; its `value` has no meaning yet.
            params: where they are taken.
            share: sum of the weights of the step's comparisons over their number.
            memory: of the steps before.
        """
        ...

    def after(self, loss: float, memory: Memory) -> Memory:
        """The memory after a step whose mean SFT loss was `loss`, in nats a response."""
        ...


@dataclass(frozen=True)
class ReferenceLevel:
    """v* is the reference's SFT loss on the comparisons of the step: the SFT checkpoint's own."""

    def of(self, problem: Bilevel, params: Params, share: float, memory: Memory) -> float | None:
        return None

    def after(self, loss: float, memory: Memory) -> Memory:
        return memory


@dataclass(frozen=True, kw_only=True)
class FixedLevel:
    """v* is a number that is known: the SFT checkpoint's mean loss over all of its data.

    Attributes:
        nats: a response.
    """

    nats: float

    def of(self, problem: Bilevel, params: Params, share: float, memory: Memory) -> float | None:
        return self.nats

    def after(self, loss: float, memory: Memory) -> Memory:
        return memory


@dataclass(frozen=True, kw_only=True)
class RunningLevel:
    """v* is the running mean of the policy's own SFT loss: no SFT checkpoint, no reference.

        v*_t = sum over s < t of decay^(t-1-s) L_SFT(theta_s) / sum of decay^(t-1-s)

    The first step has nothing to look back on and is inside the region. A policy that leaves slowly
    takes the region along: a large `decay` remembers longer. Batches differ in how hard they are,
    so some are outside by chance; give `eps`. The specification names a running mean; that it is of
    the policy's loss, and how it starts, is our choice.

    Attributes:
        decay: weight of the past a step, in [0, 1); 0.99 looks back about 100 steps.
    """

    decay: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"RunningLevel.decay must be in [0, 1), got {self.decay}; usual: 0.99")

    def of(self, problem: Bilevel, params: Params, share: float, memory: Memory) -> float | None:
        if memory.weight:
            return memory.total / memory.weight
        return mean_loss(problem.losses(params).lower, share)

    def after(self, loss: float, memory: Memory) -> Memory:
        return Memory(self.decay * memory.total + loss, self.decay * memory.weight + 1)


@dataclass(frozen=True, kw_only=True)
class InnerLevel:
    """v* is what a short SFT run from the present policy reaches on the step's own comparisons.

    Plain gradient descent; each of its steps costs a forward and a backward pass of the batch. It
    needs no SFT checkpoint and no reference. A policy that could be better at SFT is outside the
    region at once, so this pulls harder than the other levels: the constraint of the bilevel
    problem taken at its word, on one batch.

    Attributes:
        steps: of the inner run; >= 1.
        step: its learning rate; > 0.
    """

    steps: int = 3
    step: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.step < float("inf"):
            raise UserError(
                f"InnerLevel needs 1 step or more of positive length, got steps={self.steps}, "
                f"step={self.step}"
            )

    def of(self, problem: Bilevel, params: Params, share: float, memory: Memory) -> float | None:
        before = problem.losses(params).lower
        _, reached = sft_optimum(problem, params, self.steps, self.step)
        return mean_loss(before.minimum(reached), share)  # too long a step climbs

    def after(self, loss: float, memory: Memory) -> Memory:
        return memory


LEVELS: tuple[type, ...] = (ReferenceLevel, FixedLevel, RunningLevel, InnerLevel)
"""Every level, for the command line."""


def mean_loss(lower: Float[Tensor, ""], share: float) -> float:
    """The SFT loss of a step in nats a response, its weights divided out."""
    return float(lower) / share if share else 0.0
