"""Online DPO with a pair sampler over a finite response set: exact, noisy and sampled updates.

Every update is the gradient of the package's DPO objective, with the pair weights of a sampler.
Many bandits go at once: they are the leading axes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prefloop.objectives import DPO
from prefloop.pair_weights import Arms, PairWeights, arms, joint
from prefloop.tabular import expected_loss


@dataclass(frozen=True)
class Bandits:
    """Problems of Y arms; some have fewer.

    Attributes:
        reward: (G, Y); 0 where an arm does not exist.
        exists: (G, Y).
    """

    reward: Float[Tensor, "*G Y"]
    exists: Bool[Tensor, "*G Y"]

    @property
    def arms(self) -> Float[Tensor, "*G"]:
        """How many arms each problem has."""
        return self.exists.sum(-1).double()

    def known(self, implicit: Float[Tensor, "*G Y"]) -> Arms:
        """What a sampler sees when the implicit rewards are `implicit`."""
        return arms(self.reward, implicit, self.exists.double().log())


def bandits(reward: Float[Tensor, "*G Y"]) -> Bandits:
    """Problems in which every arm exists."""
    return Bandits(reward, torch.ones_like(reward, dtype=torch.bool))


def unit_range_bandits(count: int, seed: int) -> Bandits:
    """Random rewards that span [0, 1]: 2 to 11 arms, binary, uniform or beta-shaped in turn."""
    rng = np.random.default_rng(seed)
    size = torch.from_numpy(rng.integers(2, 12, count))
    exists = torch.arange(11) < size.unsqueeze(-1)
    kinds = (
        rng.integers(0, 2, (count, 11)).astype(float),
        rng.random((count, 11)),
        rng.beta(0.2, 0.2, (count, 11)),
    )
    turn = torch.arange(count).unsqueeze(-1) % 3
    drawn = sum(torch.from_numpy(kind) * (turn == place) for place, kind in enumerate(kinds))
    assert isinstance(drawn, Tensor)
    return Bandits(torch.where(exists, unit_range(drawn, exists), 0.0), exists)


def unit_range(
    reward: Float[Tensor, "*G Y"], exists: Bool[Tensor, "*G Y"]
) -> Float[Tensor, "*G Y"]:
    """Rewards moved and scaled to span [0, 1]; all equal ones become 0."""
    lowest = reward.masked_fill(~exists, torch.inf).amin(-1, keepdim=True)
    span = reward.masked_fill(~exists, -torch.inf).amax(-1, keepdim=True) - lowest
    return (reward - lowest) / torch.where(span > 0, span, 1.0)


def gaps(values: Float[Tensor, "*G Y"]) -> Float[Tensor, "*G Y Y"]:
    """values[y] - values[y'] at [y, y']."""
    return values.unsqueeze(-1) - values.unsqueeze(-2)


def existing_pairs(problems: Bandits) -> Bool[Tensor, "*G Y Y"]:
    """Which pairs of arms exist."""
    return problems.exists.unsqueeze(-1) & problems.exists.unsqueeze(-2)


def largest_error(problems: Bandits, implicit: Float[Tensor, "*G Y"]) -> Float[Tensor, "*G"]:
    """max over pairs of |delta|, delta = D - U."""
    error = gaps(problems.reward - implicit).abs()
    return torch.where(existing_pairs(problems), error, 0.0).amax((-1, -2))


def loss_gradient(
    beta: float, theta: Float[Tensor, "*G Y"], weight: Float[Tensor, "*G Y Y"]
) -> Float[Tensor, "*G Y"]:
    """Gradient of the weighted DPO loss of pi ~ softmax(theta) against the uniform reference.

    `weight` is how often y is shown with y' and preferred to it.
    """
    logits = theta.detach().requires_grad_()
    reference = torch.zeros_like(theta).log_softmax(-1)
    loss = expected_loss(DPO(beta=beta), logits.log_softmax(-1), reference, weight)
    return torch.autograd.grad(loss.sum(), logits)[0]


Disturb = Callable[[Tensor], Tensor]


def descend(
    sampler: PairWeights,
    problems: Bandits,
    beta: float,
    steps: int,
    disturb: Disturb = lambda gradient: gradient,
) -> Float[Tensor, "S ... Y"]:
    """Implicit rewards beta theta before each of `steps` updates at the theorem's learning rate.

        theta <- theta - 1 / (beta^2 n) grad L,   theta = 0 at the start

    Args:
        disturb: noise added to the gradient.
    """
    theta = torch.zeros_like(problems.reward)
    rate = (1 / (beta**2 * problems.arms)).unsqueeze(-1)
    preferred = gaps(problems.reward).sigmoid()
    path = [beta * theta]
    for _ in range(steps):
        weight = sampler(problems.known(beta * theta)) * preferred
        theta = theta - rate * disturb(loss_gradient(beta, theta, weight))
        path.append(beta * theta)
    return torch.stack(path)


def descend_residuals(
    sampler: PairWeights, problems: Bandits, steps: int
) -> Float[Tensor, "S ..."]:
    """max |delta| before each update, past where float64 ends for theta.

    The same recursion on the residual e = r - beta theta, with
    sigmoid(D) - sigmoid(U) = sinh((D - U) / 2) / (2 cosh(D / 2) cosh(U / 2)): rounding is relative
    to the residual, so errors far below 1e-16 are seen. In theta, float64 ends near 1e-16.
    """
    exists, count = problems.exists, problems.arms.unsqueeze(-1)
    error = _centered(problems.reward, exists, count)
    gap = gaps(problems.reward)
    path = []
    for _ in range(steps + 1):
        off = torch.where(existing_pairs(problems), gaps(error), 0.0)
        path.append(off.abs().amax((-1, -2)))
        implied = gap - off
        weight = sampler(problems.known(problems.reward - error))
        slope = torch.sinh(off / 2) / (2 * torch.cosh(gap / 2) * torch.cosh(implied / 2))
        error = _centered(error - (weight * slope).sum(-1) / count, exists, count)
    return torch.stack(path)


def _centered(values: Tensor, exists: Tensor, count: Tensor) -> Tensor:
    values = torch.where(exists, values, 0.0)
    return torch.where(exists, values - values.sum(-1, keepdim=True) / count, 0.0)


def uniform_rate(reward: Float[Tensor, "*G Y"]) -> Float[Tensor, "*G"]:
    """Asymptotic factor a step of DPO-Unif: how linear it is, without running it.

    Largest |eigenvalue| of I - (4 / n) Laplacian(sigmoid'(D)) on the space orthogonal to 1.
    """
    count = reward.shape[-1]
    gap = gaps(reward)
    slope = gap.sigmoid() * (-gap).sigmoid()
    laplacian = torch.diag_embed(slope.sum(-1)) - slope
    eye = torch.eye(count, dtype=reward.dtype)
    values = torch.linalg.eigvalsh(eye - 4 / count * laplacian).abs().sort(-1).values
    return values[..., -2]  # the largest is 1, of the constant vector


def root_mean_square(problems: Bandits, implicit: Float[Tensor, "S ... Y"]) -> Tensor:
    """RMS of delta over the pairs of different arms, (S, *G)."""
    squares = gaps(problems.reward - implicit).square().sum((-1, -2))
    return (squares / (problems.arms * (problems.arms - 1))).sqrt()


@dataclass(frozen=True)
class Curves:
    """What the authors log a step.

    Attributes:
        error: mean over n^2 pairs of |delta| ("Param Diff"), (S, G).
        loss: V* - V, V = E_pi[r - beta log pi] ("Value Diff"), (S, G).
    """

    error: Float[Tensor, "S G"]
    loss: Float[Tensor, "S G"]


def play(
    sampler: PairWeights, reward: Float[Tensor, "G Y"], beta: float, lr: float, steps: int
) -> Curves:
    """The authors' exact simulation: gradient steps on the loss under J = W / sum W.

    Their loss counts both labels of each ordered pair, so the weight is 2 J.
    """
    problems, preferred = bandits(reward), gaps(reward).sigmoid()

    def shown(known: Arms) -> Tensor:
        return 2 * joint(sampler(known)) * preferred

    return _play(shown, problems, beta, lr, steps)


def play_sampled(
    sampler: PairWeights,
    reward: Float[Tensor, "G Y"],
    beta: float,
    lr: float,
    steps: int,
    seed: int,
) -> Curves:
    """The authors' empirical simulation: 8192 sampled pairs a step, each with a Bernoulli label.

    The pairs of a step are drawn as counts a cell, which is the same distribution.
    """
    problems, preferred = bandits(reward), gaps(reward).sigmoid().numpy()
    rng = np.random.default_rng(seed)
    draws = 8192

    def shown(known: Arms) -> Tensor:
        chance = joint(sampler(known)).numpy()
        counts = rng.multinomial(draws, chance.reshape(len(chance), -1)).reshape(chance.shape)
        won = rng.binomial(counts, preferred)
        return torch.from_numpy(won + (counts - won).swapaxes(-1, -2)) / draws

    return _play(shown, problems, beta, lr, steps)


def _play(
    shown: Callable[[Arms], Tensor], problems: Bandits, beta: float, lr: float, steps: int
) -> Curves:
    theta = torch.zeros_like(problems.reward)
    best = beta * (problems.reward / beta).logsumexp(-1)
    error, loss = [], []
    for _ in range(steps):
        logp = theta.log_softmax(-1)
        error.append(gaps(problems.reward - beta * logp).abs().mean((-1, -2)))
        loss.append(best - (logp.exp() * (problems.reward - beta * logp)).sum(-1))
        weight = shown(problems.known(beta * theta))
        theta = theta - lr * loss_gradient(beta, theta, weight)
    return Curves(torch.stack(error), torch.stack(loss))


def first_below(path: Float[Tensor, "S ..."], threshold: float) -> Float[Tensor, "*G"]:
    """First step at which the path is below the threshold; infinite where it never is."""
    below = path < threshold
    return torch.where(below.any(0), below.int().argmax(0).double(), torch.inf)
