"""Who loses how much by whose answers: the regret matrix of a mixture, and weights from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.aggregate import (
    Aggregation,
    MaxMin,
    Regret,
    max_min_reward,
    min_max_regret,
    multiplicative_weights,
    sampled_regret,
)
from prefloop.aggregating.loading import Types
from prefloop.evaluation import gini
from prefloop.policies import Sampling
from prefloop.policies.sampling import Sample, sample
from prefloop.types import Tokenized, UserError

STEPS = 20_000
"""Updates of multiplicative weights; the authors take 100,000."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Answers of every type to the same prompts, and what every type thinks of them.

    Attributes:
        answers: [type][prompt][sample].
        log_ratio: log pi_u(y|x) / pi_ref(y|x), in nats, at [answering type, type u, prompt,
            sample].
    """

    answers: list[list[list[Sample]]]
    log_ratio: Float[Tensor, "K K X S"]


def answer(
    types: Types, prompts: Sequence[Sequence[int]], n: int, settings: Sampling, seed: int
) -> Answered:
    """`n` answers of each type to each prompt, teacher-forced under all types and the reference.

    All types draw with the same random numbers: equal policies give equal answers, and regret 0.
    The regret is that of the policies themselves only at temperature 1 without top-k or top-p.
    """
    answers = [
        types.worker.mapped(
            partial(sample, types.use(index), n=n, settings=settings, seed=seed), prompts
        )
        for index in range(len(types))
    ]
    tokens = [[[one.tokens for one in drawn] for drawn in asked] for asked in answers]
    return Answered(answers=answers, log_ratio=judged(types, prompts, tokens))


def judged(
    types: Types,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[tuple[int, ...]]]],
) -> Float[Tensor, "F K X S"]:
    """log pi_u(y|x) / pi_ref(y|x) of answers [who][prompt][sample], equally many by everybody."""
    rows = [
        Tokenized(
            prompt=tuple(prompt),
            responses=tuple(one for drawn in answers for one in drawn[place]),
            place=f"prompt {place + 1}",
        )
        for place, prompt in enumerate(prompts)
    ]
    logps = types.logps(rows)  # (1 + K, X, F * S)
    ratio = (logps[1:] - logps[0]).unflatten(-1, (len(answers), len(answers[0][0])))
    return ratio.permute(2, 0, 1, 3)  # from (u, X, F, S)


@dataclass(frozen=True, kw_only=True)
class Solved:
    """The regret matrix and the weights of mixtures that follow from it.

    Attributes:
        regret: with standard errors.
        importance: c_u, how much a unit of each type's regret counts.
        min_max: by linear programming, with its certificate.
        multiplicative: the same game by the authors' algorithm.
        max_min: the mixture that gives most reward to the type that gets least, as MaxMin-RLHF
            aims at.
        shares: of each type among the annotators.
    """

    regret: Regret
    importance: Float[Tensor, " K"]
    min_max: Aggregation
    multiplicative: Aggregation
    max_min: MaxMin
    shares: Float[Tensor, " K"]

    def weights(self) -> dict[str, Tensor]:
        """Name of a mixture -> how often each type's policy answers."""
        types = len(self.shares)
        uniform = torch.full((types,), 1 / types, dtype=torch.float64)
        named = {
            "min-max": self.min_max.weights,
            "max-min": self.max_min.weights,
            "population": self.shares,
            "uniform": uniform,
        }
        for index in range(types):
            named[f"type {index + 1}"] = torch.eye(types, dtype=torch.float64)[index]
        return named

    def as_json(self) -> dict[str, Any]:
        """What regret.json says."""
        return {
            "matrix": self.regret.matrix.tolist(),
            "standard_error": self.regret.standard_error.tolist(),
            "importance": self.importance.tolist(),
            "shares": self.shares.tolist(),
            "min_max": _aggregation(self.min_max),
            "multiplicative_weights": _aggregation(self.multiplicative),
            "max_min": {
                "weights": self.max_min.weights.tolist(),
                "least": self.max_min.least,
                "bound": self.max_min.bound,
            },
            "mixtures": {
                name: {"weights": weights.tolist(), **self.loss(weights)}
                for name, weights in self.weights().items()
            },
        }

    def loss(self, weights: Float[Tensor, " K"]) -> dict[str, Any]:
        """Regret of each type under a mixture, the worst, the mean over annotators, and Gini."""
        regret = self.regret.matrix @ weights
        error = (self.regret.standard_error.square() @ weights.square()).sqrt()
        return {
            "regret": regret.tolist(),
            "standard_error": error.tolist(),
            "worst": float((self.importance * regret).max().clamp(min=0)),
            "average": float(self.shares @ regret),
            "gini": gini(regret.clamp(min=0)),
        }


def solve(types: Types, answered: Answered, importance: Sequence[float]) -> Solved:
    """Regret, and the weights of the fairest mixture.

    Args:
        types: the policies.
        answered: their answers to X >= 2 prompts.
        importance: c_u > 0 of each type; empty is 1 for each.
    """
    if importance and len(importance) != len(types):
        raise UserError(
            f"--importance has {len(importance)} numbers for {len(types)} types; give one a type"
        )
    scale = torch.tensor(importance or [1.0] * len(types), dtype=torch.float64)
    regret = sampled_regret(answered.log_ratio, types.beta)
    value = types.beta * answered.log_ratio.double().mean((-1, -2)).mT  # (u, i)
    return Solved(
        regret=regret,
        importance=scale,
        min_max=min_max_regret(regret.matrix, scale),
        multiplicative=multiplicative_weights(regret.matrix, scale, STEPS),
        max_min=max_min_reward(value),
        shares=types.shares,
    )


def regret_section(
    solved: Solved, prompts: Sequence[str], answered: Answered, shown: int = 3
) -> dict[str, Any]:
    """The report's page: the matrix, the mixtures, answers of the types side by side."""
    count = len(solved.shares)
    names = [f"type {number}" for number in range(1, count + 1)]
    errors = solved.regret.standard_error.max()
    return {
        "title": "One policy for all types",
        "paragraphs": [
            "Regret is what a type loses in implicit reward when another type's policy answers. "
            f"The min-max mixture loses {solved.min_max.worst:.4g} at worst; no mixture loses less "
            f"than {solved.min_max.bound:.4g} (duality). Largest standard error of an entry: "
            f"{errors:.3g}."
        ],
        "tables": [
            {
                "title": "Mixtures",
                "columns": ["mixture", "weights", "worst regret", "mean regret"],
                "rows": [_row(name, found) for name, found in solved.as_json()["mixtures"].items()],
            }
        ],
        "heatmaps": [
            {
                "title": "Regret of a type (row) when a policy answers (column)",
                "rows": names,
                "columns": [f"policy {number}" for number in range(1, count + 1)],
                "values": solved.regret.matrix.tolist(),
            }
        ],
        "answers": [
            {
                "prompt": prompt,
                "texts": [
                    {"name": name, "text": answered.answers[index][place][0].text}
                    for index, name in enumerate(names)
                ],
            }
            for place, prompt in enumerate(prompts[:shown])
        ],
    }


def _row(name: str, found: Mapping[str, Any]) -> list[Any]:
    weights = ", ".join(f"{weight:.3f}" for weight in found["weights"])
    return [name, weights, found["worst"], found["average"]]


def _aggregation(found: Aggregation) -> dict[str, Any]:
    return {
        "weights": found.weights.tolist(),
        "worst": found.worst,
        "adversary": found.adversary.tolist(),
        "bound": found.bound,
        "gap": found.gap,
    }
