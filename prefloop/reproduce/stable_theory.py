"""What a DPO step does to probabilities, and the toy in which it loses the chosen response.

Everything is a gradient of a package objective on a table or a log-linear policy, in float64; the
leading axis is problems.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.objectives import DPO, Objective
from prefloop.stable import Bilevel, Hinge, Losses, Params, Penalty, Solver, Step
from prefloop.stable.objective import sft_loss
from prefloop.tabular import as_logps, log_linear
from prefloop.types import Judgement, Logps

CHOSEN, REJECTED = 0, 1
"""Responses 0 and 1 of every problem here are y_w and y_l; the others are irrelevant."""

LogpOf = Callable[[Tensor], Tensor]


def pair_judgement(problems: int) -> Judgement:
    """Response 0 preferred to response 1 in each problem."""
    return Judgement(
        rank=torch.tensor([[1, 2]]).expand(problems, -1),
        scores=torch.full((problems, 2), torch.nan),
        label=torch.full((problems, 2), -1),
        weight=torch.ones(problems),
    )


def pair_logps(logp: Float[Tensor, "G Y"]) -> Logps:
    """`Logps` of responses 0 and 1."""
    return as_logps(logp[:, :2])


def preference_losses(
    objective: Objective, logp: Float[Tensor, "G Y"], reference: Float[Tensor, "G Y"]
) -> Float[Tensor, " G"]:
    """The objective's loss of the pair of each problem."""
    return objective.per_comparison(
        pair_logps(logp), pair_logps(reference), pair_judgement(len(logp))
    )


def ratio_gradients(
    beta: float, ratio: Float[Tensor, "G 2"]
) -> tuple[Float[Tensor, "G 2"], Float[Tensor, "G 2"]]:
    """d loss / d (x_w, x_l), x = pi/pi_ref: by autograd through DPO, and in closed form.

    dL/dx_w = -beta x_l^beta / (x_w (x_w^beta + x_l^beta)),
    dL/dx_l =  beta x_l^(beta - 1) / (x_w^beta + x_l^beta)
    """
    live = ratio.detach().requires_grad_()
    loss = preference_losses(DPO(beta=beta), live.log(), torch.zeros_like(live))
    (found,) = torch.autograd.grad(loss.sum(), live)
    chosen, rejected = ratio.unbind(-1)
    total = chosen**beta + rejected**beta
    closed = torch.stack(
        [-beta * rejected**beta / (chosen * total), beta * rejected ** (beta - 1) / total], -1
    )
    return found, closed


def preference_gradient(
    logp_of: LogpOf, beta: float, theta: Tensor, reference: Float[Tensor, "G Y"]
) -> Tensor:
    """Gradient of the DPO loss of each problem's pair in its parameters."""
    live = theta.detach().requires_grad_()
    loss = preference_losses(DPO(beta=beta), logp_of(live), reference)
    return torch.autograd.grad(loss.sum(), live)[0]


def velocity(
    logp_of: LogpOf, beta: float, theta: Tensor, reference: Float[Tensor, "G Y"]
) -> tuple[Float[Tensor, "G Y"], Float[Tensor, " G"]]:
    """d log pi(y) for each unit of a DPO gradient step, over c = beta sigmoid(-m); and c.

    By a central difference, so that no formula is used to check itself.
    """
    gradient = preference_gradient(logp_of, beta, theta, reference)
    logp = logp_of(theta)
    change = (logp - reference)[:, :2]
    pace = beta * (-beta * (change[:, CHOSEN] - change[:, REJECTED])).sigmoid()
    direction = -gradient / pace.unsqueeze(-1)
    small = 1e-5
    ahead, behind = logp_of(theta + small * direction), logp_of(theta - small * direction)
    return (ahead - behind) / (2 * small), pace


def tabular_velocity(logp: Float[Tensor, "G Y"]) -> Float[Tensor, "G Y"]:
    """Closed form for a table: 1[y = y_w] - 1[y = y_l] - (pi_w - pi_l)."""
    policy = logp.exp()
    predicted = -(policy[:, CHOSEN] - policy[:, REJECTED]).unsqueeze(-1).repeat(1, logp.shape[-1])
    predicted[:, CHOSEN] += 1
    predicted[:, REJECTED] -= 1
    return predicted


def score_products(
    features: Float[Tensor, "G Y D"], theta: Float[Tensor, "G D"]
) -> Float[Tensor, "G Y Y"]:
    """<g(y), g(y')>, g = grad log pi, of a log-linear policy."""
    policy = log_linear(features, theta).softmax(-1)
    scores = features - torch.einsum("gy,gyd->gd", policy, features).unsqueeze(1)
    return scores @ scores.mT


def flow(
    start: Float[Tensor, "G 3"], beta: float = 0.1, lr: float = 2.0, steps: int = 1500
) -> Float[Tensor, "S G 3"]:
    """(pi_w, pi_l, pi_o) of a table under DPO on one pair, reference = start."""
    reference, theta = start.log(), start.log()
    path = [start]
    for _ in range(steps):
        theta = theta - lr * preference_gradient(_softmax, beta, theta, reference)
        path.append(theta.softmax(-1))
    return torch.stack(path)


def _softmax(theta: Tensor) -> Tensor:
    return theta.log_softmax(-1)


def predicted_peak(start: Float[Tensor, "G 3"]) -> Float[Tensor, " G"]:
    """Largest pi_o on the way: pi_o / (pi_o + 2 sqrt(pi_w pi_l)) if it rises at all."""
    chosen, rejected, other = start.unbind(-1)
    top = other / (other + 2 * (chosen * rejected).sqrt())
    return torch.where(chosen < rejected, top, other)


@dataclass(frozen=True)
class Toy:
    """The specification's toy: 20 responses, 8 shared features, two similarities of the pair.

    Attributes:
        features: (G, 20, 8); y_l is y_w turned by the cosine and a quarter longer.
        weight: (G, 8), after a short SFT warm start on y_w.
        reference: log-probabilities at `weight`.
        judgement: y_w preferred to y_l.
    """

    features: Float[Tensor, "G Y D"]
    weight: Float[Tensor, "G D"]
    reference: Float[Tensor, "G Y"]
    judgement: Judgement

    def logp(self, weight: Float[Tensor, "G D"]) -> Float[Tensor, "G Y"]:
        """log pi(y) of each problem."""
        return log_linear(self.features, weight).log_softmax(-1)

    def repeated(self, times: int) -> "Toy":
        """The same problems `times` times over, one block after the other."""
        return Toy(
            self.features.repeat(times, 1, 1),
            self.weight.repeat(times, 1),
            self.reference.repeat(times, 1),
            pair_judgement(times * len(self.weight)),
        )

    def bilevel(self, objective: Objective) -> Bilevel:
        """The toy as a problem for the solvers: the same two losses as on a language model."""
        reference = pair_logps(self.reference)
        best = sft_loss(reference, self.judgement)

        def losses(params: Params) -> Losses:
            policy = pair_logps(self.logp(params["weight"]))
            upper = objective.per_comparison(policy, reference, self.judgement)
            return Losses(upper, sft_loss(policy, self.judgement), best)

        return Bilevel([losses])


def toy(cosines: tuple[float, ...] = (0.2, 0.9), seed: int = 7) -> Toy:
    """Features from `seed`, start from `seed` + 1, 20 SFT steps; 7 is the specification's."""
    features = torch.stack([_features(cosine, seed) for cosine in cosines])
    drawn = np.random.default_rng(seed + 1).standard_normal(8) * 0.3
    weight = torch.from_numpy(drawn).repeat(len(cosines), 1)
    judgement = pair_judgement(len(cosines))
    for _ in range(20):
        live = weight.requires_grad_()
        policy = pair_logps(log_linear(features, live).log_softmax(-1))
        (gradient,) = torch.autograd.grad(sft_loss(policy, judgement).sum(), live)
        weight = (live - 0.05 * gradient).detach()
    reference = log_linear(features, weight).log_softmax(-1)
    return Toy(features, weight, reference, judgement)


def _features(cosine: float, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((20, 8))
    chosen = features[CHOSEN]
    along = chosen / np.linalg.norm(chosen)
    across = rng.standard_normal(8)
    across -= across @ along * along
    across /= np.linalg.norm(across)
    turned = cosine * along + np.sqrt(1 - cosine**2) * across
    features[REJECTED] = 1.25 * np.linalg.norm(chosen) * turned
    return torch.from_numpy(features)


@dataclass(frozen=True)
class SideBySide:
    """Several penalties at once, each on its block of a repeated toy: one run instead of many."""

    pulls: tuple[Penalty | Hinge, ...]

    def __call__(self, problem: Bilevel, params: Params) -> Step:
        blocks = problem.losses(params).excess.chunk(len(self.pulls))
        parts = [pull.weight(block) for pull, block in zip(self.pulls, blocks, strict=True)]
        weight = torch.cat(parts)
        gradient, losses = problem.gradient(params, 1.0, weight)
        return Step(gradient, losses, weight)


@dataclass(frozen=True)
class Course:
    """How one solver went through the toy, a number a step and problem: (S, G).

    Attributes:
        chosen, rejected: pi_w, pi_l.
        other: probability of the likeliest irrelevant response.
        excess: L_SFT - v*, nats.
        pull: weight of the SFT gradient in each of the U = S - 1 updates, (U, G).
    """

    chosen: Float[Tensor, "S G"]
    rejected: Float[Tensor, "S G"]
    other: Float[Tensor, "S G"]
    excess: Float[Tensor, "S G"]
    pull: Float[Tensor, "U G"]

    def block(self, number: int, size: int) -> "Course":
        """The course of one block of `size` problems of a repeated toy."""
        some = slice(number * size, (number + 1) * size)
        return Course(
            self.chosen[:, some],
            self.rejected[:, some],
            self.other[:, some],
            self.excess[:, some],
            self.pull[:, some],
        )

    @property
    def margin(self) -> Float[Tensor, "S G"]:
        """log pi_w / pi_ref,w - log pi_l / pi_ref,l."""
        ratio = self.chosen.log() - self.rejected.log()
        return ratio - ratio[0]


def run(
    toy: Toy, solver: Solver, objective: Objective, lr: float | Tensor, steps: int = 3000
) -> Course:
    """Plain gradient descent along the solver's direction; `lr` may be (G, 1)."""
    problem, params = toy.bilevel(objective), {"weight": toy.weight}
    states, excess, pull = [params["weight"]], [], []
    for _ in range(steps):
        step = solver(problem, params)
        params = {"weight": params["weight"] - lr * step.gradient["weight"]}
        states.append(params["weight"])
        excess.append(step.losses.excess)
        pull.append(step.weight)
    excess.append(problem.losses(params).excess)
    policy = (toy.features @ torch.stack(states).unsqueeze(-1)).squeeze(-1).softmax(-1)
    return Course(
        chosen=policy[..., CHOSEN],
        rejected=policy[..., REJECTED],
        other=policy[..., 2:].amax(-1),
        excess=torch.stack(excess),
        pull=torch.stack(pull),
    )


def descend(toy: Toy, objective: Objective, lr: float, steps: int) -> Float[Tensor, "G D"]:
    """Weights after gradient descent on the objective alone, without any solver."""
    weight = toy.weight
    for _ in range(steps):
        live = weight.detach().requires_grad_()
        loss = preference_losses(objective, toy.logp(live), toy.reference)
        weight = live - lr * torch.autograd.grad(loss.sum(), live)[0]
    return weight.detach()
