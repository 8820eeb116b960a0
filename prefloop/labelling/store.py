"""Judgements in SQLite, each on the disk before the next prompt is shown.

The write-ahead log is flushed with every judgement (synchronous = FULL), so neither kill -9 nor a
power cut loses one. Nothing is ever deleted: what is taken back is marked.
"""

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefloop.data import as_row
from prefloop.data.rows import comparison
from prefloop.errors import UserError
from prefloop.labelling.tasks import Task
from prefloop.types import Comparison

APPLICATION = 0x70666C70  # "pflp", so that another program's database is not taken for ours
SCHEMA = """
CREATE TABLE IF NOT EXISTS task (id TEXT PRIMARY KEY, row TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS judgement (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    task TEXT NOT NULL REFERENCES task (id),
    annotator TEXT NOT NULL,
    rank TEXT,                       -- JSON, an entry a response of the row; NULL: skipped
    seconds REAL,                    -- from the prompt on the screen to the judgement
    at TEXT NOT NULL,                -- UTC
    undone INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX IF NOT EXISTS one_each ON judgement (task, annotator) WHERE undone = 0;
"""


@dataclass(frozen=True)
class Count:
    """How many tasks one annotator has judged and skipped."""

    judged: int
    skipped: int


class Store:
    """The database of judgements; may be used from several threads.

    Args:
        path: made where it does not exist, gone on with where it does.

    Raises:
        UserError: a file that is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise UserError(f"{path}: not a file that can be made; give a name in a folder")
        new = not self.path.exists() or self.path.stat().st_size == 0
        self._base = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        try:
            found = self._base.execute("PRAGMA application_id").fetchone()[0]
            if not new and found != APPLICATION:
                raise UserError(f"{path}: a database of another program; choose another --out")
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = FULL")
            self._base.execute(f"PRAGMA application_id = {APPLICATION}")
            self._base.executescript(SCHEMA)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path}: not a database of labels ({error})") from None

    def close(self) -> None:
        """Fold the write-ahead log into the file."""
        self._base.close()

    def add(self, tasks: Iterable[Task]) -> None:
        """Keep the rows of `tasks`, so that the database alone can be exported.

        Raises:
            UserError: an id that stands for another prompt or other responses already.
        """
        rows = {task.row.id: json.dumps(as_row(task.row), ensure_ascii=False) for task in tasks}
        with self._lock:
            for name, row in rows.items():
                found = self._base.execute("SELECT row FROM task WHERE id = ?", (name,)).fetchone()
                if found and _text_of(found[0]) != _text_of(row):
                    raise UserError(
                        f"{self.path}: {name!r} has other text here than in --data; a database "
                        "belongs to one file of responses. Choose another --out"
                    )
            self._base.execute("BEGIN")
            self._base.executemany("INSERT OR IGNORE INTO task VALUES (?, ?)", rows.items())
            self._base.execute("COMMIT")

    def judge(
        self,
        task: str,
        annotator: str,
        rank: tuple[int | None, ...] | None,
        seconds: float | None = None,
    ) -> None:
        """Keep one judgement; None is a skip. It is on the disk when this returns.

        Raises:
            UserError: the annotator has judged this task already.
        """
        row = (task, annotator, None if rank is None else json.dumps(rank), seconds, _now())
        with self._lock:
            try:
                self._base.execute(
                    "INSERT INTO judgement (task, annotator, rank, seconds, at)"
                    " VALUES (?, ?, ?, ?, ?)",
                    row,
                )
            except sqlite3.IntegrityError:
                raise UserError(f"{task}: judged by {annotator} already, in another window") from (
                    None
                )

    def undo(self, annotator: str) -> str | None:
        """Take the annotator's last judgement or skip back; the id of its task, or None."""
        with self._lock:
            found = self._base.execute(
                "UPDATE judgement SET undone = 1 WHERE number = (SELECT max(number) FROM judgement"
                " WHERE annotator = ? AND undone = 0) RETURNING task",
                (annotator,),
            ).fetchone()
        return found[0] if found else None

    def done(self, annotator: str) -> set[str]:
        """Ids of the tasks that the annotator has judged or skipped."""
        return {row["task"] for row in self._judgements(annotator)}

    def answered(self) -> set[str]:
        """Ids of the tasks that anybody has judged or skipped."""
        return {row["task"] for row in self._judgements(None)}

    def count(self, annotator: str) -> Count:
        """How many tasks the annotator has judged and skipped."""
        ranks = [row["rank"] for row in self._judgements(annotator)]
        return Count(sum(rank is not None for rank in ranks), sum(rank is None for rank in ranks))

    def comparisons(self) -> Iterator[Comparison]:
        """Every judgement of everybody as a comparison with its annotator; skips are left out.

        Its id is "TASK@ANNOTATOR"; `task`, `labelled_at` and `seconds` are in `extra`.
        """
        for number, found in enumerate(self._judgements(None), start=1):
            if found["rank"] is None:
                continue
            place = f"{self.path}:{number}"
            row = comparison(json.loads(found["row"]), {}, place, found["task"])
            extra = {
                **row.extra,
                "task": found["task"],
                "labelled_at": found["at"],
                "seconds": found["seconds"],
            }
            yield replace(
                row,
                id=f"{found['task']}@{found['annotator']}",
                annotator=found["annotator"],
                rank=tuple(json.loads(found["rank"])),
                weight=1.0,
                extra=extra,
            )

    def _judgements(self, annotator: str | None) -> list[dict[str, Any]]:
        names = ("task", "annotator", "rank", "seconds", "at", "row")
        with self._lock:
            rows = self._base.execute(
                f"SELECT {', '.join(names)} FROM judgement JOIN task ON task.id = judgement.task"
                " WHERE undone = 0 AND (?1 IS NULL OR annotator = ?1) ORDER BY number",
                (annotator,),
            ).fetchall()
        return [dict(zip(names, row, strict=True)) for row in rows]


def _text_of(row: str) -> tuple[Any, Any]:
    read = json.loads(row)
    return read["prompt"], read["responses"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
