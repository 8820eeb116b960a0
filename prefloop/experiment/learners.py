"""What labels are spent on, and how good what comes out is: a policy, or a reward head."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from prefloop import data
from prefloop.collecting import Draw, sample_to_file, with_answers
from prefloop.data import encoder, prompt_key
from prefloop.experiment.arms import Arm
from prefloop.experiment.pools import Rewards, write_scored
from prefloop.expression import parse
from prefloop.objectives import ALL, PARTS
from prefloop.policies import Lora, Policy, Sampling, load_policy
from prefloop.reward_training import BradleyTerry, EncoderBackbone, judged, pairs_of
from prefloop.reward_training.encoder import Rows
from prefloop.rewards import load_reward, score
from prefloop.rewards.encoders import load_encoder
from prefloop.rewards.heads import EncoderMembers
from prefloop.settings import TrainSettings
from prefloop.trainer.build import accelerator_for
from prefloop.training import Handling, Training, prepare
from prefloop.types import Comparison, UserError

POOL = "pool.jsonl"
WARM = "warm.jsonl"
HELD_OUT = "held_out.jsonl"


@runtime_checkable
class Learner(Protocol):
    """What labels are spent on."""

    @property
    def quality(self) -> str:
        """What the numbers of `learn` are."""
        ...

    def prepare(self, folder: Path, seed: int) -> None:
        """Write pool, warm rows, held-out rows and scored pools of one seed; done once."""
        ...

    def learn(
        self, arm: Arm, rows: Sequence[Comparison], shared: Path, out: Path
    ) -> Mapping[str, float]:
        """Learn from the labelled `rows`; the quality on each held-out row or prompt, by id."""
        ...


@dataclass(frozen=True, kw_only=True)
class PolicyLearner:
    """Labels train a policy; its quality is the labeller's mean reward of its answers.

    Attributes:
        model: Hugging Face name or folder.
        prompts: file of prompts; each seed divides them anew into pool, warm and held out.
        reward: the labeller, as `prefloop score --reward` names it.
        rewards: what rules read.
        loop: the training loop. With equal steps every arm takes as many as the full data in
            `epochs`; with equal epochs each goes `epochs` times over its own labels.
        rates: learning rate of each objective that has one of its own, by its text.
        drawing: how tokens are drawn.
        answers: to each prompt of the pool.
        measured: answers to each held-out prompt, after training.
        pool, warm, held_out: prompts of each part.
        lora_rank: of the adapter; 0 trains the whole model.
    """

    model: str
    prompts: Path
    reward: str
    rewards: Rewards
    loop: TrainSettings
    rates: tuple[tuple[str, float], ...]
    drawing: Sampling
    answers: int = 5
    measured: int = 2
    pool: int = 300
    warm: int = 60
    held_out: int = 80
    lora_rank: int = 16
    quality: str = "mean reward of answers to held-out prompts"

    def prepare(self, folder: Path, seed: int) -> None:
        """Answers to the prompts of the seed, labelled and scored."""
        if (folder / "done").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        pool, warm, held_out = self._parts(seed)
        policy = load_policy(self.model, device="cpu")
        draw = Draw(n=self.answers, settings=self.drawing, seed=seed)
        answered = sample_to_file(policy, [*pool, *warm], folder, draw)
        labelled = score([row for row in answered if not data.has_empty(row)], self._label())
        names = {row.id for row in warm}
        parts = {
            HELD_OUT: held_out,
            WARM: [row for row in labelled if row.id in names],
            POOL: [row for row in labelled if row.id not in names],
        }
        _share(parts, self.rewards, folder, seed)

    def learn(
        self, arm: Arm, rows: Sequence[Comparison], shared: Path, out: Path
    ) -> Mapping[str, float]:
        """Train on best against worst of each row, answer the held-out prompts, score."""
        adapter = Lora(rank=self.lora_rank) if self.lora_rank else None
        policy = load_policy(self.model, adapter=adapter, device="cpu", seed=arm.seed)
        if telling := [row for row in rows if data.ordered(row)]:  # ties were paid for in vain
            self._train(policy, arm, telling, out)
        prompts = data.read_prompts(shared / HELD_OUT)
        draw = Draw(n=self.measured, settings=self.drawing, seed=10_000 + arm.seed)
        drawn = draw(policy, encoder(policy.tokenizer).prompts(prompts))
        answered = [
            with_answers(prompt, answers) for prompt, answers in zip(prompts, drawn, strict=True)
        ]
        scored = score(answered, self._label())
        return {row.id: sum(row.scores or ()) / len(row.responses) for row in scored}

    def _train(self, policy: Policy, arm: Arm, rows: Sequence[Comparison], out: Path) -> None:
        """Train in place; of the run only metrics.jsonl is left."""
        objective: Any = parse(arm.objective, (*ALL, *PARTS))
        handling = Handling(overlong=data.Overlong.drop, empty=data.Empty.drop)
        ready = prepare(rows, policy, objective, handling)
        training = Training(
            policy=policy,
            objective=objective,
            settings=self._loop(arm),
            accelerator=accelerator_for((), out, "no"),
            out=out,
        )
        training(ready.rows)
        for name in ("policy", "checkpoint"):
            shutil.rmtree(out / name, ignore_errors=True)

    def _label(self) -> Any:
        return load_reward(self.reward)

    def _loop(self, arm: Arm) -> TrainSettings:
        steps = self.loop.epochs * -(-self.pool // self.loop.batch_size)
        return replace(
            self.loop,
            lr=dict(self.rates).get(arm.objective, self.loop.lr),
            seed=arm.seed,
            max_steps=steps if arm.equal == "steps" else 0,
            epochs=10**6 if arm.equal == "steps" else self.loop.epochs,
            log_displacement=False,
            save_every=10**6,
        )

    def _parts(self, seed: int) -> tuple[list[Comparison], list[Comparison], list[Comparison]]:
        prompts = data.read_prompts(self.prompts)
        needed = self.pool + self.warm + self.held_out
        if len(prompts) < needed:
            raise UserError(
                f"{self.prompts}: {len(prompts)} prompts, and the experiment needs {needed} "
                f"({self.pool} to choose from, {self.warm} for reward models, {self.held_out} held "
                "out). Give more prompts, or smaller parts"
            )
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        drawn = [prompts[place] for place in order[:needed]]
        cut = self.pool + self.warm
        return drawn[: self.pool], drawn[self.pool : cut], drawn[cut:]


@dataclass(frozen=True, kw_only=True)
class HeadLearner:
    """Labels of people train a reward head; its quality is its accuracy on held-out judgements.

    The warm rows are labels that exist already: rewards for the rules are trained on them, and
    every arm learns from them besides its own.

    Attributes:
        votes: file of judged rows; each seed divides its prompts anew.
        encoder: sentence encoder under the heads.
        rewards: what rules read.
        features: what the learned head reads.
        l2: pull of its weights to 0.
        warm: judged rows that exist already.
        pool: most rows to choose from, 0 for all.
        held_out_share: of the prompts.
    """

    votes: Path
    encoder: str
    rewards: Rewards
    features: tuple[str, ...] = ("response", "product")
    l2: float = 3e-3
    warm: int = 100
    pool: int = 0
    held_out_share: float = 0.25
    quality: str = "accuracy on held-out judgements"

    def prepare(self, folder: Path, seed: int) -> None:
        """The rows of the seed, in three parts, and the scores that rules read."""
        if (folder / "done").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        rows = judged(data.read(self.votes), data.with_ranks)
        train, held_out = data.split(rows, self.held_out_share, seed)
        if len(train) <= self.warm:
            raise UserError(
                f"{self.votes}: {len(train)} judged rows to train on, of which {self.warm} are "
                "warm; give more rows, or take fewer warm ones"
            )
        rng = torch.Generator().manual_seed(seed)
        drawn = [train[place] for place in torch.randperm(len(train), generator=rng).tolist()]
        most = self.warm + self.pool if self.pool else None
        parts = {HELD_OUT: held_out, WARM: drawn[: self.warm], POOL: drawn[self.warm : most]}
        _share(parts, self.rewards, folder, seed)

    def learn(
        self, arm: Arm, rows: Sequence[Comparison], shared: Path, out: Path
    ) -> Mapping[str, float]:
        """Fit a head to the warm rows and `rows`; mean credit on each held-out prompt."""
        loss = parse(arm.objective, (BradleyTerry,))
        backbone = EncoderBackbone(
            encoder=load_encoder(self.encoder, device="cpu"), loss=loss, features=self.features
        )
        known = [*data.read(shared / WARM), *rows]
        head, _ = backbone.fit(Rows(backbone, known), self.l2, arm.seed)
        reward = EncoderMembers(backbone.encoder, self.features, (head,))
        held_out = data.read(shared / HELD_OUT)
        told = reward([row.prompt for row in held_out], [row.responses for row in held_out])
        credit = pairs_of(held_out, told)
        found: dict[str, list[float]] = {}
        for place, value in zip(credit.row.tolist(), credit.credit.tolist(), strict=True):
            found.setdefault(prompt_key(held_out[place].prompt), []).append(value)
        return {key: sum(values) / len(values) for key, values in found.items()}


def _share(
    parts: Mapping[str, Sequence[Comparison]], rewards: Rewards, folder: Path, seed: int
) -> None:
    """Write the parts of a seed and the scores that rules read; then the seed is done."""
    for name, rows in parts.items():
        data.write(folder / name, rows)
    write_scored(data.read(folder / POOL), data.read(folder / WARM), rewards, folder, seed)
    (folder / "done").touch()
