"""Planted annotator types on a real small model: does EM find them, and from how many votes?

    python scripts/mixture_planted.py --model FOLDER --out FOLDER --judgements 1 4 8 --seeds 0 1 2

The model tells the beginnings of stories, cut after one to three sentences. Annotators in turn like
positive stories (VADER), short ones, and with `--types 3` such with questions; each vote is a
Bradley-Terry (or Plackett-Luce) draw on the planted reward. Votes an annotator are swept, and
pairs compared with best-of-three and with rankings of three at the same number of judgements.
Prints a row a setting and seed, and writes results.json; what is there is not done again.
"""

import argparse
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from prefloop import em
from prefloop.data import encoder, tokenize
from prefloop.mixture import Clusters, Dirichlet, Mixture, MixtureTraining, Start
from prefloop.objectives import PlackettLuce
from prefloop.policies import Lora, Policy, Sampling, load_policy
from prefloop.policies.sampling import sample
from prefloop.rewards.rules import Brevity, Questions, Vader
from prefloop.runs import read_json, write_json
from prefloop.settings import TrainSettings
from prefloop.types import Comparison

NAMES = ("Lily", "Tom", "Sara", "Ben", "Mia", "Max", "Anna", "Tim")
OPENINGS = ("One day, {} went to the", "Once upon a time, {} found a", "{} was sad because")
SETTINGS = TrainSettings(lr=3e-3, batch_size=16, save_every=1000)
STRENGTH = 3.0  # of the planted preference, in standard deviations of the reward
FORMS = {"pair": 2, "best": 3, "ranking": 3}
STARTS: dict[str, Start] = {
    "clusters": Clusters(),
    "dirichlet": Dirichlet(),
    "clusters-crossfit": Clusters(),
    "dirichlet-crossfit": Dirichlet(),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One line of the table."""

    judgements: int
    form: str
    start: str
    annotators: int
    types: int
    epochs: int
    seed: int


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
    """For each prompt (3, answers): sentiment, brevity, questions, of spread 1 over everything."""
    rules = (Vader(), Brevity(), Questions())
    raw = [torch.tensor([rule([prompt], [texts])[0] for rule in rules]) for prompt, texts in told]
    spread = torch.cat(raw, -1).std(-1, keepdim=True)
    return [one / spread for one in raw]


def votes(told: list[tuple[str, list[str]]], setting: Setting) -> list[Comparison]:
    """`judgements` judgements by each annotator; types take turns."""
    rng = np.random.default_rng(setting.seed)
    rewards = planted_rewards(told)
    rows = []
    for annotator in range(setting.annotators):
        for number in range(setting.judgements):
            place = int(rng.integers(len(told)))
            prompt, texts = told[place]
            shown = rng.choice(len(texts), FORMS[setting.form], replace=False)
            liked = rewards[place][annotator % setting.types].numpy()[shown]
            noisy = STRENGTH * liked + rng.gumbel(size=len(shown))
            rank = np.argsort(np.argsort(-noisy)) + 1  # Gumbel noise: Plackett-Luce
            rows.append(
                Comparison(
                    prompt,
                    tuple(texts[index] for index in shown),
                    tuple(
                        int(r) for r in (rank if setting.form == "ranking" else rank.clip(max=2))
                    ),
                    annotator=f"person-{annotator}",
                    id=f"{annotator}-{number}",
                )
            )
    return rows


def run(model: str, rows: list[Comparison], setting: Setting, out: Path) -> dict[str, float]:
    """EM on `rows`; how well the annotators' types were found, after round 1 and at the end."""
    policy = load_policy(model, adapter=Lora(rank=8, alpha=16.0))
    tokens, _ = tokenize(rows, policy.tokenizer)
    crossfit = setting.start.endswith("crossfit")
    training = MixtureTraining(
        policy=policy,
        objective=PlackettLuce(beta=0.3),
        settings=replace(SETTINGS, epochs=setting.epochs),
        mixture=Mixture(types=setting.types, rounds=4, crossfit=crossfit, seed=setting.seed),
        start=STARTS[setting.start],
        allow_unidentified=True,
        accelerator=Accelerator(cpu=True),
        out=out,
    )
    began = time.perf_counter()
    fitted = training(tokens)
    truth = torch.arange(setting.annotators) % setting.types
    first = fitted.history[0].belief.responsibilities
    return {
        "seconds": time.perf_counter() - began,
        "loglik_per_judgement": fitted.loglik / fitted.scored,
        "round_1_ari": em.adjusted_rand_index(truth, first.argmax(-1)),
        "ari": em.adjusted_rand_index(truth, fitted.gamma.argmax(-1)),
        "round_1_accuracy": em.type_accuracy(truth, first),
        "accuracy": em.type_accuracy(truth, fitted.gamma),
    }


def settings_of(given: argparse.Namespace) -> list[Setting]:
    """Every line of the table, seed by seed."""
    return [
        Setting(
            judgements=judgements,
            form=form,
            start=start,
            annotators=given.annotators,
            types=given.types,
            epochs=given.epochs,
            seed=seed,
        )
        for seed in given.seeds
        for judgements in given.judgements
        for form in given.forms
        for start in given.starts
    ]


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--judgements", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=["pair", "best"])
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=["clusters"])
    parser.add_argument("--annotators", type=int, default=32)
    parser.add_argument("--types", type=int, choices=[2, 3], default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser.parse_args()


def main() -> None:
    """The sweep."""
    given = options()
    told = stories(load_policy(given.model), 9)
    told = [(prompt, texts) for prompt, texts in told if len(texts) >= 3]
    results = given.out / "results.json"
    found = read_json(results) if results.exists() else []
    for setting in settings_of(given):
        if any(asdict(setting).items() <= one.items() for one in found):
            continue
        folder = given.out / "-".join(str(value) for value in asdict(setting).values())
        one = asdict(setting) | run(given.model, votes(told, setting), setting, folder)
        found.append(one)
        print(
            f"{setting.judgements:3d} {setting.form:<8}{setting.start:<19}"
            f"{setting.annotators:4d} annotators, {setting.types} types, "
            f"{setting.epochs} epochs, seed {setting.seed}: "
            f"ARI {one['round_1_ari']:6.3f} -> {one['ari']:6.3f}, accuracy {one['accuracy']:.3f}, "
            f"{one['loglik_per_judgement']:.3f} nats a judgement, {one['seconds']:.0f} s",
            flush=True,
        )
        write_json(results, found)


if __name__ == "__main__":
    main()
