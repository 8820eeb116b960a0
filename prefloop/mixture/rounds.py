"""Rounds of EM on disk: killed anywhere, they go on and end in the same numbers.

FOLDER/rounds.jsonl             a line a round: log-likelihood, shares, what died
FOLDER/responsibilities.jsonl   a line an annotator, after the last round so far
FOLDER/round-1/type-1/          metrics.jsonl, loglik.safetensors, weights.safetensors
FOLDER/round-1/part-1/type-1/   the same where a round has parts, see `evidence`
FOLDER/final/type-1/            the last training on everything, where evidence was held out

A round whose log-likelihoods are on disk is not done again: replaying the E-steps from them gives
the very responsibilities of the run that was killed, also where E-steps average over rounds.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from prefloop import em
from prefloop.mixture.evidence import Evidence, Halves, Part, Trained
from prefloop.mixture.steps import Steps, write_tensors
from prefloop.mixture.votes import Votes
from prefloop.runs import write_jsonl
from prefloop.types import UserError

NEGLIGIBLE = 1e-3
"""A judgement is not trained on by a type that its annotator is of with less probability."""

DEAD = 0.5
"""A type with fewer expected annotators than this has died."""

WEIGHTS = "weights.safetensors"
LOGLIK = "loglik.safetensors"
FINAL = "final"
ROUNDS = "rounds.jsonl"
RESPONSIBILITIES = "responsibilities.jsonl"


PLAIN = Trained()
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
        evidence: which judgements a round trains on and which it scores.
        average: rounds whose log-likelihoods an E-step averages, see `em.averaged`; 1 reads the
            round that was just trained, as in the authors' code.
        seed: of the parts of the evidence, and of a random start.
    """

    types: int = 2
    rounds: int = 5
    warm: bool = False
    assign: Literal["soft", "hard"] = "soft"
    evidence: Evidence = PLAIN
    average: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("types", "rounds", "average"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warm and isinstance(self.evidence, Halves):
            raise UserError(
                "warm rounds go on from policies that were trained on the half that is scored now; "
                'leave --warm out, or hold annotators out: --evidence "HeldOut()"'
            )


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A finished run of EM.

    Attributes:
        history: every round.
        folder: where it is on disk.
        scored: judgements that the last E-step scored; half of them under `Halves`.
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
        final = self.folder / FINAL / f"type-{number}" / WEIGHTS
        if final.exists():
            return final
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
    leads = steps.worker.leads
    history: list[em.Round] = []
    fit = em.averaged(work.fit, mixture.average)
    for done in em.rounds(fit, start, mixture.rounds, ASSIGN[mixture.assign]):
        history.append(done)
        if leads:
            _write(folder, votes, history, work.scored[-1])
        on_round(done)
    if mixture.evidence.unseen:
        work.finish(ASSIGN[mixture.assign](history[-1].belief))
    return Fitted(history=tuple(history), folder=folder, scored=work.scored[-1])


@dataclass(frozen=True)
class _Work:
    """What a round needs to know, and how many judgements each round so far has scored."""

    steps: Steps
    votes: Votes
    mixture: Mixture
    folder: Path
    scored: list[int] = field(default_factory=list)

    def fit(self, gamma: Tensor, number: int) -> Tensor:
        """M-step of round `number` (the first is 0), and the log-likelihoods (I, K) it gives."""
        here, before = (self.folder / f"round-{one}" for one in (number + 1, number))
        parts = self.mixture.evidence(self.votes, number, self.mixture.seed)
        loglik = torch.zeros(len(self.votes.rows), self.mixture.types, dtype=torch.float64)
        for place, part in enumerate(parts, 1):
            name = f"part-{place}" if len(parts) > 1 else ""
            start = before / name if self.mixture.warm and number else None
            loglik += self._part(gamma, part, here / name, start)
        self._forget(before)
        self.scored.append(int(torch.stack([part.scored for part in parts]).any(0).sum()))
        return em.by_annotator(loglik, self.votes.annotator, len(self.votes.names))

    def finish(self, gamma: Float[Tensor, "I K"]) -> None:
        """Train every type on all judgements, once more."""
        nothing = torch.zeros(len(self.votes.rows), dtype=torch.bool)
        self._part(gamma, Part(~nothing, nothing), self.folder / FINAL, None)
        self._forget(self.folder / f"round-{self.mixture.rounds}")

    def _forget(self, folder: Path) -> None:
        """Delete weights that nobody reads any more."""
        if self.steps.worker.leads:
            for old in folder.rglob(WEIGHTS):
                old.unlink()

    def _part(
        self, gamma: Tensor, part: Part, here: Path, before: Path | None
    ) -> Float[Tensor, "J K"]:
        """Train every type on one part of the evidence; log-likelihoods of what it scores, else 0.

        Types start where they were in `before`, at the origin where that is None.
        """
        found = []
        for index in range(self.mixture.types):
            belonging = gamma[self.votes.annotator, index]
            weight = torch.where(part.trained & (belonging > NEGLIGIBLE), belonging, 0.0)
            name = f"type-{index + 1}"
            start = before / name / WEIGHTS if before else None
            found.append(self._type(weight, part.scored, here / name, start))
        return torch.stack(found, -1)

    def _type(
        self, weight: Tensor, scored: Tensor, here: Path, start: Path | None
    ) -> Float[Tensor, " J"]:
        """Log-likelihood of each judgement under one type, 0 where it is not scored."""
        done, worker = here / LOGLIK, self.steps.worker
        if not worker.led(done.exists):
            here.mkdir(parents=True, exist_ok=True)
            found = torch.zeros(len(weight), dtype=torch.float64)
            if start is None:
                self.steps.put(self.steps.origin)
            else:
                self.steps.put_file(start)
            rows = self.votes.weighted(weight)
            if rows:  # a dead type stays where it starts
                self.steps.train(rows, here)
            places = scored.nonzero().flatten().tolist()
            if places:
                found[scored] = self.steps.loglik([self.votes.rows[place] for place in places])
            if worker.leads:
                self.steps.save(here / WEIGHTS)
                write_tensors(done, {"loglik": found})
            worker.wait()
        if worker.leads:  # also where a run was killed before it came to this
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
