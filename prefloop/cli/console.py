"""What the commands show while they work: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY = 20.0  # seconds between plain lines where there is no terminal


def note(line: str) -> None:
    """A line about what goes on, above a bar if there is one."""
    print(f"prefloop: {line}", file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A function to call with how much is done (of `total`, if it is known before); the bar goes
    away at the end."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield counted(what, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def counted(what: str, total: int | None = None) -> Callable[[int], None]:
    """A function to call with how much is done: a plain line every 20 s, above a bar if any."""
    of = "" if total is None else f"/{total}"
    started = last = time.monotonic()

    def step(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY or done == total:
            last = now
            print(f"{what} {done}{of}, {now - started:.0f} s", file=sys.stderr, flush=True)

    return step
