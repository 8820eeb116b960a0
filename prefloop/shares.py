"""Work that several processes share: this process among those that were started together."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: shares of a large file may end hours apart."""


@dataclass(frozen=True)
class Worker:
    """One of `count` processes that see the same disk.

    Attributes:
        index: of this one, from 0; 0 also does what one process has to do.
        count: how many there are.
        wait: returns when all of them have called it.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def leads(self) -> bool:
        """Whether this process does what only one may do."""
        return self.index == 0

    def owns(self, number: int) -> bool:
        """Whether piece `number` of the work is this process's."""
        return number % self.count == self.index


def this_worker() -> Worker:
    """This process, as `accelerate launch` or `torchrun` started it; alone without them."""
    import torch  # seconds to import, as is the next
    from accelerate import PartialState

    # Accelerate joins processes without an accelerator only if it is told that there is none.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    return Worker(state.process_index, state.num_processes, state.wait_for_everyone)
