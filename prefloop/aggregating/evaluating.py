"""Every form of a mixture by annotator: votes ordered, win rate and regret, worst and average.

Votes are the annotators' own. Win rates and regrets are in implicit rewards of the types: an
annotator's is the mean over types by their responsibility, so they say how well a form serves the
types that were found, not the people themselves; held-out votes do that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.aggregating.forms import pooled_answers
from prefloop.aggregating.loading import Types, response_logps
from prefloop.aggregating.people import accuracy_by_annotator, accuracy_of, known_weights
from prefloop.aggregating.regret import judged
from prefloop.evaluation import gini, outcomes
from prefloop.intervals import Estimate, mean
from prefloop.mixture import Votes
from prefloop.policies import Policy, Sampling
from prefloop.policies.sampling import ON_POLICY, Sampler, sample
from prefloop.samplers import FromReference
from prefloop.shares import ALONE, Worker

Tokens = tuple[int, ...]

POOLED = ("min-max", "population")
"""Mixtures that are pooled too: a pool runs all types for every token, which takes time."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How answers are drawn: `n` a prompt by everybody, with `settings`, from `seed`."""

    n: int
    settings: Sampling
    seed: int


@dataclass(frozen=True, kw_only=True)
class Served:
    """How well each form serves each type, in the types' implicit rewards.

    Attributes:
        win_rate: form -> share of answers that beat the reference's under each type's reward.
        regret: form -> what each type loses against its own policy, in reward.
    """

    win_rate: dict[str, Float[Tensor, " K"]]
    regret: dict[str, Float[Tensor, " K"]]


def served(
    types: Types,
    mixtures: Mapping[str, Tensor],
    others: Mapping[str, Policy],
    prompts: Sequence[Sequence[int]],
    drawing: Drawing,
) -> Served:
    """Answers of the reference, of every type and of the geometric pools, judged by every type.

    A draw of one type a prompt is the mean over types of what each type's answers get. The pools
    of `POOLED` answer themselves, where types share a base and the mixture has more than one of
    them; so does each of `others`, a distilled policy for one.
    """
    pools = {
        f"{name}, geometric": weights
        for name, weights in mixtures.items()
        if name in POOLED and types.share_a_base and int((weights > 0).sum()) > 1
    }
    answers = [_reference_answers(types, prompts, drawing)]
    answers += [
        _answers(types.use(index), prompts, drawing, types.worker) for index in range(len(types))
    ]
    answers += [
        pooled_answers(types, prompts, weights, drawing.settings, drawing.n, drawing.seed)
        for weights in pools.values()
    ]
    answers += [_answers(policy, prompts, drawing, types.worker) for policy in others.values()]
    reward = types.beta * judged(types, prompts, answers).double()  # (F, u, X, S)
    base, own = reward[0], reward[1 : 1 + len(types)]
    wins = torch.stack(
        [
            torch.stack([outcomes(one[u], base[u]).mean() for u in range(len(types))])
            for one in reward
        ]
    )
    value = reward.mean((-1, -2))  # (F, u)
    loss = own.mean((-1, -2)).diagonal() - value
    win_rate = {name: weights @ wins[1 : 1 + len(types)] for name, weights in mixtures.items()}
    regret = {name: weights @ loss[1 : 1 + len(types)] for name, weights in mixtures.items()}
    for place, name in enumerate([*pools, *others], 1 + len(types)):
        win_rate[name], regret[name] = wins[place], loss[place]
    return Served(
        win_rate=win_rate | {"reference": wins[0]}, regret=regret | {"reference": loss[0]}
    )


def evaluate_by_annotator(
    types: Types,
    votes: Votes,
    mixtures: Mapping[str, Tensor],
    others: Mapping[str, Policy],
    drawing: Drawing,
) -> dict[str, Any]:
    """What `prefloop evaluate --by annotator` writes.

    Args:
        types: of the mixture.
        votes: held-out judgements; answers are drawn to their prompts.
        mixtures: name -> weights.
        others: name -> a policy that is no mixture.
        drawing: how answers are drawn.

    Returns:
        "forms": form -> {"accuracy", "win_rate", "regret"}, each with worst, average and Gini over
        annotators; "result": the rows that a report shows.
    """
    prompts = list(dict.fromkeys(row.prompt for row in votes.rows))
    found = served(types, mixtures, others, prompts, drawing)
    gamma = known_weights(types, votes)  # (I, K)
    accuracy = accuracy_by_annotator(types, votes, mixtures)
    for name, policy in others.items():
        own = response_logps(policy, votes.rows, worker=types.worker)
        accuracy[name] = accuracy_of(own - types.reference_logps(votes.rows), votes)
    forms: dict[str, dict[str, Any]] = {name: {"accuracy": one} for name, one in accuracy.items()}
    people = _personal(types, gamma, found)
    for name in {**found.win_rate, "personal": None}:
        one = forms.setdefault(name, {})
        rate, loss = people.get(name) or (gamma @ found.win_rate[name], gamma @ found.regret[name])
        one["win_rate"] = _spread(rate, votes.names, lowest=True)
        one["regret"] = _spread(loss, votes.names, lowest=False)
    return {"forms": forms, "annotators": len(votes.names), "result": _result(forms)}


def _personal(
    types: Types, gamma: Float[Tensor, "I K"], found: Served
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each annotator answered by their own mixture; "type k" rows hold what policy k does."""
    names = [f"type {number}" for number in range(1, len(types) + 1)]
    rates = torch.stack([found.win_rate[name] for name in names])  # (i, u)
    losses = torch.stack([found.regret[name] for name in names])
    return {
        "personal": (
            torch.einsum("ai,iu,au->a", gamma, rates, gamma),
            torch.einsum("ai,iu,au->a", gamma, losses, gamma),
        )
    }


def _spread(values: Float[Tensor, " I"], names: Sequence[str], *, lowest: bool) -> dict[str, Any]:
    place = int(values.argmin() if lowest else values.argmax())
    return {
        "worst": float(values[place]),
        "worst_group": names[place],
        "average": float(values.mean()),
        "gini": gini(values.clamp(min=0)),
        "groups": dict(zip(names, values.tolist(), strict=True)),
    }


def ranking_by_annotator(policy: Policy, votes: Votes, worker: Worker = ALONE) -> dict[str, Any]:
    """Accuracy by annotator of one policy, its reference, and its implicit reward."""
    trained = policy.logps(votes.rows, worker=worker).sum.double()
    base = policy.reference_logps(votes.rows, worker=worker).sum.double()
    scores = {"reference": base, "policy": trained, "implicit reward": trained - base}
    forms = {name: {"accuracy": accuracy_of(value, votes)} for name, value in scores.items()}
    return {"forms": forms, "annotators": len(votes.names), "result": _result(forms)}


def _result(forms: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of a report: the average over annotators with its interval, for each form."""
    units = {"accuracy": "share", "win_rate": "share", "regret": "reward"}
    said = {"accuracy": "accuracy", "win_rate": "win rate", "regret": "regret"}
    return [
        _averaged(one[kind]).row(f"{said[kind]}, {name}", unit)
        for kind, unit in units.items()
        for name, one in forms.items()
        if kind in one
    ]


def _averaged(found: Mapping[str, Any]) -> Estimate:
    values = [one["value"] if isinstance(one, Mapping) else one for one in found["groups"].values()]
    return mean(torch.tensor(values, dtype=torch.float64))


def _reference_answers(
    types: Types, prompts: Sequence[Sequence[int]], drawing: Drawing
) -> list[list[Tokens]]:
    sampler = FromReference() if types.share_a_base else ON_POLICY
    return _answers(types.reference, prompts, drawing, types.worker, sampler)


def _answers(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    drawing: Drawing,
    worker: Worker,
    sampler: Sampler = ON_POLICY,
) -> list[list[Tokens]]:
    drawn = worker.mapped(
        lambda asked: sample(policy, asked, drawing.n, drawing.settings, drawing.seed, sampler),
        prompts,
    )
    return [[one.tokens for one in asked] for asked in drawn]
