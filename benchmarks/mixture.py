"""What K types cost: `prefloop mixture` against one training of the same policy on the same votes.

    python benchmarks/mixture.py --model MODEL --data votes.jsonl --types 2

One training is `prefloop train`'s own loop with LoRA; the mixture runs one round of EM from the
same settings (its M-step trains every type, its E-step scores every vote under every type). Two
starts: hard clusters, where a type trains on its own annotators only, and soft ones, where every
type trains on everybody, which is the most that a round can cost. Each run is a process of its
own: CPU seconds of the work after loading, and peak resident memory less that of a process that
loads the model and does nothing. The reference is scored in every run, never read from a cache.
Runs take turns, `--repeats` of each; medians are printed, with the least and the most. With `--new`
no answer stands in two votes, so that scoring votes by answers saves nothing.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from accelerate import Accelerator

from prefloop.data import read, tokenize
from prefloop.mixture import Dirichlet, Mixture, MixtureTraining, Votes
from prefloop.mixture.starts import Given
from prefloop.objectives import PlackettLuce
from prefloop.policies import Lora, load_policy
from prefloop.runs import write_jsonl
from prefloop.settings import TrainSettings
from prefloop.training import Training
from prefloop.types import Comparison, Tokenized

KINDS = ("load", "train", "hard", "soft")


def work(kind: str, given: argparse.Namespace) -> dict[str, float]:
    """One run in this process; its CPU seconds and its peak memory."""
    policy = load_policy(given.model, adapter=Lora(rank=given.rank, alpha=2.0 * given.rank))
    votes = read(given.data)
    rows, _ = tokenize((_new(votes) if given.new else votes)[: given.rows], policy.tokenizer)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PREFLOOP_CACHE"] = folder
        settings = TrainSettings(batch_size=given.batch, epochs=given.epochs, lr=1e-4)
        accelerator, out = Accelerator(cpu=True), Path(folder)
        if kind == "train":
            Training(
                policy=policy,
                objective=PlackettLuce(beta=0.1),
                settings=settings,
                accelerator=accelerator,
                out=out,
            )(rows)
        elif kind != "load":
            MixtureTraining(
                policy=policy,
                objective=PlackettLuce(beta=0.1),
                settings=settings,
                mixture=Mixture(types=given.types, rounds=1),
                start=_hard(rows, given.types, out) if kind == "hard" else Dirichlet(),
                allow_unidentified=True,
                accelerator=accelerator,
                out=out,
            )(rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB
    return {"seconds": time.process_time() - began, "peak": peak, "rows": float(len(rows))}


def _new(votes: list[Comparison]) -> list[Comparison]:
    """The votes whose answers are all in no vote before them."""
    seen: set[tuple[str, object]] = set()
    kept = []
    for row in votes:
        answers = {(str(row.prompt), answer) for answer in row.responses}
        if not answers & seen and len(answers) == len(row.responses):
            kept.append(row)
            seen |= answers
    return kept


def _hard(rows: list[Tokenized], types: int, folder: Path) -> Given:
    """Annotators in turn: equal shares, each wholly of one type."""
    names = Votes.of(rows).names
    gamma = [[float(place % types == kind) for kind in range(types)] for place in range(len(names))]
    lines = zip(names, gamma, strict=True)
    write_jsonl(folder / "given.jsonl", ({"annotator": n, "gamma": g} for n, g in lines))
    return Given(path=str(folder / "given.jsonl"))


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Cost of a mixture against one training.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--types", type=int, default=2)
    parser.add_argument("--rows", type=int, default=200, help="votes, the first of the file")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--new", action="store_true", help="votes on answers of their own only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kind", choices=KINDS, help="one run in this process, as JSON")
    return parser.parse_args()


def main() -> None:
    """All four, each in a process of its own, and their ratios."""
    given = options()
    if given.kind:
        print(json.dumps(work(given.kind, given)))
        return
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(given.repeats):
        for kind in KINDS:
            command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[kind].append(json.loads(done.stdout.strip().splitlines()[-1]))
    seconds = {kind: [one["seconds"] for one in runs] for kind, runs in found.items()}
    peak = {kind: median(one["peak"] for one in runs) for kind, runs in found.items()}
    for kind, taken in seconds.items():
        print(
            f"{kind:<6}{median(taken):7.2f} CPU s ({min(taken):.2f} to {max(taken):.2f}), "
            f"peak {peak[kind]:.3f} GiB, {found[kind][0]['rows']:.0f} votes"
        )
    for kind in ("hard", "soft"):
        whole = peak[kind] / peak["train"]
        working = (peak[kind] - peak["load"]) / (peak["train"] - peak["load"])
        times = median(seconds[kind]) / median(seconds["train"])
        print(
            f"{kind}: {times:.2f} trainings for {given.types} types "
            f"({100 * (times / given.types - 1):+.0f} % a type), memory {whole:.2f} times one run, "
            f"{working:.2f} times without what loading takes"
        )


if __name__ == "__main__":
    main()
