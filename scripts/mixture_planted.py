"""Planted annotator types on a real small model: does EM find them, and from how many votes?

    python scripts/mixture_planted.py --model FOLDER --out FOLDER --judgements 1 4 8

The model tells the beginnings of stories, cut after one to three sentences. Half of the annotators
like positive stories (VADER), half like short ones; each vote is a Bradley-Terry (or Plackett-Luce)
draw on the planted reward. Votes an annotator are swept, and pairs compared with best-of-three at
the same number of judgements. Prints a row a setting, and writes results.json.
"""

import argparse
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from prefloop import em
from prefloop.data import encoder, tokenize
from prefloop.mixture import Clusters, Dirichlet, Mixture, MixtureTraining
from prefloop.objectives import PlackettLuce
from prefloop.policies import Lora, Policy, Sampling, load_policy
from prefloop.policies.sampling import sample
from prefloop.rewards.rules import Vader
from prefloop.runs import write_json
from prefloop.settings import TrainSettings
from prefloop.types import Comparison

NAMES = ("Lily", "Tom", "Sara", "Ben", "Mia", "Max", "Anna", "Tim")
OPENINGS = ("One day, {} went to the", "Once upon a time, {} found a", "{} was sad because")
SETTINGS = TrainSettings(lr=3e-3, batch_size=16, epochs=4, save_every=1000)
ANNOTATORS = 32
STRENGTH = 3.0  # of the planted preference, in standard deviations of the reward


def stories(policy: Policy, n: int) -> list[tuple[str, list[str]]]:
    """`n` different beginnings of each opening, cut after one to three sentences."""
    prompts = [opening.format(name) for opening in OPENINGS for name in NAMES]
    tokens = encoder(policy.tokenizer).prompts([Comparison(prompt, ()) for prompt in prompts])
    drawn = sample(policy, tokens, n, Sampling(max_new_tokens=48, rows=96), seed=1)
    told = []
    for prompt, answers in zip(prompts, drawn, strict=True):
        cut = [_cut(one.text, 1 + place % 3) for place, one in enumerate(answers)]
        told.append((prompt, sorted({text for text in cut if text.strip()})))
    return told


def _cut(text: str, sentences: int) -> str:
    return "".join(re.findall(r"[^.!?]*[.!?]+|[^.!?]+$", text)[:sentences])


def planted_rewards(told: list[tuple[str, list[str]]]) -> list[torch.Tensor]:
    """For each prompt (2, answers): sentiment and brevity, both of spread 1 over everything."""
    vader = Vader()
    raw = [
        torch.tensor([vader([prompt], [texts])[0], [-float(len(text.split())) for text in texts]])
        for prompt, texts in told
    ]
    spread = torch.cat(raw, -1).std(-1, keepdim=True)
    return [one / spread for one in raw]


def votes(
    told: list[tuple[str, list[str]]], judgements: int, among: int, seed: int
) -> list[Comparison]:
    """Best of `among` answers, `judgements` times by each annotator; types alternate."""
    rng = np.random.default_rng(seed)
    rewards = planted_rewards(told)
    rows = []
    for annotator in range(ANNOTATORS):
        for number in range(judgements):
            place = int(rng.integers(len(told)))
            prompt, texts = told[place]
            shown = rng.choice(len(texts), among, replace=False)
            noisy = STRENGTH * rewards[place][annotator % 2].numpy()[shown] + rng.gumbel(size=among)
            rank = np.where(np.arange(among) == noisy.argmax(), 1, 2).tolist()
            rows.append(
                Comparison(
                    prompt,
                    tuple(texts[index] for index in shown),
                    tuple(rank),
                    annotator=f"person-{annotator}",
                    id=f"{annotator}-{number}",
                )
            )
    return rows


def adjusted_rand_index(first: torch.Tensor, second: torch.Tensor) -> float:
    """Agreement of two clusterings: 1 the same, 0 as by chance (Hubert and Arabie 1985)."""
    table = np.zeros((int(first.max()) + 1, int(second.max()) + 1))
    np.add.at(table, (first.numpy(), second.numpy()), 1)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    inside, a, b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = a * b / math.comb(len(first), 2)
    return (inside - chance) / ((a + b) / 2 - chance) if (a + b) / 2 != chance else 1.0


def run(model: str, rows: list[Comparison], types: int, start: str, out: Path) -> dict[str, float]:
    """EM on `rows`; how well the annotators' types were found, after round 1 and at the end."""
    policy = load_policy(model, adapter=Lora(rank=8, alpha=16.0))
    tokens, _ = tokenize(rows, policy.tokenizer)
    starts = {"clusters": Clusters(), "dirichlet": Dirichlet(), "dirichlet, crossfit": Dirichlet()}
    training = MixtureTraining(
        policy=policy,
        objective=PlackettLuce(beta=0.3),
        settings=SETTINGS,
        mixture=Mixture(types=types, rounds=4, crossfit="crossfit" in start),
        start=starts[start],
        allow_unidentified=True,
        accelerator=Accelerator(cpu=True),
        out=out,
    )
    began = time.perf_counter()
    fitted = training(tokens)
    truth = torch.arange(ANNOTATORS) % 2
    first = fitted.history[0].belief.responsibilities
    return {
        "seconds": time.perf_counter() - began,
        "loglik_per_judgement": fitted.loglik / fitted.scored,
        "round_1_ari": adjusted_rand_index(truth, first.argmax(-1)),
        "ari": adjusted_rand_index(truth, fitted.gamma.argmax(-1)),
        "accuracy": em.type_accuracy(truth, fitted.gamma) if types == 2 else float("nan"),
    }


def main() -> None:
    """The sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--judgements", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--random", type=int, default=8, help="judgements of random starts")
    given = parser.parse_args()
    told = stories(load_policy(given.model), 9)
    told = [(prompt, texts) for prompt, texts in told if len(texts) >= 3]
    sweep = [(m, among, "clusters") for m in given.judgements for among in (2, 3)]
    if given.random:
        sweep += [(given.random, 2, "dirichlet"), (given.random, 2, "dirichlet, crossfit")]
    found = []
    for judgements, among, start in sweep:
        rows = votes(told, judgements, among, seed=7)
        folder = given.out / f"{judgements}-{among}-{start}"
        one = {"judgements": judgements, "among": among, "start": start}
        one |= run(given.model, rows, 2, start, folder)
        found.append(one)
        print(
            f"{judgements:3d} judgements, best of {among}, {start:<20} "
            f"ARI {one['round_1_ari']:6.3f} -> {one['ari']:6.3f}, accuracy {one['accuracy']:.3f}, "
            f"{one['loglik_per_judgement']:.3f} nats a judgement, {one['seconds']:.0f} s",
            flush=True,
        )
        write_json(given.out / "results.json", found)


if __name__ == "__main__":
    main()
