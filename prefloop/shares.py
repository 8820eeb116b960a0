"""Work that several processes share: this process among those that were started together.

They see the same disk. A condition on files is asked of one of them (`led`), since another may
look when the first is a stage further.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

Item = TypeVar("Item")
Made = TypeVar("Made")

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: shares of a large file may end hours apart."""


@dataclass(frozen=True)
class Worker:
    """One of `count` processes that see the same disk.

    Attributes:
        index: of this one, from 0; 0 also does what one process has to do.
        count: how many there are.
        wait: returns when all of them have called it.
        pool: what each of them gave, in their order; returns when all have called it.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None
    pool: Callable[[Any], list[Any]] = lambda mine: [mine]

    @property
    def leads(self) -> bool:
        """Whether this process does what only one may do."""
        return self.index == 0

    def owns(self, number: int) -> bool:
        """Whether piece `number` of the work is this process's."""
        return number % self.count == self.index

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Those of `items` that are this process's."""
        return list(items[self.index :: self.count])

    def gathered(self, mine: Sequence[Made]) -> list[Made]:
        """What all of them made, an entry an item of their `share`, in the order of the whole."""
        parts: list[Sequence[Made]] = self.pool(list(mine))
        found: list[Any] = [None] * sum(map(len, parts))
        for index, part in enumerate(parts):
            found[index :: self.count] = part
        return found

    def mapped(
        self, work: Callable[[list[Item]], Sequence[Made]], items: Sequence[Item]
    ) -> list[Made]:
        """What `work` makes of `items`, an entry each; every process does its share."""
        mine = self.share(items)
        return self.gathered(work(mine) if mine else [])

    def led(self, work: Callable[[], Made]) -> Made:
        """What the first process makes of `work`, which the others do not do, for all of them.

        What it raises, all raise.
        """
        value, error = self.pool(_attempt(work) if self.leads else (None, None))[0]
        if error is not None:
            raise error
        return value


ALONE = Worker()
"""A process that shares with nobody."""


def _attempt(work: Callable[[], Made]) -> tuple[Made | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def this_worker() -> Worker:
    """This process, as `accelerate launch` or `torchrun` started it; alone without them."""
    import torch  # seconds to import, as is the next
    from accelerate import PartialState

    # Accelerate joins processes without an accelerator only if it is told that there is none.
    return _worker(PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE))


def worker_of(accelerator: "Accelerator") -> Worker:
    """This process among those of `accelerator`."""
    return _worker(accelerator)


def _worker(state: "PartialState | Accelerator") -> Worker:
    if state.num_processes == 1:
        return ALONE
    return Worker(state.process_index, state.num_processes, state.wait_for_everyone, _pool)


def _pool(mine: Any) -> list[Any]:
    import torch.distributed as processes

    found: list[Any] = [None] * processes.get_world_size()
    processes.all_gather_object(found, mine)
    return found
