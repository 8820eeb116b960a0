"""Votes on pairs as one row a pair, labels turned round on purpose, and how well they are found.

    python scripts/votes.py one VOTES OUT [--seed 0]
    python scripts/votes.py majority VOTES OUT [--turned 0.1] [--seed 0]
    python scripts/votes.py doubts RUN [--votes VOTES]
    python scripts/votes.py agreement SCORED...

VOTES is a file with a row a vote. `one` keeps one vote of each pair at random, `majority` what most
of its voters said; ties are left out. `--turned` turns a share of the labels round and says so in a
column. `doubts` asks of RUN/flips.jsonl, which `prefloop reward` wrote, how well the probability
that a label is flipped finds the labels that were turned round, or with --votes those that the
majority of the votes on their pair contradicts. `agreement` asks of judged rows that `prefloop
score` scored how often the reward agrees with the judgement, over pairs (Wilson) and with whole
prompts drawn again; further files are of the same rows, and are compared with the first, whole
prompts drawn again.
"""

import argparse
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from prefloop import data
from prefloop.intervals import Estimate, paired
from prefloop.reward_training import pairs_of
from prefloop.reward_training.measures import accuracy, accuracy_over_prompts, length_bias
from prefloop.runs import read_jsonl
from prefloop.types import Comparison

Pair = tuple[str, tuple[str, ...]]


def of_pair(rows: Iterable[Comparison]) -> dict[Pair, list[Comparison]]:
    """The votes of each pair; a vote is kept whatever its order of the two."""
    found: dict[Pair, list[Comparison]] = {}
    for row in rows:
        found.setdefault((data.prompt_key(row.prompt), row.responses), []).append(row)
    return found


def majority(votes: Iterable[Comparison]) -> Comparison | None:
    """The vote that most gave, or None where no strict order leads."""
    votes = list(votes)
    counted = Counter(row.rank for row in votes).most_common(2)
    rank, most = counted[0]
    tied = len(counted) > 1 and counted[1][1] == most
    if tied or rank is None or len(set(rank)) == 1:
        return None
    return next(row for row in votes if row.rank == rank)


def turned(rows: Iterable[Comparison], share: float, rng: random.Random) -> list[Comparison]:
    """Some labels turned round, with a column that says which."""
    found = []
    for row in rows:
        turn = rng.random() < share
        rank = row.rank[::-1] if turn and row.rank else row.rank
        found.append(replace(row, rank=rank, annotator=None, extra={**row.extra, "turned": turn}))
    return found


def auc(score: np.ndarray, hit: np.ndarray) -> float:
    """Probability that a hit has the higher score; ties count half."""
    ranks, hits = rankdata(score), int(hit.sum())
    return float((ranks[hit].sum() - hits * (hits + 1) / 2) / (hits * (len(hit) - hits)))


def doubts(run: Path, votes: Path | None) -> None:
    rows = list(read_jsonl(run / "flips.jsonl"))
    if votes is None:
        wrong = [bool(row["turned"]) for row in rows]
    else:
        most = {pair: majority(said) for pair, said in of_pair(data.read(votes)).items()}
        told = [most.get((data.prompt_key(row["prompt"]), tuple(row["responses"]))) for row in rows]
        rows = [row for row, one in zip(rows, told, strict=True) if one]
        wrong = [
            tuple(r["rank"]) != one.rank for r, one in zip(rows, filter(None, told), strict=True)
        ]
    score = np.array([row["flip_flipped"] for row in rows])
    hit = np.array(wrong)
    order = np.argsort(-score)
    print(f"{len(hit)} labels, {hit.mean():.3f} wrong; AUC {auc(score, hit):.3f}")
    for share in (0.01, 0.02, 0.05, 0.1):
        head = order[: max(1, int(share * len(order)))]
        print(f"  of the {100 * share:g} % most doubtful {hit[head].mean():.3f} are wrong")


def shown(found: Estimate | None) -> str:
    return "none" if found is None else f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def agreement(files: Sequence[Path]) -> None:
    first = None
    for file in files:
        rows = data.read(file)
        found = pairs_of(rows, [tuple((score,) for score in row.scores or ()) for row in rows])
        over_prompts = shown(accuracy_over_prompts(found))
        print(f"{file}: {len(found.row)} pairs, accuracy {shown(accuracy(found))}", end="")
        print(f", over prompts {over_prompts}")
        if bias := length_bias(found):
            print(f"  longer chosen: by people {shown(bias.people)}, by it {shown(bias.model)}")
            print(f"  accuracy where the shorter was chosen: {shown(bias.shorter)}")
        first = found if first is None else first
        if found is not first:
            led = paired(found.credit, first.credit, found.prompt)
            print(f"  less {files[0]}: {shown(led.difference)}, p {led.t_p:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("one", "majority"):
        command = commands.add_parser(name)
        command.add_argument("votes", type=Path)
        command.add_argument("out", type=Path)
        command.add_argument("--turned", type=float, default=0.0)
        command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("doubts")
    command.add_argument("run", type=Path)
    command.add_argument("--votes", type=Path)
    command = commands.add_parser("agreement")
    command.add_argument("scored", type=Path, nargs="+")
    told = parser.parse_args()
    if told.command == "agreement":
        agreement(told.scored)
        return
    if told.command == "doubts":
        doubts(told.run, told.votes)
        return
    rng = random.Random(told.seed)
    groups = of_pair(data.read(told.votes)).values()
    if told.command == "majority":
        kept = [row for votes in groups if (row := majority(votes))]
    else:
        drawn = [rng.choice(votes) for votes in groups]
        kept = [row for row in drawn if row.rank and len(set(row.rank)) > 1]
    count = data.write(told.out, turned(kept, told.turned, rng))
    print(f"{count} pairs")


if __name__ == "__main__":
    main()
