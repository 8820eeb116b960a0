"""From comparisons and a policy to a trained policy in a run folder.

run/config.json      what was asked for, versions, git id
run/metrics.jsonl    a line a logged step
run/checkpoint/      to go on from
run/policy/          the result, loadable by plain transformers or peft
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn

from prefloop.data import Empty, Overlong, best_vs_worst, tokenize, with_ranks
from prefloop.logps import EmbeddedScorer, Scorer, cached_reference, model_identity
from prefloop.objectives import Objective, needs_embeddings, needs_mismatched
from prefloop.pairing import with_mismatched
from prefloop.policies import Policy
from prefloop.policies.policy import evaluating
from prefloop.runs import cache_folder
from prefloop.settings import TrainSettings
from prefloop.trainer import Gradient, Progress, backward, build_trainer, fit
from prefloop.trainer.build import in_precision
from prefloop.trainer.loop import Metrics, Reference, rows_seen
from prefloop.types import Comparison, Tokenized, UserError

Pairs = Literal["best-worst", "all"]
PAIRS = {"best-worst": best_vs_worst, "all": with_ranks}
"""Which responses are ordered where a row has scores: the two ends, or all of them."""


@dataclass(frozen=True)
class Prepared:
    """Rows to train on, and what was left out on the way.

    Attributes:
        rows: in tokens.
        unweighted: rows of weight 0 (not selected).
        unordered: rows that order no two responses (ties), for objectives without a model of ties.
        overlong: rows past the length limit.
        empty: rows with a response of no token.
        truncated: rows with a response that was cut.
    """

    rows: list[Tokenized]
    unweighted: int
    unordered: int
    overlong: int
    empty: int
    truncated: int

    def __str__(self) -> str:
        counts = {
            "not selected": self.unweighted,
            "tied": self.unordered,
            "over-long": self.overlong,
            "with an empty response": self.empty,
        }
        left_out = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        cut = f"; {self.truncated} cut" if self.truncated else ""
        return (
            f"{len(self.rows)} comparisons" + (f" ({left_out} left out)" if left_out else "") + cut
        )


@dataclass(frozen=True, kw_only=True)
class Handling:
    """What to do with rows that cannot be trained on as they are.

    Attributes:
        pairs: which responses of a row that has scores only are ordered, a key of `PAIRS`.
        max_length: most tokens of a prompt and its response; None is the model's context.
        overlong: refuse, drop or truncate longer rows.
        empty: refuse or drop rows with a response of no token.
    """

    pairs: Pairs = "best-worst"
    max_length: int | None = None
    overlong: Overlong = Overlong.refuse
    empty: Empty = Empty.refuse


def prepare(
    comparisons: Sequence[Comparison],
    policy: Policy,
    objective: Objective,
    handling: Handling,
) -> Prepared:
    """Comparisons that `objective` can read, in the tokens of `policy`."""
    weighted = [row for row in comparisons if row.weight > 0]
    scored = PAIRS[handling.pairs]
    judged = [
        ranked
        for row in weighted
        for ranked in (scored([row]) if _wants_order(row, objective) else [row])
    ]
    ordered = [row for row in judged if _readable(row, objective)]
    limit = handling.max_length or policy.context
    rows, report = tokenize(
        ordered, policy.tokenizer, limit, handling.overlong, empty=handling.empty
    )
    if not rows:
        raise UserError(
            f"no comparison is left to train on: {len(comparisons)} rows, "
            f"{len(comparisons) - len(weighted)} of weight 0, {len(weighted) - len(ordered)} "
            f"without an order that {type(objective).__name__} reads; {report}"
        )
    if needs_mismatched(objective):
        rows = with_mismatched(rows)
    return Prepared(
        rows=rows,
        unweighted=len(comparisons) - len(weighted),
        unordered=len(weighted) - len(ordered),
        overlong=len(report.dropped),
        empty=len(report.empty),
        truncated=len(report.truncated),
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """One policy's training, up to its data.

    Attributes:
        policy: trained in place and saved as `out`/policy.
        objective: what is minimised.
        settings: the numbers of the loop.
        accelerator: devices and processes.
        out: the run folder.
        gradient: how an update is computed; the bilevel solvers bring their own.
        on_step: called after every optimizer step.
        reference: what stands for pi_ref, of (policy, rows, settings); `reference_of` when None.
        demonstrations: rows besides the comparisons that the gradient asks the reference for.
        on_reference: called with how many rows the reference has scored; `reference_of` only.
    """

    policy: Policy
    objective: Objective
    settings: TrainSettings
    accelerator: Accelerator
    out: Path
    gradient: Gradient = backward
    on_step: Callable[[Progress], None] = lambda progress: None
    reference: Callable[[Policy, Sequence[Tokenized], TrainSettings], Reference] | None = None
    demonstrations: Sequence[Tokenized] = ()
    on_reference: Callable[[int], None] = lambda done: None

    def __call__(self, rows: Sequence[Tokenized], held_out: Sequence[Tokenized] = ()) -> Metrics:
        """Train on `rows`, save the policy; the last metrics.

        The reference is the policy as it was, an adapter off; it is scored once, before the first
        step, on the rows that the steps will see, in the precision of the steps, and kept in the
        cache. A policy that is trained whole is scored before it moves.
        """
        self.policy.model.to(self.accelerator.device)  # pyright: ignore[reportArgumentType] - overloads
        reference = None
        if self.objective.needs_reference or self.settings.log_displacement:
            scoring = partial(reference_of, on_rows=lambda done, total: self.on_reference(done))
            referred = self.reference or scoring
            seen = [rows[index] for index in rows_seen(len(rows), self.settings)]
            asked = [*seen, *held_out, *self.demonstrations]
            with in_precision(
                self.accelerator
            ):  # in another precision the two would not start equal
                reference = referred(self.policy, asked, self.settings)
        scorer = _scorer(self.policy, self.objective)
        trainer = build_trainer(
            scorer, self.objective, reference, self.settings, self.accelerator, self.gradient
        )
        metrics = fit(trainer, rows, held_out, self.out, self.on_step)
        weights = trainer.engine.weights(frozen=self.policy.adapter is None)
        if self.accelerator.is_main_process:
            own = {name.removeprefix("model."): value for name, value in weights.items()}
            self.policy.save(self.out / "policy", own)
        self.accelerator.wait_for_everyone()
        return metrics


def _scorer(policy: Policy, objective: Objective) -> Scorer:
    """What scores `policy` in training: with all that `objective` reads."""
    if needs_embeddings(objective):
        return EmbeddedScorer(policy.model)
    return policy.scorer(None, with_collision=objective.needs_collision)


def carry_selection(data: Path, out: Path) -> None:
    """Copy what `prefloop select` left beside `data` into the run, so that its report shows it."""
    beside = data.parent / "selection.json"
    if beside.is_file():
        shutil.copyfile(beside, out / beside.name)


def reference_of(
    policy: Policy,
    rows: Sequence[Tokenized],
    settings: TrainSettings,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> Reference:
    """Log-probabilities of the reference for `rows`, from the cache or scored into it."""
    # A policy that is trained whole is its own reference, as long as it has not moved.
    held = policy.adapter or policy.frozen is not None
    with policy.reference() if held else nullcontext(policy.model) as model:
        return cached_logps(model, rows, settings, on_rows)


@torch.no_grad()
def cached_logps(
    model: nn.Module,
    rows: Sequence[Tokenized],
    settings: TrainSettings,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> Reference:
    """What `model`, as it is now, says of `rows`, dropout off; from the cache or scored into it."""
    with evaluating(model):
        return cached_reference(
            Scorer(model, token_budget=settings.token_budget),
            rows,
            path=cache_folder() / "reference",
            identity=model_identity(model),
            progress=on_rows,
        )


def _wants_order(row: Comparison, objective: Objective) -> bool:
    """Whether the row has scores only, and the objective reads an order."""
    reads_numbers = {"scores", "ensemble"} & set(objective.data)
    return row.rank is None and bool(row.scores) and not reads_numbers


def _readable(row: Comparison, objective: Objective) -> bool:
    """Whether the objective finds in the row what it reads."""
    if "label" in objective.data and (row.label is not None or row.rank is not None):
        return True
    if "scores" in objective.data:
        return row.scores is not None and len(row.scores) > 1
    if "ensemble" in objective.data:
        return row.ensemble is not None and len(row.ensemble) > 1
    ranks = [rank for rank in row.rank or () if rank]
    return len(ranks) > 1 and (objective.uses_ties or len(set(ranks)) > 1)
