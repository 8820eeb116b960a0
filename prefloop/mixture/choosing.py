"""How many types are there? Likelihood of held-out judgements, and BIC beside it.

Each annotator's judgements are dealt into folds; a fold is held out, EM runs on the rest, and the
held-out judgements of annotator i are predicted from the others:

    score_i = log sum_k gamma_ik(others) p_k(held-out judgements of i)

An annotator without others gets the shares of the types: for a new person.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop import em
from prefloop.mixture.rounds import WEIGHTS, Fitted, run_em
from prefloop.mixture.steps import Steps
from prefloop.mixture.training import MixtureTraining
from prefloop.mixture.votes import Votes
from prefloop.runs import read_json, write_json
from prefloop.types import Tokenized, UserError


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """How well K types do.

    Attributes:
        types: K.
        held_out: log-likelihood of a held-out judgement, mean over all, in nats; -log 2 is a coin
            on pairs.
        error: its standard error, over annotators.
        bic: Bayesian information criterion of the trained judgements, summed over folds; lower is
            better. It counts every trained weight, so with adapters larger than the data it favours
            one type; the choice does not read it.
    """

    types: int
    held_out: float
    error: float
    bic: float


def choose_types(
    training: MixtureTraining,
    rows: Sequence[Tokenized],
    folds: int,
    say: Callable[[str], None] = lambda line: None,
) -> MixtureTraining:
    """`training` with the number of types, up to its own, that predicts held-out votes best.

    Writes `out`/types.json. Of two numbers within one standard error of the best the smaller one
    is taken.
    """
    votes = Votes.of(rows)
    dealt = deal(votes, folds, training.mixture.seed)
    steps = training.steps(votes)
    candidates = []
    for types in range(1, training.mixture.types + 1):
        found = _candidate(training, steps, votes, dealt, types)
        candidates.append(found)
        say(
            f"{types} types: {found.held_out:.4f} nats a held-out judgement "
            f"(error {found.error:.4f}), BIC {found.bic:.0f}"
        )
    steps.put(steps.origin)
    best = max(candidates, key=lambda one: one.held_out)
    enough = next(one for one in candidates if one.held_out >= best.held_out - best.error)
    chosen = {"chosen": enough.types, "candidates": [vars(one) for one in candidates]}
    steps.worker.led(lambda: write_json(training.out / "types.json", chosen))
    return replace(training, mixture=replace(training.mixture, types=enough.types))


def deal(votes: Votes, folds: int, seed: int) -> Tensor:
    """The fold (J,) of each judgement: each annotator's are dealt out in turn, in random order."""
    if not 2 <= folds <= len(votes.rows):
        raise UserError(
            f"--folds must be 2 to {len(votes.rows)}, the number of judgements, got {folds}"
        )
    rng = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(votes.rows), generator=rng)
    order = shuffled[votes.annotator[shuffled].argsort(stable=True)]
    fold = torch.empty(len(votes.rows), dtype=torch.long)
    fold[order] = torch.arange(len(votes.rows)) % folds
    return fold


def _candidate(
    training: MixtureTraining, steps: Steps, votes: Votes, dealt: Tensor, types: int
) -> Candidate:
    """Train `types` types on all folds but one, in turn, and score that one."""
    total, bic = torch.zeros(len(votes.names), dtype=torch.float64), 0.0
    mixture = replace(training.mixture, types=types)
    trained = sum(value.numel() for value in steps.weights().values())
    for fold in range(int(dealt.max()) + 1):
        known, held_out = votes.where(dealt != fold), votes.where(dealt == fold)
        folder = training.out / "types" / f"{types}-fold-{fold + 1}"
        done = folder / "held_out.json"
        if not steps.worker.led(done.exists):
            start = training.start(known, types, mixture.seed, training.features)
            fitted = run_em(steps, known, mixture, start, folder)
            predicted = fitted.gamma.log() + type_logliks(steps, fitted, held_out)
            steps.worker.led(partial(_keep, done, predicted.logsumexp(-1), fitted))
        if steps.worker.leads:  # also where a run was killed before it came to this
            for weights in folder.rglob(WEIGHTS):
                weights.unlink()
        found = read_json(done)
        total += torch.tensor(found["predicted"], dtype=torch.float64)
        parameters = types * trained + types - 1
        bic += parameters * log(found["scored"]) - 2 * found["loglik"]
    per_judgement = len(votes.names) / len(votes.rows)
    error = total.std() * per_judgement / len(votes.names) ** 0.5
    return Candidate(
        types=types,
        held_out=float(total.sum()) / len(votes.rows),
        error=float(error),
        bic=bic,
    )


def _keep(done: Path, predicted: Tensor, fitted: Fitted) -> None:
    """Write what is read of a fold."""
    scored = {"loglik": fitted.loglik, "scored": fitted.scored}
    write_json(done, {"predicted": predicted.tolist(), **scored})


def type_logliks(steps: Steps, fitted: Fitted, votes: Votes) -> Float[Tensor, "I K"]:
    """Log-likelihood of each annotator's judgements under each type's policy."""
    columns = []
    for number in range(1, fitted.gamma.shape[-1] + 1):
        steps.put_file(fitted.weights(number))
        columns.append(steps.loglik(votes.rows))
    return em.by_annotator(torch.stack(columns, -1), votes.annotator, len(votes.names))
