"""Arms in processes, each in a folder of its own; what is finished is not done again.

out/seed-S/        pool, warm and held-out rows of a seed, and what each reward gives the pool
out/arms/ARM/      selected.jsonl, selection.json, result.json
out/table.json     a row a setting, over seeds; evaluation.json and the report's page
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from prefloop import data
from prefloop.errors import UserError
from prefloop.experiment.arms import EVERYTHING, NOTHING, Arm, Grid, plan
from prefloop.experiment.learners import POOL, Learner
from prefloop.experiment.table import Row, page, summarise
from prefloop.expression import parse
from prefloop.runs import read_json, write_json
from prefloop.selecting import Cut, select
from prefloop.selection import RULES, Random, Rule
from prefloop.types import Comparison

RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class SelectionExperiment:
    """The same budget of labels, spent in several ways.

    Attributes:
        grid: what is varied.
        learner: what labels are spent on.
        out: the run folder.
        jobs: processes; each takes one torch thread where there are several.
        on_arm: told how many arms are done.
    """

    grid: Grid
    learner: Learner
    out: Path
    jobs: int = 1
    on_arm: Callable[[int], None] = lambda done: None

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f"jobs must be 1 or more, got {self.jobs}")
        for rule in self.grid.rules:
            parse(rule, RULES)

    def __call__(self) -> list[Row]:
        """Run what has no result yet, then write and return the table."""
        arms = plan(self.grid)
        seeds = [(self.learner, self._shared(seed), seed) for seed in range(self.grid.seeds)]
        for _ in self._each(_prepare, seeds):
            pass
        missing = [arm for arm in arms if not (self._folder(arm) / RESULT).exists()]
        done = len(arms) - len(missing)
        self.on_arm(done)
        work = [(self.learner, arm, self._shared(arm.seed), self._folder(arm)) for arm in missing]
        for _ in self._each(_run, work):
            done += 1
            self.on_arm(done)
        results = [(arm, read_json(self._folder(arm) / RESULT)) for arm in arms]
        rows = summarise(results, self.grid.shares[0])
        write_json(self.out / "table.json", [asdict(row) for row in rows])
        write_json(self.out / "evaluation.json", {"result": [row.estimate() for row in rows]})
        write_json(self.out / "experiment.section.json", page(rows, self.learner.quality))
        return rows

    def _shared(self, seed: int) -> Path:
        return self.out / f"seed-{seed}"

    def _folder(self, arm: Arm) -> Path:
        return self.out / "arms" / arm.folder

    def _each(
        self, function: Callable[[Any], None], work: Sequence[tuple[Any, ...]]
    ) -> Iterator[None]:
        """Call `function` on each piece of work, in processes where there are several."""
        if self.jobs == 1 or len(work) < 2:
            for piece in work:
                yield function(piece)
            return
        context = get_context("spawn")
        with ProcessPoolExecutor(
            self.jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            for finished in as_completed([pool.submit(function, piece) for piece in work]):
                yield finished.result()


def _prepare(work: tuple[Learner, Path, int]) -> None:
    learner, folder, seed = work
    learner.prepare(folder, seed)


def _run(work: tuple[Learner, Arm, Path, Path]) -> None:
    learner, arm, shared, folder = work
    folder.mkdir(parents=True, exist_ok=True)
    rows = chosen(arm, shared, folder)
    quality = learner.learn(arm, rows, shared, folder)
    write_json(folder / RESULT, {"arm": asdict(arm), "labels": len(rows), "quality": dict(quality)})


def chosen(arm: Arm, shared: Path, folder: Path) -> list[Comparison]:
    """The rows that the arm has labelled: of the pool, with what the labeller says."""
    pool = data.read(shared / POOL)
    if arm.rule in (EVERYTHING, NOTHING):
        return pool if arm.rule == EVERYTHING else []
    rule: Rule = parse(arm.rule, RULES)
    if isinstance(rule, Random):
        rule = replace(rule, seed=arm.seed)
    cut = Cut(keep=arm.keep, fraction=arm.share)
    if not (folder / "selection.json").exists():
        select(shared / f"scored-{arm.reward}.jsonl", folder, rule, cut)
    kept = {row.id for row in data.read(folder / "selected.jsonl") if row.weight > 0}
    return [row for row in pool if row.id in kept]
