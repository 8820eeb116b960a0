"""From judged rows to a reward model in a run folder; killed and gone on with.

run/reward/          reward.json and a folder a member: what `--reward RUN` loads
run/metrics.jsonl    a line a member; of a causal model, the first member's training
run/evaluation.json  accuracy, calibration, length bias, by part of the data
run/flips.jsonl      every training row with the probability that its label is flipped
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import PartialState

from prefloop.data import as_row
from prefloop.errors import UserError
from prefloop.reward_training.measures import Measured, Pairs, measure, pairs_of
from prefloop.reward_training.members import Doubt, doubts, draws, weighted
from prefloop.reward_training.section import section
from prefloop.rewards.trained import FILE, Ensemble, load_trained
from prefloop.runs import read_json, write_json, write_jsonl
from prefloop.types import Comparison

SUMMARY = "summary.json"


@runtime_checkable
class Backbone(Protocol):
    """What a reward model is made of, and how one member of it is trained."""

    def describe(self) -> Mapping[str, Any]:
        """What reward.json keeps, besides the members."""
        ...

    def readable(self, rows: Sequence[Comparison]) -> list[Comparison]:
        """The rows that it can read."""
        ...

    def train(
        self, rows: Sequence[Comparison], held_out: Sequence[Comparison], folder: Path, seed: int
    ) -> Mapping[str, int | float]:
        """Train on `rows` by their weights, save as `folder`; numbers of the result."""
        ...

    def asking(self) -> AbstractContextManager[Any]:
        """Inside it the finished model is asked, in the precision that it was trained in."""
        ...


@dataclass(frozen=True, kw_only=True)
class RewardTraining:
    """A reward model's training, up to its data.

    Attributes:
        backbone: what is trained.
        members: K, each on its own draw of the rows; 1 is trained on all of them.
        seed: of the draws, and the first member's.
        out: the run folder.
        on_member: told how many members are done.
    """

    backbone: Backbone
    members: int
    seed: int
    out: Path
    on_member: Callable[[int], None] = lambda done: None

    def __post_init__(self) -> None:
        if self.members < 1:
            raise UserError(f"members must be 1 or more, got {self.members}; usual is 5")

    def __call__(
        self, rows: Sequence[Comparison], held_out: Sequence[Comparison]
    ) -> list[Measured]:
        """Train what is not trained yet, then measure; every file of the run is there afterwards.

        Rows need ranks, see `judged`. Under several processes the first one measures.
        """
        if len(rows) < self.members:
            raise UserError(
                f"{len(rows)} rows cannot be drawn for {self.members} members; take fewer members"
            )
        drawn = draws(rows, self.members, self.seed)
        summaries = [
            self._member(number, weighted(rows, counts), held_out)
            for number, counts in enumerate(drawn)
        ]
        if not PartialState().is_main_process:
            return []
        names = [f"member-{number + 1}" for number in range(self.members)]
        write_json(self.out / "reward" / FILE, {**self.backbone.describe(), "members": names})
        self._write_metrics(summaries)
        with self.backbone.asking():
            return self._measure(load_trained(self.out / "reward"), rows, held_out, drawn == 0)

    def _member(
        self, number: int, rows: Sequence[Comparison], held_out: Sequence[Comparison]
    ) -> Mapping[str, int | float]:
        folder = self.out / "reward" / f"member-{number + 1}"
        if not (folder / SUMMARY).is_file():
            told = self.backbone.train(rows, held_out, folder, self.seed + number)
            if PartialState().is_main_process:
                write_json(folder / SUMMARY, dict(told))
            PartialState().wait_for_everyone()
        self.on_member(number + 1)
        return read_json(folder / SUMMARY)

    def _write_metrics(self, summaries: Iterable[Mapping[str, int | float]]) -> None:
        curve = self.out / "reward" / "member-1" / "metrics.jsonl"
        if curve.is_file():
            shutil.copyfile(curve, self.out / "metrics.jsonl")
            return
        lines = ({"step": number, **told} for number, told in enumerate(summaries, 1))
        write_jsonl(self.out / "metrics.jsonl", lines)

    def _measure(
        self,
        reward: Ensemble,
        rows: Sequence[Comparison],
        held_out: Sequence[Comparison],
        unseen: torch.Tensor,
    ) -> list[Measured]:
        pairs = _asked(reward, rows)
        measured = [measure("training", pairs)]
        if held_out:
            measured.insert(0, measure("held out", _asked(reward, held_out)))
        doubted = _doubted(rows, pairs, unseen) if self.members > 1 else []
        if doubted:
            write_jsonl(self.out / "flips.jsonl", (_flip(row, doubt) for row, doubt in doubted))
        write_json(self.out / "evaluation.json", _evaluation(measured, doubted))
        write_json(self.out / "reward.section.json", section(measured, doubted))
        return measured


def judged(
    rows: Sequence[Comparison], order: Callable[[Iterable[Comparison]], list[Comparison]]
) -> list[Comparison]:
    """The rows that order two responses, of a weight above 0; `order` ranks those with scores only.

    Raises:
        UserError: there is no such row.
    """
    kept = []
    for row in rows:
        ranked = order([row]) if row.rank is None and row.scores is not None else [row]
        kept += [one for one in ranked if one.weight > 0 and _ordered(one)]
    if not kept:
        raise UserError(
            f"no row is left to train a reward on: none of {len(rows)} orders two responses. Give "
            "rows a rank, or scores that differ"
        )
    return kept


def _ordered(row: Comparison) -> bool:
    return len({place for place in row.rank or () if place is not None}) > 1


def _asked(reward: Ensemble, rows: Sequence[Comparison]) -> Pairs:
    members = reward.members([row.prompt for row in rows], [row.responses for row in rows])
    return pairs_of(rows, members)


def _doubted(
    rows: Sequence[Comparison], pairs: Pairs, unseen: torch.Tensor
) -> list[tuple[Comparison, Doubt]]:
    """Every row with the doubt about its label (of its most doubtful pair), most doubtful first."""
    worst: dict[int, Doubt] = {}
    for place, doubt in zip(
        pairs.row.tolist(), doubts(pairs.margins, unseen[:, pairs.row]), strict=True
    ):
        if place not in worst or doubt.flipped > worst[place].flipped:
            worst[place] = doubt
    return sorted(
        ((rows[place], doubt) for place, doubt in worst.items()),
        key=lambda found: -found[1].flipped,
    )


def _flip(row: Comparison, doubt: Doubt) -> dict[str, Any]:
    extra = {"place": row.place, **{f"flip_{name}": value for name, value in asdict(doubt).items()}}
    return as_row(replace(row, extra={**row.extra, **extra}))


def _evaluation(
    measured: Sequence[Measured], doubted: Sequence[tuple[Comparison, Doubt]]
) -> dict[str, Any]:
    return {
        "result": [row for one in measured for row in one.rows()],
        "parts": {
            one.name: {
                "members": list(one.members),
                "calibration": asdict(one.calibration),
                "length": None if one.length is None else asdict(one.length),
            }
            for one in measured
        },
        "doubtful": sum(doubt.flipped > 0.5 for _, doubt in doubted),
        "labels": len(doubted),
    }
