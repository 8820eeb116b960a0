"""`prefloop mixture`: votes with annotators -> a policy for each type of annotator."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from prefloop.settings import TrainSettings

if TYPE_CHECKING:
    import torch

    from prefloop.em import Round
    from prefloop.mixture import Fitted, MixtureTraining
    from prefloop.policies import Policy
    from prefloop.training import Prepared


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Find types of annotators who disagree, and train a policy for each (EM-DPO)."""

    model: str
    """Hugging Face name or folder of the policy that every type starts from."""
    data: Path
    """Judgements with annotators: pairs, best of several, rankings, in any mix."""
    out: Path
    """Run folder; refused if it holds a run."""
    types: int | Literal["auto"] = 2
    """Types of annotators; 1 is plain training on everybody; auto: by held-out likelihood."""
    most_types: int = 5
    """Most types that --types auto tries; never more than there are annotators."""
    folds: int = 2
    """Parts that --types auto divides each annotator's votes into; each is held out once."""
    rounds: int = 5
    """Rounds of EM; 1 with Clusters() is cluster-then-DPO."""
    start: str = "Clusters()"
    """Who is of which type at first: Clusters(), LinearRewards(), Dirichlet(), or
    Given(path="gamma.jsonl")."""
    restarts: int = 1
    """Starts with seeds of their own; that of the highest likelihood is kept."""
    warm: bool = False
    """Train each type on from the round before; otherwise each round starts from --model."""
    assign: Literal["soft", "hard"] = "soft"
    """soft: types train on everybody, weighted; hard: on their likeliest people, as MaxMin-RLHF."""
    evidence: str = "Trained()"
    """What rounds score: Trained(), what they trained on; Halves(), the other half of each
    annotator's judgements; HeldOut(folds=3), annotators none of whose judgements were read."""
    average: int = 1
    """E-steps read log-likelihoods averaged over about this many rounds: short trainings differ by
    chance; 1 reads the last round only."""
    annotator_missing: Literal["refuse", "own"] = "refuse"
    """What happens to rows without an annotator: own makes each an annotator of its own."""
    allow_unidentified: bool = False
    """Go on with one binary judgement an annotator, which cannot tell types apart."""
    objective: str = "PlackettLuce(beta=0.1)"
    """Minus the log-likelihood of a judgement: PlackettLuce, BestOfN, TopK, or DPO on pairs."""
    lora_rank: int = 16
    """Rank of each type's adapter; 0 trains a whole model a type."""
    lora_alpha: float = 32.0
    """Scale of the adapter, divided by its rank."""
    max_length: int = 0
    """Most tokens of a prompt and its response; 0 is the model's context."""
    overlong: Literal["refuse", "drop", "truncate"] = "refuse"
    """What happens to longer rows."""
    empty: Literal["refuse", "drop"] = "refuse"
    """What happens to rows with an empty response."""
    columns: tuple[str, ...] = ()
    """Other names of columns, new=old: annotator=worker."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; auto: bfloat16 for the frozen base of an adapter on a GPU, else float32."""
    loop: Annotated[TrainSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=TrainSettings)
    resume: bool = False
    """Go on with the run in --out from where it stopped."""

    shares: ClassVar[bool] = True  # the work, with the processes of torchrun

    def __call__(self) -> None:
        """Check everything, then run EM, then say who is of which type."""
        from prefloop.cli import settings
        from prefloop.expression import parse
        from prefloop.mixture import (
            EVIDENCE,
            STARTS,
            MixtureTraining,
            Votes,
            choose_types,
            refuse_divided,
            refuse_unlearnable,
        )
        from prefloop.mixture import Mixture as EM
        from prefloop.mixture.steps import refuse_no_likelihood
        from prefloop.objectives import ALL
        from prefloop.runs import start_run
        from prefloop.shares import PATIENCE, worker_of
        from prefloop.trainer.build import accelerator_for, finish

        objective, start = parse(self.objective, ALL), parse(self.start, STARTS)
        refuse_no_likelihood(objective)
        accelerator = accelerator_for((), self.out, "no", PATIENCE)
        refuse_divided(accelerator)
        worker = worker_of(accelerator)
        policy = self._policy(accelerator.device)
        prepared = self._prepared(policy, objective)
        if worker.leads:
            print(f"{prepared}")
        rows = prepared.rows
        votes = Votes.of(rows)
        em = EM(
            types=self._types(len(votes.names)),
            rounds=self.rounds,
            warm=self.warm,
            assign=self.assign,
            evidence=parse(self.evidence, EVIDENCE),
            average=self.average,
            seed=self.loop.seed,
        )
        refuse_unlearnable(votes, em.types, self.allow_unidentified)
        worker.led(lambda: start_run(self.out, "mixture", settings(self), self.resume))
        training = MixtureTraining(
            policy=policy,
            objective=objective,
            settings=self.loop,
            mixture=em,
            start=start,
            restarts=self.restarts,
            allow_unidentified=self.allow_unidentified,
            accelerator=accelerator,
            out=self.out,
            on_round=_say_round if worker.leads else lambda done: None,
        )
        if self.types == "auto":
            say = print if worker.leads else lambda line: None
            training = choose_types(training, rows, self.folds, say)
        fitted = training(rows)
        if worker.leads:
            _say(training, fitted)
        finish(accelerator)

    def _types(self, annotators: int) -> int:
        return min(self.most_types, annotators) if self.types == "auto" else self.types

    def _policy(self, device: "torch.device") -> "Policy":
        import torch

        from prefloop.policies import Lora, load_policy

        adapter = Lora(rank=self.lora_rank, alpha=self.lora_alpha) if self.lora_rank else None
        dtype = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]
        return load_policy(
            self.model, adapter=adapter, dtype=dtype, device=device, seed=self.loop.seed
        )

    def _prepared(self, policy: "Policy", objective: object) -> "Prepared":
        from prefloop import data
        from prefloop.mixture import with_annotators
        from prefloop.training import Handling, prepare

        found = data.read(self.data, data.parse_columns(self.columns))
        handling = Handling(
            pairs="all",
            max_length=self.max_length or None,
            overlong=data.Overlong(self.overlong),
            empty=data.Empty(self.empty),
        )
        named = with_annotators(found, self.annotator_missing)
        return prepare(named, policy, objective, handling)  # pyright: ignore[reportArgumentType] - checked before


def _say_round(done: "Round") -> None:
    from prefloop.em import type_shares

    loglik = float(done.belief.evidence.sum())
    shares = " ".join(f"{share:.3f}" for share in type_shares(done.belief.responsibilities))
    print(f"round {done.number + 1}: log-likelihood {loglik:.2f}, shares {shares}", flush=True)


def _say(training: "MixtureTraining", fitted: "Fitted") -> None:
    likeliest = fitted.gamma.argmax(-1)
    for number, share in enumerate(fitted.shares.tolist(), 1):
        count = int((likeliest == number - 1).sum())
        died = "; it died: nobody is left in it" if number in fitted.dead else ""
        print(f"type {number}: share {share:.3f}, {count} annotators{died}")
    print(f"policies: {training.out}/policy-1 to policy-{training.mixture.types}")
    print(f"next: prefloop aggregate {training.out} --data PROMPTS --out AGGREGATE")
