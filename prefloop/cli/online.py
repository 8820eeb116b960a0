"""`prefloop online`: rounds of sample, score, select and train."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from prefloop.settings import TrainSettings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import ExitStack
    from typing import Any

    from prefloop.online import Asking, Labels, Learning, Measuring, Recipe
    from prefloop.online import Online as Loop
    from prefloop.online.answers import Answers
    from prefloop.policies.sampling import Sampler
    from prefloop.types import Comparison


@dataclass(frozen=True, kw_only=True)
class Online:
    """Train online: what the policy says is scored, and trains the next policy."""

    model: str
    """Hugging Face name or folder of the policy to start from."""
    data: Path
    """Rows with a `prompt`; each round asks all of them anew."""
    reward: str
    """vader, brevity, questions; module:function; or the folder or name of a reward model."""
    out: Path
    """Run folder: round-1/..., rounds.jsonl; refused if it holds a run."""
    rounds: int = 3
    """Rounds of sample, score, select, train."""
    recipe: Literal["vanilla", "on_policy", "hybrid", "tilted", "mixture", "xpo", "rs_dpo"] = (
        "on_policy"
    )
    """A method's sampler and objective; docs/online.md lists them."""
    sampler: str = ""
    """Where pairs come from after the first round, in place of the recipe's: Tilted(k=0.5), ..."""
    first: str = "FromPolicy()"
    """Where pairs come from in the first round, in which the policy is its reference."""
    objective: str = ""
    """What is minimised, in place of the recipe's; docs/objectives.md lists them."""
    margin_scale: float = 1.0
    """Log-odds of a preference per unit of reward, in the recipe's soft labels."""
    reference: Literal["fixed", "moving"] = "fixed"
    """pi_ref of the objective: the first model, or the policy that each round begins with."""
    n: int = 2
    """Answers a prompt, where the sampler does not say so itself."""
    judge: str = ""
    """Address of an OpenAI-compatible server whose model says which answer of a pair is better,
    asked in both orders; "" leaves it to the reward."""
    judge_model: str = ""
    """Name of the judge's model, where its server has several."""
    people: bool = False
    """People say which answer is better: each round waits for `prefloop label`."""
    server: str = ""
    """Address of a server that answers in the reference's place, for --recipe vanilla; "" samples
    with the model in this process."""
    server_model: str = ""
    """Name of the model on --server, where it has several."""
    patience: float = 600.0
    """Seconds to wait for a server that stopped answering; then the run stops, to be resumed."""
    rule: str = "PVar()"
    """What scores a prompt: PVar(scale=1.0), OnlinePVar(beta=0.1), RewardGap(), Random(seed=0)."""
    budget: int = 0
    """Prompts to label in each round, the highest by --rule; 0 is all of them."""
    held_out: Path | None = None
    """Prompts to measure on, never trained on."""
    held_out_share: float = 0.2
    """Share of the prompts of --data to measure on where --held-out is not given."""
    held_out_n: int = 2
    """Answers to each held-out prompt."""
    temperature: float = 1.0
    """Divides the logits of training answers; held-out answers are drawn at 1, as KL needs."""
    top_p: float = 1.0
    """Keep the most likely tokens of training answers up to this probability; 1 keeps all."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    rows: int = 32
    """Answers decoded side by side."""
    lora_rank: int = 16
    """Rank of the adapter; 0 trains the whole model."""
    lora_alpha: float = 32.0
    """Scale of the adapter, divided by its rank."""
    loop: Annotated[TrainSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=TrainSettings)
    resume: bool = False
    """Go on with the run in --out, at the stage where it stopped."""

    shares: ClassVar[bool] = True  # the work, with the processes of torchrun

    def __call__(self) -> None:
        """Check everything, then do every round that is not on disk."""
        from contextlib import ExitStack

        from prefloop import data, online
        from prefloop.cli import settings
        from prefloop.runs import start_run
        from prefloop.shares import PATIENCE, worker_of
        from prefloop.trainer.build import accelerator_for, finish

        accelerator = accelerator_for((), self.out, "no", PATIENCE)
        worker = worker_of(accelerator)
        prompts = data.read_prompts(self.data)
        held_out = data.read_prompts(self.held_out) if self.held_out else []
        if not self.held_out:
            prompts, held_out = data.split(prompts, self.held_out_share, self.loop.seed)
        recipe = self._recipe()
        with ExitStack() as open_ones:
            loop = online.Online(
                asking=self._asking(recipe, prompts, open_ones),
                learning=self._learning(recipe),
                measuring=self._measuring(held_out),
                rounds=self.rounds,
                accelerator=accelerator,
                out=self.out,
                on_stage=_say_stage if worker.leads else _say_nothing,
            )
            hasty = ("patience",)
            worker.led(lambda: start_run(self.out, "online", settings(self), self.resume, hasty))
            said = self._rounds(loop)
        del loop  # and what the accelerator has wrapped
        finish(accelerator)
        if worker.leads:
            print(said)

    def _rounds(self, loop: "Loop") -> str:
        """Do the rounds; what is said at the end."""
        from prefloop.online import Waiting

        try:
            for row in loop():
                if loop.worker.leads:
                    _say(row)
        except Waiting as waiting:
            return str(waiting)
        policy = self.out / f"round-{self.rounds}" / "policy"
        return f"policy: {policy}\nnext: prefloop report {self.out}"

    def _recipe(self) -> "Recipe":
        from dataclasses import replace

        from prefloop.expression import parse
        from prefloop.objectives import ALL, PARTS, SoftLabelDPO
        from prefloop.online import RECIPES, SOURCES, XPO

        recipe = RECIPES[self.recipe]
        if isinstance(recipe.objective, SoftLabelDPO):
            soft = replace(recipe.objective, margin_scale=self.margin_scale)
            recipe = replace(recipe, objective=soft)
        if self.sampler:
            recipe = replace(recipe, source=parse(self.sampler, SOURCES))
        if self.objective:
            recipe = replace(recipe, objective=parse(self.objective, (*ALL, *PARTS, XPO)))
        return recipe

    def _asking(
        self, recipe: "Recipe", prompts: "list[Comparison]", open_ones: "ExitStack"
    ) -> "Asking":
        from prefloop.expression import parse
        from prefloop.online import Asking, source_of
        from prefloop.policies import Sampling
        from prefloop.rewards import load_reward
        from prefloop.selecting import Cut
        from prefloop.selection import RULES

        return Asking(
            prompts=prompts,
            reward=load_reward(self.reward),
            first=source_of(self._first(), self.n),
            later=source_of(recipe.source, self.n),
            drawing=Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                max_new_tokens=self.max_new_tokens,
                rows=self.rows,
            ),
            rule=parse(self.rule, RULES),
            cut=Cut(fraction=1.0, budget=self.budget, price="prompt"),
            labels=self._labels(recipe, open_ones),
            answers=self._answers(recipe, open_ones),
            seed=self.loop.seed,
        )

    def _first(self) -> "Sampler":
        """The first round's source; what a server answers is the reference's."""
        from prefloop.expression import parse
        from prefloop.online import SOURCES
        from prefloop.samplers import FromReference

        return FromReference() if self.server else parse(self.first, SOURCES)

    def _labels(self, recipe: "Recipe", open_ones: "ExitStack") -> "Labels":
        """Who judges: the reward, a model on a server, or people."""
        from prefloop.cli.console import note
        from prefloop.errors import UserError
        from prefloop.judging import Judge
        from prefloop.labelling import People
        from prefloop.online import ByScores, refuse_scores
        from prefloop.servers import Server, connect

        if self.judge and self.people:
            raise UserError("--judge and --people both say who judges; choose one")
        if not self.judge and not self.people:
            return ByScores()
        refuse_scores(recipe.objective)
        if self.people:
            return People()
        server = Server(url=self.judge, model=self.judge_model, patience=self.patience)
        return Judge(open_ones.enter_context(connect(server, note)), seed=self.loop.seed)

    def _answers(self, recipe: "Recipe", open_ones: "ExitStack") -> "Answers":
        from prefloop.cli.console import note
        from prefloop.collecting import sample_to_file
        from prefloop.online import from_server, refuse_changing
        from prefloop.servers import Server, connect

        if not self.server:
            return sample_to_file
        refuse_changing(recipe.source, self.server)
        server = Server(url=self.server, model=self.server_model, patience=self.patience)
        return from_server(open_ones.enter_context(connect(server, note)))

    def _learning(self, recipe: "Recipe") -> "Learning":
        from prefloop.online import REFERENCES, Learning
        from prefloop.policies import Lora

        adapter = Lora(rank=self.lora_rank, alpha=self.lora_alpha) if self.lora_rank else None
        return Learning(
            model=self.model,
            adapter=adapter,
            objective=recipe.objective,
            settings=self.loop,
            reference=REFERENCES[self.reference],
        )

    def _measuring(self, held_out: "list[Comparison]") -> "Measuring":
        from prefloop.collecting import Draw
        from prefloop.online import Measuring
        from prefloop.policies import Sampling

        drawing = Sampling(max_new_tokens=self.max_new_tokens, rows=self.rows)
        draw = Draw(n=self.held_out_n, settings=drawing, seed=self.loop.seed)
        return Measuring(prompts=held_out, draw=draw)


def _say_stage(number: int, stage: str) -> None:
    print(f"[round {number}] {stage}", flush=True)


def _say_nothing(number: int, stage: str) -> None:
    """What the other processes of a run say."""


def _say(row: "Mapping[str, Any]") -> None:
    print(
        f"round {row['round']}: reward {row['reward']:.4f} (reference "
        f"{row['reference_reward']:.4f}), KL {row['kl']:.3f} +- {row['kl_se']:.3f}, "
        f"win rate {row['win_rate']:.3f}, {row['labels']} labels"
    )
