"""Does it matter where preference training begins? The same training from several SFT checkpoints.

out/sft/metrics.jsonl        the SFT run on the chosen responses, the same for all starts
out/start-K/model/           the model after K steps of it: policy and reference begin here
out/start-K/...              a run folder of the preference training, and its diagnosis.json
out/init_sweep.json          a row a start; out/init_sweep.section.json: the report's page

A start whose diagnosis is on disk is not run again. A response with little probability grows
slowly, while what the rejected lose is released first (derived): so starts differ, and by how much
is measured here.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel

from prefloop.comparing import both_logps
from prefloop.diagnosing import FOREIGN, diagnose
from prefloop.diagnostics.roles import roles
from prefloop.intervals import ratio
from prefloop.objectives import SFT, Objective
from prefloop.policies import Policy
from prefloop.runs import provenance, read_json, write_json
from prefloop.settings import TrainSettings
from prefloop.trainer import Gradient, Progress
from prefloop.training import Training
from prefloop.types import Comparison, Tokenized, UserError, judgement

Row = Mapping[str, Any]
MOVED = {
    "chosen": "chosen change, mean nats",
    "rejected": "rejected change, mean nats",
    FOREIGN: f"{FOREIGN}, mean change, nats",
}
SHARES = {
    "chosen fell": "chosen fell, share",
    "both fell": "both fell, share",
    "implicit accuracy": "accuracy of the implicit reward, share",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a run trained, to do it again from another model.

    Attributes:
        load: the policy of a model's name or folder, with its new adapter.
        rows: what a policy of an objective is trained on, in tokens.
        gradient: a fresh one for a policy, and the demonstrations it asks the reference for.
        model, objective, settings, accelerator: of the run.
    """

    load: Callable[[str], Policy]
    rows: Callable[[Policy, Objective], Sequence[Tokenized]]
    gradient: Callable[[Policy], tuple[Gradient, Sequence[Tokenized]]]
    model: str
    objective: Objective
    settings: TrainSettings
    accelerator: Accelerator


@dataclass(frozen=True, kw_only=True)
class InitSweep:
    """The sweep of one recipe.

    Attributes:
        recipe: of the preference training.
        steps: of SFT before it, one start each; 0 is the model as it is.
        sft: the numbers of the SFT stage; its `max_steps` and `epochs` follow from `steps`.
        held_out: judged comparisons to diagnose on.
        beta: of the training, for the size of margins.
        out: where the folders go.
        on_stage: called with what is done next.
    """

    recipe: Recipe
    steps: tuple[int, ...]
    sft: TrainSettings
    held_out: Sequence[Comparison]
    beta: float
    out: Path
    on_stage: Callable[[str], None] = lambda stage: None

    def __post_init__(self) -> None:
        if len(set(self.steps)) < 2 or min(self.steps) < 0:
            raise UserError(
                f"a sweep compares two starts or more, each a number of SFT steps; got "
                f"{' '.join(map(str, self.steps)) or 'none'}. Try 0 10 40"
            )
        if self.recipe.accelerator.num_processes > 1:
            raise UserError("a sweep runs in one process; start it without accelerate launch")

    def __call__(self) -> list[Row]:
        """Run what is not on disk; a row a start, fewest SFT steps first."""
        steps = tuple(sorted(set(self.steps)))
        self._make_starts(steps)
        rows = [self._row(number) for number in steps]
        write_json(self.out / "init_sweep.json", {"starts": rows, "beta": self.beta})
        write_json(self.out / "init_sweep.section.json", section(rows))
        return rows

    def _make_starts(self, steps: Sequence[int]) -> None:
        """One SFT run, whose model is kept after each number of steps."""
        if all((self._model(number)).is_dir() for number in steps if number):
            return
        self.on_stage(f"SFT, {steps[-1]} steps")
        recipe, objective = self.recipe, SFT()
        policy = recipe.load(recipe.model)

        def keep(done: Progress) -> None:
            if done.step in steps:
                _whole(policy).save(self._model(done.step))

        settings = replace(
            self.sft, max_steps=steps[-1], epochs=10**9, schedule="constant", log_displacement=False
        )
        Training(
            policy=policy,
            objective=objective,
            settings=settings,
            accelerator=recipe.accelerator,
            out=self.out / "sft",
            on_step=keep,
        )(recipe.rows(policy, objective))
        recipe.accelerator.free_memory()

    def _row(self, number: int) -> Row:
        folder = self.out / f"start-{number}"
        if not (folder / "diagnosis.json").exists():
            self._train(number, folder)
        found = read_json(folder / "diagnosis.json")["numbers"]
        names = {**MOVED, **SHARES}
        begun = read_json(folder / "start.json")
        return {"SFT steps": number, **begun, **{key: found.get(at) for key, at in names.items()}}

    def _train(self, number: int, folder: Path) -> None:
        self.on_stage(f"preference training after {number} steps of SFT")
        recipe = self.recipe
        folder.mkdir(parents=True, exist_ok=True)
        told = {"model": recipe.model, "objective": repr(recipe.objective), "sft_steps": number}
        settings = {**told, **vars(recipe.settings)}
        write_json(
            folder / "config.json",
            {"command": "diagnose", "settings": settings, "provenance": provenance()},
        )
        policy = recipe.load(str(self._model(number)) if number else recipe.model)
        policy = policy if policy.adapter else policy.with_frozen_copy()
        gradient, demonstrations = recipe.gradient(policy)
        Training(
            policy=policy,
            objective=recipe.objective,
            settings=recipe.settings,
            accelerator=recipe.accelerator,
            out=folder,
            gradient=gradient,
            demonstrations=demonstrations,
        )(recipe.rows(policy, recipe.objective))
        recipe.accelerator.free_memory()
        write_json(folder / "start.json", _begun(policy, self.held_out))
        diagnose(policy, self.held_out, self.beta, folder, folder)

    def _model(self, number: int) -> Path:
        return self.out / f"start-{number}" / "model"


def section(rows: Sequence[Row]) -> Mapping[str, Any]:
    """The report's page: what moved, against how long SFT was."""
    x = [row["SFT steps"] for row in rows]

    def line(title: str, unit: str, names: Sequence[str]) -> Mapping[str, Any]:
        series = [{"name": name, "x": x, "y": [row[name] for row in rows]} for name in names]
        return {"title": title, "x_label": "SFT steps", "y_label": unit, "series": series}

    columns = list(rows[0])
    return {
        "title": "Initialization",
        "paragraphs": [
            "The same preference training from the SFT run's model after so many steps, which is "
            "policy and reference. Numbers are of held-out comparisons; the first columns are of "
            "the start."
        ],
        "lines": [
            line("Change of log-probability", "nats a response", list(MOVED)),
            line("Shares", "share of comparisons or pairs", list(SHARES)),
        ],
        "tables": [
            {
                "title": "Starts",
                "columns": columns,
                "rows": [[row[name] for name in columns] for row in rows],
            }
        ],
    }


def _begun(policy: Policy, held_out: Sequence[Comparison]) -> Row:
    """What the start thinks of the held-out responses: nats a token."""
    rows, _, base, _ = both_logps(policy, held_out)
    found = roles(judgement(rows).rank, base.exists)
    return {
        f"{name} at the start, nats a token": ratio(base.sum[which], base.length[which]).value
        for name, which in (("chosen", found.chosen), ("rejected", found.rejected))
    }


def _whole(policy: Policy) -> Policy:
    """The policy as one model without an adapter; the policy itself stays as it is."""
    if not isinstance(policy.model, PeftModel):
        return policy
    merged: Any = copy.deepcopy(policy.model).merge_and_unload()
    return replace(policy, model=merged)
