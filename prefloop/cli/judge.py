"""`prefloop judge`: a language model on a server says which answers are better."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

HASTE = ("patience", "concurrency")  # settings that answers do not depend on


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Have a language model on a server rank answers, each pair asked in both orders."""

    data: Path
    """Rows with `prompt` and two or more `responses`; an order that they have is replaced."""
    server: str
    """Address of an OpenAI-compatible server; an API key is read from the environment variable
    PREFLOOP_API_KEY and written nowhere."""
    out: Path
    """Folder for judged.jsonl and judge.json; refused if it holds a run."""
    server_model: str = ""
    """Name of the judge's model, where the server has several."""
    question: Path | None = None
    """Text file with the question in place of ours; it holds {prompt}, {first} and {second}."""
    max_new_tokens: int = 16
    """Longest reply, in tokens; more for a judge that thinks before its [[A]]."""
    concurrency: int = 4
    """Requests under way at a time."""
    patience: float = 600.0
    """Seconds to wait for a server that stopped answering; then the run stops, to be resumed."""
    seed: int = 0
    """Sent with each question."""
    resume: bool = False
    """Go on with the run in --out; only what is missing is asked."""

    def __call__(self) -> None:
        """Write judged.jsonl and say how far the judge can be trusted."""
        from prefloop import data, judging
        from prefloop.cli import settings
        from prefloop.cli.console import note, progress
        from prefloop.errors import UserError
        from prefloop.runs import read_json, start_run
        from prefloop.servers import Server, connect

        rows = data.read(self.data)
        question = judging.QUESTION
        if self.question is not None:
            if not self.question.is_file():
                raise UserError(f"{self.question}: there is no such file for --question")
            question = self.question.read_text(encoding="utf-8")
        server = Server(
            url=self.server,
            model=self.server_model,
            concurrency=self.concurrency,
            patience=self.patience,
        )
        with connect(server, note) as connection, progress("judging", len(rows)) as step:
            judge = judging.Judge(
                connection, question=question, max_new_tokens=self.max_new_tokens, seed=self.seed
            )
            out = start_run(self.out, "judge", settings(self), self.resume, HASTE)
            for _ in judging.judge_rows(rows, out, judge, step):
                pass
        counts = read_json(out / "judge.json")
        _say(counts)
        print(f"wrote {out / 'judged.jsonl'}")
        if counts["left_out"] == counts["rows"]:
            print("no row was judged, so there is nothing to train on; ask another judge")
            return
        print(f"next: prefloop train --data {out / 'judged.jsonl'} --model MODEL --out RUN")


def _say(found: "Mapping[str, Any]") -> None:
    pairs = found["pairs"]
    print(f"{found['judge']}: {found['rows']} rows, {pairs} pairs, each asked in both orders")
    for name, meaning in (
        ("decided", "the same winner in both orders"),
        ("tied", "a tie"),
        ("swayed", "another winner in the other order; counted as a tie"),
        ("unread", "a reply without a verdict; not judged"),
    ):
        print(f"{found[name]:>7} ({100 * found[name] / max(1, pairs):.1f} %) {meaning}")
    if found["unread_reply"] is not None:
        print(f"        the first such reply begins: {found['unread_reply']!r}")
    if found["shown_first"] is not None:
        print(f"of its verdicts {100 * found['shown_first']:.1f} % name the answer shown first")
    if found["left_out"]:
        print(f"{found['left_out']} rows are left without a rank")
