"""UKPConvArg1's votes as comparisons with annotators, and what types of its workers are like.

    python scripts/ukp_votes.py convert FOLDER votes.jsonl [--workers 40 --votes 25]
    python scripts/ukp_votes.py describe FOLDER heads/responsibilities-2.jsonl

FOLDER holds arguments.jsonl.gz and pairs.jsonl.gz (Habernal and Gurevych, ACL 2016; CC BY 4.0).
`convert` writes a row a vote, "equal" as a tie; with --workers only the workers with most votes
that are no tie, --votes of each at random. `describe` prints, by likeliest type, what the data says
of the workers: how competent MACE finds them, how often they vote for the longer argument, how
often they agree with the others.
"""

import argparse
import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prefloop.runs import read_jsonl, write_jsonl

RANKS = {"a1": [1, 2], "a2": [2, 1], "equal": [1, 1]}


def read_gz(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """A row a vote."""
    arguments = {one["id"]: one for one in read_gz(folder / "arguments.jsonl.gz")}
    for pair in read_gz(folder / "pairs.jsonl.gz"):
        first, second = arguments[pair["a1"]], arguments[pair["a2"]]
        for number, vote in enumerate(pair["votes"]):
            yield {
                "id": f"{pair['id']}#{number}",
                "prompt": f"{pair['title']}: {first['stance']}.",
                "responses": [first["text"], second["text"]],
                "rank": RANKS[vote["value"]],
                "annotator": vote["worker"],
            }


def most_active(votes: list[dict[str, Any]], workers: int, each: int) -> list[dict[str, Any]]:
    """`each` random votes without ties of each of the workers who have most."""
    rng = np.random.default_rng(0)
    of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in votes:
        if row["rank"] != [1, 1]:
            of[row["annotator"]].append(row)
    names = sorted(of, key=lambda name: (-len(of[name]), name))[:workers]
    return [
        of[name][place]
        for name in names
        for place in sorted(rng.choice(len(of[name]), min(each, len(of[name])), replace=False))
    ]


def convert(folder: Path, out: Path, workers: int, each: int) -> None:
    found = list(rows(folder))
    kept = most_active(found, workers, each) if workers else found
    write_jsonl(out, kept)
    ties = sum(row["rank"] == [1, 1] for row in kept)
    print(f"{len(kept):,} votes, {ties:,} ties, of {len({r['annotator'] for r in kept}):,} workers")


def describe(folder: Path, responsibilities: Path) -> None:
    """A line a type: means over its workers, each worker counted once."""
    likeliest = {
        row["annotator"]: int(np.argmax(row["gamma"])) + 1 for row in read_jsonl(responsibilities)
    }
    arguments = {
        one["id"]: len(one["text"].split()) for one in read_gz(folder / "arguments.jsonl.gz")
    }
    facts: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for pair in read_gz(folder / "pairs.jsonl.gz"):
        longer = "a1" if arguments[pair["a1"]] > arguments[pair["a2"]] else "a2"
        count = Counter(vote["value"] for vote in pair["votes"])
        for vote in pair["votes"]:
            value = vote["value"]
            if value == "equal":
                continue
            others = count["a1"] + count["a2"] - 1
            agree = (count[value] - 1) / others if others else np.nan
            facts[vote["worker"]].append((vote["competence"], float(value == longer), agree))
    print("type  workers  votes each  competence (MACE)  longer wins  others agree")
    for kind in sorted(set(likeliest.values())):
        people = [np.array(facts[name]) for name, one in likeliest.items() if one == kind]
        means = np.nanmean([np.nanmean(person, 0) for person in people if len(person) > 4], 0)
        each = np.mean([len(person) for person in people])
        print(
            f"{kind:4d}  {len(people):7d}  {each:10.1f}  {means[0]:17.3f}  {means[1]:11.3f}  "
            f"{means[2]:12.3f}"
        )


def main() -> None:
    """One of the two."""
    parser = argparse.ArgumentParser(description="UKPConvArg1's votes with their workers.")
    parser.add_argument("what", choices=["convert", "describe"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", type=int, default=0, help="only the most active; 0 is all")
    parser.add_argument("--votes", type=int, default=25, help="votes of each of them")
    given = parser.parse_args()
    if given.what == "convert":
        convert(given.folder, given.file, given.workers, given.votes)
    else:
        describe(given.folder, given.file)


if __name__ == "__main__":
    main()
