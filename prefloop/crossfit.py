"""Validation losses of comparisons by models that did not train on them: SelectiveDPO's order.

The prompts are cut in halves; a model trained on one half gives the DPO loss of the other, and the
other way round; over several seeds, each with its own halves, losses are averaged.

References:
    SelectiveDPO, arXiv 2502.09650 (as in its public code: halves, swapped, three seeds, beta 0.01;
    it also averages over checkpoints, which is left out here).
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from prefloop.data import where
from prefloop.data.keys import prompt_key
from prefloop.logps import buckets
from prefloop.objectives import DPO
from prefloop.policies import Lora, Policy, load_policy
from prefloop.policies.policy import evaluating
from prefloop.policies.sampling import derived_seed
from prefloop.runs import read_json, write_json
from prefloop.settings import TrainSettings
from prefloop.training import Handling, Training, prepare
from prefloop.types import Comparison, Tokenized, UserError, judgement, score


@dataclass(frozen=True, kw_only=True)
class CrossFit:
    """How the models are trained.

    Attributes:
        model: Hugging Face name or folder that each begins with.
        adapter: its new adapter; None trains the whole model.
        settings: the numbers of the loop.
        beta: of the DPO loss, in training and in validation.
        seeds: how often the halves are drawn anew; two models each.
        accelerator: device and precision; one process.
    """

    model: str
    adapter: Lora | None
    settings: TrainSettings
    accelerator: Accelerator
    beta: float = 0.01
    seeds: int = 3

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"seeds of the learning order must be 1 or more, got {self.seeds}")
        if self.accelerator.num_processes > 1:
            raise UserError(
                "the learning order is fitted in one process; start it without torchrun"
            )

    def __call__(
        self,
        comparisons: Sequence[Comparison],
        out: Path,
        on_fit: Callable[[int], None] = lambda done: None,
    ) -> dict[str, float]:
        """Mean validation loss of each comparison, by id, nats; kept in `out` fit by fit.

        Raises:
            UserError: a comparison that orders no two responses, or all with one prompt.
        """
        _refuse_unordered(comparisons)
        sums = dict.fromkeys((row.id for row in comparisons), 0.0)
        for seed in range(self.seeds):
            halves = _halves(comparisons, derived_seed(self.settings.seed, "halves", seed))
            for side in (0, 1):
                file, folder = (out / f"{name}-{seed}-{side}" for name in ("losses", "fit"))
                if not file.exists():
                    write_json(file, self._fit(halves[side], halves[1 - side], folder))
                    shutil.rmtree(folder)
                for name, loss in read_json(file).items():
                    sums[name] += loss / self.seeds
                on_fit(2 * seed + side + 1)
        return sums

    def _fit(
        self, seen: Sequence[Comparison], unseen: Sequence[Comparison], folder: Path
    ) -> dict[str, float]:
        """Train on `seen`; the loss of each of `unseen`."""
        folder.mkdir(exist_ok=True)
        seed = derived_seed(self.settings.seed, folder.name)
        policy = load_policy(
            self.model, adapter=self.adapter, device=self.accelerator.device, seed=seed
        )
        policy = policy if policy.adapter else policy.with_frozen_copy()
        objective = DPO(beta=self.beta)
        handling = Handling()
        rows = prepare(seen, policy, objective, handling).rows
        training = Training(
            policy=policy,
            objective=objective,
            settings=replace(self.settings, seed=seed, log_displacement=False),
            accelerator=self.accelerator,
            out=folder,
        )
        training(rows)
        self.accelerator.free_memory()
        held = prepare(unseen, policy, objective, handling).rows
        return self._losses(policy, held, objective)

    def _losses(
        self, policy: Policy, rows: Sequence[Tokenized], objective: DPO
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        scorer = policy.scorer(self.settings.token_budget)
        for part in buckets(rows, self.settings.token_budget):
            batch = [rows[at] for at in part]
            with torch.no_grad(), evaluating(policy.model):
                ours = score(scorer, batch)
            theirs = policy.reference_logps(batch, self.settings.token_budget)
            judged = judgement(batch, device=ours.token.device)
            losses = objective.per_comparison(ours, theirs, judged).tolist()
            found |= {row.id: loss for row, loss in zip(batch, losses, strict=True)}
        return found


def _halves(
    comparisons: Sequence[Comparison], seed: int
) -> tuple[list[Comparison], list[Comparison]]:
    """Two halves that share no prompt."""
    prompts = sorted({prompt_key(row.prompt) for row in comparisons})
    if len(prompts) < 2:
        raise UserError("the learning order needs two different prompts or more")
    rng = torch.Generator().manual_seed(seed)
    shuffled = [prompts[at] for at in torch.randperm(len(prompts), generator=rng).tolist()]
    first: Mapping[str, bool] = dict.fromkeys(shuffled[: len(shuffled) // 2], True)
    sides: tuple[list[Comparison], list[Comparison]] = ([], [])
    for row in comparisons:
        sides[0 if prompt_key(row.prompt) in first else 1].append(row)
    return sides


def _refuse_unordered(comparisons: Sequence[Comparison]) -> None:
    for row in comparisons:
        values = [one for one in row.rank or row.scores or () if one is not None]
        if len(set(values)) < 2:
            raise UserError(
                f"{where(row)}: orders no two responses, so it has no validation loss; drop the "
                "row, or give ranks or scores that differ"
            )
        if row.weight <= 0:
            raise UserError(
                f"{where(row)}: has weight 0, so nothing is trained on it; drop the row, or give "
                "it a weight"
            )
