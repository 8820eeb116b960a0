"""Which sampler learns most from the same number of labels? Four of them, several seeds.

The first round is on-policy and shared: it is run once a seed and copied. Afterwards each method
draws its own pairs; reward, prompts, labels, objective and every setting of training are the same.
Everything is kept in --out, so that a run that was stopped goes on.

    python benchmarks/online_samplers.py --model STORIES260K --out runs/online --seeds 5
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from prefloop.collecting import Draw
from prefloop.demo_prompts import story_prompts
from prefloop.intervals import Estimate, mean
from prefloop.objectives import SoftLabelDPO
from prefloop.online import RECIPES, Asking, Learning, Measuring, Online, source_of
from prefloop.online.loop import Row
from prefloop.policies import Lora, Sampling
from prefloop.policies.sampling import FromPolicy
from prefloop.rewards import load_reward
from prefloop.runs import write_json
from prefloop.selecting import Cut
from prefloop.selection import PVar
from prefloop.settings import TrainSettings

METHODS = ("vanilla", "on_policy", "hybrid", "mixture")
BETA, MARGIN_SCALE, TOKENS, ANSWERS = 0.1, 4.0, 40, 4


def loop(model: str, method: str, seed: int, rounds: int, out: Path) -> Online:
    """The online run of one method and seed."""
    train, held_out = story_prompts()
    settings = Sampling(max_new_tokens=TOKENS, rows=128)
    return Online(
        asking=Asking(
            prompts=train,
            reward=load_reward("vader"),
            first=source_of(FromPolicy(), 2),
            later=source_of(RECIPES[method].source, 2),
            drawing=settings,
            rule=PVar(),
            cut=Cut(fraction=1.0),
            seed=seed,
        ),
        learning=Learning(
            model=model,
            adapter=Lora(rank=8, alpha=16.0),
            objective=SoftLabelDPO(beta=BETA, margin_scale=MARGIN_SCALE),
            settings=TrainSettings(lr=1e-3, batch_size=12, epochs=3, seed=seed),
        ),
        measuring=Measuring(
            prompts=held_out, draw=Draw(n=ANSWERS, settings=settings, seed=1000 + seed)
        ),
        rounds=rounds,
        accelerator=Accelerator(cpu=True),
        out=out,
    )


def run_seed(model: str, seed: int, rounds: int, out: Path) -> dict[str, list[Row]]:
    """The rounds of every method, the first one shared."""
    shared = out / f"seed-{seed}" / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    list(loop(model, "on_policy", seed, 1, shared)())
    found = {}
    for method in METHODS:
        folder = out / f"seed-{seed}" / method
        if not (folder / "round-1").exists():
            part = folder.with_name(f"{method}.part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(shared, part)
            part.rename(folder)
        found[method] = list(loop(model, method, seed, rounds, folder)())
    return found


def value(row: Row) -> float:
    """What the objective aims at, in units of the reward: reward - beta / margin_scale * KL."""
    return row["reward"] - BETA / MARGIN_SCALE * row["kl"]


def over_seeds(values: list[float]) -> Estimate:
    """Mean over seeds with a Student-t interval."""
    return mean(torch.tensor(values, dtype=torch.float64))


def said(found: Estimate) -> str:
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def summary(seeds: list[dict[str, list[Row]]]) -> dict[str, Any]:
    """Means over seeds after each round, and the differences to on-policy, paired by seed."""
    frontier, differences = [], []
    for number in range(len(seeds[0]["on_policy"])):
        for method in METHODS if number else ("on_policy",):
            rows = [seed[method][number] for seed in seeds]
            line: dict[str, Any] = {"round": number + 1, "method": method}
            line |= {name: over_seeds([r[name] for r in rows]) for name in ("reward", "kl")}
            line["win_rate"] = over_seeds([row["win_rate"] for row in rows])
            line["value"] = over_seeds([value(row) for row in rows])
            line["labels"] = sum(seeds[0][method][at]["labels"] for at in range(number + 1))
            frontier.append(line)
    for method in METHODS:
        if method != "on_policy":
            pairs = [(seed[method][-1], seed["on_policy"][-1]) for seed in seeds]
            differences.append(
                {
                    "method": method,
                    "reward": over_seeds([a["reward"] - b["reward"] for a, b in pairs]),
                    "kl": over_seeds([a["kl"] - b["kl"] for a, b in pairs]),
                    "value": over_seeds([value(a) - value(b) for a, b in pairs]),
                }
            )
    return {"frontier": frontier, "differences": differences}


def show(found: dict[str, Any], reference: Estimate, seeds: int) -> None:
    """Print the tables of docs/online.md."""
    print(f"\nreward of the reference {said(reference)}; {seeds} seeds, 95 % intervals over seeds")
    print(f"\n{'after round':<12}{'method':<11}{'labels':>6}  ", end="")
    print(f"{'reward':<26}{'KL, nats':<26}{'win rate':<26}reward - {BETA / MARGIN_SCALE:g} KL")
    for line in found["frontier"]:
        name = "all" if line["round"] == 1 else line["method"]
        print(f"{line['round']:<12}{name:<11}{line['labels']:>6}  ", end="")
        print("".join(f"{said(line[key]):<26}" for key in ("reward", "kl", "win_rate", "value")))
    print("\nlast round, method minus on-policy, paired by seed")
    for line in found["differences"]:
        print(f"{line['method']:<11}", end="")
        print("".join(f"{key} {said(line[key]):<28}" for key in ("reward", "kl", "value")))


def main() -> None:
    """Run what is not on disk yet, and print after every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the stories260k model")
    parser.add_argument("--out", type=Path, default=Path("runs/online_samplers"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    started, done = time.monotonic(), []
    for seed in range(asked.seeds):
        done.append(run_seed(asked.model, seed, asked.rounds, asked.out))
        print(f"seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
        if seed:
            found = summary(done)
            reference = over_seeds([s["on_policy"][0]["reference_reward"] for s in done])
            show(found, reference, len(done))
            write_json(asked.out / "summary.json", _plain(found))


def _plain(found: Any) -> Any:
    if isinstance(found, Estimate):
        return vars(found)
    if isinstance(found, dict):
        return {key: _plain(item) for key, item in found.items()}
    return [_plain(item) for item in found] if isinstance(found, list) else found


if __name__ == "__main__":
    main()
