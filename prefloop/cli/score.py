"""`prefloop score`: rewards, log-probabilities and hidden statistics of each answer."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from prefloop.settings import TrainSettings

if TYPE_CHECKING:
    from prefloop.scoring import Column


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score sampled answers: by a reward, by a policy, by an encoder, in one pass over the file."""

    shares: ClassVar[bool] = True  # the work, with the processes of torchrun

    data: Path
    """Rows with `prompt` and `responses`: JSON-lines, Parquet, Arrow or a saved data set."""
    out: Path
    """Folder for scored.jsonl (scored.arrow of Parquet, Arrow and data sets); refused if it holds a
    run."""
    reward: str = ""
    """Writes scores. vader, brevity, questions; module:function; the run of prefloop reward; the
    folder or name of a reward model; or RewardModel(path='RUN', penalty=1.0)."""
    policy: str = ""
    """Writes policy_logps and tokens: name or folder of a model, or RUN/policy; with an adapter
    also reference_logps, of the base."""
    reference: str = ""
    """Writes reference_logps: the model that is the reference of --policy."""
    hidden: bool = False
    """With --policy: also write hidden_gram, for CHES."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """With --policy: rows that are longer than its context."""
    encoder: str = ""
    """Writes embedding, for --spread: minilm, or a folder or name of a sentence encoder."""
    learning_order: str = ""
    """Writes validation_loss, for LearningOrder: the model that is trained on each half of the
    data in turn, and scores the other. Memory holds what one model trains on."""
    fits: int = 3
    """With --learning-order: how often the halves are drawn anew; two trainings each."""
    fit_rows: int = 0
    """With --learning-order: rows that each model trains on, drawn from its half; 0 is all."""
    beta: float = 0.01
    """With --learning-order: of the DPO loss."""
    lora_rank: int = 16
    """With --learning-order: rank of the adapter that is trained; 0 trains the whole model."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward passes, by Accelerate; of a --reward, use what it was trained in."""
    loop: Annotated[TrainSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=TrainSettings)
    resume: bool = False
    """Go on with the run in --out."""

    def __call__(self) -> None:
        """Write the rows with the new columns, kept as they come."""
        from prefloop.cli import settings
        from prefloop.cli.console import progress
        from prefloop.data import iterate
        from prefloop.runs import start_run
        from prefloop.scoring import score_file
        from prefloop.shares import this_worker
        from prefloop.trainer.build import accelerator_for

        self._refuse_nothing()
        next(iterate(self.data), None)  # before a model is loaded and a folder made
        worker = this_worker()
        columns = self._columns()
        if worker.leads:
            start_run(self.out, "score", settings(self), self.resume)
        worker.wait()
        if self.learning_order:
            columns.append(self._learning_order())
        autocast = accelerator_for((), self.out, self.precision).autocast()
        with progress("scoring rows", None) as step, autocast:
            done = score_file(self.data, self.out, columns, worker, step)
        if worker.leads:
            reward = "" if done["reward"] is None else f", mean reward {done['reward']:.4f}"
            file = self.out / done["file"]
            left_out = f" ({done['left_out']} rows left out)" if done["left_out"] else ""
            print(
                f"wrote {file}: {done['answers']} answers of {done['rows']} prompts{left_out}"
                f"{reward}"
            )
            print(f"next: prefloop select --data {file} --out SELECTED")

    def _refuse_nothing(self) -> None:
        from prefloop.errors import UserError

        if not (self.reward or self.policy or self.encoder or self.learning_order):
            raise UserError(
                "nothing to score with: give --reward, --policy, --encoder or --learning-order"
            )
        if (self.reference or self.hidden) and not self.policy:
            raise UserError(
                "--reference and --hidden belong to a policy; give --policy MODEL as well"
            )

    def _columns(self) -> "list[Column]":
        from prefloop.policies import load_policy
        from prefloop.rewards import load_reward
        from prefloop.rewards.encoders import load_encoder
        from prefloop.scoring import WithEmbedding, WithLogps, WithReward

        found: list[Column] = []
        if self.reward:
            found.append(WithReward(load_reward(self.reward)))
        if self.policy:
            logps = WithLogps(
                policy=load_policy(self.policy),
                reference=load_policy(self.reference) if self.reference else None,
                hidden=self.hidden,
                drop_overlong=self.overlong == "drop",
                token_budget=self.loop.token_budget,
            )
            found.append(logps)
        if self.encoder:
            found.append(WithEmbedding(load_encoder(self.encoder)))
        return found

    def _learning_order(self) -> "Column":
        from prefloop import data
        from prefloop.cli.console import progress
        from prefloop.crossfit import CrossFit
        from prefloop.policies import Lora
        from prefloop.scoring import WithNumbers
        from prefloop.trainer.build import accelerator_for

        fit = CrossFit(
            model=self.learning_order,
            adapter=Lora(rank=self.lora_rank) if self.lora_rank else None,
            settings=replace(self.loop, eval_every=0),
            accelerator=accelerator_for((), self.out, self.precision),
            beta=self.beta,
            seeds=self.fits,
            most=self.fit_rows,
        )
        folder = self.out / "fits"
        folder.mkdir(exist_ok=True)
        with progress("fitting", 2 * self.fits) as step:
            numbers = fit(lambda: data.iterate(self.data), folder, step)
        return WithNumbers("validation_loss", numbers)
