"""Which comparisons an optimizer step sees, on which process, in which forward passes.

Nothing here has a state: the order of an epoch follows from an `Order` and (seed, epoch), so a
resumed run needs to know its step only.
"""

from collections.abc import Sequence

import torch

from prefloop.logps.layout import buckets
from prefloop.orders import Order, Shuffled
from prefloop.types import Tokenized

SHUFFLED = Shuffled()


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps that see each of `rows` comparisons once; the last may be smaller."""
    return -(-rows // batch_size)


def batch_indices(
    rows: int, batch_size: int, step: int, seed: int, order: Order = SHUFFLED
) -> list[int]:
    """Row numbers of the global batch of optimizer step `step`."""
    epoch, within = divmod(step, steps_per_epoch(rows, batch_size))

    def shuffled() -> list[int]:
        return torch.randperm(rows, generator=generator(seed, epoch)).tolist()

    return list(order(rows, shuffled)[within * batch_size : (within + 1) * batch_size])


def generator(*key: int) -> torch.Generator:
    """A generator that follows from a key of small integers, and from nothing else."""
    return torch.Generator().manual_seed(derived_seed(*key))


def derived_seed(*key: int) -> int:
    """A 63-bit seed for a key such as (seed, epoch); neighbouring keys give unrelated seeds."""
    state = 0x9E3779B97F4A7C15
    for part in key:
        state = ((state ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 31)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return state >> 1


def shares(batch: Sequence[Tokenized], processes: int) -> list[list[Tokenized]]:
    """The rows of each process: longest first, dealt out in turn, so that all get similar work."""
    order = sorted(range(len(batch)), key=lambda i: (-tokens(batch[i]), i))
    return [[batch[i] for i in order[rank::processes]] for rank in range(processes)]


def forward_passes(
    batch: Sequence[Tokenized], processes: int, token_budget: int
) -> list[list[list[Tokenized]]]:
    """For each process its list of forward passes; all processes get equally many.

    Sharded models gather weights in every forward pass, so a process that has fewer rows runs an
    empty pass; the loop gives it a filler row that counts nothing.
    """
    split = [
        [[share[i] for i in part] for part in buckets(share, token_budget)] if share else []
        for share in shares(batch, processes)
    ]
    most = max(len(passes) for passes in split)
    return [passes + [[]] * (most - len(passes)) for passes in split]


def tokens(row: Tokenized) -> int:
    """Tokens of a row as a forward pass sees it: its prompt once, and all its responses."""
    return len(row.prompt) + sum(map(len, row.responses))
