"""Rounds of EM on disk: killed anywhere, they go on and end in the same numbers.

FOLDER/rounds.jsonl             a line a round: log-likelihood, shares, scale, what died
FOLDER/responsibilities.jsonl   a line an annotator, after the last round so far
FOLDER/round-1/type-1/          metrics.jsonl, evidence.safetensors, weights.safetensors
FOLDER/round-1/part-1/type-1/   the same where a round has parts, see `evidence`
FOLDER/final/type-1/            the last training on everything, where evidence was held out

A round whose evidence is on disk is not done again: replaying the E-steps from it gives the very
responsibilities of the run that was killed.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefloop import em
from prefloop.logps.layout import table_shape
from prefloop.mixture.evidence import Evidence, Halves, Part, Trained
from prefloop.mixture.steps import Steps
from prefloop.mixture.votes import Votes
from prefloop.runs import write_jsonl
from prefloop.types import UserError

NEGLIGIBLE = 1e-3
"""A judgement is not trained on by a type that its annotator is of with less probability."""

DEAD = 0.5
"""A type with fewer expected annotators than this has died."""

WEIGHTS = "weights.safetensors"
SCORED = "evidence.safetensors"
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
        seed: of the parts of the evidence, and of a random start.
    """

    types: int = 2
    rounds: int = 5
    warm: bool = False
    assign: Literal["soft", "hard"] = "soft"
    evidence: Evidence = PLAIN
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("types", "rounds"):
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
        scale: of the rewards, in the last E-step.
    """

    history: tuple[em.Round, ...]
    folder: Path
    scored: int
    scale: float

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
    history: list[em.Round] = []
    for done in em.rounds(work.fit, start, mixture.rounds, ASSIGN[mixture.assign]):
        history.append(done)
        _write(folder, votes, history, work)
        on_round(done)
    if mixture.evidence.unseen:
        work.finish(ASSIGN[mixture.assign](history[-1].belief))
    scored, scale = work.scored[-1], work.scales[-1]
    return Fitted(history=tuple(history), folder=folder, scored=scored, scale=scale)


@dataclass(frozen=True)
class _Work:
    """What a round needs to know, and what is said of the rounds so far.

    Attributes:
        scored: judgements that each round scored.
        scales: of the rewards, in each E-step.
    """

    steps: Steps
    votes: Votes
    mixture: Mixture
    folder: Path
    scored: list[int] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)

    def fit(self, gamma: Tensor, number: int) -> Tensor:
        """M-step of round `number` (the first is 0), and the log-likelihoods (I, K) it gives."""
        here, before = (self.folder / f"round-{one}" for one in (number + 1, number))
        parts = self.mixture.evidence(self.votes, number, self.mixture.seed)
        ratio = torch.zeros(*table_shape(self.votes.rows)[:2], self.mixture.types).double()
        for place, part in enumerate(parts, 1):
            name = f"part-{place}" if len(parts) > 1 else ""
            start = before / name if self.mixture.warm and number else None
            ratio += torch.stack(self._part(gamma, part, here / name, start), -1)
        for old in before.rglob(WEIGHTS):
            old.unlink()  # nobody reads them any more
        scored = torch.stack([part.scored for part in parts]).any(0)
        return self._evidence(ratio, scored, em.type_shares(gamma))

    def finish(self, gamma: Float[Tensor, "I K"]) -> None:
        """Train every type on all judgements, once more."""
        nothing = torch.zeros(len(self.votes.rows), dtype=torch.bool)
        self._part(gamma, Part(~nothing, nothing), self.folder / FINAL, None)
        for old in (self.folder / f"round-{self.mixture.rounds}").rglob(WEIGHTS):
            old.unlink()

    def _evidence(
        self, ratio: Float[Tensor, "J N K"], scored: Bool[Tensor, " J"], shares: Tensor
    ) -> Float[Tensor, "I K"]:
        """Log-likelihood of each annotator's scored judgements, at the best scale where asked."""
        votes = self.votes.where(scored)
        table = ratio[scored].unbind(-1)

        def loglik(scale: float) -> Tensor:
            columns = [self.steps.likelihood(one, votes.rows, scale) for one in table]
            return em.by_annotator(torch.stack(columns, -1), votes.annotator, len(votes.names))

        scale = em.evidence_scale(loglik, shares) if self.mixture.evidence.scaled else 1.0
        self.scored.append(len(votes.rows))
        self.scales.append(scale)
        return loglik(scale)

    def _part(
        self, gamma: Tensor, part: Part, here: Path, before: Path | None
    ) -> list[Float[Tensor, "J N"]]:
        """Train every type on one part of the evidence; what each says of the scored judgements.

        Types start where they were in `before`, at the origin where that is None.
        """
        found = []
        for index in range(self.mixture.types):
            belonging = gamma[self.votes.annotator, index]
            weight = torch.where(part.trained & (belonging > NEGLIGIBLE), belonging, 0.0)
            name = f"type-{index + 1}"
            start = before / name / WEIGHTS if before else None
            found.append(self._type(weight, part.scored, here / name, start))
        return found

    def _type(
        self, weight: Tensor, scored: Tensor, here: Path, start: Path | None
    ) -> Float[Tensor, "J N"]:
        """Log ratio of each response under one type, 0 where the judgement is not scored."""
        done = here / SCORED
        if not done.exists():
            here.mkdir(parents=True, exist_ok=True)
            found = torch.zeros(table_shape(self.votes.rows)[:2], dtype=torch.float64)
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
                ratio = self.steps.log_ratio([self.votes.rows[place] for place in places])
                found[scored, : ratio.shape[-1]] = ratio
            part = done.with_suffix(".part")
            save_file({"log_ratio": found}, part)
            part.replace(done)
            shutil.rmtree(here / "checkpoint", ignore_errors=True)
        return load_file(done)["log_ratio"]


def dead_types(gamma: Float[Tensor, "I K"]) -> list[int]:
    """Types with fewer than `DEAD` expected annotators, counted from 1."""
    return ((gamma.sum(0) < DEAD).nonzero().flatten() + 1).tolist()


def write_responsibilities(path: Path, names: Sequence[str], gamma: Float[Tensor, "I K"]) -> None:
    """A line an annotator: {"annotator", "gamma"}."""
    rows = zip(names, gamma.tolist(), strict=True)
    write_jsonl(path, ({"annotator": name, "gamma": row} for name, row in rows))


def _write(folder: Path, votes: Votes, history: list[em.Round], work: _Work) -> None:
    write_responsibilities(
        folder / RESPONSIBILITIES, votes.names, history[-1].belief.responsibilities
    )
    rounds = zip(history, work.scored, work.scales, strict=True)
    write_jsonl(folder / ROUNDS, (_line(*one) for one in rounds))


def _line(done: em.Round, scored: int, scale: float) -> dict[str, Any]:
    gamma = done.belief.responsibilities
    shares = em.type_shares(gamma)
    loglik = float(done.belief.evidence.sum())
    return {
        "round": done.number + 1,
        "loglik": loglik,
        "loglik_per_judgement": loglik / max(1, scored),
        "scale": scale,
        "prior": done.shares.tolist(),
        "shares": shares.tolist(),
        "effective_types": float(em.effective_types(shares)),
        "certain": float((gamma.max(-1).values > 0.9).double().mean()),
        "dead": dead_types(gamma),
    }
