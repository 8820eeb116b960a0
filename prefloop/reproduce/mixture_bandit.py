"""The contextual bandit of the paper's first version: small networks, annotators of three types.

After the authors' public code, with what it leaves open chosen by us: the first layer is frozen
("meant frozen"), and a round is full-batch gradient steps at a rate that fits a CPU.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefloop.aggregate import Aggregation, min_max_regret, regret_matrix
from prefloop.em import Round, responsibilities, rounds
from prefloop.objectives import DPO
from prefloop.tabular import as_logps
from prefloop.types import Pair

ARMS = 3
SHARES = (0.2, 0.0, 0.8)


@dataclass(frozen=True)
class Votes:
    """All comparisons of one seed.

    Attributes:
        context: x in U[0, 1]^3 of each of I users' M comparisons.
        chosen, rejected: arms.
        types: of each user.
    """

    context: Float[Tensor, "I M D"]
    chosen: Int[Tensor, "I M"]
    rejected: Int[Tensor, "I M"]
    types: Int[Tensor, " I"]


def vote(seed: int, users: int = 100, each: int = 100) -> Votes:
    """Users of three types (20 %, none, 80 %); type z likes arm z by 10 (x_1 + x_2 + x_3)."""
    rng = np.random.default_rng(seed)
    types = rng.choice(ARMS, users, p=SHARES)
    context = rng.random((users, each, 3))
    reward = rng.normal(0, 0.01, (users, each, ARMS))
    reward[np.arange(users), :, types] += 10 * context.sum(-1)
    order = rng.permuted(np.broadcast_to(np.arange(ARMS), reward.shape), axis=-1)[..., :2]
    shown = np.take_along_axis(reward, order, -1)
    first_wins = rng.random((users, each)) < 1 / (1 + np.exp(shown[..., 1] - shown[..., 0]))
    chosen = np.where(first_wins, order[..., 0], order[..., 1])
    rejected = np.where(first_wins, order[..., 1], order[..., 0])
    return Votes(*(torch.from_numpy(part) for part in (context, chosen, rejected, types)))


@dataclass(frozen=True)
class Networks:
    """K networks 3 - 10 - 3 with a softmax; only the second layer is trained.

    Attributes:
        hidden: first layers, (K, 3, 10), and their biases (K, 10).
        output: second layers with their biases as the last row, (K, 11, 3).
    """

    hidden: tuple[Float[Tensor, "K D H"], Float[Tensor, "K H"]]
    output: Float[Tensor, "K H1 A"]

    def logp(self, context: Float[Tensor, "M D"]) -> Float[Tensor, "K M A"]:
        """log pi_k(arm | x)."""
        return (features(self.hidden, context) @ self.output).log_softmax(-1)


def features(hidden: tuple[Tensor, Tensor], context: Float[Tensor, "M D"]) -> Tensor:
    """Activations of the frozen layers, with a one for the bias, (K, M, 11)."""
    weight, bias = hidden
    active = (context @ weight + bias.unsqueeze(1)).relu()
    return torch.cat([active, torch.ones_like(active[..., :1])], -1)


def random_networks(seed: int) -> Networks:
    """Networks as torch would start them: uniform within 1 / sqrt(inputs)."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int, inputs: int) -> Tensor:
        unit = 2 * torch.rand(shape, generator=rng, dtype=torch.float64) - 1
        return unit / inputs**0.5

    hidden = draw(ARMS, 3, 10, inputs=3), draw(ARMS, 10, inputs=3)
    return Networks(hidden, draw(ARMS, 11, ARMS, inputs=10))


@dataclass(frozen=True)
class Outcome:
    """What EM and the min-max game made of the votes.

    Attributes:
        networks: the policies of the last round.
        path: the E-step of each round.
        game: weights of the min-max mixture of the living types.
    """

    networks: Networks
    path: tuple[Round, ...]
    game: Aggregation


def train(votes: Votes, seed: int, count: int = 20, epochs: int = 40, beta: float = 5.0) -> Outcome:
    """EM for `count` rounds, starting with an E-step from random networks and equal shares."""
    networks = random_networks(seed)
    uniform = torch.full((len(votes.types), ARMS), 1 / ARMS, dtype=torch.float64)
    seen = features(networks.hidden, votes.context.flatten(0, 1))
    output = networks.output

    def fit(gamma: Tensor, number: int) -> Tensor:
        nonlocal output
        output = _m_step(seen, output, gamma, votes, beta, epochs)
        return _loglik(seen @ output, votes, beta)

    start = responsibilities(_loglik(seen @ output, votes, beta), uniform[0]).responsibilities
    path = tuple(rounds(fit, start, count))
    trained = Networks(networks.hidden, output)
    test = torch.from_numpy(np.random.default_rng(seed).random((500, 3)))
    policies = trained.logp(test).transpose(0, 1)  # (contexts, K, arms)
    reference = torch.full((500, ARMS), 1 / ARMS, dtype=torch.float64).log()
    regret = regret_matrix(policies, reference, beta).mean(0)
    return Outcome(trained, path, min_max_regret(regret))


def best_arm_accuracy(outcome: Outcome, votes: Votes, seed: int) -> float:
    """How often the policy of a user's likeliest type picks the user's best arm."""
    context = torch.from_numpy(np.random.default_rng((seed, 1)).random((200, 3)))
    picks = outcome.networks.logp(context).argmax(-1)  # (K, contexts)
    type_of = outcome.path[-1].belief.responsibilities.argmax(-1)
    return float((picks[type_of] == votes.types.unsqueeze(-1)).double().mean())


def _m_step(
    seen: Tensor, output: Tensor, gamma: Tensor, votes: Votes, beta: float, epochs: int
) -> Tensor:
    """Gradient steps on the weighted DPO loss of each network, all networks at once."""
    weight = gamma.T.unsqueeze(-1) / votes.chosen.shape[1]  # (K, I, 1)
    share = weight.sum((1, 2), keepdim=True).clamp(min=1e-12) * votes.chosen.shape[1]
    for _ in range(epochs):
        live = output.detach().requires_grad_()
        loss = -(_vote_loglik(seen @ live, votes, beta) * weight / share).sum()
        (gradient,) = torch.autograd.grad(loss, live)
        output = live - 0.05 * gradient
    return output.detach()


def _vote_loglik(logits: Tensor, votes: Votes, beta: float) -> Float[Tensor, "K I M"]:
    """log-likelihood of every vote under every network: minus the DPO loss."""
    logp = logits.log_softmax(-1)

    def side(arm: Tensor) -> Tensor:
        return logp.gather(-1, arm.flatten().expand(len(logp), -1).unsqueeze(-1)).flatten()

    chosen, rejected = side(votes.chosen), side(votes.rejected)
    uniform = as_logps(torch.full_like(chosen, 1 / ARMS).log())
    losses = DPO(beta=beta)(Pair(as_logps(chosen), as_logps(rejected)), Pair(uniform, uniform))
    return -losses.reshape(len(logp), *votes.chosen.shape)


def _loglik(logits: Tensor, votes: Votes, beta: float) -> Float[Tensor, "I K"]:
    return _vote_loglik(logits, votes, beta).sum(-1).T
