"""`prefloop train`: a policy, comparisons, an objective -> a run folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from prefloop.settings import TrainSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from accelerate import Accelerator

    from prefloop.initialization import Recipe
    from prefloop.objectives import Objective
    from prefloop.policies import Policy
    from prefloop.trainer.loop import Gradient, Metrics
    from prefloop.trainer.memory import Memory
    from prefloop.training import Prepared
    from prefloop.types import Comparison, Tokenized


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a policy on comparisons."""

    shares: ClassVar[bool] = True  # the work, with the processes of torchrun

    model: str
    """Hugging Face name or folder of the policy to start from; an adapter is trained on."""
    data: Path
    """Comparisons: ranked, scored or labelled rows, in any form that `prefloop check` reads."""
    out: Path
    """Run folder; refused if it holds a run."""
    objective: str = "DPO(beta=0.1)"
    """What is minimised, written as its own repr; docs/objectives.md lists them."""
    stable: str = ""
    """Keep to the region that SFT allows, by a solver of Stable Preference Optimization: Hinge(),
    Penalty(lam=0.2), OneStep(), OneStepFirstOrder(), Alternating(), Adaptive(); "" for none."""
    stable_level: str = "ReferenceLevel()"
    """Where --stable takes the lowest SFT loss from: ReferenceLevel(), the reference's own on the
    same responses; FixedLevel(nats=12.5); RunningLevel(decay=0.99) or InnerLevel(steps=3), which
    need no reference."""
    demonstrations: Path | None = None
    """Rows whose good or best responses are the SFT of --stable; the chosen ones by default."""
    held_out: Path | None = None
    """Comparisons to evaluate on, never trained on."""
    held_out_share: float = 0.1
    """Share of the prompts of --data to hold out where --held-out is not given; 0 holds none."""
    sort: str = ""
    """Column of numbers by which the rows are sorted, smallest first, such as place or
    validation_loss; with --order "AsGiven()" training sees them so, as a curriculum."""
    pairs: Literal["best-worst", "all"] = "best-worst"
    """Which responses are ordered where a row has scores only."""
    lora_rank: int = 16
    """Rank of the adapter; 0 trains the whole model."""
    lora_alpha: float = 32.0
    """Scale of the adapter, divided by its rank."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs that training drops."""
    max_length: int = 0
    """Most tokens of a prompt and its response; 0 is the model's context."""
    overlong: Literal["refuse", "drop", "truncate"] = "refuse"
    """What happens to longer rows."""
    empty: Literal["refuse", "drop"] = "refuse"
    """What happens to rows with an empty response."""
    columns: tuple[str, ...] = ()
    """Other names of columns, new=old: prompt=instruction annotator=worker."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; auto: bfloat16 for the frozen base of an adapter on a GPU, else float32."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward pass, by Accelerate."""
    loop: Annotated[TrainSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=TrainSettings)
    trackers: tuple[str, ...] = ()
    """Also log to tensorboard, wandb or trackio; metrics.jsonl is always written."""
    resume: bool = False
    """Go on with the run in --out from its newest checkpoint."""

    def __call__(self) -> None:
        """Check everything, then train, then say what came out."""
        from prefloop.cli import settings
        from prefloop.cli.console import counted, progress
        from prefloop.data import as_row
        from prefloop.runs import start_run, write_jsonl
        from prefloop.trainer.build import accelerator_for, finish
        from prefloop.trainer.loop import total_steps
        from prefloop.training import Training, carry_selection

        self._refuse_unsorted()
        objective, gradient = self._minimised()
        accelerator = accelerator_for(self.trackers, self.out, self.precision)
        given, aside = self._divided()
        policy = self._policy(accelerator.device)
        rows, held_out = self._rows(given, aside, policy, objective)
        shown = self._demonstrations(policy)
        if accelerator.is_main_process:
            start_run(self.out, "train", settings(self), self.resume)
            carry_selection(self.data, self.out)
            if aside:
                write_jsonl(self.out / "held_out.jsonl", map(as_row, aside))
            print(f"training on {rows}; {len(held_out)} held out")
            print(f"memory: about {self._memory(policy, rows.rows, accelerator)}")
        accelerator.wait_for_everyone()
        if self.trackers:
            accelerator.init_trackers("prefloop", config=settings(self))
        total = total_steps(len(rows.rows), self.loop)
        with progress("training", total) as bar:
            training = Training(
                policy=policy,
                objective=objective,
                settings=self.loop,
                accelerator=accelerator,
                out=self.out,
                gradient=self._shown(gradient, shown),
                on_step=lambda done: bar(done.step),
                demonstrations=shown,
                on_reference=counted("scoring the reference"),
            )
            metrics = training(rows.rows, held_out)
        finish(accelerator)
        if accelerator.is_main_process:
            _say(self.out, metrics)

    def recipe(self) -> "Recipe":
        """How this command trains, to do it again from another model."""
        from dataclasses import replace

        from prefloop.initialization import Recipe
        from prefloop.trainer.build import accelerator_for

        accelerator = accelerator_for((), self.out, self.precision)
        given, _ = self._divided()

        def gradient(policy: "Policy") -> "tuple[Gradient, Sequence[Tokenized]]":
            shown = self._demonstrations(policy)
            return self._shown(self._minimised()[1], shown), shown

        return Recipe(
            load=lambda model: replace(self, model=model)._policy(accelerator.device),
            rows=lambda policy, objective: self._rows(given, [], policy, objective)[0].rows,
            gradient=gradient,
            model=self.model,
            objective=self._minimised()[0],
            settings=self.loop,
            accelerator=accelerator,
        )

    def _minimised(self) -> tuple["Objective", "Gradient"]:
        """The objective, and how its gradient is computed."""
        from prefloop.expression import parse
        from prefloop.objectives import ALL, PARTS
        from prefloop.stable import LEVELS, OBJECTIVES, SOLVERS, StableGradient
        from prefloop.trainer import backward

        objective = parse(self.objective, (*ALL, *PARTS, *OBJECTIVES))
        level = parse(self.stable_level, LEVELS)
        if self.stable:
            return objective, StableGradient(solver=parse(self.stable, SOLVERS), level=level)
        self._refuse_unread()
        return objective, backward

    def _refuse_unsorted(self) -> None:
        """Where every epoch is shuffled, sorted rows are of no use."""
        from prefloop.errors import UserError
        from prefloop.orders import AsGiven

        if self.sort and not isinstance(self.loop.ordering, AsGiven):
            raise UserError(
                f"--sort {self.sort} is of no use where every epoch has an order of its own "
                f'(--order {self.loop.order}); add --order "AsGiven()"'
            )

    def _refuse_unread(self) -> None:
        """Without a solver nobody reads its settings."""
        from prefloop.errors import UserError

        for name, given, default in (
            ("--stable-level", self.stable_level, type(self).stable_level),
            ("--demonstrations", self.demonstrations, None),
        ):
            if given != default:
                raise UserError(
                    f'{name} {given} is of no use without a solver; add --stable "Hinge()"'
                )

    def _demonstrations(self, policy: "Policy") -> list["Tokenized"]:
        """What SFT is done on beside the comparisons, in tokens."""
        from prefloop import data

        if self.demonstrations is None:
            return []
        rows, _ = data.tokenize(
            data.read(self.demonstrations, data.parse_columns(self.columns)),
            policy.tokenizer,
            self.max_length or policy.context,
            data.Overlong(self.overlong),
            empty=data.Empty(self.empty),
        )
        return rows

    def _shown(self, gradient: "Gradient", rows: list["Tokenized"]) -> "Gradient":
        """The gradient, with demonstrations where they are given."""
        from dataclasses import replace

        from prefloop.stable import Demonstrations, StableGradient

        if self.demonstrations is None or not isinstance(gradient, StableGradient):
            return gradient
        return replace(gradient, demonstrations=Demonstrations(rows))

    def _policy(self, device: "torch.device") -> "Policy":
        import torch

        from prefloop.policies import Lora, load_policy

        adapter = None
        if self.lora_rank:
            adapter = Lora(rank=self.lora_rank, alpha=self.lora_alpha, dropout=self.lora_dropout)
        dtype = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]
        return load_policy(
            self.model, adapter=adapter, dtype=dtype, device=device, seed=self.loop.seed
        )

    def _divided(self) -> tuple[list["Comparison"], list["Comparison"]]:
        """What is trained on and what is held out."""
        from prefloop import data

        columns = data.parse_columns(self.columns)
        share, seed = self.held_out_share, self.loop.seed
        given, aside = data.read_divided(self.data, self.held_out, share, seed, columns)
        return (data.sorted_by(given, self.sort) if self.sort else given), aside

    def _rows(
        self,
        given: list["Comparison"],
        aside: list["Comparison"],
        policy: "Policy",
        objective: "Objective",
    ) -> tuple["Prepared", list["Tokenized"]]:
        """Both parts in tokens; checked before anything runs."""
        from prefloop import data
        from prefloop.training import Handling, prepare

        handling = Handling(
            pairs=self.pairs,
            max_length=self.max_length or None,
            overlong=data.Overlong(self.overlong),
            empty=data.Empty(self.empty),
        )
        train = prepare(given, policy, objective, handling)
        test = prepare(aside, policy, objective, handling).rows if aside else []
        return train, test

    def _memory(
        self, policy: "Policy", rows: list["Tokenized"], accelerator: "Accelerator"
    ) -> "Memory":
        from prefloop.trainer.build import divided
        from prefloop.trainer.memory import estimate

        return estimate(
            policy.scorer(None), rows, self.loop, accelerator.num_processes, divided(accelerator)
        )


def _say(out: Path, metrics: "Metrics") -> None:
    for name in ("loss", "rewards/accuracies", "rewards/margins", "eval_rewards/accuracies"):
        if name in metrics:
            print(f"{name:<24}{metrics[name]:.4f}")
    if metrics.get("displacement/chosen_fell", 0) > 0.5:
        share = 100 * metrics["displacement/chosen_fell"]
        print(f"in {share:.0f} % of the last batch the chosen response became less likely")
    print(f"policy: {out / 'policy'}")
    if (out / "held_out.jsonl").exists():
        print(f"next: prefloop evaluate {out} --data {out / 'held_out.jsonl'}")
    else:
        print(f"next: prefloop report {out}")
