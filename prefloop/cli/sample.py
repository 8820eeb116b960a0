"""`prefloop sample`: several answers to each prompt."""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prefloop.collecting import Draw
    from prefloop.shares import Worker
    from prefloop.types import Comparison

    Collect = Callable[
        [Sequence[Comparison], Path, Draw, Worker, Callable[[int], None]], list[Comparison]
    ]

HASTE = ("patience", "concurrency")  # settings that answers do not depend on


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sample several answers to each prompt."""

    data: Path
    """Rows with a `prompt`; other columns are carried along."""
    out: Path
    """Folder for responses.jsonl; refused if it holds a run."""
    model: str = ""
    """Hugging Face name or folder of the policy; a folder with an adapter brings its base along."""
    server: str = ""
    """Address of an OpenAI-compatible server that answers in place of --model; an API key is read
    from the environment variable PREFLOOP_API_KEY and written nowhere."""
    server_model: str = ""
    """Name of the model on --server, where it has several."""
    completion: bool = False
    """Ask the server's completion endpoint, which gets the prompt as it stands, not its chat."""
    concurrency: int = 4
    """Requests to the server under way at a time."""
    patience: float = 600.0
    """Seconds to wait for a server that stopped answering; then the run stops, to be resumed."""
    n: int = 4
    """Answers a prompt."""
    sampler: str = "FromPolicy()"
    """Where answers come from: FromPolicy(), FromReference(), Hybrid(), Tilted(k=0.5), ..."""
    temperature: float = 1.0
    """Divides the logits; 1 is the model's own distribution, 0 the most likely token."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this probability; 1 keeps all."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    rows: int = 32
    """Answers decoded side by side; more is faster and needs more memory."""
    seed: int = 0
    """Answers follow from the seed and the prompt."""
    resume: bool = False
    """Go on with the run in --out."""

    shares: ClassVar[bool] = True  # the work, with the processes of torchrun

    def __call__(self) -> None:
        """Write responses.jsonl, kept as the answers come."""
        from prefloop import data
        from prefloop.cli import settings
        from prefloop.cli.console import progress
        from prefloop.collecting import Draw
        from prefloop.errors import UserError
        from prefloop.expression import parse
        from prefloop.policies import Sampling
        from prefloop.runs import start_run
        from prefloop.samplers import SAMPLERS
        from prefloop.shares import this_worker

        if bool(self.model) == bool(self.server):
            raise UserError("who answers? give --model NAME or --server URL, and not both")
        drawing = Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            rows=self.rows,
        )
        sampler = parse(self.sampler, SAMPLERS)
        draw = Draw(n=self.n, settings=drawing, seed=self.seed, sampler=sampler)
        prompts = data.read_prompts(self.data)
        worker = this_worker()
        with self._source(draw) as collect:
            worker.led(lambda: start_run(self.out, "sample", settings(self), self.resume, HASTE))
            with progress("sampling", len(prompts)) as step:
                collect(prompts, self.out, draw, worker, step)
        if worker.leads:
            file = self.out / "responses.jsonl"
            print(f"wrote {file}: {self.n} answers to each of {len(prompts)} prompts")
            print(f"next: prefloop score --data {file} --reward vader --out SCORED")

    @contextmanager
    def _source(self, draw: "Draw") -> "Iterator[Collect]":
        """Who answers: the policy in this process, or a server."""
        from functools import partial

        from prefloop.cli.console import note
        from prefloop.collecting import ask_server, sample_to_file
        from prefloop.policies import load_policy
        from prefloop.servers import Server, connect

        if self.model:
            yield partial(sample_to_file, load_policy(self.model))
            return
        server = Server(
            url=self.server,
            model=self.server_model,
            chat=not self.completion,
            concurrency=self.concurrency,
            patience=self.patience,
        )
        with connect(server, note) as connection:
            connection.refuse_impossible(draw.n, draw.settings, draw.sampler)
            yield partial(ask_server, connection)
