"""E4: one policy for several types: the min-max game, its closed form, and what it cannot reach."""

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.optimize import linprog
from torch import Tensor

from prefloop.aggregate import (
    evaluate_weights,
    geometric,
    min_max_regret,
    mixture,
    multiplicative_weights,
    regret_matrix,
    sampled_regret,
    two_type_weights,
)
from prefloop.reproduce.claims import Claim, Reproduction, Table, at_least, at_most, near
from prefloop.reproduce.drawing import COLORS, panels
from prefloop.tabular import random_logp

SOURCE = "spec E4"


def aggregation(seed: int) -> Reproduction:
    """Regret, the game by three ways, importance, and the restrictiveness of mixtures."""
    games, table = game_claims(seed)
    importance, importance_table, figure = importance_claims()
    claims = (*regret_claims(seed), *games, *importance, *restrictive_claims())
    figures = {"mixture-importance": figure}
    return Reproduction(
        name="mixture", claims=claims, figures=figures, tables=(table, importance_table)
    )


def random_types(
    types: int, responses: int, rng: torch.Generator, beta: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(reward, reference, policies) of types whose policies are optimal for their rewards."""
    reference = random_logp((responses,), rng)
    reward = 2 * torch.randn((types, responses), generator=rng, dtype=torch.float64)
    return reward, reference, (reference + reward / beta).log_softmax(-1)


def regret_claims(seed: int) -> list[Claim]:
    """Implicit regret is true regret; it can be sampled, with an honest standard error."""
    rng = torch.Generator().manual_seed(seed)
    off, negative = 0.0, 0
    for beta in (0.3, 1.0, 3.0):
        for _ in range(20):
            reward, reference, policies = random_types(4, 10, rng, beta)
            value = reward @ policies.exp().mT
            true = value.diagonal().unsqueeze(-1) - value
            found = regret_matrix(policies, reference, beta)
            off = max(off, float((found - true).abs().max()))
            negative += int((found < -1e-9).sum())
    _, reference, policies = random_types(3, 8, rng)
    exact = regret_matrix(policies, reference, 1.0)
    scores = []
    for _ in range(200):
        answers = torch.multinomial(policies.exp(), 128, replacement=True, generator=rng)
        ratio = (policies - reference)[:, answers].transpose(0, 1).unsqueeze(-1)
        estimate = sampled_regret(ratio, 1.0)
        apart = ~torch.eye(3, dtype=torch.bool)
        scores.append(((estimate.matrix - exact) / estimate.standard_error)[apart])
    spread = float(torch.stack(scores).square().mean().sqrt())
    return [
        at_most("implicit regret against regret in true reward", off, 1e-12, SOURCE, "code"),
        at_least(
            "negative entries among 960: why there is a row of zeros", negative, 1, SOURCE, "code"
        ),
        near(
            "128 sampled answers: error over standard error (RMS)",
            spread,
            1.0,
            0.15,
            SOURCE,
            "derived",
        ),
    ]


def game_claims(seed: int) -> tuple[list[Claim], Table]:
    """Linear program and optimistic multiplicative weights on random games."""
    rng = torch.Generator().manual_seed(seed)
    rows, apart, gap, beaten, closed = [], 0.0, 0.0, -np.inf, 0.0
    regret = torch.zeros(2, 2, dtype=torch.float64)
    for types in (2, 2, 3, 3, 4, 4):
        _, reference, policies = random_types(types, 10, rng)
        regret = regret_matrix(policies, reference, 1.0)
        exact, near_it = min_max_regret(regret), multiplicative_weights(regret, steps=5000)
        uniform = evaluate_weights(regret, torch.full((types,), 1 / types, dtype=torch.float64))
        skew = torch.tensor([0.8] + [0.2 / (types - 1)] * (types - 1), dtype=torch.float64)
        skewed = evaluate_weights(regret, skew)
        apart, gap = max(apart, abs(near_it.worst - exact.worst)), max(gap, exact.gap)
        beaten = max(beaten, exact.worst - min(uniform, skewed))
        if types == 2 and float(regret[0, 1]) > 0 and float(regret[1, 0]) > 0:
            _, value = two_type_weights(float(regret[0, 1]), float(regret[1, 0]))
            closed = max(closed, abs(value - exact.worst))
        rows.append((types, exact.worst, near_it.worst, uniform, skewed))
    columns = ("types", "program", "multiplicative weights", "uniform", "(.8, rest)")
    table = Table(
        title="Largest regret of a type under each mixture", columns=columns, rows=tuple(rows)
    )
    return [
        at_most("program: duality gap", gap, 1e-9, SOURCE, "derived"),
        at_most(
            "multiplicative weights (T = 5,000) off the program", apart, 5e-3, SOURCE, "derived"
        ),
        at_most(
            "program less the better of uniform and skewed weights", beaten, 1e-9, SOURCE, "derived"
        ),
        at_most("two types: closed form against the program", closed, 1e-9, SOURCE, "derived"),
        _authors_setting(regret),
    ], table


def _authors_setting(regret: Float[Tensor, "K K"]) -> Claim:
    """T = 100,000 steps of 5 / sqrt(T), as in the code: close to the program, never below it."""
    exact, slow = min_max_regret(regret), multiplicative_weights(regret, steps=100_000)
    name = "the authors' 100,000 steps: value above the program's"
    return at_most(name, slow.worst - exact.worst, 1.5e-3, SOURCE, "code")


def importance_claims() -> tuple[list[Claim], Table, Figure]:
    """E4: a symmetric game, one type counted 1, 2, 4, 8 times."""
    regret = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    counts = (1.0, 2.0, 4.0, 8.0)
    rows, off = [], 0.0
    for count in counts:
        weight = torch.tensor([count, 1.0], dtype=torch.float64)
        found = min_max_regret(regret, weight)
        closed, value = two_type_weights(1.0, 1.0, (count, 1.0))
        off = max(off, abs(float(found.weights[0]) - closed[0]), abs(found.worst - value))
        rows.append((count, float(found.weights[0]), closed[0], found.worst))
    figure, (ax,) = panels(["Weight of the policy of the type that counts c times"])
    ax.plot(counts, [row[1] for row in rows], color=COLORS[0], marker="o", ms=3)
    ax.set(xlabel="c", ylabel="w_1")
    table = Table(
        title="Importance of type 1 in a symmetric game",
        columns=("c", "w_1", "closed form", "worst weighted regret"),
        rows=tuple(rows),
    )
    return (
        [
            at_most(
                "importance 1 to 8: closed form against the program", off, 1e-9, SOURCE, "derived"
            ),
            near("importance (4, 1): weight", rows[2][1], 0.8, 1e-9, SOURCE, "derived"),
            near("importance (8, 1): weight", rows[3][1], 8 / 9, 1e-9, SOURCE, "derived"),
        ],
        table,
        figure,
    )


def restrictive_claims() -> list[Claim]:
    """Two extreme types and one compromise: mixtures of the extremes never play it."""
    reward = torch.tensor([[3.0, 0, 0, 2, 0], [0, 3, 0, 2, 0]], dtype=torch.float64)
    reference = torch.full((5,), 0.2, dtype=torch.float64).log()
    policies = (reference + reward).log_softmax(-1)
    affine = min_max_regret(regret_matrix(policies, reference, 1.0))
    half = torch.full((2,), 0.5, dtype=torch.float64)
    pooled = geometric(policies, reference, half).log_softmax(-1)
    mixed = mixture(policies, affine.weights)
    free, value = unrestricted(reward, policies)
    compromise = float(free[3])
    return [
        near("best mixture: worst regret", affine.worst, 0.939, 5e-4, SOURCE, "derived"),
        near(
            "the same, from the mixture's own probabilities",
            _worst(reward, policies, mixed),
            0.939,
            5e-4,
            SOURCE,
            "derived",
        ),
        near(
            "geometric pool, halves",
            _worst(reward, policies, pooled),
            0.924,
            5e-4,
            SOURCE,
            "derived",
        ),
        near("any policy: worst regret", value, 0.462, 5e-4, SOURCE, "derived"),
        near("any policy: it plays the compromise", compromise, 1.0, 1e-9, SOURCE, "derived"),
    ]


def _worst(
    reward: Float[Tensor, "K Y"], policies: Float[Tensor, "K Y"], logp: Float[Tensor, " Y"]
) -> float:
    own = (reward * policies.exp()).sum(-1)
    return float((own - reward @ logp.exp()).max())


def unrestricted(
    reward: Float[Tensor, "K Y"], policies: Float[Tensor, "K Y"]
) -> tuple[Float[Tensor, " Y"], float]:
    """The policy of least worst regret among all policies, by linear programming."""
    own = (reward * policies.exp()).sum(-1).numpy()
    types, responses = reward.shape
    solved = linprog(
        c=np.append(np.zeros(responses), 1.0),
        A_ub=np.hstack([-reward.numpy(), -np.ones((types, 1))]),
        b_ub=-own,
        A_eq=np.append(np.ones(responses), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * responses + [(None, None)],
        method="highs",
    )
    assert solved.status == 0, solved.message
    return torch.from_numpy(solved.x[:responses]), float(solved.x[-1])
