"""The rounds of online training, on disk; each stage can be killed and gone on with.

out/round-R/responses.jsonl, scored.jsonl   answers, and their scores (scoring.json: it is whole)
out/round-R/selected.jsonl, selection.json  which prompts are worth a label
out/round-R/log_ratios.jsonl                only for rules that read log-probabilities
out/round-R/judged.jsonl, labels.sqlite     only with a judge, or with people
out/round-R/pairs.jsonl                     what is trained on
out/round-R/metrics.jsonl, policy/          the training, and what came out
out/round-R/evaluation.json, samples.jsonl  it against the reference, on held-out prompts
out/rounds.jsonl, online.section.json       a line a round; the report's page

A stage begins from files alone and its last file appears whole or not at all, so a run that was
killed ends in the same files as one that was not. Several processes share the answers, the scores
and the training; pairs are made and labelled by one of them.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import Accelerator

from prefloop import data
from prefloop.collecting import Draw, sample_to_file
from prefloop.comparing import compare
from prefloop.objectives import Objective
from prefloop.online.answers import Answers
from prefloop.online.exploration import in_round
from prefloop.online.labels import ByScores, Labels
from prefloop.online.section import section
from prefloop.online.sources import Source
from prefloop.policies import Lora, Policy, Sampling, load_policy
from prefloop.policies.sampling import derived_seed
from prefloop.rewards import Reward
from prefloop.runs import read_json, read_jsonl, write_json, write_jsonl
from prefloop.scoring import WithLogps, WithReward, score_file
from prefloop.selecting import Cut, Selecting
from prefloop.selection import Rule
from prefloop.settings import TrainSettings
from prefloop.shares import Worker, worker_of
from prefloop.trainer.loop import Reference
from prefloop.training import Handling, Training, cached_logps, prepare, reference_of
from prefloop.types import Comparison, Tokenized, UserError

Row = Mapping[str, Any]


def fixed_reference(
    policy: Policy, rows: Sequence[Tokenized], settings: TrainSettings
) -> Reference:
    """pi_ref is the model that the first round began with, in every round."""
    return reference_of(policy, rows, settings)


def moving_reference(
    policy: Policy, rows: Sequence[Tokenized], settings: TrainSettings
) -> Reference:
    """pi_ref is the policy that this round began with."""
    return cached_logps(policy.model, rows, settings)


REFERENCES = {"fixed": fixed_reference, "moving": moving_reference}
"""What stands for pi_ref in the objective. Samplers tilt against the first model in both."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What a round asks a label for.

    Attributes:
        prompts: asked in every round, anew.
        reward: who scores all answers, for the rule, the choosers and the measurements.
        first: where the comparisons of the first round come from; the same for methods that are
            compared with each other.
        later: of the other rounds.
        drawing: how tokens are drawn.
        rule, cut: which prompts are kept.
        labels: who says which answer of a pair is better; the reward unless told otherwise.
        answers: how responses.jsonl comes to be; by the policy itself unless told otherwise.
        seed: of answers and choices.
    """

    prompts: Sequence[Comparison]
    reward: Reward
    first: Source
    later: Source
    drawing: Sampling
    rule: Rule
    cut: Cut = field(default_factory=lambda: Cut(fraction=1.0))
    labels: Labels = field(default_factory=ByScores)
    answers: Answers = sample_to_file
    seed: int = 0

    def source(self, number: int) -> Source:
        """Of round `number`, the first being 1."""
        return self.first if number == 1 else self.later


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How a round trains.

    Attributes:
        model: Hugging Face name or folder that the first round begins with.
        adapter: its new adapter, trained on in every round; None trains the whole model.
        objective: what is minimised; an `XPO` with `rounds` has another strength in each.
        settings: the numbers of the loop, in each round; the schedule begins anew.
        reference: one of `REFERENCES`.
        handling: rows that cannot be trained on as they are.
    """

    model: str
    adapter: Lora | None
    objective: Objective
    settings: TrainSettings
    reference: Callable[[Policy, Sequence[Tokenized], TrainSettings], Reference] = fixed_reference
    handling: Handling = field(
        default_factory=lambda: Handling(overlong=data.Overlong.drop, empty=data.Empty.drop)
    )


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """Held-out prompts, and how answers to them are drawn after each round."""

    prompts: Sequence[Comparison]
    draw: Draw


@dataclass(frozen=True, kw_only=True)
class Online:
    """The loop of a run folder.

    Attributes:
        asking, learning, measuring: the stages of a round.
        rounds: how many.
        accelerator: devices and processes.
        out: the run folder.
        on_stage: called with (round, stage) before a stage that is not on disk yet.
    """

    asking: Asking
    learning: Learning
    measuring: Measuring
    rounds: int
    accelerator: Accelerator
    out: Path
    on_stage: Callable[[int, str], None] = lambda number, stage: None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"rounds must be 1 or more, got {self.rounds}; 3 is the paper's")

    @property
    def worker(self) -> Worker:
        """This process among those of the accelerator."""
        return worker_of(self.accelerator)

    def __call__(self) -> Iterator[Row]:
        """Do every round that is not on disk yet; gives each round's line of rounds.jsonl."""
        rows: list[Row] = []
        for number in range(1, self.rounds + 1):
            self._round(number)
            rows.append(self._row(number, self._folder(number)))
            if self.worker.leads:
                write_jsonl(self.out / "rounds.jsonl", rows)
                samples = list(read_jsonl(self._folder(number) / "samples.jsonl"))
                write_json(self.out / "online.section.json", section(rows, samples))
            yield rows[-1]

    def policy(self, number: int) -> Policy:
        """The policy after round `number`; 0 is before the first."""
        learning = self.learning
        if number == 0:
            policy = load_policy(
                learning.model,
                adapter=learning.adapter,
                device=self.accelerator.device,
                seed=learning.settings.seed,
            )
            return policy if policy.adapter else policy.with_frozen_copy()
        policy = load_policy(self._folder(number) / "policy", device=self.accelerator.device)
        if policy.adapter:
            return policy
        frozen = load_policy(learning.model, device=self.accelerator.device).base
        return replace(policy, frozen=frozen.requires_grad_(False))

    def _round(self, number: int) -> None:
        folder, led = self._folder(number), self.worker.led
        folder.mkdir(exist_ok=True)
        if not led((folder / "policy").is_dir):
            self._collect_and_train(number, folder)
        if self.worker.leads:  # of no use next to the policy
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        if not led((folder / "evaluation.json").exists):
            self.on_stage(number, "evaluate")
            compare(
                self.policy(number),
                self.measuring.prompts,
                self.asking.reward,
                folder,
                self.measuring.draw,
                self.worker,
            )

    def _collect_and_train(self, number: int, folder: Path) -> None:
        policy, led = self.policy(number - 1), self.worker.led
        pairs = folder / "pairs.jsonl"
        if not led(pairs.exists):
            self._select(number, folder, policy)
            led(lambda: self._label(number, folder))
        self.on_stage(number, "train")
        learning = self.learning
        rows = data.read(pairs)
        if not learning.objective.uses_ties:
            rows, _ = data.drop_ties(rows)  # soft labels too, as in the authors' code
        objective = in_round(learning.objective, number)
        prepared = prepare(rows, policy, objective, learning.handling)
        seed = derived_seed(learning.settings.seed, "order", number)
        training = Training(
            policy=policy,
            objective=objective,
            settings=replace(learning.settings, seed=seed),
            accelerator=self.accelerator,
            out=folder,
            reference=learning.reference,
        )
        training(prepared.rows)
        self.accelerator.free_memory()

    def _select(self, number: int, folder: Path, policy: Policy) -> None:
        """Which prompts are worth a label: sampled, scored, selected."""
        asking, source = self.asking, self.asking.source(number)
        seed = self._seed(number)
        draw = Draw(n=source.answers, settings=asking.drawing, seed=seed, sampler=source.sampler)
        self.on_stage(number, "sample")
        asking.answers(policy, asking.prompts, folder, draw, self.worker)
        self.on_stage(number, "score")
        columns = [WithReward(asking.reward)]
        score_file(folder / "responses.jsonl", folder, columns, self.worker)
        scored = folder / "scored.jsonl"
        if not self.worker.led((folder / "selection.json").exists):
            self.on_stage(number, "select")
            scored = self._selected_from(folder, policy)
        Selecting(rule=asking.rule, cut=asking.cut, worker=self.worker)(scored, folder)

    def _label(self, number: int, folder: Path) -> None:
        """What the round trains on: pairs of the selected prompts' answers, judged."""
        source, seed = self.asking.source(number), self._seed(number)
        kept = [row for row in data.iterate(folder / "selected.jsonl") if row.weight > 0]
        pairs = [pair for row in kept for pair in source.pairing(row, seed)]
        if not pairs:
            raise UserError(
                f"round {number}: none of the {len(kept)} selected prompts has a pair to compare; "
                "sample more answers, or lower the threshold"
            )
        self.on_stage(number, "label")
        labelled = self.asking.labels(pairs, folder)
        write_jsonl(folder / "pairs.jsonl", map(data.as_row, labelled))

    def _selected_from(self, folder: Path, policy: Policy) -> Path:
        """The file that the rule reads: with log-probabilities where it asks for them."""
        scored = folder / "scored.jsonl"
        if "reference_logps" not in self.asking.rule.columns:
            return scored
        measured = folder / "log_ratios.jsonl"
        rows = self.worker.mapped(WithLogps(policy=policy), list(data.iterate(scored)))
        self.worker.led(lambda: write_jsonl(measured, map(data.as_row, rows)))
        return measured

    def _row(self, number: int, folder: Path) -> Row:
        """The line of rounds.jsonl: what was asked, and what came of it."""
        evaluation = read_json(folder / "evaluation.json")
        before, after = evaluation["reward_kl"]
        named = {row["name"]: row for row in evaluation["result"]}
        wins = named["win rate against the reference"]
        scored = [row.scores or () for row in data.iterate(folder / "scored.jsonl")]
        flat = [score for scores in scored for score in scores]
        return {
            "round": number,
            "source": repr(self.asking.source(number).sampler),
            "objective": repr(in_round(self.learning.objective, number)),
            "answers": len(flat),
            "labels": sum(1 for _ in read_jsonl(folder / "pairs.jsonl")),
            "reward_of_answers": sum(flat) / len(flat),
            "reward": after["reward"],
            "reward_se": after["reward_se"],
            "reference_reward": before["reward"],
            "reference_reward_se": before["reward_se"],
            "kl": after["kl"],
            "kl_se": after["kl_se"],
            "win_rate": wins["value"],
            "win_rate_low": wins["low"],
            "win_rate_high": wins["high"],
            **_displacement(list(read_jsonl(folder / "metrics.jsonl"))),
        }

    def _seed(self, number: int) -> int:
        """Of a round's answers and pairs."""
        return derived_seed(self.asking.seed, "round", number)

    def _folder(self, number: int) -> Path:
        return self.out / f"round-{number}"


def _displacement(metrics: Sequence[Row]) -> Row:
    """What training did to chosen and rejected responses: means over the steps of the last epoch.

    A step whose responses were all tied has none.
    """
    last = [row for row in metrics if row["epoch"] > metrics[-1]["epoch"] - 1 + 1e-9]
    names = dict.fromkeys(name for row in last for name in row if name.startswith("displacement/"))
    return {name: fmean(row[name] for row in last if name in row) for name in names}
