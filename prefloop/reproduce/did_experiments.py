"""Differential information, measured: sampled pairs, entropy estimates, smoothing."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop import did
from prefloop.objectives import DPO, IPO, SFT, Hinge, SimPO
from prefloop.objectives.family import Pairwise
from prefloop.reproduce.did_theory import LogOdds, lesson
from prefloop.tabular import (
    TabularPolicy,
    anneal,
    jensen_shannon,
    kl,
    pair_of,
    sequence_logp,
)


class Curve(NamedTuple):
    """Jensen-Shannon divergence to the target (mean over problems) at recorded steps."""

    steps: tuple[int, ...]
    divergence: tuple[float, ...]
    error: float

    @property
    def end(self) -> float:
        """At the last step."""
        return self.divergence[-1]


def sampled_objectives(beta: float) -> dict[str, Pairwise]:
    """What is trained on sampled pairs; IPO and the hinge follow beta and are not tuned."""
    return {
        "DPO": DPO(beta=beta),
        "Hinge": Hinge(beta=beta),
        "IPO": IPO(beta=beta, log_ratios="sum"),
        "log-odds": LogOdds(beta=beta),
        "log pi": SimPO(beta=beta, gamma=0.0),
        "SimPO, gamma 0.5": SimPO(beta=beta, gamma=0.5),
        "SimPO, gamma 1.5": SimPO(beta=beta, gamma=1.5),
        "SFT": SFT(log_likelihood="sum"),
    }


def sampled_curves(
    rng: torch.Generator, beta: float, problems: int = 6, steps: int = 1500, batch: int = 512
) -> tuple[float, dict[str, Curve]]:
    """Train every objective on the same sampled pairs; the start and a curve for each.

    32 responses, chosen from the reference, rejected in closed form; Adam at 0.02 with cosine.
    """
    taught = lesson(rng, problems, 32, beta, change=1.0)
    objectives = sampled_objectives(beta)
    drawn = [
        torch.multinomial(logp.exp(), steps * batch, replacement=True, generator=rng)
        for logp in (taught.chosen, taught.rejected)
    ]
    policy = TabularPolicy(taught.reference.expand(len(objectives), -1, -1))
    target = taught.target.expand(len(objectives), -1, -1)
    recorded: dict[int, Tensor] = {}

    def loss(step: int) -> Tensor:
        here = slice(step * batch, (step + 1) * batch)
        chosen, rejected = (side[:, here] for side in drawn)
        reference = pair_of(taught.reference, chosen, rejected)
        logp = policy.logp()
        if step % 100 == 0:
            recorded[step] = jensen_shannon(logp.detach(), target)
        total = torch.zeros((), dtype=torch.float64)
        for objective, table in zip(objectives.values(), logp.unbind(0), strict=True):
            total = total + objective(pair_of(table, chosen, rejected), reference).sum() / batch
        return total

    anneal(policy, loss, steps, lr=0.02)
    recorded[steps] = jensen_shannon(policy.logp().detach(), target)
    curves = {
        name: Curve(
            tuple(recorded),
            tuple(float(values[place].mean()) for values in recorded.values()),
            float(recorded[steps][place].std()) / math.sqrt(problems),
        )
        for place, name in enumerate(objectives)
    }
    return float(jensen_shannon(taught.reference, taught.target).mean()), curves


class Estimated(NamedTuple):
    """Estimates of one DID entropy over many repeats."""

    exact: float
    mean: float
    deviation: float
    effective_samples: float
    repeats: int

    @property
    def bias(self) -> float:
        """Mean estimate minus the exact value."""
        return self.mean - self.exact

    @property
    def unbiased(self) -> bool:
        """Whether the bias is within 4 standard errors of zero."""
        return abs(self.bias) <= 4 * self.deviation / math.sqrt(self.repeats)


KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "small": lambda logits, noise: logits + 0.3 * noise,
    "reinforce": lambda logits, noise: 1.6 * logits,
    "smooth": lambda logits, noise: 0.5 * logits,
}
"""How the target's next-token logits come from the reference's."""


def markov_nodes(logits: Float[Tensor, "T V V"]) -> Float[Tensor, "nodes V"]:
    """Next-token logits of a Markov chain, copied to every prefix of the tree.

    logits[t, v] belongs to position t after token v; the first position reads row 0.
    """
    length, vocabulary = logits.shape[:2]
    levels = [logits[0, :1]]
    for level in range(1, length):
        last = torch.arange(vocabulary**level) % vocabulary
        levels.append(logits[level, last])
    return torch.cat(levels)


def entropy_estimates(
    rng: torch.Generator, kind: str, samples: int = 32, repeats: int = 300
) -> dict[str, Estimated]:
    """The estimators on one random pair of six-token Markov models over six tokens.

    Logits N(0, 4), all 46,656 responses enumerated; proposals: the reference, the target, and the
    sequential one.
    """
    logits = 2 * torch.randn((6, 6, 6), generator=rng, dtype=torch.float64)
    noise = torch.randn((6, 6, 6), generator=rng, dtype=torch.float64)
    reference_nodes = markov_nodes(logits).log_softmax(-1)
    target_nodes = markov_nodes(KINDS[kind](logits, noise)).log_softmax(-1)
    reference, target = sequence_logp(reference_nodes, 6), sequence_logp(target_nodes, 6)
    ratio = target - reference
    exact = float(did.did_entropy(ratio))
    results = {}
    for name, proposal in (("reference", reference), ("target", target)):
        drawn = torch.multinomial(
            proposal.exp(), repeats * samples, replacement=True, generator=rng
        ).reshape(repeats, samples)
        results[name] = did.estimate_did_entropy(ratio[drawn], proposal[drawn])
    followed = did.sample_did(target_nodes - reference_nodes, 6, (repeats, samples), rng)
    results["sequential"] = did.weighted_did_entropy(*followed)
    return {
        name: Estimated(
            exact,
            float(estimate.entropy.mean()),
            float(estimate.entropy.std()),
            float(estimate.effective_samples.mean()),
            repeats,
        )
        for name, estimate in results.items()
    }


def estimates_over_models(
    rng: torch.Generator, models: int = 10
) -> dict[tuple[str, str], list[Estimated]]:
    """(update, proposal) -> the estimates on each of several references, the same for all."""
    seeds = torch.randint(2**31, (models,), generator=rng).tolist()
    found: dict[tuple[str, str], list[Estimated]] = {}
    for kind in KINDS:
        for seed in seeds:
            estimates = entropy_estimates(torch.Generator().manual_seed(seed), kind)
            for proposal, value in estimates.items():
                found.setdefault((kind, proposal), []).append(value)
    return found


REFERENCES: dict[str, Callable[[torch.Generator, tuple[int, int]], Tensor]] = {
    "Zipf 1.5": lambda rng, shape: (
        -1.5 * torch.arange(1, shape[1] + 1, dtype=torch.float64).log().expand(shape)
    ),
    "small head, flat tail": lambda rng, shape: (
        6.0 * (torch.arange(shape[1]) < max(2, shape[1] // 50)) + 0.3 * _normal(rng, shape)
    ),
    "Gaussian logits, sd 4": lambda rng, shape: 4 * _normal(rng, shape),
    "Gaussian logits, sd 2": lambda rng, shape: 2 * _normal(rng, shape),
    "Gaussian logits, sd 1": lambda rng, shape: _normal(rng, shape),
    "Gaussian logits, sd 0.5": lambda rng, shape: 0.5 * _normal(rng, shape),
    "long lower tail (gamma)": lambda rng, shape: -_gamma_of_two(rng, shape),
}
"""Logits of reference policies, over (trials, Y)."""


def smoothing_beats_reinforcing(
    rng: torch.Generator, family: str, trials: int = 66
) -> tuple[float, float]:
    """How often smoothing has the higher DID entropy at equal KL(pi_ref || pi*); mean gap.

    pi* ~ pi_ref^a with a < 1 (smoothing) and a > 1 (reinforcing), solved for the same KL, for three
    sizes of response set. The gap is in units of log |Y|.
    """
    wins, gaps = [], []
    for size in (50, 300, 1500):
        reference = REFERENCES[family](rng, (trials, size)).log_softmax(-1)
        share = 0.1 + 0.8 * torch.rand(trials, generator=rng, dtype=torch.float64)
        largest = torch.minimum(_tilt_kl(reference, 0.0), _tilt_kl(reference, 8.0))
        high, low = (
            did.did_entropy((power.unsqueeze(-1) - 1) * reference)
            for power in (
                solve_tilt(reference, share * largest, 1.0, 0.0),
                solve_tilt(reference, share * largest, 1.0, 60.0),
            )
        )
        wins.append((high > low).double())
        gaps.append((high - low) / math.log(size))
    return float(torch.cat(wins).mean()), float(torch.cat(gaps).mean())


def solve_tilt(
    reference: Float[Tensor, "R Y"], divergence: Float[Tensor, " R"], near: float, far: float
) -> Float[Tensor, " R"]:
    """The power a between `near` and `far` with KL(pi_ref || pi_ref^a) = divergence: bisection."""
    inner = torch.full_like(divergence, near)
    outer = torch.full_like(divergence, far)
    for _ in range(45):
        middle = 0.5 * (inner + outer)
        short = _tilt_kl(reference, middle.unsqueeze(-1)) < divergence
        inner, outer = torch.where(short, middle, inner), torch.where(short, outer, middle)
    return 0.5 * (inner + outer)


def _tilt_kl(reference: Tensor, power: float | Tensor) -> Tensor:
    return kl(reference, (power * reference).log_softmax(-1))


def _normal(rng: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def _gamma_of_two(rng: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Gamma(2, 1): the sum of two exponentials."""
    return -torch.rand((2, *shape), generator=rng, dtype=torch.float64).log().sum(0)
