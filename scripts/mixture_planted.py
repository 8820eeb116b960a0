"""Planted annotator types on a real small model: does EM find them, and from how many votes?

    python scripts/mixture_planted.py --model FOLDER --out FOLDER --judgements 1 4 8 --seeds 0 1 2

The model tells the beginnings of stories, cut after one to three sentences. Annotators in turn like
positive stories (VADER), short ones, and with `--types 3` such with questions; each vote is a
Bradley-Terry (or Plackett-Luce) draw on the planted reward. Votes an annotator are swept, pairs
compared with best-of-three and with rankings of three at the same number of judgements, starts,
and what the E-step reads. Prints a row a setting and seed, then a row a setting: the adjusted Rand
index at the start, after each round, and the rest; means over seeds with the least and the most.
results.json is written on the way; what is there is not done again.
"""

import argparse
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from prefloop import em
from prefloop.data import encoder, tokenize
from prefloop.expression import parse
from prefloop.mixture import EVIDENCE, STARTS, Mixture, MixtureTraining, Start, Votes
from prefloop.mixture.starts import Features
from prefloop.objectives import PlackettLuce
from prefloop.policies import Lora, Policy, Sampling, load_policy
from prefloop.policies.sampling import sample
from prefloop.rewards.rules import Brevity, Questions, Vader
from prefloop.runs import read_json, read_jsonl, write_json
from prefloop.settings import TrainSettings
from prefloop.types import Comparison

NAMES = ("Lily", "Tom", "Sara", "Ben", "Mia", "Max", "Anna", "Tim")
OPENINGS = ("One day, {} went to the", "Once upon a time, {} found a", "{} was sad because")
STRENGTH = 3.0  # of the planted preference, in standard deviations of the reward
FORMS = {"pair": 2, "best": 3, "ranking": 3}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One line of the table."""

    judgements: int
    form: str
    start: str
    restarts: int
    evidence: str
    assign: str
    average: int
    warm: bool
    annotators: int
    types: int
    rounds: int
    epochs: int
    lr: float
    batch_size: int
    lora_rank: int
    beta: float
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.judgements:3d} {self.form:<8}{self.start:<16}{self.evidence:<18}"
            f"{self.annotators:4d} annotators, {self.types} types, {self.restarts} starts, "
            f"{self.assign}{', warm' * self.warm}, average of {self.average}, {self.epochs} epochs "
            f"at {self.lr:g}, batches of {self.batch_size}, rank {self.lora_rank}, "
            f"beta {self.beta:g}"
        )


@dataclass(frozen=True)
class Seen:
    """A start that can be asked afterwards where EM began."""

    start: Start
    gammas: list[Tensor] = field(default_factory=list)

    def __call__(self, votes: Votes, types: int, seed: int, features: Features) -> Tensor:
        """What `start` says; kept."""
        self.gammas.append(self.start(votes, types, seed, features))
        return self.gammas[-1]


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


def known(told: list[tuple[str, list[str]]], rows: list[Comparison], setting: Setting) -> float:
    """Adjusted Rand index of types told by the planted rewards themselves: what votes can say."""
    reward = {
        (prompt, text): STRENGTH * one[: setting.types, place].double()
        for (prompt, texts), one in zip(told, planted_rewards(told), strict=True)
        for place, text in enumerate(texts)
    }
    loglik = torch.zeros(setting.annotators, setting.types, dtype=torch.float64)
    for row in rows:
        drawn = torch.stack([reward[str(row.prompt), text] for text in row.responses])  # (N, K)
        rank = torch.tensor(row.rank)
        left = drawn[rank.argsort()] if setting.form == "ranking" else drawn[rank.argsort()[:1]]
        for place, winner in enumerate(left):
            beaten = drawn[rank > place] if setting.form == "ranking" else drawn
            loglik[int(str(row.annotator).split("-")[1])] += winner - beaten.logsumexp(0)
    truth = torch.arange(setting.annotators) % setting.types
    return em.adjusted_rand_index(truth, loglik.argmax(-1))


def run(model: str, rows: list[Comparison], setting: Setting, out: Path) -> dict[str, Any]:
    """EM on `rows`; how well the annotators' types were found: at the start, after each round."""
    rank = setting.lora_rank
    policy = load_policy(model, adapter=Lora(rank=rank, alpha=2.0 * rank))
    tokens, _ = tokenize(rows, policy.tokenizer)
    start = Seen(parse(setting.start, STARTS))
    training = MixtureTraining(
        policy=policy,
        objective=PlackettLuce(beta=setting.beta),
        settings=TrainSettings(
            lr=setting.lr,
            epochs=setting.epochs,
            batch_size=setting.batch_size,
            save_every=1000,
            seed=setting.seed,
        ),
        mixture=Mixture(
            types=setting.types,
            rounds=setting.rounds,
            evidence=parse(setting.evidence, EVIDENCE),
            assign="hard" if setting.assign == "hard" else "soft",
            average=setting.average,
            warm=setting.warm,
            seed=setting.seed,
        ),
        start=start,
        restarts=setting.restarts,
        allow_unidentified=True,
        accelerator=Accelerator(cpu=True),
        out=out,
    )
    began = time.process_time()
    fitted = training(tokens)
    seconds = time.process_time() - began
    truth = torch.arange(setting.annotators) % setting.types

    def found(gamma: Tensor) -> float:
        return em.adjusted_rand_index(truth, gamma.argmax(-1))

    chosen = int(read_json(out / "mixture.json")["start"]) - 1
    aris = [found(one.belief.responsibilities) for one in fitted.history]
    return {
        "seconds": seconds,
        "loglik_per_judgement": fitted.loglik / fitted.scored,
        "start_ari": found(start.gammas[chosen]),
        "aris": aris,
        "ari": aris[-1],
        "accuracy": em.type_accuracy(truth, fitted.gamma),
        "each_start": [each_start(folder, found) for folder in sorted(out.glob("start-*"))],
    }


def each_start(folder: Path, found: Callable[[Tensor], float]) -> tuple[float, float]:
    """Log-likelihood that one of several starts came to, and how well it found the types."""
    *_, last = read_jsonl(folder / "rounds.jsonl")
    gamma = torch.tensor([row["gamma"] for row in read_jsonl(folder / "responsibilities.jsonl")])
    return last["loglik"], found(gamma)


def settings_of(given: argparse.Namespace) -> list[Setting]:
    """Every line of the table, seed by seed."""
    return [
        Setting(
            judgements=judgements,
            form=form,
            start=start,
            restarts=given.restarts,
            evidence=evidence,
            assign=given.assign,
            average=given.average,
            warm=given.warm,
            annotators=given.annotators,
            types=given.types,
            rounds=given.rounds,
            epochs=given.epochs,
            lr=given.lr,
            batch_size=given.batch_size,
            lora_rank=given.lora_rank,
            beta=given.beta,
            seed=seed,
        )
        for seed in given.seeds
        for judgements in given.judgements
        for form in given.forms
        for start in given.starts
        for evidence in given.evidence
    ]


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--judgements", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=["pair", "best"])
    parser.add_argument("--starts", nargs="+", default=["Clusters()"])
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--evidence", nargs="+", default=["Trained()"])
    parser.add_argument("--assign", choices=["soft", "hard"], default="soft")
    parser.add_argument("--average", type=int, default=1)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--annotators", type=int, default=32)
    parser.add_argument("--types", type=int, choices=[2, 3], default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser.parse_args()


def summary(found: list[dict[str, Any]]) -> None:
    """A row a setting: means over seeds, with the least and the most."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        named = {name: one[name] for name in Setting.__dataclass_fields__}
        settings.setdefault(str(Setting(**named)), []).append(one)
    for setting, runs in settings.items():
        best = np.mean([run["known_ari"] for run in runs])
        aris = np.array([[run["start_ari"], *run["aris"]] for run in runs])
        columns = [*aris.T, *([run[name] for run in runs] for name in ("accuracy", "seconds"))]
        *said, right, seconds = [
            f"{np.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]" for values in columns
        ]
        print(
            f"{setting}, {len(runs)} seeds: ARI {' -> '.join(said)}, in their type {right}, "
            f"CPU s {seconds}; by the planted rewards {best:.2f}"
        )


def main() -> None:
    """The sweep."""
    given = options()
    told = stories(load_policy(given.model), 9)
    told = [(prompt, texts) for prompt, texts in told if len(texts) >= 3]
    results = given.out / "results.json"
    found: list[dict[str, Any]] = read_json(results) if results.exists() else []
    for setting in settings_of(given):
        if any(asdict(setting).items() <= one.items() for one in found):
            continue
        folder = given.out / "-".join(str(value) for value in asdict(setting).values())
        rows = votes(told, setting)
        one = asdict(setting) | run(given.model, rows, setting, folder)
        one["known_ari"] = known(told, rows, setting)
        found.append(one)
        print(
            f"{setting}, seed {setting.seed}: ARI {one['start_ari']:.3f} -> "
            f"{' '.join(f'{ari:.3f}' for ari in one['aris'])}, accuracy {one['accuracy']:.3f}, "
            f"{one['loglik_per_judgement']:.3f} nats a judgement, "
            f"{one['seconds']:.0f} CPU s",
            flush=True,
        )
        write_json(results, found)
    summary(found)


if __name__ == "__main__":
    main()
