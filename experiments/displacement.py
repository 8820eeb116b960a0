"""A real model over-trained on pairs that are alike, with and without the safe region of SFT.

The pairs are answers to PandaLM's instructions that three people ordered unanimously and that share
most of their words. DPO and SimPO train an adapter on a few of them for many epochs; Stable PO does
the same with a penalty outside the safe region. `prefloop diagnose` says what became of the chosen.

    python experiments/displacement.py --data shared/data/pandalm/votes.jsonl \\
        --out runs/displacement --model STORIES260K --seeds 0 1 2 3 4 --lr 1e-3 --steps 120

SmolLM2-135M-Instruct is trained where no --model is given. Methods and seeds may be run apart, into
one --out; what is there is not run again.
"""

import argparse
import difflib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from curves import Line, Panel, draw
from methods import Method

from prefloop import data, smollm2
from prefloop.comparing import trained_policy
from prefloop.data import encoder
from prefloop.diagnosing import diagnose
from prefloop.intervals import Estimate, mean
from prefloop.objectives import DPO, SimPO
from prefloop.policies import Lora, Policy, Sampling, load_policy
from prefloop.policies.sampling import FromPolicy, Sampler, sample
from prefloop.runs import read_json, read_jsonl, write_jsonl
from prefloop.samplers import FromReference
from prefloop.settings import TrainSettings
from prefloop.stable import Hinge, StableGradient
from prefloop.training import Handling, Training, prepare
from prefloop.types import Comparison

ALIKE, ANSWER_WORDS, PROMPT_WORDS = 0.5, 20, 45
TRAIN, HELD_OUT = 12, 12
BATCH, BETA = 4, 0.1
KINDS = ("train", "held-out")


METHODS = {
    "DPO": Method(DPO(beta=BETA)),
    "SimPO": Method(SimPO()),
    "Stable DPO": Method(DPO(beta=BETA), StableGradient(solver=Hinge(lam=1.0))),
    "Stable SimPO": Method(SimPO(), StableGradient(solver=Hinge(lam=1.0))),
}


def similar_pairs(path: Path) -> tuple[list[Comparison], list[Comparison]]:
    """Pairs that three people ordered alike and that share their words: to train on, held out."""
    votes: dict[str, list[Comparison]] = {}
    for row in data.iterate(path):
        votes.setdefault(row.id.rsplit("-", 1)[0], []).append(row)
    found: dict[tuple[Any, frozenset[str]], Comparison] = {}
    for rows in votes.values():
        first = rows[0]
        if all(row.rank == first.rank for row in rows) and _alike(first):
            found.setdefault((first.prompt, frozenset(first.responses)), first)
    train, held_out = data.split(list(found.values()), 0.35, 0)
    return train[:TRAIN], held_out[:HELD_OUT]


def _alike(row: Comparison) -> bool:
    assert isinstance(row.prompt, str)
    first, second = (response.split() for response in row.responses)
    if len(set(row.rank or ())) == 1 or max(len(first), len(second)) > ANSWER_WORDS:
        return False
    ratio = difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()
    return len(row.prompt.split()) <= PROMPT_WORDS and ratio >= ALIKE


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained on what, for how long.

    Attributes:
        model: folder or name.
        pairs: to train on, and held out.
        lr, steps: of the training.
        out: where the runs go.
    """

    model: str
    pairs: tuple[list[Comparison], list[Comparison]]
    lr: float
    steps: int
    out: Path

    def folder(self, name: str, seed: int) -> Path:
        """The run folder of a method."""
        return self.out / f"{name.replace(' ', '-')}-{seed}"

    def seeds(self, name: str) -> list[Path]:
        """The finished runs of a method."""
        return sorted(
            path.parents[1]
            for path in self.out.glob(f"{name.replace(' ', '-')}-[0-9]*/held-out/diagnosis.json")
        )


def train(method: Method, task: Task, seed: int, out: Path) -> None:
    """One run folder."""
    policy = load_policy(task.model, adapter=Lora(rank=16, alpha=32.0), seed=seed)
    settings = TrainSettings(
        lr=task.lr,
        batch_size=BATCH,
        epochs=10**6,
        max_steps=task.steps,
        schedule="constant",
        save_every=task.steps,
        seed=seed,
    )
    training = Training(
        policy=policy,
        objective=method.objective,
        settings=settings,
        accelerator=Accelerator(cpu=True),
        out=out,
        gradient=method.gradient,
    )
    handling = Handling(empty=data.Empty.drop, overlong=data.Overlong.drop)
    training(prepare(task.pairs[0], policy, method.objective, handling).rows)


def answers(policy: Policy, prompts: Sequence[Comparison], out: Path) -> None:
    """Greedy answers of the reference and of the policy, for the diagnosis of the text."""
    tokens = encoder(policy.tokenizer).prompts(prompts)
    settings = Sampling(temperature=0.0, max_new_tokens=48)

    def texts(sampler: Sampler) -> list[str]:
        return [drawn[0].text for drawn in sample(policy, tokens, 1, settings, 0, sampler)]

    before, after = texts(FromReference()), texts(FromPolicy())
    write_jsonl(
        out / "samples.jsonl",
        (
            {"prompt": row.prompt, "before": one, "after": two}
            for row, one, two in zip(prompts, before, after, strict=True)
        ),
    )


def run(name: str, task: Task, seed: int) -> None:
    """Train and diagnose one method; what is on disk is not made again."""
    folder, started = task.folder(name, seed), time.monotonic()
    if not (folder / "policy").is_dir():
        train(METHODS[name], task, seed, folder)
    policy = trained_policy(folder)
    if not (folder / "samples.jsonl").exists():
        answers(policy, task.pairs[1], folder)
    for kind, rows in zip(KINDS, task.pairs, strict=True):
        place = folder / kind
        if not (place / "diagnosis.json").exists():
            place.mkdir(exist_ok=True)
            diagnose(policy, rows, BETA, folder, place)
    print(f"{name}, seed {seed}: {time.monotonic() - started:.0f} s", flush=True)


def by_epoch(folders: Sequence[Path], metric: str) -> Line:
    """Means of a metric over each pass through the pairs, against the step it ended at."""
    runs = [list(read_jsonl(folder / "metrics.jsonl")) for folder in folders]
    size = TRAIN // BATCH
    starts = range(0, min(map(len, runs)), size)

    def within(rows: Sequence[Mapping[str, Any]], start: int) -> float:
        part = rows[start : start + size]
        return sum(row[metric] for row in part) / len(part)

    at = [over_seeds([within(rows, start) for rows in runs]) for start in starts]
    known = len(runs) > 1
    return Line(
        x=[runs[0][min(start + size, len(runs[0])) - 1]["step"] for start in starts],
        y=[one.value for one in at],
        low=[one.low for one in at] if known else None,
        high=[one.high for one in at] if known else None,
    )


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over seeds, with a Student-t interval."""
    return mean(torch.tensor(values, dtype=torch.float64))


def said(found: Estimate) -> str:
    """The mean, and its interval where there are several seeds."""
    interval = f" [{found.low:.2f}, {found.high:.2f}]" if found.clusters > 1 else ""
    return f"{found.value:.2f}{interval}"


def show(names: Sequence[str], task: Task) -> None:
    """Print the table of docs/stable.md, and what the diagnosis of the first seed says."""
    keys = {
        "chosen fell": "chosen fell, share",
        "chosen, nats": "chosen change, mean nats",
        "a token": "chosen change, nats a token",
        "rejected, nats": "rejected change, mean nats",
        "implicit accuracy": "accuracy of the implicit reward, share",
    }
    print(f"\n| method | pairs | seeds | {' | '.join(keys)} |")
    print(f"|---|---|---|{'---|' * len(keys)}")
    for kind in KINDS:
        for name in names:
            told = [read_json(f / kind / "diagnosis.json")["numbers"] for f in task.seeds(name)]
            cells = [said(over_seeds([one[key] for one in told])) for key in keys.values()]
            print(f"| {name} | {kind} | {len(told)} | {' | '.join(cells)} |")
    for name in names:
        held = read_json(task.seeds(name)[0] / "held-out" / "diagnosis.json")
        print(f"\n{name}:", *held["verdict"], sep="\n  - ")


def figure(names: Sequence[str], task: Task, path: Path) -> None:
    """Chosen and rejected over training, by method; bands are 95 % intervals over seeds."""
    panels = [
        Panel(
            title=title,
            x_label="step",
            lines={name: by_epoch(task.seeds(name), metric) for name in names},
            level=0.0,
        )
        for title, metric in (
            ("chosen: log policy / reference, nats", "displacement/chosen"),
            ("rejected: log policy / reference, nats", "displacement/rejected"),
        )
    ]
    draw(panels, path)


def main() -> None:
    """Run what is not on disk yet; print and draw what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="PandaLM's votes")
    parser.add_argument("--model", default="", help="folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--out", type=Path, default=Path("runs/displacement"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--figure", type=Path, help="where to draw; in --out by default")
    asked = parser.parse_args()
    if not asked.data.exists():
        raise SystemExit(f"skipped: {asked.data} is not there")
    torch.set_num_threads(1)
    task = Task(
        model=asked.model or str(smollm2.demo_model()),
        pairs=similar_pairs(asked.data),
        lr=asked.lr,
        steps=asked.steps,
        out=asked.out,
    )
    print(f"{len(task.pairs[0])} pairs to train on, {len(task.pairs[1])} held out", flush=True)
    for seed in asked.seeds:
        for name in asked.methods:
            run(name, task, seed)
    done = [name for name in METHODS if task.seeds(name)]
    show(done, task)
    figure(done, task, asked.figure or asked.out / "displacement.png")


if __name__ == "__main__":
    main()
