"""How fast responses are scored and prompts are chosen.

    python benchmarks/score.py scoring --shape hh
    python benchmarks/score.py filing --shape five
    python benchmarks/score.py selecting --prompts 1000000

`scoring` is what the reference cache, `prefloop score` and the diagnostics do: a forward pass over
comparisons, the prompt once, against one padded row a response with full logits. `filing` is the
whole of `prefloop score --policy` from file to file. `selecting` is preference variance over
prompts with eight rewards each: in memory, and as `prefloop select` does it with JSON-lines, from
file to file (`select_scale.py` does it with columns).
"""

import json
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from shapes import ModelName, Shape, load_model, matmul_peak, texts, useful_flops
from train_vs_trl import Case, Material, plain_rows


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Score comparisons with a model."""

    shape: Shape = "hh"
    """Lengths of the data: hh, uf, five, five-long, or pandalm."""
    model: ModelName = "small"
    """small: random Qwen2 of 8.5 M weights, vocabulary 32,000; smollm2: SmolLM2-135M-Instruct."""
    comparisons: int = 48
    """Prompts to score."""
    token_budget: int = 8192
    """Tokens of one forward pass."""
    rounds: int = 3
    """How often each way is timed."""
    threads: int = 1
    """Threads."""
    votes: Path | None = None
    """For --shape pandalm: JSON-lines with prompt, responses and rank."""

    def __call__(self) -> None:
        from prefloop.logps import FullLogits, Masked, OneARow, PrefixShared, Scorer
        from prefloop.types import score

        torch.set_num_threads(self.threads)
        model, tokenizer = load_model(self.model)
        data = texts(self.shape, self.comparisons, self.votes)
        rows = plain_rows(Material(Case(shape=self.shape), model.eval(), tokenizer, data))
        peak = matmul_peak()
        work = sum(
            useful_flops(model, len(row.prompt), [len(r) for r in row.responses]) for row in rows
        )
        tokens = sum(len(response) for row in rows for response in row.responses)
        print(f"{len(rows)} comparisons, {tokens} response tokens, peak {peak / 1e9:.0f} GFLOP/s")
        ways = (FullLogits(), OneARow(), Masked(model.config.hidden_size), PrefixShared())
        with torch.no_grad():
            for way in ways:
                scorer = Scorer(model, token_budget=self.token_budget, way=way)
                score(scorer, rows[:2])
                seconds = timed(lambda scorer=scorer: score(scorer, rows), self.rounds)
                print(
                    f"{type(way).__name__:>12}: {seconds:7.2f} CPU s, {tokens / seconds:8.0f} "
                    f"response tokens a second, useful work at {work / seconds / peak:.0%} of peak"
                )


@dataclass(frozen=True, kw_only=True)
class Filing:
    """Score a file of responses with a policy, as the command does."""

    shape: Shape = "five"
    """Lengths of the data: hh, uf, five, five-long, or pandalm."""
    model: ModelName = "small"
    """small or smollm2."""
    prompts: int = 32
    """Prompts of the file."""
    threads: int = 1
    """Threads."""
    votes: Path | None = None
    """For --shape pandalm: JSON-lines with prompt, responses and rank."""

    def __call__(self) -> None:
        from prefloop.policies import Policy
        from prefloop.scoring import WithLogps, score_file

        torch.set_num_threads(self.threads)
        model, tokenizer = load_model(self.model)
        policy = Policy(model.eval(), tokenizer, self.model)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "responses.jsonl"
            with source.open("w", encoding="utf-8") as file:
                for number, row in enumerate(texts(self.shape, self.prompts, self.votes)):
                    made = {"id": str(number), "prompt": row.prompt, "responses": row.responses}
                    file.write(json.dumps(made) + "\n")
            for hidden in (False, True, False, True):  # the first two warm up
                column, out = WithLogps(policy=policy, hidden=hidden), Path(folder, str(hidden))
                shutil.rmtree(out, ignore_errors=True)
                seconds = timed(lambda c=column, to=out: score_file(source, to, [c]), 1)
                tokens = sum(
                    sum(json.loads(line)["tokens"]) for line in (out / "scored.jsonl").open()
                )
                print(
                    f"{'with hidden products' if hidden else 'log-probabilities':>20}: "
                    f"{self.prompts / seconds:7.1f} prompts, {tokens / seconds:8.0f} response "
                    f"tokens a CPU second, peak memory {peak_gb():.2f} GiB"
                )


@dataclass(frozen=True, kw_only=True)
class Selecting:
    """Preference variance of many prompts with eight rewards each."""

    prompts: int = 1_000_000
    """Prompts."""
    rewards: int = 8
    """Rewards a prompt."""
    words: int = 4
    """Words of a prompt and of a response in the file."""

    def __call__(self) -> None:
        from prefloop.selecting import Cut, select
        from prefloop.selection import PVar, preference_variance

        rng = torch.Generator().manual_seed(0)
        table = torch.randn(self.prompts, self.rewards, generator=rng)
        before = peak_gb()
        seconds = timed(lambda: preference_variance(table), 1)
        print(
            f"in memory: {seconds:.2f} CPU s for {self.prompts:,} prompts, "
            f"peak memory {before:.2f} to {peak_gb():.2f} GiB"
        )
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "scored.jsonl"
            self.write(source)
            size, before = source.stat().st_size / 2**30, peak_gb()
            rule, cut = PVar(), Cut(fraction=0.5)
            seconds = timed(lambda: select(source, Path(folder), rule, cut), 1)
            print(
                f"prefloop select: {seconds:.1f} CPU s for {self.prompts:,} rows ({size:.2f} GiB), "
                f"{self.prompts / seconds:,.0f} rows a second, peak memory {before:.2f} to "
                f"{peak_gb():.2f} GiB"
            )

    def write(self, path: Path) -> None:
        rng = random.Random(0)
        text = " ".join(["word"] * self.words)
        with path.open("w", encoding="utf-8") as file:
            for number in range(self.prompts):
                row = {
                    "id": str(number),
                    "prompt": f"{number} {text}",
                    "responses": [f"{place} {text}" for place in range(self.rewards)],
                    "scores": [round(rng.gauss(0, 1), 6) for _ in range(self.rewards)],
                }
                file.write(json.dumps(row) + "\n")


def timed(work: Callable[[], object], rounds: int) -> float:
    """Median CPU seconds."""
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def peak_gb() -> float:
    """Peak memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"scoring": Scoring, "filing": Filing, "selecting": Selecting}
    )()


if __name__ == "__main__":
    main()
