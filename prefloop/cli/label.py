"""`prefloop label`: rank answers by hand, on a local page."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from prefloop.labelling import Labeller, Store


@dataclass(frozen=True, kw_only=True)
class Label:
    """Rank two or three answers to each prompt, with the keyboard, on a page of this machine."""

    out: Path
    """Database of judgements (SQLite), made or gone on with; nothing in it is ever deleted."""
    data: Path | None = None
    """Rows with `prompt` and `responses`; with scores, the most disputed prompts come first."""
    annotator: str = ""
    """Who judges; several people may share a database, each under a name."""
    answers: Literal[2, 3] = 3
    """Most answers to rank at once; of more, the best, the worst and the middle one by score."""
    port: int = 0
    """Port on 127.0.0.1; 0 takes a free one."""
    export: Path | None = None
    """Write all judgements in --out as comparisons to this file, and stop."""

    def __call__(self) -> None:
        """Serve the page until Ctrl-C, or export."""
        from prefloop.errors import UserError
        from prefloop.labelling import Labeller, Store, tasks_of

        if self.export is not None:
            self._export(self.export)
            return
        if self.data is None or not self.annotator:
            raise UserError("labelling needs --data RESPONSES and --annotator NAME")
        from prefloop.data import read

        tasks = tasks_of(read(self.data), self.answers)
        store = Store(self.out)
        try:
            self._serve(store, Labeller(store=store, tasks=tasks, annotator=self.annotator))
        finally:
            store.close()

    def _serve(self, store: "Store", labeller: "Labeller") -> None:
        from prefloop.labelling import serve

        server = serve(labeller, self.port)
        print(f"open {server.url}", flush=True)
        print("every judgement is saved at once; stop with Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            server.server_close()
        count = store.count(self.annotator)
        print(f"\n{self.out}: {self.annotator} judged {count.judged}, skipped {count.skipped}")
        print(f"next: prefloop label --out {self.out} --export COMPARISONS.jsonl")

    def _export(self, path: Path) -> None:
        from prefloop.data import write
        from prefloop.errors import UserError
        from prefloop.labelling import Store

        if not self.out.is_file():
            raise UserError(f"{self.out}: there is no such database; label first, without --export")
        if path.exists():
            raise UserError(
                f"{path} exists already and is not overwritten; choose another --export"
            )
        store = Store(self.out)
        try:
            found = list(store.comparisons())
        finally:
            store.close()
        if not found:
            raise UserError(f"{self.out}: holds no judgement yet; label first, without --export")
        write(path, found)
        people = sorted({row.annotator or "" for row in found})
        print(f"wrote {path}: {len(found)} comparisons of {', '.join(people)}")
        print(f"next: prefloop train --data {path} --model MODEL --out RUN")
