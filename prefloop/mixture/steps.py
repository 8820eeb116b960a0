"""The two steps of EM on any scorer: train one type's policy, ask how likely the votes are.

All types live in one place, one after the other: what training changes (an adapter, or a whole
model) is put in and taken out as tensors by name. Memory holds the base once and one type.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from accelerate import Accelerator
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefloop.logps import logps_once
from prefloop.objectives import DPO, BestOfN, Objective, PlackettLuce, TopK
from prefloop.settings import TrainSettings
from prefloop.shares import Worker, worker_of
from prefloop.trainer import Progress, build_trainer, fit
from prefloop.trainer.loop import Reference
from prefloop.types import Tokenized, UserError, judgement

Likelihood: TypeAlias = PlackettLuce | BestOfN | TopK | DPO
LIKELIHOODS = (PlackettLuce, BestOfN, TopK, DPO)
"""Objectives that are minus the log-likelihood of a judgement."""


@dataclass(kw_only=True)
class Steps:
    """One policy that is trained as each type in turn.

    Attributes:
        make_scorer: a fresh scorer around the same weights, for each training and scoring.
        objective: one of `LIKELIHOODS`; its loss is minus the log-likelihood of a judgement.
        reference: log-probabilities under the policy that all types start from.
        settings: the numbers of the loop.
        accelerator: devices and processes.
        on_step: called after every optimizer step.
        origin: the weights that every type starts from.
    """

    make_scorer: Callable[[], nn.Module]
    objective: Objective
    reference: Reference
    settings: TrainSettings
    accelerator: Accelerator
    on_step: Callable[[Progress], None] = lambda progress: None
    origin: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        refuse_no_likelihood(self.objective)
        self.origin = {name: value.clone() for name, value in self.weights().items()}

    def weights(self) -> dict[str, Tensor]:
        """What training changes, by name: the policy that is in place now."""
        named = self.make_scorer().named_parameters()
        return {name: value.detach() for name, value in named if value.requires_grad}

    @torch.no_grad()
    def put(self, weights: dict[str, Tensor]) -> None:
        """Make the policy in place the one with these weights."""
        present = self.weights()
        assert present.keys() == weights.keys(), "weights of another model"
        for name, value in present.items():
            value.copy_(weights[name])

    def put_file(self, path: Path) -> None:
        """`put` the weights that `save` wrote."""
        self.put(load_file(path))

    @property
    def worker(self) -> Worker:
        """This process among those that train and score together."""
        return worker_of(self.accelerator)

    def save(self, path: Path) -> None:
        """Write the weights in place, whole or not at all; one worker does."""
        write_tensors(path, self.weights())

    def train(self, rows: Sequence[Tokenized], folder: Path) -> None:
        """The M-step of one type, from the weights in place or from a checkpoint in `folder`."""
        trainer = build_trainer(
            self.make_scorer(), self.objective, self.reference, self.settings, self.accelerator
        )
        fit(trainer, rows, [], folder, self.on_step)
        # It keeps all that it prepared, moments too. `free_memory` would collect garbage besides,
        # which takes longer than training a small adapter.
        self.accelerator._optimizers.clear()
        self.accelerator._models.clear()
        if self.worker.count > 1:
            del trainer
            gc.collect()  # what joined the gradients of this type must not join the next one's

    @torch.no_grad()
    def loglik(self, rows: Sequence[Tokenized]) -> Float[Tensor, " J"]:
        """Log-likelihood of each judgement under the policy in place, in nats, unweighted.

        Every different answer goes through the model once, however many judged it. Workers share
        the prompts.
        """
        prompts = dict.fromkeys(row.prompt for row in rows)
        asked = set(self.worker.share(list(prompts)))
        places = [place for place, row in enumerate(rows) if row.prompt in asked]
        values = self._loglik([rows[place] for place in places]).tolist() if places else []
        found = torch.zeros(len(rows), dtype=torch.float64)
        for theirs, numbers in self.worker.pool((places, values)):
            found[theirs] = torch.tensor(numbers, dtype=torch.float64)
        return found

    def _loglik(self, rows: Sequence[Tokenized]) -> Float[Tensor, " J"]:
        scorer = self.make_scorer().to(self.accelerator.device).eval()
        found = torch.zeros(len(rows), dtype=torch.float64)
        for part, policy in logps_once(scorer, rows, self.settings.token_budget):
            batch = [rows[index] for index in part]
            losses = self.objective.per_comparison(policy, self.reference(batch), judgement(batch))
            found[torch.tensor(part)] = -losses.double()
        return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    part = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part)
    part.replace(path)


def refuse_no_likelihood(objective: Objective) -> None:
    """Refuse an objective whose loss is not minus the log-likelihood of what was observed."""
    smoothed = isinstance(objective, DPO) and objective.label_smoothing > 0
    if not isinstance(objective, LIKELIHOODS) or smoothed:
        raise UserError(
            f"{objective!r} is no likelihood of a judgement, so nobody can be put into a type by "
            f"it; use {', '.join(made.__name__ for made in LIKELIHOODS)}, without smoothing"
        )


def refuse_long_pairs(objective: Objective, rows: Sequence[Tokenized]) -> None:
    """DPO averages over the pairs of a ranking, which is a likelihood for two responses only."""
    long = [row for row in rows if sum(rank > 0 for rank in row.rank or ()) > 2]
    if isinstance(objective, DPO) and long:
        raise UserError(
            f"{long[0].place}: {len(long[0].responses)} responses were ranked, and the loss of DPO "
            "is a likelihood for two only; use PlackettLuce, which is DPO on pairs"
        )
