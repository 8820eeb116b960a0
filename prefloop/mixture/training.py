"""Votes and a language model -> a run folder with one policy a type.

RUN/mixture.json             shares, likelihood, which start won, which types died
RUN/policy-1 ... policy-K    loadable by plain transformers or peft
RUN/responsibilities.jsonl   a line an annotator: probability of each type
RUN/rounds.jsonl             a line a round
RUN/round-1/type-1/ ...      metrics of each training; under RUN/start-1/ with several starts
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from jaxtyping import Float
from torch import Tensor

from prefloop import em
from prefloop.logps import by_buckets, distinct, hidden_sums
from prefloop.logps.layout import response_mask
from prefloop.mixture.rounds import RESPONSIBILITIES, ROUNDS, Fitted, Mixture, run_em
from prefloop.mixture.sections import mixture_section
from prefloop.mixture.starts import Clusters, Start
from prefloop.mixture.steps import Likelihood, Steps, refuse_long_pairs
from prefloop.mixture.votes import Votes, refuse_unlearnable
from prefloop.policies import Policy
from prefloop.policies.policy import evaluating
from prefloop.runs import write_json
from prefloop.settings import TrainSettings
from prefloop.shares import worker_of
from prefloop.trainer import Progress
from prefloop.trainer.build import zero_asked
from prefloop.training import reference_of
from prefloop.types import Tokenized, UserError


@dataclass(frozen=True, kw_only=True)
class MixtureTraining:
    """EM over annotator types of one language model, up to its votes.

    Attributes:
        policy: what every type starts from; its adapter, or the whole of it, is trained.
        objective: a likelihood of judgements, see `steps.LIKELIHOODS`.
        settings: the numbers of each M-step.
        mixture: the numbers of EM.
        start: who is of which type at first.
        restarts: how many starts with seeds of their own; that of the highest likelihood is kept.
            No penalty is taken off it: the likelihoods of `steps.LIKELIHOODS` carry none.
        allow_unidentified: go on with one binary judgement an annotator.
        accelerator: devices and processes.
        out: the run folder.
        on_step, on_round: called after every optimizer step and every round.
    """

    policy: Policy
    objective: Likelihood
    settings: TrainSettings
    mixture: Mixture
    start: Start = field(default_factory=Clusters)
    restarts: int = 1
    allow_unidentified: bool = False
    accelerator: Accelerator
    out: Path
    on_step: Callable[[Progress], None] = lambda progress: None
    on_round: Callable[[em.Round], None] = lambda done: None

    def __post_init__(self) -> None:
        refuse_divided(self.accelerator)

    def __call__(self, rows: Sequence[Tokenized]) -> Fitted:
        """Find the types of the annotators of `rows`, and save a policy for each."""
        votes = Votes.of(rows)
        refuse_unlearnable(votes, self.mixture.types, self.allow_unidentified)
        refuse_long_pairs(self.objective, votes.rows)
        steps = self.steps(votes)
        runs = []
        for number in range(self.restarts):
            mixture = replace(self.mixture, seed=self.mixture.seed + number)
            folder = self.out if self.restarts == 1 else self.out / f"start-{number + 1}"
            start = self.start(votes, mixture.types, mixture.seed, self.features)
            runs.append(run_em(steps, votes, mixture, start, folder, self.on_round))
        best = max(range(len(runs)), key=lambda index: runs[index].loglik)
        self._keep(steps, votes, runs[best], best)
        return runs[best]

    def steps(self, votes: Votes) -> Steps:
        """What trains and scores; the reference is scored here, once for all rounds and types."""
        self.policy.model.to(self.accelerator.device)  # pyright: ignore[reportArgumentType] - overloads
        return Steps(
            make_scorer=lambda: self.policy.scorer(None),
            objective=self.objective,
            reference=reference_of(self.policy, votes.rows, self.settings),
            settings=self.settings,
            accelerator=self.accelerator,
            on_step=self.on_step,
        )

    @torch.no_grad()
    def features(self, rows: Sequence[Tokenized]) -> Float[Tensor, "B N D"]:
        """Mean last hidden state of each response under the policy, and the log of its length."""
        scorer, budget = self.policy.scorer(None), self.settings.token_budget
        once = distinct(rows, budget)
        with evaluating(self.policy.model):
            summed: list[Float[Tensor, "N D"]] = worker_of(self.accelerator).mapped(
                lambda mine: by_buckets(
                    lambda batch: hidden_sums(scorer, batch).cpu(), mine, budget
                ),
                once.rows,
            )
        states = torch.nn.utils.rnn.pad_sequence(summed, batch_first=True)[once.row, once.place]
        length = response_mask(rows).sum(-1, keepdim=True)  # (B, N, 1)
        return torch.cat([states / length.clamp(min=1), length.clamp(min=1).log()], -1)

    def _keep(self, steps: Steps, votes: Votes, fitted: Fitted, chosen: int) -> None:
        if steps.worker.leads:
            for number in range(1, self.mixture.types + 1):
                steps.put_file(fitted.weights(number))
                self.policy.save(self.out / f"policy-{number}")
            if fitted.folder != self.out:
                for name in (RESPONSIBILITIES, ROUNDS):
                    shutil.copyfile(fitted.folder / name, self.out / name)
            write_json(self.out / "mixture.section.json", mixture_section(fitted, votes))
            write_json(self.out / "mixture.json", self.summary(fitted, votes, chosen))
        steps.put(steps.origin)
        steps.worker.wait()

    def summary(self, fitted: Fitted, votes: Votes, chosen: int) -> dict[str, Any]:
        """What mixture.json says."""
        return {
            "types": self.mixture.types,
            "policies": [f"policy-{number}" for number in range(1, self.mixture.types + 1)],
            "shares": fitted.shares.tolist(),
            "dead": fitted.dead,
            "loglik": fitted.loglik,
            "loglik_per_judgement": fitted.loglik / max(1, fitted.scored),
            "annotators": len(votes.names),
            "judgements": len(votes.rows),
            "rounds": len(fitted.history),
            "start": chosen + 1,
            "beta": self.objective.beta,
            "objective": repr(self.objective),
            "model": self.policy.name,
        }


def refuse_divided(accelerator: Accelerator) -> None:
    """Types take turns in weights that are whole: processes share the rows, not the weights.

    Raises:
        UserError: FSDP or DeepSpeed is asked for.
    """
    if accelerator.distributed_type == DistributedType.FSDP or zero_asked(accelerator) is not None:
        raise UserError(
            "the types of a mixture take turns in weights that each process holds whole, so FSDP "
            "and DeepSpeed cannot divide them; start it with torchrun, or with accelerate launch "
            "without --use_fsdp and --use_deepspeed"
        )
