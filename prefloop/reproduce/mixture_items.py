"""Annotators of hidden types judge a few items: outcomes, data and exact EM, many problems at once.

Every likelihood is that of a package objective (DPO, BestOfN, PlackettLuce at beta 1): minus its
loss. A policy over n items is its implicit rewards, up to a constant; the reference is uniform.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefloop.em import Round, rounds
from prefloop.objectives import DPO, BestOfN, Objective, PlackettLuce
from prefloop.tabular import as_logps
from prefloop.types import Judgement, Logps

RIDGE = 1e-3
"""Quadratic penalty on the rewards: sum of squares times this, in the penalised likelihood."""


@dataclass(frozen=True)
class Kind:
    """One kind of question about n items, and all answers it can have.

    Attributes:
        objective: whose loss is minus the log-likelihood of an answer.
        responses: items of each of O outcomes, the best first.
        rank: their ranks.
        sets: which question each outcome answers; questions are asked equally often.
    """

    objective: Objective
    responses: Int[Tensor, "O N"]
    rank: Int[Tensor, "O N"]
    sets: Int[Tensor, " O"]


def pairs(items: int) -> Kind:
    """Which of two items is better."""
    answers = [
        (pair, order) for pair in combinations(range(items), 2) for order in permutations(pair)
    ]
    return _kind(DPO(beta=1.0), answers, (1, 2))


def best_of_three(items: int) -> Kind:
    """Which of three items is the best."""
    answers = [
        (triple, (best, *(item for item in triple if item != best)))
        for triple in combinations(range(items), 3)
        for best in triple
    ]
    return _kind(BestOfN(beta=1.0), answers, (1, 2, 2))


def rankings(items: int) -> Kind:
    """All three items in order."""
    answers = [
        (triple, order)
        for triple in combinations(range(items), 3)
        for order in permutations(triple)
    ]
    return _kind(PlackettLuce(beta=1.0), answers, (1, 2, 3))


KINDS = {"pairs": pairs, "best of three": best_of_three, "rankings": rankings}


def _kind(
    objective: Objective,
    answers: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    rank: tuple[int, ...],
) -> Kind:
    number = {
        question: place for place, question in enumerate(dict.fromkeys(q for q, _ in answers))
    }
    return Kind(
        objective=objective,
        responses=torch.tensor([order for _, order in answers]),
        rank=torch.tensor([rank] * len(answers)),
        sets=torch.tensor([number[question] for question, _ in answers]),
    )


def outcome_loglik(kind: Kind, reward: Float[Tensor, "*G Y"]) -> Float[Tensor, "*G O"]:
    """log-probability of each answer to its question under each policy."""
    token = reward[..., kind.responses]  # (*G, O, N)
    rows = token.flatten(0, -2) if token.dim() > 2 else token
    return -row_losses(kind, rows).reshape(token.shape[:-1])


def row_losses(kind: Kind, rows: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """The objective's loss of each row of rewards; rows are the outcomes, over and over."""
    rank = kind.rank.repeat(len(rows) // len(kind.rank), 1)
    judgement = Judgement(
        rank=rank,
        scores=torch.full(rank.shape, torch.nan),
        label=torch.full_like(rank, -1),
        weight=torch.ones(len(rank)),
    )
    uniform: Logps = as_logps(torch.zeros_like(rows))
    return kind.objective.per_comparison(as_logps(rows), uniform, judgement)


def ask(
    kind: Kind,
    reward: Float[Tensor, "K Y"],
    types: Int[Tensor, " I"],
    times: int,
    rng: torch.Generator,
) -> Float[Tensor, "I O"]:
    """How often each annotator gave each answer, over `times` random questions."""
    chance = outcome_loglik(kind, reward).exp()[types]  # each question's answers sum to 1
    drawn = torch.multinomial(chance, times, replacement=True, generator=rng)
    counts = torch.zeros_like(chance)
    return counts.scatter_add(-1, drawn, torch.ones_like(drawn, dtype=counts.dtype))


@dataclass(frozen=True)
class Fit:
    """What EM ended with, for problems (seeds, restarts).

    Attributes:
        reward: implicit rewards of the policy of each type.
        last: the last round.
        history: penalised log-likelihood after each round, first to last.
    """

    reward: Float[Tensor, "*G K Y"]
    last: Round
    history: Float[Tensor, "S ..."]


def fit_types(
    kind: Kind, counts: Float[Tensor, "*#G I O"], start: Float[Tensor, "*#G I K"], count: int
) -> Fit:
    """EM with exact M-steps: each policy minimises its weighted losses plus the ridge."""
    items = int(kind.responses.max()) + 1
    reward = counts.new_zeros((*start.shape[:-2], start.shape[-1], items))
    history = []

    def fit(gamma: Tensor, number: int) -> Tensor:
        nonlocal reward
        weight = gamma.mT @ counts  # (*G, K, O)

        def loss(policy: Tensor) -> Tensor:
            fitted = (weight * outcome_loglik(kind, policy)).sum(-1)
            return RIDGE * policy.square().sum(-1) - fitted

        reward = newton(loss, reward)
        return counts @ outcome_loglik(kind, reward).mT

    last = None
    for last in rounds(fit, start, count):
        penalty = RIDGE * reward.square().sum((-1, -2))
        history.append(last.belief.evidence.sum(-1) - penalty)
    assert last is not None
    return Fit(reward, last, torch.stack(history))


def best_restart(fit: Fit) -> Fit:
    """Of problems (seeds, restarts), each seed's restart of the highest likelihood."""
    best = fit.history[-1].argmax(-1)
    seed = torch.arange(len(best))
    belief = fit.last.belief
    chosen = type(belief)(belief.responsibilities[seed, best], belief.evidence[seed, best])
    last = Round(fit.last.number, fit.last.shares[seed, best], chosen)
    return Fit(fit.reward[seed, best], last, fit.history[:, seed, best])


def newton(
    loss: Callable[[Tensor], Tensor], start: Float[Tensor, "*G Y"], steps: int = 50
) -> Float[Tensor, "*G Y"]:
    """Minimisers of independent, strictly convex losses of a few parameters each.

    Newton's method with the step halved where it would not go down; it stops when no problem
    gains any more.
    """
    point = start
    for _ in range(steps):
        value, gradient, hessian = _second_order(loss, point)
        direction = -torch.linalg.solve(hessian, gradient.unsqueeze(-1)).squeeze(-1)
        point = _downhill(loss, point, value, direction)
        gain = -(gradient * direction).sum(-1) / 2
        if (gain <= 1e-13 * (1 + value.abs())).all():
            break
    return point


def _downhill(
    loss: Callable[[Tensor], Tensor], point: Tensor, value: Tensor, direction: Tensor
) -> Tensor:
    """The longest of the steps 1, 1/2, 1/4, ... that does not raise a loss; at last none."""
    length = torch.ones_like(value)
    for _ in range(30):
        moved = point + length.unsqueeze(-1) * direction
        worse = loss(moved) > value
        if not worse.any():
            return moved.detach()
        length = torch.where(worse, length / 2, length)
    moved = point + length.unsqueeze(-1) * direction
    return torch.where((loss(moved) > value).unsqueeze(-1), point, moved).detach()


def _second_order(loss: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    live = at.detach().requires_grad_()
    value = loss(live)
    (gradient,) = torch.autograd.grad(value.sum(), live, create_graph=True)
    columns = [
        torch.autograd.grad(gradient[..., place].sum(), live, retain_graph=True)[0]
        for place in range(at.shape[-1])
    ]
    return value.detach(), gradient.detach(), torch.stack(columns, -1)


def centered(reward: Float[Tensor, "*G Y"]) -> Float[Tensor, "*G Y"]:
    """Rewards with mean zero: what data can say of them."""
    return reward - reward.mean(-1, keepdim=True)


def reward_error(
    truth: Float[Tensor, "K Y"], found: Float[Tensor, "*G K Y"]
) -> Float[Tensor, "*G K Y"]:
    """|found - truth| of centered rewards, under the naming of the types with least total."""
    types = list(permutations(range(len(truth))))
    errors = torch.stack(
        [(centered(found[..., list(order), :]) - centered(truth)).abs() for order in types]
    )
    best = errors.mean((-1, -2)).argmin(0)
    index = best[None, ..., None, None].expand(1, *errors.shape[1:])
    return errors.gather(0, index).squeeze(0)


def cross_regret(
    truth: Float[Tensor, "*G K Y"], found: Float[Tensor, "*G J Y"]
) -> Float[Tensor, "*G K J"]:
    """What type k loses in true reward when fitted policy j answers instead of its own."""
    own = (truth * truth.softmax(-1)).sum(-1, keepdim=True)
    return own - truth @ found.softmax(-1).mT
