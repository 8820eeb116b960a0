"""Does preference training keep a skill? Exact match of sums while six methods train on pairs.

A small Llama learns to add two numbers of three digits, from random weights, until it answers about
seven of ten held-out sums right. Then each method trains it on the same pairs: the right sum, and
the right sum with one digit changed. Held-out sums are answered all along; every seed has its own
model, pairs and order.

Everything is kept in --out: a run that was stopped goes on, and seeds may be run apart.

    python experiments/arithmetic.py --out runs/arithmetic --seeds 0 1 2 3 4
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from curves import Line, Panel, draw
from methods import Method
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefloop.intervals import Estimate, mean
from prefloop.logps import Scorer, cached_reference, model_identity
from prefloop.objectives import DPO, DPOP, SFT, SimPO, Sum
from prefloop.runs import read_json, write_json
from prefloop.settings import TrainSettings
from prefloop.stable import Hinge, StableGradient
from prefloop.trainer import build_trainer
from prefloop.trainer.loop import global_batch
from prefloop.types import Tokenized

BOS, EOS, PLUS, EQUALS, ZERO = 0, 1, 2, 3, 4
VOCABULARY, DIGITS = 14, 3
SKILL, HELD_OUT, PAIRS = 0.7, 500, 512
LR, STEPS, EVERY, BATCH = 3e-4, 400, 20, 32
BETA = 0.1
PATIENCE = 6000
EXACT, LOGP, CHANGE = "exact match", "log p(right answer), nats", "change of the chosen, nats"


METHODS = {
    "DPO": Method(DPO(beta=BETA)),
    "SimPO": Method(SimPO()),
    "DPO + SFT": Method(Sum(objectives=(DPO(beta=BETA), SFT()), weights=(1.0, 1.0))),
    "DPOP": Method(DPOP(beta=BETA)),
    "Stable DPO": Method(DPO(beta=BETA), StableGradient(solver=Hinge(lam=1.0))),
    "Stable SimPO": Method(SimPO(), StableGradient(solver=Hinge(lam=1.0))),
}


def sums(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` questions `a+b=` and their answers, lowest digit first, in tokens."""
    terms = torch.randint(0, 10**DIGITS, (2, count), generator=rng)
    first, second = (_digits(term, DIGITS) for term in terms)

    def column(token: int) -> Tensor:
        return torch.full((count, 1), token)

    question = torch.cat([column(BOS), first, column(PLUS), second, column(EQUALS)], -1)
    return question, torch.cat([_digits(terms.sum(0), DIGITS + 1), column(EOS)], -1)


def _digits(numbers: Tensor, places: int) -> Tensor:
    return torch.stack([numbers // 10**place % 10 for place in range(places)], -1) + ZERO


def pairs(count: int, rng: torch.Generator) -> list[Tokenized]:
    """The right answer, and the same with one digit changed."""
    questions, right = sums(count, rng)
    place = torch.randint(0, DIGITS + 1, (count,), generator=rng)
    shift = torch.randint(1, 10, (count,), generator=rng)
    wrong, rows = right.clone(), torch.arange(count)
    wrong[rows, place] = (wrong[rows, place] - ZERO + shift) % 10 + ZERO
    return [
        Tokenized(
            prompt=tuple(question.tolist()),
            responses=(tuple(good.tolist()), tuple(bad.tolist())),
            rank=(1, 2),
            id=str(number),
        )
        for number, (question, good, bad) in enumerate(zip(questions, right, wrong, strict=True))
    ]


@torch.no_grad()
def exact_match(model: PreTrainedModel, questions: Tensor, answers: Tensor) -> tuple[float, float]:
    """Share of the questions that greedy decoding answers right; mean log p(answer), nats.

    Greedy decoding gives the right answer exactly where each of its tokens is the likeliest one
    after those before it, so one pass with the right answer tells.
    """
    model.eval()
    logits = model(torch.cat([questions, answers], -1)).logits[:, questions.shape[1] - 1 : -1]
    right = (logits.argmax(-1) == answers).all(-1).double().mean()
    logp = logits.log_softmax(-1).gather(-1, answers.unsqueeze(-1)).sum((1, 2)).mean()
    return float(right), float(logp)


def pretrained(seed: int, folder: Path) -> PreTrainedModel:
    """A model that adds right in `SKILL` of the cases, from `folder` if it is there."""
    if folder.is_dir():
        return AutoModelForCausalLM.from_pretrained(folder)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    rng, test = torch.Generator().manual_seed(seed), held_out(seed, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(PATIENCE):
        question, answer = sums(256, rng)
        tokens = torch.cat([question, answer], -1)
        labels = tokens.clone()
        labels[:, : question.shape[1]] = -100
        optimizer.zero_grad()
        model(tokens, labels=labels).loss.backward()
        optimizer.step()
        if step % 25 == 24 and exact_match(model, *test)[0] >= SKILL:
            print(f"seed {seed}: learned to add in {step + 1} steps", flush=True)
            model.save_pretrained(folder)
            return model
    raise SystemExit(f"seed {seed}: {PATIENCE} steps were not enough to learn to add")


def held_out(seed: int, number: int) -> tuple[Tensor, Tensor]:
    """Sums to test on: number 1 while learning to add, number 2 afterwards."""
    return sums(HELD_OUT, torch.Generator().manual_seed(number * 10**6 + seed))


def curve(start: PreTrainedModel, method: Method, seed: int, cache: Path) -> list[dict[str, float]]:
    """Train a copy of `start`; what became of the skill every `EVERY` steps."""
    model = AutoModelForCausalLM.from_config(start.config)
    model.load_state_dict(start.state_dict())
    rows, test = pairs(PAIRS, torch.Generator().manual_seed(3 * 10**6 + seed)), held_out(seed, 2)
    settings = TrainSettings(
        lr=LR, batch_size=BATCH, epochs=10**6, max_steps=STEPS, schedule="constant", seed=seed
    )
    trainer = build_trainer(
        Scorer(model),
        method.objective,
        cached_reference(Scorer(model), rows, cache, model_identity(model)),
        settings,
        Accelerator(cpu=True),
        method.gradient,
    )
    found: list[dict[str, float]] = []
    for number in range(STEPS + 1):
        if number % EVERY == 0:
            right, logp = exact_match(model, *test)
            fell = trainer.evaluate(rows)["eval_displacement/chosen"]
            found.append({"step": number, EXACT: right, LOGP: logp, CHANGE: fell})
        if number < STEPS:
            batch = global_batch(rows, settings, number)
            trainer.step(batch, number, settings.learning_rate(number, STEPS))
    return found


def curves_of(seed: int, out: Path) -> dict[str, list[dict[str, float]]]:
    """The curve of every method; what is in `out` already is not made again."""
    folder, found = out / f"seed-{seed}", {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, method in METHODS.items():
        path = folder / f"{name.replace(' ', '-')}.json"
        if not path.exists():
            started = time.monotonic()
            start = pretrained(seed, folder / "model")
            write_json(path, curve(start, method, seed, folder / "reference"))
            print(f"seed {seed}: {name}, {time.monotonic() - started:.0f} s", flush=True)
        found[name] = read_json(path)
    return found


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over seeds, with a Student-t interval."""
    return mean(torch.tensor(values, dtype=torch.float64))


def said(found: Estimate, digits: int = 3) -> str:
    """The estimate and its interval."""
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def show(seeds: Sequence[dict[str, list[dict[str, float]]]]) -> None:
    """Print the table of docs/stable.md."""
    start = over_seeds([seed["DPO"][0][EXACT] for seed in seeds])
    print(f"\n{len(seeds)} seeds, 95 % t intervals over seeds; at the start {said(start)} right")
    print("| method | right in the end | end minus start | minus DPO | log p(right) | chosen |")
    print("|---|---|---|---|---|---|")
    for name in METHODS:
        ends, starts = ([seed[name][at] for seed in seeds] for at in (-1, 0))
        gained = [end[EXACT] - begin[EXACT] for end, begin in zip(ends, starts, strict=True)]
        beside = [
            end[EXACT] - seed["DPO"][-1][EXACT] for end, seed in zip(ends, seeds, strict=True)
        ]
        cells = [
            said(over_seeds([end[EXACT] for end in ends])),
            said(over_seeds(gained)),
            "" if name == "DPO" else said(over_seeds(beside)),
            said(over_seeds([end[LOGP] for end in ends]), 2),
            said(over_seeds([end[CHANGE] for end in ends]), 2),
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def figure(seeds: Sequence[dict[str, list[dict[str, float]]]], path: Path) -> None:
    """Exact match and log-probability over training, bands are 95 % intervals over seeds."""
    panels = []
    for what in (EXACT, LOGP):
        lines = {}
        for name in METHODS:
            steps = [row["step"] for row in seeds[0][name]]
            at = [over_seeds([seed[name][i][what] for seed in seeds]) for i in range(len(steps))]
            lines[name] = Line(
                x=steps,
                y=[one.value for one in at],
                low=[one.low for one in at],
                high=[one.high for one in at],
            )
        panels.append(Panel(title=f"{what}, held-out sums", x_label="step", lines=lines))
    draw(panels, path)


def main() -> None:
    """Run what is not on disk yet; print and draw all that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/arithmetic"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--figure", type=Path, help="where to draw; in --out by default")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = [curves_of(seed, asked.out) for seed in asked.seeds]
    if len(found) > 1:
        show(found)
        figure(found, asked.figure or asked.out / "arithmetic.png")


if __name__ == "__main__":
    main()
