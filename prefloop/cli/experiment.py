"""`prefloop experiment selection`: the same labels, chosen in several ways."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from prefloop.settings import TrainSettings

if TYPE_CHECKING:
    from prefloop.experiment import HeadLearner, PolicyLearner
    from prefloop.experiment.pools import Rewards


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Spend the same budget of labels by several rules, and compare what comes out.

    With --model, labels train a policy on its own answers. Without, --data holds judgements of
    people, and labels train a reward head on a sentence encoder.
    """

    name: Annotated[Literal["selection"], tyro.conf.Positional]
    """Which experiment."""
    data: Path
    """Prompts, or with no --model judged rows."""
    out: Path
    """Run folder; refused if it holds a run."""
    model: str = ""
    """Hugging Face name or folder of the policy; "" learns a reward head from judged rows."""
    reward: str = "vader"
    """Who labels the answers of a policy, as in prefloop score."""
    rules: tuple[str, ...] = ("PVar()", "RewardGap()")
    """Rules that choose; the first also from the bottom. Random and the full data are added."""
    rewards: tuple[str, ...] = ("encoder",)
    """Rewards that rules read: label, noisy, encoder, length, causal, or the scores that
    `prefloop score` wrote, Scored(path="RUN/scored.jsonl", name="NAME"). The first is the
    middle."""
    shares: tuple[float, ...] = (0.25, 0.1, 0.5)
    """Shares of the prompts that are labelled; the first is the middle."""
    objectives: tuple[str, ...] = ()
    """What is minimised; empty: DPO(), SimPO(), KTO(), ORPO() of a policy, BradleyTerry() of a
    head."""
    rates: tuple[float, ...] = ()
    """Learning rate of each objective; empty: --lr for all. Losses differ in scale."""
    equals: tuple[Literal["steps", "epochs"], ...] = ("steps", "epochs")
    """What is kept equal between arms; a head is always fitted to the end."""
    seeds: int = 3
    """Repetitions, each with its own pool, held-out prompts and training."""
    jobs: int = 1
    """Arms side by side, a process each."""
    encoder: str = "minilm"
    """Sentence encoder under the heads."""
    noise: float = 1.0
    """Standard deviation of the reward `noisy`, in standard deviations of the label's scores."""
    answers: int = 5
    """Answers to each prompt of the pool."""
    measured: int = 2
    """Answers to each held-out prompt after training."""
    max_new_tokens: int = 48
    """Longest answer, in tokens."""
    pool: int = 300
    """Prompts (rows) to choose from; with judged rows 0 takes all."""
    warm: int = 60
    """Prompts (rows) with labels that exist already, for reward models."""
    held_out: int = 80
    """Prompts that quality is measured on, of a policy."""
    held_out_share: float = 0.25
    """The same as a share of the prompts, of a head."""
    lora_rank: int = 16
    """Rank of the policy's adapter; 0 trains the whole model."""
    loop: Annotated[TrainSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=TrainSettings)
    resume: bool = False
    """Go on with the run in --out; --seeds and --jobs may be others than before."""

    def __call__(self) -> None:
        """Run every arm that has no result yet, then print the table."""
        from prefloop.cli import settings
        from prefloop.cli.console import progress
        from prefloop.experiment import Grid, SelectionExperiment, plan
        from prefloop.experiment.pools import called, rewards_named
        from prefloop.experiment.table import text_table
        from prefloop.runs import start_run, write_text

        grid = Grid(
            rules=self.rules,
            rewards=tuple(map(called, rewards_named(self.rewards))),
            shares=self.shares,
            objectives=self._objectives(),
            equals=self.equals if self.model else ("epochs",),
            seeds=self.seeds,
        )
        arms = len(plan(grid))
        learner = self._policy(grid.objectives) if self.model else self._head()
        with progress("arms", arms) as bar:
            experiment = SelectionExperiment(
                grid=grid, learner=learner, out=self.out, jobs=self.jobs, on_arm=bar
            )
            start_run(self.out, "experiment", settings(self), self.resume, ("seeds", "jobs"))
            rows = experiment()
        table = "\n".join(text_table(rows))
        write_text(self.out / "table.md", table + "\n")
        print(table)
        print(f"next: prefloop report {self.out}")

    def _objectives(self) -> tuple[str, ...]:
        if self.objectives:
            return self.objectives
        return ("DPO()", "SimPO()", "KTO()", "ORPO()") if self.model else ("BradleyTerry()",)

    def _rewards(self) -> "Rewards":
        from prefloop.experiment.pools import Rewards, rewards_named

        return Rewards(
            which=rewards_named(self.rewards),
            encoder=self.encoder,
            model=self.model,
            noise=self.noise,
            loop=self.loop,
        )

    def _policy(self, objectives: tuple[str, ...]) -> "PolicyLearner":
        from prefloop.errors import UserError
        from prefloop.experiment import PolicyLearner
        from prefloop.policies import Sampling

        if self.rates and len(self.rates) != len(objectives):
            raise UserError(
                f"{len(self.rates)} rates for {len(objectives)} objectives; give one each, or none"
            )
        return PolicyLearner(
            model=self.model,
            prompts=self.data,
            reward=self.reward,
            rewards=self._rewards(),
            loop=self.loop,
            rates=tuple(zip(objectives, self.rates, strict=False)),
            drawing=Sampling(max_new_tokens=self.max_new_tokens, rows=256),
            answers=self.answers,
            measured=self.measured,
            pool=self.pool,
            warm=self.warm,
            held_out=self.held_out,
            lora_rank=self.lora_rank,
        )

    def _head(self) -> "HeadLearner":
        from prefloop.experiment import HeadLearner

        return HeadLearner(
            votes=self.data,
            encoder=self.encoder,
            rewards=self._rewards(),
            warm=self.warm,
            pool=self.pool,
            held_out_share=self.held_out_share,
        )
