"""Several workers as threads of one process: what they share, without starting any."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from prefloop.shares import Worker

Made = TypeVar("Made")


def together(count: int, work: Callable[[Worker], Made]) -> list[Made]:
    """What each of `count` workers returns; an error of one is raised and frees the others."""
    barrier = threading.Barrier(count, timeout=60)
    given: list[Any] = [None] * count

    def pool_of(index: int) -> Callable[[Any], list[Any]]:
        def pool(mine: Any) -> list[Any]:
            given[index] = mine
            barrier.wait()
            found = copy.deepcopy(given)  # as processes have it
            barrier.wait()
            return found

        return pool

    def one(index: int) -> Made:
        try:
            return work(Worker(index, count, lambda: barrier.wait() and None, pool_of(index)))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as threads:
        futures = [threads.submit(one, index) for index in range(count)]
    errors = [future.exception() for future in futures]
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    for error in real:
        if error is not None:
            raise error
    return [future.result() for future in futures]
