"""Online training past the point where its reward is worth following: what shows first?

A story model is trained on its own answers, labelled by VADER's sentiment, for many rounds with a
weak KL constraint. After each round two things are measured on held-out prompts: the diagnosis of
probabilities, on answers of the first model that were drawn once; and the text itself. Printed is
the first round in which each passes its threshold of docs/diagnostics.md.

    python experiments/overoptimization.py --model STORIES260K --out runs/overoptimization \\
        --seeds 0 1 2

Everything is kept in --out: a run that was stopped goes on, and seeds may be run apart.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from curves import Line, Panel, draw

from prefloop.collecting import Draw, with_answers
from prefloop.data import encoder
from prefloop.demo_prompts import story_prompts
from prefloop.diagnosing import diagnose
from prefloop.diagnostics import verdict
from prefloop.diagnostics.text import text_statistics
from prefloop.intervals import Estimate, mean
from prefloop.objectives import DPO
from prefloop.online import Asking, Learning, Measuring, Online, source_of
from prefloop.policies import Lora, Policy, Sampling
from prefloop.policies.sampling import FromPolicy
from prefloop.rewards import load_reward, score
from prefloop.runs import read_json, read_jsonl, write_json
from prefloop.selection import PVar
from prefloop.settings import TrainSettings
from prefloop.types import Comparison

BETA, LR, TOKENS = 0.02, 1e-3, 60
DRAWING = Sampling(max_new_tokens=TOKENS, rows=128)
Row = Mapping[str, Any]

SIGNS: dict[str, Callable[[Row], bool]] = {
    "chosen fell in half of the comparisons": lambda row: row["chosen fell"] >= verdict.DISPLACED,
    "chosen and rejected both fell in half": lambda row: row["both fell"] >= verdict.BOTH_FELL,
    "chosen collapsed, 0.5 nats a token": lambda row: row["a token"] <= verdict.COLLAPSED,
    "text repeats, 5 points more": lambda row: row["repeats"],
    "text loops, one in ten": lambda row: row["looping"] >= verdict.LOOPING,
}
"""What is looked for, with the thresholds of the verdict: first of probabilities, then of text."""


def loop(model: str, seed: int, rounds: int, out: Path) -> Online:
    """The online run of one seed: on-policy pairs, hard labels, little KL constraint."""
    train, held_out = story_prompts()
    source = source_of(FromPolicy(), 2)
    return Online(
        asking=Asking(
            prompts=train,
            reward=load_reward("vader"),
            first=source,
            later=source,
            drawing=DRAWING,
            rule=PVar(),
            seed=seed,
        ),
        learning=Learning(
            model=model,
            adapter=Lora(rank=8, alpha=16.0),
            objective=DPO(beta=BETA),
            settings=TrainSettings(lr=LR, batch_size=12, epochs=3, seed=seed),
        ),
        measuring=Measuring(prompts=held_out, draw=Draw(n=4, settings=DRAWING, seed=1000 + seed)),
        rounds=rounds,
        accelerator=Accelerator(cpu=True),
        out=out,
    )


def judged_answers(policy: Policy, seed: int) -> list[Comparison]:
    """Four answers of the first model to each held-out prompt: best, worst, and two not judged."""
    rows = story_prompts()[1]
    draw = Draw(n=4, settings=DRAWING, seed=2000 + seed)
    drawn = draw(policy, encoder(policy.tokenizer).prompts(rows))
    answered = [with_answers(row, answers) for row, answers in zip(rows, drawn, strict=True)]
    return [_best_and_worst(row) for row in score(answered, load_reward("vader"))]


def _best_and_worst(row: Comparison) -> Comparison:
    scores = row.scores or ()
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    rank = [{best: 1, worst: 2}.get(place) for place in range(len(scores))]
    return replace(row, scores=None, rank=tuple(rank))


def measured(online: Online, line: Row, rows: Sequence[Comparison]) -> Row:
    """One round: its line of rounds.jsonl, the diagnosis, the text; kept on disk."""
    folder = online.out / f"round-{line['round']}"
    path = folder / "measured.json"
    if path.exists():
        return read_json(path)
    found = diagnose(online.policy(line["round"]), rows, BETA, folder, folder)["numbers"]
    drawn = list(read_jsonl(folder / "samples.jsonl"))
    before, after = (
        text_statistics([row[side].split() for row in drawn]) for side in ("before", "after")
    )
    rise = after.repeated.value - before.repeated.value
    row = {
        "round": line["round"],
        "reward": line["reward"],
        "reference reward": line["reference_reward"],
        "KL": line["kl"],
        "chosen fell": found["chosen fell, share"],
        "both fell": found["both fell, share"],
        "a token": found["chosen change, nats a token"],
        "repeated": after.repeated.value,
        "repeats": rise >= verdict.REPEATING and after.repeated.low > before.repeated.value,
        "looping": after.looping.value,
        "distinct": after.distinct,
        "text": drawn[0]["after"],
    }
    write_json(path, row)
    return row


def run(model: str, seed: int, rounds: int, out: Path) -> list[Row]:
    """All rounds of a seed."""
    folder, started = out / f"seed-{seed}", time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    online = loop(model, seed, rounds, folder)
    rows = judged_answers(online.policy(0), seed)
    found = [measured(online, line, rows) for line in online()]
    print(f"seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
    return found


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over seeds, with a Student-t interval."""
    return mean(torch.tensor(values, dtype=torch.float64))


def show(seeds: Sequence[Sequence[Row]]) -> None:
    """Print the tables of docs/stable.md."""
    shown = (
        "reward",
        "KL",
        "chosen fell",
        "both fell",
        "a token",
        "repeated",
        "looping",
        "distinct",
    )
    print(f"\n{len(seeds)} seeds, means; one seed's first answer")
    print(f"| round | {' | '.join(shown)} |")
    print(f"|---|{'---|' * len(shown)}")
    for at in range(len(seeds[0])):
        cells = [f"{over_seeds([rows[at][name] for rows in seeds]).value:.2f}" for name in shown]
        print(f"| {at + 1} | {' | '.join(cells)} |")
    print("\n| sign | first round, seed by seed |")
    print("|---|---|")
    for name, seen in SIGNS.items():
        first = [next((row["round"] for row in rows if seen(row)), "never") for rows in seeds]
        print(f"| {name} | {', '.join(map(str, first))} |")
    for row in seeds[0][:: max(1, len(seeds[0]) // 6)]:
        print(f"round {row['round']}: {row['text']!r}")


def figure(seeds: Sequence[Sequence[Row]], path: Path) -> None:
    """Reward, probabilities and text over rounds."""
    groups = {
        "reward and KL / 40": {"reward": 1.0, "KL": 1 / 40},
        "probabilities": {"chosen fell": 1.0, "both fell": 1.0},
        "text, shares": {"repeated": 1.0, "looping": 1.0, "distinct": 1.0},
    }
    panels = [
        Panel(title=title, x_label="round", lines={k: _line(seeds, k, f) for k, f in what.items()})
        for title, what in groups.items()
    ]
    draw(panels, path)


def _line(seeds: Sequence[Sequence[Row]], name: str, factor: float) -> Line:
    at = [
        over_seeds([factor * rows[number][name] for rows in seeds])
        for number in range(len(seeds[0]))
    ]
    return Line(
        x=[row["round"] for row in seeds[0]],
        y=[one.value for one in at],
        low=[one.low for one in at],
        high=[one.high for one in at],
    )


def main() -> None:
    """Run what is not on disk yet; print and draw all that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the stories260k model")
    parser.add_argument("--out", type=Path, default=Path("runs/overoptimization"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--figure", type=Path, help="where to draw; in --out by default")
    asked = parser.parse_args()
    if not Path(asked.model).is_dir():
        raise SystemExit(f"skipped: {asked.model} is not there")
    torch.set_num_threads(1)
    found = [run(asked.model, seed, asked.rounds, asked.out) for seed in asked.seeds]
    show(found)
    figure(found, asked.figure or asked.out / "overoptimization.png")


if __name__ == "__main__":
    main()
