"""What the arms of one seed share: answers, what the labeller thinks, and rewards for the rules.

A rule never sees the labels that it asks for. It reads a reward: the labeller's own (`label`, as if
labels were free), a copy of it with noise, or reward models that were trained on other prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import inf
from pathlib import Path
from statistics import fmean, pstdev

import torch

from prefloop import data
from prefloop.data import where
from prefloop.expression import parse
from prefloop.reward_training import (
    BradleyTerry,
    CausalBackbone,
    EncoderBackbone,
    RewardTraining,
    judged,
)
from prefloop.reward_training.run import Backbone
from prefloop.rewards import Reward, load_trained, score
from prefloop.rewards.encoders import load_encoder
from prefloop.settings import TrainSettings
from prefloop.trainer.build import accelerator_for
from prefloop.types import Comparison, UserError

LABEL = "label"
NOISY = "noisy"
ENCODER = "encoder"
LENGTH = "length"
CAUSAL = "causal"
REWARDS = (LABEL, NOISY, ENCODER, LENGTH, CAUSAL)
"""Rewards that a rule may read: the labeller's; that with noise; heads on the sentence encoder;
a head on the length alone; a head on the policy's own model."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A reward that has been read off already: the scores of a file that `prefloop score` wrote.

    So a reward that is dear, such as a head on a language model, is trained and asked once for all
    seeds. It must not know the rows: train it on other prompts.

    Attributes:
        path: of the file; it has the rows of the experiment, by their ids.
        name: what the arms call it; "" is the name of the file's folder.
        noise: standard deviation of Gaussian noise that is added, in standard deviations of the
            scores over the pool: how a worse reward of the same kind would choose.
    """

    path: str
    name: str = ""
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise < inf:
            raise UserError(f"noise of {self.called}: must be 0 or more, got {self.noise}")

    @property
    def called(self) -> str:
        """What the arms call it."""
        return self.name or Path(self.path).resolve().parent.name

    def of(self, pool: Sequence[Comparison], seed: int) -> list[Comparison]:
        """The rows of the pool with the scores of the file; `seed` draws the noise."""
        wanted = {row.id: row for row in pool}
        found = {row.id: row for row in data.iterate(self.path) if row.id in wanted}
        told = [replace(row, scores=self._scores(row, found.get(row.id))) for row in pool]
        return _with_noise(told, self.noise, seed)

    def _scores(self, row: Comparison, told: Comparison | None) -> tuple[float, ...]:
        if told is None:
            raise UserError(
                f"{self.path}: has no row of the id {row.id!r}; score the file that the "
                "experiment reads"
            )
        if told.responses != row.responses or told.scores is None:
            lacks = "no scores" if told.scores is None else "other responses"
            raise UserError(
                f"{where(told)}: has {lacks} for {row.id!r}; score the file that the experiment "
                "reads, with: prefloop score --reward REWARD"
            )
        return told.scores


def rewards_named(texts: Sequence[str]) -> tuple[str | Scored, ...]:
    """Rewards as the command line gives them: one of `REWARDS`, or `Scored(path="...")`.

    Raises:
        UserError: a name that is none, or two rewards of one name.
    """
    found = tuple(parse(text, (Scored,)) if "(" in text else text for text in texts)
    if unknown := [one for one in found if isinstance(one, str) and one not in REWARDS]:
        raise UserError(
            f"rewards holds {unknown[0]!r}; it knows {', '.join(REWARDS)} and "
            'Scored(path="RUN/scored.jsonl", name="NAME")'
        )
    names = [called(one) for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two rewards are called {twice[0]!r}; give each its own name")
    return found


def called(reward: str | Scored) -> str:
    """What the arms call a reward."""
    return reward if isinstance(reward, str) else reward.called


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """How the rewards that rules read are made.

    Attributes:
        which: each one of `REWARDS`, or `Scored`.
        encoder: sentence encoder under the heads.
        model: causal model under the head `causal`.
        noise: standard deviation of the noise of `noisy`, in standard deviations of the label's
            scores over the pool.
        loop: how the head on a causal model is trained.
    """

    which: tuple[str | Scored, ...]
    encoder: str
    model: str
    noise: float
    loop: TrainSettings

    def __post_init__(self) -> None:
        if CAUSAL in self.which and not self.model:
            raise UserError("the reward causal needs a model; give --model, or leave it out")


def write_scored(
    pool: Sequence[Comparison], warm: Sequence[Comparison], rewards: Rewards, out: Path, seed: int
) -> None:
    """`out`/scored-NAME.jsonl: the pool with each reward as `scores`; no rank, no label.

    Args:
        pool: rows to choose from, with the labeller's `scores` where it has any.
        warm: judged rows on other prompts, that reward models are trained on.
        rewards: which, and how.
        out: folder of the seed.
        seed: of noise and training.
    """
    makers: Mapping[str, Callable[[], Reward]] = {
        ENCODER: lambda: _trained(_heads(rewards, ("response", "product")), warm, out / ENCODER),
        LENGTH: lambda: _trained(_heads(rewards, ("length",)), warm, out / LENGTH),
        CAUSAL: lambda: _trained(_causal(rewards, out), warm, out / CAUSAL),
    }
    for reward in rewards.which:
        file = out / f"scored-{called(reward)}.jsonl"
        if file.exists():
            continue
        if isinstance(reward, Scored):
            rows = reward.of(pool, seed)
        elif reward in (LABEL, NOISY):
            rows = _from_label(pool, rewards.noise if reward == NOISY else 0.0, seed)
        else:
            rows = score(pool, makers[reward]())
        data.write(file, (replace(row, rank=None, label=None, ensemble=None) for row in rows))


def _from_label(pool: Sequence[Comparison], noise: float, seed: int) -> list[Comparison]:
    if any(row.scores is None for row in pool):
        raise UserError(
            "the rewards label and noisy copy the labeller's scores, and these rows have ranks "
            "only; take encoder, length or causal"
        )
    return _with_noise(pool, noise, seed)


def _with_noise(rows: Sequence[Comparison], noise: float, seed: int) -> list[Comparison]:
    """The rows with Gaussian noise on their scores, in standard deviations of all of them."""
    spread = pstdev([value for row in rows for value in row.scores or ()])
    return [
        replace(
            row,
            scores=tuple(
                value + noise * spread * drawn
                for value, drawn in zip(row.scores or (), _normals(row, seed), strict=True)
            ),
        )
        for row in rows
    ]


def _normals(row: Comparison, seed: int) -> list[float]:
    told = blake2b(f"{seed}:{row.id}".encode(), digest_size=7).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(told, "big"))
    return torch.randn(len(row.responses), generator=rng, dtype=torch.float64).tolist()


def _trained(backbone: Backbone, warm: Sequence[Comparison], out: Path) -> Reward:
    rows = judged(warm, data.with_ranks)
    RewardTraining(backbone=backbone, members=1, seed=0, out=out)(rows, [])
    return load_trained(out / "reward")


def _heads(rewards: Rewards, features: tuple[str, ...]) -> EncoderBackbone:
    encoder = load_encoder(rewards.encoder, device="cpu")
    return EncoderBackbone(encoder=encoder, loss=BradleyTerry(), features=features)


def _causal(rewards: Rewards, out: Path) -> CausalBackbone:
    return CausalBackbone(
        model=rewards.model,
        adapter=None,
        loss=BradleyTerry(),
        settings=rewards.loop,
        accelerator=accelerator_for((), out, "no"),
    )


def agreement(pool: Sequence[Comparison], scored: Sequence[Comparison]) -> float:
    """Share of the labeller's ordered pairs on which the scores agree; a tie counts half."""
    credits = []
    for row, told in zip(pool, scored, strict=True):
        values = told.scores or ()
        for better, worse in data.ordered(row):
            credits.append(
                0.5 + 0.5 * ((values[better] > values[worse]) - (values[better] < values[worse]))
            )
    return fmean(credits)
