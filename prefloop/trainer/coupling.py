"""Log-probabilities of all processes on each of them, for losses that couple a batch.

Each process scores its share; the numbers of all then meet on every process, which differentiates
by its own. The sum over processes is the gradient of one process with the whole batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from prefloop.types import Logps


def everyones(policy: Logps, count: int) -> Logps:
    """The first `count` rows of every process, in the order of processes.

    Those of this process keep their graph, those of the others are numbers.
    """
    mine = [None if value is None else value[:count] for value in _tables(policy)]
    sent = [None if value is None else value.detach().cpu() for value in mine]
    found: list[list[Tensor | None]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(found, sent)
    found[torch.distributed.get_rank()] = mine
    token, mask, collision = (_joined(column) for column in zip(*found, strict=True))
    assert token is not None
    assert mask is not None
    return Logps(token, mask, collision)


def _tables(policy: Logps) -> tuple[Tensor, Tensor, Tensor | None]:
    return policy.token, policy.mask, policy.collision


def _joined(tables: Sequence[Tensor | None]) -> Tensor | None:
    """Tables (B, N, T) of several processes as one, padded with 0 to the largest N and T."""
    given = [table for table in tables if table is not None]
    if not given:
        return None
    device = next((table.device for table in given if table.device.type != "cpu"), given[0].device)
    responses, longest = (max(table.shape[axis] for table in given) for axis in (1, 2))
    padded = [
        torch.nn.functional.pad(
            table.to(device), (0, longest - table.shape[2], 0, responses - table.shape[1])
        )
        for table in given
    ]
    return torch.cat(padded)
