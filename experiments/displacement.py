"""A real model over-trained on pairs that are alike, with and without the safe region of SFT.

The pairs are answers to PandaLM's instructions that three people ordered unanimously and that share
most of their words. DPO and SimPO train an adapter on a few of them for many epochs; Stable PO does
the same with a penalty outside the safe region. `prefloop diagnose` says what became of the chosen.

    python experiments/displacement.py --data shared/data/pandalm/votes.jsonl \\
        --out runs/displacement --methods DPO SimPO "Stable DPO" "Stable SimPO"

Methods may be run apart, into one --out. SmolLM2-135M-Instruct is trained unless --model is given.
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

from prefloop import data, smollm2
from prefloop.comparing import trained_policy
from prefloop.data import encoder
from prefloop.diagnosing import diagnose
from prefloop.objectives import DPO, Objective, SimPO
from prefloop.policies import Lora, Policy, Sampling, load_policy
from prefloop.policies.sampling import FromPolicy, Sampler, sample
from prefloop.runs import read_json, read_jsonl, write_jsonl
from prefloop.samplers import FromReference
from prefloop.settings import TrainSettings
from prefloop.stable import Hinge, StableGradient
from prefloop.trainer import Gradient, backward
from prefloop.training import Handling, Training, prepare
from prefloop.types import Comparison

ALIKE, ANSWER_WORDS, PROMPT_WORDS = 0.5, 20, 45
TRAIN, HELD_OUT = 12, 12
LR, BATCH, STEPS, BETA = 5e-4, 4, 36, 0.1


@dataclass(frozen=True)
class Method:
    """What is minimised, and how its gradient is computed."""

    objective: Objective
    gradient: Gradient = backward


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


def train(method: Method, model: str, rows: Sequence[Comparison], out: Path) -> None:
    """One run folder."""
    policy = load_policy(model, adapter=Lora(rank=16, alpha=32.0))
    settings = TrainSettings(
        lr=LR,
        batch_size=BATCH,
        epochs=10**6,
        max_steps=STEPS,
        schedule="constant",
        save_every=STEPS,
    )
    training = Training(
        policy=policy,
        objective=method.objective,
        settings=settings,
        accelerator=Accelerator(cpu=True),
        out=out,
        gradient=method.gradient,
    )
    training(prepare(rows, policy, method.objective, Handling(empty=data.Empty.drop)).rows)


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


def run(name: str, model: str, pairs: tuple[list[Comparison], list[Comparison]], out: Path) -> None:
    """Train and diagnose one method; what is on disk is not made again."""
    folder, started = out / name.replace(" ", "-"), time.monotonic()
    if not (folder / "policy").is_dir():
        train(METHODS[name], model, pairs[0], folder)
        print(f"{name}: trained in {time.monotonic() - started:.0f} s", flush=True)
    policy = trained_policy(folder)
    if not (folder / "samples.jsonl").exists():
        answers(policy, pairs[1], folder)
    for kind, rows in zip(("train", "held-out"), pairs, strict=True):
        place = folder / kind
        if not (place / "diagnosis.json").exists():
            place.mkdir(exist_ok=True)
            diagnose(policy, rows, BETA, folder, place)
    print(f"{name}: all of it in {time.monotonic() - started:.0f} s", flush=True)


def by_epoch(folder: Path, metric: str) -> Line:
    """Means of a metric over each pass through the pairs, against the step it ended at."""
    rows: list[Mapping[str, Any]] = list(read_jsonl(folder / "metrics.jsonl"))
    size = TRAIN // BATCH
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return Line(
        x=[part[-1]["step"] for part in parts],
        y=[sum(row[metric] for row in part) / len(part) for part in parts],
    )


def show(names: Sequence[str], out: Path) -> None:
    """Print the table of docs/stable.md, and what the diagnosis says."""
    keys = {
        "chosen fell": "chosen fell, share",
        "chosen, nats": "chosen change, mean nats",
        "a token": "chosen change, nats a token",
        "rejected, nats": "rejected change, mean nats",
        "implicit accuracy": "accuracy of the implicit reward, share",
    }
    print(f"\n| method | pairs | {' | '.join(keys)} |")
    print(f"|---|---|{'---|' * len(keys)}")
    for name in names:
        for kind in ("train", "held-out"):
            held = read_json(out / name.replace(" ", "-") / kind / "diagnosis.json")
            numbers = [f"{held['numbers'][key]:.2f}" for key in keys.values()]
            print(f"| {name} | {kind} | {' | '.join(numbers)} |")
    for name in names:
        held = read_json(out / name.replace(" ", "-") / "held-out" / "diagnosis.json")
        print(f"\n{name}:", *held["verdict"], sep="\n  - ")


def figure(names: Sequence[str], out: Path, path: Path) -> None:
    """Chosen and rejected over training, by method."""
    panels = [
        Panel(
            title=title,
            x_label="step",
            lines={name: by_epoch(out / name.replace(" ", "-"), metric) for name in names},
            level=0.0,
        )
        for title, metric in (
            ("chosen: log policy / reference, nats", "displacement/chosen"),
            ("rejected: log policy / reference, nats", "displacement/rejected"),
        )
    ]
    draw(panels, path)


def main() -> None:
    """Run what is not on disk yet; print and draw when all methods are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="PandaLM's votes")
    parser.add_argument("--model", default="", help="folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--out", type=Path, default=Path("runs/displacement"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--figure", type=Path, help="where to draw; in --out by default")
    asked = parser.parse_args()
    if not asked.data.exists():
        raise SystemExit(f"skipped: {asked.data} is not there")
    torch.set_num_threads(1)
    pairs = similar_pairs(asked.data)
    print(f"{len(pairs[0])} pairs to train on, {len(pairs[1])} held out", flush=True)
    for name in asked.methods:
        run(name, asked.model or str(smollm2.demo_model()), pairs, asked.out)
    done = [n for n in METHODS if (asked.out / n.replace(" ", "-") / "held-out").is_dir()]
    show(done, asked.out)
    figure(done, asked.out, asked.figure or asked.out / "displacement.png")


if __name__ == "__main__":
    main()
