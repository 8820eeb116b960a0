"""Does training on high-PVar prompts pay? Log-linear policies, exact evaluation, many worlds.

Every world has prompts whose candidates differ by a random amount; the policy starts uniform over
them. Arms differ only in which prompts they train on, and all of them see the same labels.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefloop import selection
from prefloop.objectives.family import PairLoss
from prefloop.objectives.unpaired import KTO
from prefloop.selection import preference_variance, reward_gap
from prefloop.tabular import as_logps, kl, log_linear, pair_of

BATCH = 32

TableLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(log pi (A, S, B, Y), chosen (A, S, B), rejected (A, S, B)) -> losses (A, S, B)."""


class World(NamedTuple):
    """Prompts with candidates, for S seeds: the first half trains, the second is held out.

    Attributes:
        features: of each candidate; what all candidates of a prompt share is left out, since a
            log-linear policy cannot see it.
        reward: the true reward, linear in the features.
        direction: the unit vector of that reward.
        spurious: a unit vector orthogonal to it.
    """

    features: Float[Tensor, "S X Y D"]
    reward: Float[Tensor, "S X Y"]
    direction: Float[Tensor, "S D"]
    spurious: Float[Tensor, "S D"]

    @property
    def half(self) -> int:
        """Number of training prompts."""
        return self.reward.shape[1] // 2


class Samples(NamedTuple):
    """The n candidates of each training prompt that were sampled, with the reward's logits."""

    candidates: Int[Tensor, "S X N"]
    reward: Float[Tensor, "S X N"]


class Labels(NamedTuple):
    """A labelled pair of candidates for every training prompt, for A arms or for all (A = 1)."""

    chosen: Int[Tensor, "A S X"]
    rejected: Int[Tensor, "A S X"]


class Outcome(NamedTuple):
    """What training did, a number for each arm and seed.

    Attributes:
        win: win rate over the uniform start on held-out prompts, ties a half.
        gain: gain of the expected true reward there.
        loss: mean training loss of the last ten steps.
        curve: training loss, mean over seeds, a row a step.
    """

    win: Float[Tensor, "A S"]
    gain: Float[Tensor, "A S"]
    loss: Float[Tensor, "A S"]
    curve: Float[Tensor, "steps A"]


def make_world(
    rng: torch.Generator, seeds: int, prompts: int = 2000, candidates: int = 24
) -> World:
    """Features s_x N(0, I) in as many dimensions as candidates, s_x = exp(0.9 N) a prompt."""

    def normal(*shape: int) -> Tensor:
        return torch.randn((seeds, *shape), generator=rng, dtype=torch.float64)

    direction = torch.nn.functional.normalize(normal(candidates), dim=-1)
    spurious = normal(candidates)
    overlap = (spurious * direction).sum(-1, keepdim=True)
    spurious = torch.nn.functional.normalize(spurious - overlap * direction, dim=-1)
    features = normal(prompts, candidates, candidates)
    features *= (0.9 * normal(prompts, 1, 1)).exp()
    reward = log_linear(features, direction.unsqueeze(1))
    return World(features, reward, direction, spurious)


def with_fixed_bias(rng: torch.Generator, world: World) -> World:
    """The same world, its spurious feature redrawn with one spread for all prompts."""
    along = world.spurious.unsqueeze(1)
    old = log_linear(world.features, along)
    new = torch.randn(old.shape, generator=rng, dtype=old.dtype)
    change = (new - old).unsqueeze(-1) * along.unsqueeze(-2)
    return world._replace(features=world.features + change)


def draw_samples(rng: torch.Generator, world: World, count: int = 5) -> Samples:
    """`count` different candidates of each training prompt; the reward's logits are 1.5 r."""
    seeds, _, candidates = world.reward.shape
    keys = torch.rand((seeds, world.half, candidates), generator=rng)
    picked = keys.argsort(-1)[..., :count]
    return Samples(picked, 1.5 * world.reward[:, : world.half].gather(-1, picked))


def best_and_worst(samples: Samples, reward: Float[Tensor, "S X N"]) -> Labels:
    """Chosen and rejected are the samples of highest and of lowest reward."""
    places = (reward.argmax(-1, keepdim=True), reward.argmin(-1, keepdim=True))
    return Labels(*(samples.candidates.gather(-1, at).squeeze(-1).unsqueeze(0) for at in places))


def bradley_terry(
    rng: torch.Generator, samples: Samples, reward: Float[Tensor, "*A S X N"]
) -> Labels:
    """Two different samples at random, ordered by a Bradley-Terry draw."""
    shape, count = reward.shape[:-1], reward.shape[-1]
    first = torch.randint(count, shape[-2:], generator=rng)
    second = (first + torch.randint(1, count, shape[-2:], generator=rng)) % count
    at = [index.expand(shape).unsqueeze(-1) for index in (first, second)]
    gap = (reward.gather(-1, at[0]) - reward.gather(-1, at[1])).squeeze(-1)
    wins = torch.rand(shape, generator=rng, dtype=gap.dtype) < gap.sigmoid()
    one, two = (samples.candidates.gather(-1, i.unsqueeze(-1)).squeeze(-1) for i in (first, second))
    chosen, rejected = torch.where(wins, one, two), torch.where(wins, two, one)
    lead = (-1, *shape[-2:])
    return Labels(chosen.reshape(lead), rejected.reshape(lead))


def choose(
    scores: Float[Tensor, "S X"], rule: Callable[[Tensor, int], Tensor], count: int
) -> Int[Tensor, "S C"]:
    """The prompts that a rule of `prefloop.selection` keeps in each world."""
    return torch.stack([rule(row, count) for row in scores])


def arms(
    rng: torch.Generator, reward: Float[Tensor, "S X N"], count: int
) -> dict[str, Int[Tensor, "S C"]]:
    """Top, random and bottom `count` prompts by PVar, and the top by reward gap."""
    scores, gaps = preference_variance(reward), reward_gap(reward)
    chance = torch.rand(scores.shape, generator=rng, dtype=scores.dtype)
    return {
        "top": choose(scores, selection.top, count),
        "random": choose(chance, selection.top, count),
        "bottom": choose(scores, selection.bottom, count),
        "gap": choose(gaps, selection.top, count),
    }


def batches(
    rng: torch.Generator, kept: Int[Tensor, "S C"], steps: int
) -> Int[Tensor, "S steps batch"]:
    """Prompts of each step: passes over what is kept, each in a new order, cut into batches."""
    seeds, count = kept.shape
    passes = math.ceil(steps * BATCH / count)
    orders = torch.rand((seeds, passes, count), generator=rng).argsort(-1).flatten(1)
    return kept.gather(1, orders)[:, : steps * BATCH].reshape(seeds, steps, BATCH)


def on_pairs(objective: PairLoss) -> TableLoss:
    """A pairwise objective, with the uniform start as its reference."""

    def losses(logp: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        uniform = torch.full_like(logp, -math.log(logp.shape[-1]))
        at = (chosen.unsqueeze(-1), rejected.unsqueeze(-1))
        return objective(pair_of(logp, *at), pair_of(uniform, *at)).reshape(chosen.shape)

    return losses


def on_both_responses(objective: KTO) -> TableLoss:
    """KTO: the chosen response is good, the rejected one bad, z0 is the batch's exact KL.

    A third, unlabelled response of every prompt carries that KL: its log-ratio is the expectation
    under the policy. Every run has a batch, and so a z0, of its own.
    """
    label = torch.tensor([1, 0, -1])

    def losses(logp: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        uniform = torch.full_like(logp, -math.log(logp.shape[-1]))
        expected = uniform[..., 0] + kl(logp, uniform).detach()
        sides = [logp.gather(-1, at.unsqueeze(-1)).squeeze(-1) for at in (chosen, rejected)]
        table = torch.stack([*sides, expected], -1)
        runs = [
            objective(as_logps(run), as_logps(base), label.expand(run.shape)).sum(-1)
            for run, base in zip(table.flatten(0, 1), uniform[..., :3].flatten(0, 1), strict=True)
        ]
        return torch.stack(runs).reshape(chosen.shape)

    return losses


def train(
    world: World,
    labels: Labels,
    order: Int[Tensor, "A S steps batch"],
    objective: TableLoss,
    rate: Float[Tensor, "A 1 1"] | float,
) -> Outcome:
    """Gradient descent on all arms and seeds at once, through the objective, then evaluation."""
    runs, seeds, steps, _ = order.shape
    weight = torch.zeros((runs, seeds, world.features.shape[-1]), dtype=torch.float64)
    weight.requires_grad_()
    at_seed = torch.arange(seeds).view(1, -1, 1)
    losses = torch.zeros((steps, runs, seeds), dtype=torch.float64)
    for step in range(steps):
        prompts = order[:, :, step]
        logits = log_linear(world.features[at_seed, prompts], weight.unsqueeze(-2))
        pair = (side.expand(runs, -1, -1).gather(-1, prompts) for side in labels)
        loss = objective(logits.log_softmax(-1), *pair).mean(-1)
        slope = torch.autograd.grad(loss.sum(), weight)[0]
        with torch.no_grad():
            weight.sub_(rate * slope)
        losses[step] = loss.detach()
    return evaluate(world, weight.detach(), losses)


def evaluate(
    world: World, weight: Float[Tensor, "A S D"], losses: Float[Tensor, "steps A S"]
) -> Outcome:
    """Exact expectations over the candidates of the held-out prompts."""
    features, reward = world.features[:, world.half :], world.reward[:, world.half :]
    chance = torch.einsum("sxyd,asd->asxy", features, weight).softmax(-1)
    gap = reward.unsqueeze(-1) - reward.unsqueeze(-2)
    beats = (0.5 + 0.5 * gap.sign()).mean(-1)
    gain = (chance * (reward - reward.mean(-1, keepdim=True))).sum(-1).mean(-1)
    return Outcome(
        win=(chance * beats).sum(-1).mean(-1),
        gain=gain,
        loss=losses[-10:].mean(0),
        curve=losses.mean(-1),
    )


def compare_arms(
    rng: torch.Generator,
    world: World,
    objective: TableLoss,
    rates: tuple[float, ...],
    labelling: str,
    noise: float = 0.0,
) -> tuple[tuple[str, ...], Outcome]:
    """Train on the top, random, bottom and gap-selected half, at each step size; two epochs.

    Args:
        objective: through which the pairs teach.
        rates: step sizes; arm a at rate i is row i * 4 + a of the outcome.
        labelling: "best/worst" or "Bradley-Terry", by the true reward.
        noise: standard deviation of the error of the reward model that selects.
    """
    samples = draw_samples(rng, world)
    error = torch.randn(samples.reward.shape, generator=rng, dtype=torch.float64)
    count = world.half // 2
    kept = arms(rng, samples.reward + noise * error, count)
    if labelling == "best/worst":
        labels = best_and_worst(samples, samples.reward)
    else:
        labels = bradley_terry(rng, samples, samples.reward)
    steps = 2 * count // BATCH
    order = torch.stack([batches(rng, prompts, steps) for prompts in kept.values()])
    rate = torch.tensor(rates, dtype=torch.float64).repeat_interleave(len(kept)).view(-1, 1, 1)
    return tuple(kept), train(world, labels, order.repeat(len(rates), 1, 1, 1), objective, rate)


def tenth_against_all(
    rng: torch.Generator,
    world: World,
    objective: TableLoss,
    biases: tuple[float, ...],
    steps: int = 400,
) -> Mapping[str, Float[Tensor, "bias S"]]:
    """Win rates of the top tenth, a random tenth and all prompts after equally many steps.

    Annotators add `bias` times a spurious feature to 1.5 times the true reward, and are drawn from
    Bradley-Terry; selection sees the true reward. The bias has one size everywhere, so it rules
    where the true rewards differ little: the claim holds by construction.
    """
    world = with_fixed_bias(rng, world)
    samples = draw_samples(rng, world)
    spurious = log_linear(world.features[:, : world.half], world.spurious.unsqueeze(1))
    extra = spurious.gather(-1, samples.candidates)
    humans = torch.stack([samples.reward + bias * extra for bias in biases])
    labels = bradley_terry(rng, samples, humans)
    kept = arms(rng, samples.reward, world.half // 10)
    everything = torch.arange(world.half).expand(len(samples.reward), -1)
    chosen = {"top 10 %": kept["top"], "random 10 %": kept["random"], "all": everything}
    results = {}
    for name, prompts in chosen.items():
        order = batches(rng, prompts, steps).expand(len(biases), -1, -1, -1)
        results[name] = train(world, labels, order, objective, 0.5).win
    return results


ERRORS: dict[str, Callable[[torch.Generator, tuple[int, ...]], Tensor]] = {
    "none": lambda rng, shape: torch.zeros(shape, dtype=torch.float64),
    "Gaussian, sd 1": lambda rng, shape: _normal(rng, shape),
    "Gaussian, sd 3": lambda rng, shape: 3 * _normal(rng, shape),
    "Student t, 2 degrees": lambda rng, shape: (
        _normal(rng, shape) / (-torch.rand(shape, generator=rng, dtype=torch.float64).log()).sqrt()
    ),
    "Cauchy": lambda rng, shape: torch.tan(
        math.pi * (torch.rand(shape, generator=rng, dtype=torch.float64) - 0.5)
    ),
    "5 % outliers, x20": lambda rng, shape: (
        20 * _normal(rng, shape) * (torch.rand(shape, generator=rng) < 0.05)
    ),
}
"""Errors of a reward model. t with 2 degrees of freedom is N / sqrt(Exp(1))."""


def overlap_with_truth(
    rng: torch.Generator, error: str, samples: int, prompts: int = 20000
) -> tuple[float, float]:
    """Share of the truly most diverse half that PVar and the reward gap keep, in that order.

    Rewards N(0, s_x^2), s_x = exp(0.8 N); PVar grows with s_x, so s_x is the truth.
    """
    spread = (0.8 * torch.randn(prompts, generator=rng, dtype=torch.float64)).exp()
    rewards = spread.unsqueeze(-1) * _normal(rng, (prompts, samples))
    seen = rewards + ERRORS[error](rng, (prompts, samples))
    truth = selection.top(spread, prompts // 2)
    kept = (
        selection.top(scores, prompts // 2)
        for scores in (preference_variance(seen), reward_gap(seen))
    )
    by_variance, by_gap = (float(torch.isin(found, truth).double().mean()) for found in kept)
    return by_variance, by_gap


def fidelity(rng: torch.Generator, samples: int, prompts: int = 40000) -> tuple[float, float]:
    """Spearman correlation of estimated with true PVar, and overlap of the upper halves."""
    spread = (0.8 * torch.randn(prompts, generator=rng, dtype=torch.float64)).exp()
    scores = preference_variance(spread.unsqueeze(-1) * _normal(rng, (prompts, samples)))
    ranks = torch.stack([values.argsort().argsort().double() for values in (spread, scores)])
    truth, found = (selection.top(values, prompts // 2) for values in (spread, scores))
    overlap = float(torch.isin(found, truth).double().mean())
    return float(torch.corrcoef(ranks)[0, 1]), overlap


def _normal(rng: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64)
