"""Rounds of EM on disk: killed anywhere, they go on and end in the same numbers.

FOLDER/rounds.jsonl             a line a round: log-likelihood, shares, what died
FOLDER/responsibilities.jsonl   a line an annotator, after the last round so far
FOLDER/round-1/type-1/          metrics.jsonl, loglik.safetensors, weights.safetensors

A round whose log-likelihoods are on disk is not done again: replaying the E-steps from them gives
the very responsibilities of the run that was killed.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefloop import em
from prefloop.mixture.steps import Steps
from prefloop.mixture.votes import Votes
from prefloop.runs import write_jsonl
from prefloop.types import UserError

NEGLIGIBLE = 1e-3
"""A judgement is not trained on by a type that its annotator is of with less probability."""

DEAD = 0.5
"""A type with fewer expected annotators than this has died."""

WEIGHTS = "weights.safetensors"
LOGLIK = "loglik.safetensors"
ROUNDS = "rounds.jsonl"
RESPONSIBILITIES = "responsibilities.jsonl"


ASSIGN = {"soft": em.soft, "hard": em.hard}


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How EM is run.

    Attributes:
        types: K, how many types of annotators.
        rounds: M- and E-steps; the authors' code takes 5.
        warm: train each type on from the round before; otherwise from the policy of the start, as
            the authors' code does.
        assign: "soft" trains every type on everybody as far as they are of it; "hard" on those
            who are likeliest of it, as MaxMin-RLHF does.
        crossfit: train on half of each annotator's judgements and score the other half, the halves
            swapped each round, so that votes that were trained on do not freeze a random start.
        seed: of the halves, and of a random start.
    """

    types: int = 2
    rounds: int = 5
    warm: bool = False
    assign: Literal["soft", "hard"] = "soft"
    crossfit: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("types", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A finished run of EM.

    Attributes:
        history: every round.
        folder: where it is on disk.
        scored: judgements that the last E-step scored; half of them under cross-fitting.
    """

    history: tuple[em.Round, ...]
    folder: Path
    scored: int

    @property
    def gamma(self) -> Float[Tensor, "I K"]:
        """Responsibilities after the last round."""
        return self.history[-1].belief.responsibilities

    @property
    def shares(self) -> Float[Tensor, " K"]:
        """eta_k, share of each type among the annotators, after the last round."""
        return em.type_shares(self.gamma)

    @property
    def loglik(self) -> float:
        """Log-likelihood of the judgements that the last E-step scored, in nats."""
        return float(self.history[-1].belief.evidence.sum())

    @property
    def dead(self) -> list[int]:
        """Types with next to no annotator, counted from 1."""
        return dead_types(self.gamma)

    def weights(self, number: int) -> Path:
        """File of the weights of type `number`, counted from 1."""
        return self.folder / f"round-{len(self.history)}" / f"type-{number}" / WEIGHTS


def run_em(
    steps: Steps,
    votes: Votes,
    mixture: Mixture,
    start: Float[Tensor, "I K"],
    folder: Path,
    on_round: Callable[[em.Round], None] = lambda done: None,
) -> Fitted:
    """Run EM from responsibilities `start`, or go on with what `folder` holds of it.

    Args:
        steps: trains a type and scores votes.
        votes: the judgements.
        mixture: how.
        folder: of this run of EM.
        on_round: called after each round.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = _Work(steps, votes, mixture, folder)
    history: list[em.Round] = []
    for done in em.rounds(work.fit, start, mixture.rounds, ASSIGN[mixture.assign]):
        history.append(done)
        _write(folder, votes, history, work.scored_count())
        on_round(done)
    return Fitted(history=tuple(history), folder=folder, scored=work.scored_count())


@dataclass(frozen=True)
class _Work:
    """What a round needs to know."""

    steps: Steps
    votes: Votes
    mixture: Mixture
    folder: Path

    def fit(self, gamma: Tensor, number: int) -> Tensor:
        """M-step of round `number` (the first is 0), and the log-likelihoods (I, K) it gives."""
        trained, scored = self._parts(number)
        here = self.folder / f"round-{number + 1}"
        before = self.folder / f"round-{number}"
        columns = []
        for index in range(self.mixture.types):
            belonging = gamma[self.votes.annotator, index]
            weight = torch.where(trained & (belonging > NEGLIGIBLE), belonging, 0.0)
            name = f"type-{index + 1}"
            start = before / name / WEIGHTS if self.mixture.warm and number else None
            columns.append(self._type(weight, scored, here / name, start))
        for old in before.glob(f"type-*/{WEIGHTS}"):
            old.unlink()  # nobody reads them any more
        return em.by_annotator(
            torch.stack(columns, -1), self.votes.annotator, len(self.votes.names)
        )

    def scored_count(self) -> int:
        """How many judgements the last E-step scores."""
        return int(self._parts(self.mixture.rounds - 1)[1].sum())

    def _parts(self, number: int) -> tuple[Bool[Tensor, " J"], Bool[Tensor, " J"]]:
        """Which judgements a round trains on, and which it scores."""
        annotator = self.votes.annotator
        if not self.mixture.crossfit:
            everything = torch.ones(len(annotator), dtype=torch.bool)
            return everything, everything
        half = em.halves(annotator, self.mixture.seed)
        return (half, ~half) if number % 2 == 0 else (~half, half)

    def _type(
        self, weight: Tensor, scored: Tensor, here: Path, start: Path | None
    ) -> Float[Tensor, " J"]:
        """Log-likelihood of each judgement under one type, 0 where it is not scored."""
        done = here / LOGLIK
        if not done.exists():
            here.mkdir(parents=True, exist_ok=True)
            found = torch.zeros(len(weight), dtype=torch.float64)
            if start is None:
                self.steps.put(self.steps.origin)
            else:
                self.steps.put_file(start)
            rows = self.votes.weighted(weight)
            if rows:  # a dead type stays where it starts
                self.steps.train(rows, here)
            self.steps.save(here / WEIGHTS)
            places = scored.nonzero().flatten().tolist()
            if places:
                found[scored] = self.steps.loglik([self.votes.rows[place] for place in places])
            part = done.with_suffix(".part")
            save_file({"loglik": found}, part)
            part.replace(done)
            shutil.rmtree(here / "checkpoint", ignore_errors=True)
        return load_file(done)["loglik"]


def dead_types(gamma: Float[Tensor, "I K"]) -> list[int]:
    """Types with fewer than `DEAD` expected annotators, counted from 1."""
    return ((gamma.sum(0) < DEAD).nonzero().flatten() + 1).tolist()


def write_responsibilities(path: Path, names: Sequence[str], gamma: Float[Tensor, "I K"]) -> None:
    """A line an annotator: {"annotator", "gamma"}."""
    rows = zip(names, gamma.tolist(), strict=True)
    write_jsonl(path, ({"annotator": name, "gamma": row} for name, row in rows))


def _write(folder: Path, votes: Votes, history: list[em.Round], scored: int) -> None:
    write_responsibilities(
        folder / RESPONSIBILITIES, votes.names, history[-1].belief.responsibilities
    )
    write_jsonl(folder / ROUNDS, (_line(done, scored) for done in history))


def _line(done: em.Round, scored: int) -> dict[str, Any]:
    gamma = done.belief.responsibilities
    shares = em.type_shares(gamma)
    loglik = float(done.belief.evidence.sum())
    return {
        "round": done.number + 1,
        "loglik": loglik,
        "loglik_per_judgement": loglik / max(1, scored),
        "prior": done.shares.tolist(),
        "shares": shares.tolist(),
        "effective_types": float(em.effective_types(shares)),
        "certain": float((gamma.max(-1).values > 0.9).double().mean()),
        "dead": dead_types(gamma),
    }
