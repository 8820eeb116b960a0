"""Requests side by side, that nobody has to wait for."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Job = TypeVar("Job")
Found = TypeVar("Found")


def side_by_side(work: Callable[[Job], Found], jobs: Sequence[Job], threads: int) -> list[Found]:
    """`work` of each job, in order; the first error, and Ctrl-C, end the others.

    The threads are daemons: whoever stops the program does not wait for replies under way, as a
    pool of `concurrent.futures` would make them.
    """
    todo: queue.SimpleQueue[tuple[int, Job]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Found | BaseException]] = queue.SimpleQueue()
    for job in enumerate(jobs):
        todo.put(job)
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            try:
                place, job = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((place, work(job)))
            except BaseException as error:
                done.put((place, error))

    for _ in range(min(threads, len(jobs))):
        threading.Thread(target=run, daemon=True).start()
    found: dict[int, Found] = {}
    try:
        while len(found) < len(jobs):
            place, one = done.get()
            if isinstance(one, BaseException):
                raise one
            found[place] = one
    finally:
        stop.set()
    return [found[place] for place in range(len(jobs))]
