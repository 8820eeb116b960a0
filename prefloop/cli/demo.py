"""`prefloop demo`: the whole loop on a real small model, by the commands themselves."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefloop.cli.evaluate import Evaluate
from prefloop.cli.sample import Sample
from prefloop.cli.score import Score
from prefloop.cli.select import Select
from prefloop.cli.train import Train
from prefloop.settings import TrainSettings

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Sample, score, select, train, evaluate, report: SmolLM2-135M and a sentiment reward."""

    out: Path = Path("runs/demo")
    """Folder for everything; what is there already is not done again."""
    quick: bool = False
    """A shorter run, under three minutes: fewer prompts, shorter answers."""
    seed: int = 0
    """Of samples, data order and the adapter's start."""

    def __call__(self) -> None:
        """Run every stage that is not on disk yet, then print the result and the paths."""
        from prefloop.report import write_report
        from prefloop.runs import read_json
        from prefloop.smollm2 import demo_model

        started = time.monotonic()
        stage("model", "SmolLM2-135M-Instruct; the first time it is unpacked, which takes a minute")
        model = str(demo_model())
        for name, what, finished, command in self._stages(model):
            stage(name, what)
            if (self.out / finished).exists():
                print(f"  on disk already: {self.out / finished}")
            else:
                command()
        stage("report", "figures and answers on one page")
        page = write_report([self.out / "run"], self.out / "report.html")
        from prefloop.cli.evaluate import say

        print("\nResult on prompts that training never saw")
        say(read_json(self.out / "run" / "evaluation.json"))
        print(f"\nreport:  {page}\npolicy:  {self.out / 'run' / 'policy'}")
        print(f"took {time.monotonic() - started:.0f} s")

    def _stages(self, model: str) -> "list[tuple[str, str, str, Callable[[], None]]]":
        """Name, what it does, the file that ends it, and the command."""
        from prefloop.demo_prompts import HELD_OUT, TRAIN

        prompts, held_out, tokens, epochs = (
            (TRAIN[:12], HELD_OUT[:6], 32, 2) if self.quick else (TRAIN, HELD_OUT, 64, 4)
        )
        out = self.out
        train, test = out / "prompts.jsonl", out / "held_out.jsonl"
        self._write_prompts(train, prompts)
        self._write_prompts(test, held_out)
        sample = Sample(
            model=model,
            data=train,
            out=out / "responses",
            n=4,
            max_new_tokens=tokens,
            seed=self.seed,
            resume=True,
        )
        score = Score(
            data=out / "responses" / "responses.jsonl",
            out=out / "scored",
            reward="vader",
            resume=True,
        )
        select = Select(data=out / "scored" / "scored.jsonl", out=out / "selected", resume=True)
        training = Train(
            model=model,
            data=out / "selected" / "selected.jsonl",
            out=out / "run",
            held_out_share=0.0,
            empty="drop",
            loop=TrainSettings(lr=4e-4, batch_size=8, epochs=epochs, seed=self.seed),
            resume=True,
        )
        evaluate = Evaluate(
            run=out / "run", data=test, reward="vader", max_new_tokens=tokens, seed=self.seed
        )
        return [
            (
                "sample",
                f"4 answers to each of {len(prompts)} prompts",
                "responses/responses.jsonl",
                sample,
            ),
            ("score", "the sentiment of each answer, by VADER", "scored/scored.jsonl", score),
            (
                "select",
                "the half with the highest preference variance",
                "selected/selected.jsonl",
                select,
            ),
            ("train", "DPO on the best against the worst answer, LoRA", "run/policy", training),
            (
                "evaluate",
                f"against the reference on {len(held_out)} new prompts",
                "run/evaluation.json",
                evaluate,
            ),
        ]

    def _write_prompts(self, path: Path, prompts: tuple[str, ...]) -> None:
        from prefloop.runs import write_jsonl

        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            rows = ({"id": f"{path.stem}-{n}", "prompt": text} for n, text in enumerate(prompts))
            write_jsonl(path, rows)


def stage(name: str, what: str) -> None:
    """A plain line where a stage begins."""
    print(f"[{name}] {what}", flush=True)
