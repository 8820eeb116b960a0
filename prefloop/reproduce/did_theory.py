"""Differential information: identities, what each objective learns, why the chosen falls."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop import did
from prefloop.objectives import DPO, IPO, Hinge, SimPO
from prefloop.objectives.checks import given
from prefloop.objectives.family import PairLoss, Pairwise
from prefloop.tabular import (
    TabularPolicy,
    anneal,
    as_logps,
    expected_loss,
    independent_pairs,
    jensen_shannon,
    kl,
    population_optimum,
    random_logp,
)
from prefloop.types import Logps, Pair, PerPair

SIZES = (2, 3, 5, 8, 13, 21, 39)
"""Numbers of responses of the random problems."""


@dataclass(frozen=True, kw_only=True)
class LogOdds(Pairwise):
    """Bradley-Terry loss on log-odds: the part of ORPO that compares, without its SFT term.

    loss = -log sigmoid( beta (odds_w - odds_l) ),   odds = log pi - log(1 - pi)
    """

    beta: float
    needs_reference = False

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        chosen = self.rewards(policy.chosen, None)
        return -logsigmoid(chosen - self.rewards(policy.rejected, None))

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.beta * (policy.sum - torch.log(-torch.expm1(policy.sum)))


@dataclass(frozen=True, kw_only=True)
class ProbabilityGap(Pairwise):
    """Bradley-Terry loss on scale (pi - pi_ref): a reward that is no log-ratio."""

    scale: float

    def __call__(self, policy: Pair, reference: Pair | None) -> PerPair:
        assert reference is not None
        chosen = self.rewards(policy.chosen, reference.chosen)
        return -logsigmoid(chosen - self.rewards(policy.rejected, reference.rejected))

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        return self.scale * (policy.sum.exp() - given(reference).sum.exp())


class Lesson(NamedTuple):
    """Pairs whose differential information is that of a target, and the policies around them."""

    reference: Float[Tensor, "R Y"]
    target: Float[Tensor, "R Y"]
    chosen: Float[Tensor, "R Y"]
    rejected: Float[Tensor, "R Y"]
    beta: float

    @property
    def weight(self) -> Float[Tensor, "R Y Y"]:
        """Probability of each (chosen, rejected)."""
        return independent_pairs(self.chosen, self.rejected)


class Learned(NamedTuple):
    """Where an objective ends on a lesson: distances to the target, to q, and its reward's error.

    `reward_error` is the largest error of the objective's own reward margins against the
    Bradley-Terry reward of the data, beta log pi*/pi_ref.
    """

    to_target: Float[Tensor, " R"]
    to_did: Float[Tensor, " R"]
    reward_error: Float[Tensor, " R"]


def lesson(
    rng: torch.Generator,
    problems: int,
    responses: int,
    beta: float,
    change: float = 0.8,
) -> Lesson:
    """Random reference and target (logits apart by N(0, change^2)); chosen from the reference."""
    reference = random_logp((problems, responses), rng)
    noise = torch.randn((problems, responses), generator=rng, dtype=torch.float64)
    target = (reference + change * noise).log_softmax(-1)
    rejected = did.optimal_rejected(reference, target, reference, beta)
    return Lesson(reference, target, reference, rejected, beta)


def identity_errors(rng: torch.Generator, each: int = 300) -> dict[str, float]:
    """Largest errors of the algebra over random triples of policies, in nats or probability."""
    worst: dict[str, float] = {}
    for size in SIZES:
        for name, error in _errors_of_size(rng, each, size).items():
            worst[name] = max(worst.get(name, 0.0), float(error.abs().max()))
    return worst


def _errors_of_size(rng: torch.Generator, each: int, size: int) -> dict[str, Tensor]:
    reference, target, middle, chosen = (
        random_logp((each, size), rng, spread) for spread in (1.5, 1.5, 1.0, 1.0)
    )
    beta = 10 ** (2 * torch.rand((each, 1), generator=rng, dtype=torch.float64) - 1)
    q = did.log_did(target, reference)
    reverse = did.log_did(reference, target)
    chained = did.log_did(target, middle) + did.log_did(middle, reference)
    usual = did.optimal_rejected(reference, target, reference, beta)
    general = did.optimal_rejected(chosen, target, reference, beta)
    reward = beta * (target - reference)
    expected = (reward.unsqueeze(-1) - reward.unsqueeze(-2)).sigmoid()
    joint = independent_pairs(chosen, general)
    learned = did.learned_target(chosen, general, reference, beta)
    return {
        "pi_ref q, normalized, is pi": (reference + q).log_softmax(-1) - target,
        "q from pi to pi_ref is 1/q, normalized": (-q).log_softmax(-1) - reverse,
        "q_{a/b} q_{b/c}, normalized, is q_{a/c}": chained.log_softmax(-1) - q,
        "H(q) = log|Y| - KL(q || uniform)": did.did_entropy(target - reference)
        - (q.new_tensor(size).log() - kl(q, torch.zeros_like(q).log_softmax(-1))),
        "optimal rejected: q_{ref/l} is q_{*/ref}^beta, normalized": did.log_did(reference, usual)
        - (beta * q).log_softmax(-1),
        "any pi_w: pairs are Bradley-Terry in beta log pi*/pi_ref": joint / (joint + joint.mT)
        - expected,
        "and so says the DID form of the pair probability": did.preference(chosen, general)
        - expected,
        "the target is recovered from pi_w and pi_l": learned - target,
    }


def pairwise_signs(rng: torch.Generator, pairs: int = 20000) -> tuple[float, float, float]:
    """Unrelated policies: agreement of (beta > 0) with equal signs, share ordered, share matching.

    One random pair of responses of each of `pairs` random triples of policies.
    """
    margins = [
        spread * (logits[:, 0] - logits[:, 1])
        for spread in (1.0, 1.0, 2.0)
        for logits in [torch.randn((pairs, 2), generator=rng, dtype=torch.float64)]
    ]
    policy, reference, rejected = margins
    positive = did.pairwise_beta(policy, reference, rejected) > 0
    same = (reference - rejected).sign() == (policy - reference).sign()
    law = did.fit_power_law(policy, reference, rejected)
    agreement = (positive == same).double().mean().item()
    return agreement, did.ordered_margins(policy, reference, rejected), law.matching


def margins_of(logp: Float[Tensor, "R Y"]) -> Float[Tensor, " P"]:
    """log pi(y) - log pi(y') over all pairs y < y' of every problem, flat."""
    first, second = torch.triu_indices(logp.shape[-1], logp.shape[-1], offset=1)
    return (logp[:, first] - logp[:, second]).flatten()


def dynamics_errors(rng: torch.Generator, each: int = 300) -> dict[str, float]:
    """Largest errors of the laws of the log-likelihood changes, and counts of their signs."""
    worst: dict[str, float] = {}
    signs = {"chosen rises, beta < 1": 0.0, "chosen falls, beta < 1": 0.0, "wrong signs": 0.0}
    for size in SIZES:
        reference = random_logp((each, size), rng, 1.5)
        noise = torch.randn((each, size), generator=rng, dtype=torch.float64)
        target = (reference + noise).log_softmax(-1)
        beta = 10 ** (2 * torch.rand((each, 1), generator=rng, dtype=torch.float64) - 1)
        first = _chosen_from_reference(reference, target, beta)
        second, risen = _rejected_from_reference(reference, target, beta)
        for name, error in (first | second).items():
            worst[name] = max(worst.get(name, 0.0), float(error.abs().max()))
        small = beta.squeeze(-1) < 1
        signs["chosen rises, beta < 1"] += float((small & (risen >= 0)).sum())
        signs["chosen falls, beta < 1"] += float((small & (risen < 0)).sum())
        signs["wrong signs"] += float((~small & (risen < -1e-12)).sum())
    return worst | signs


def _chosen_from_reference(
    reference: Float[Tensor, "R Y"], target: Float[Tensor, "R Y"], beta: Float[Tensor, "R 1"]
) -> dict[str, Tensor]:
    rejected = did.optimal_rejected(reference, target, reference, beta)
    law = did.change_when_chosen_is_reference(target, reference, rejected, beta)
    chosen_change = did.expected_change(reference, target, reference)
    rejected_change = did.expected_change(rejected, target, reference)
    apart = (kl(reference, rejected) + kl(rejected, reference)) / beta.squeeze(-1)
    return {
        "C1 chosen": chosen_change - law.chosen,
        "C1 rejected": rejected_change - law.rejected,
        "C3": chosen_change - rejected_change - apart,
    }


def _rejected_from_reference(
    reference: Float[Tensor, "R Y"], target: Float[Tensor, "R Y"], beta: Float[Tensor, "R 1"]
) -> tuple[dict[str, Tensor], Float[Tensor, " R"]]:
    chosen = (reference + beta * (target - reference)).log_softmax(-1)
    law = did.change_when_rejected_is_reference(target, reference, chosen, beta)
    chosen_change = did.expected_change(chosen, target, reference)
    rejected_change = did.expected_change(reference, target, reference)
    errors = {
        "C2 chosen": chosen_change - law.chosen,
        "C2 rejected": rejected_change - law.rejected,
    }
    return errors, chosen_change


def uniqueness(rng: torch.Generator, problems: int = 20) -> dict[str, Learned]:
    """Where each objective ends when it may see infinitely many pairs of the lesson."""
    taught = lesson(rng, problems, 16, beta=0.5)
    length = torch.randint(1, 6, taught.reference.shape, generator=rng)
    beta = taught.beta
    results = {
        "DPO": learned(DPO(beta=beta), taught),
        "log pi (SimPO at one token, no margin)": learned(SimPO(beta=beta, gamma=0.0), taught),
        "log-odds (ORPO without SFT)": learned(LogOdds(beta=beta), taught),
        "IPO": learned(IPO(beta=beta, log_ratios="sum"), taught),
        "probability gap": learned(ProbabilityGap(scale=5.0), taught),
        "SimPO, random lengths": learned(SimPO(beta=2.0, gamma=0.0), taught, length),
    }
    hinge = measured(Hinge(beta=beta), taught, _hinge_optimum(beta, taught))
    return results | {"Hinge": hinge}


def learned(
    objective: Pairwise, taught: Lesson, length: Int[Tensor, "R Y"] | None = None
) -> Learned:
    """Population optimum of a smooth objective on a lesson, measured."""
    logp = population_optimum(objective, taught.reference, taught.weight, length)
    return measured(objective, taught, logp, length)


def measured(
    objective: Pairwise,
    taught: Lesson,
    logp: Float[Tensor, "R Y"],
    length: Int[Tensor, "R Y"] | None = None,
) -> Learned:
    """Distances of a policy from the target, from q, and of its reward from the data's."""
    rewards = objective.rewards(as_logps(logp, length), as_logps(taught.reference, length))
    error = rewards - taught.beta * (taught.target - taught.reference)
    return Learned(
        jensen_shannon(logp, taught.target),
        jensen_shannon(logp, did.log_did(taught.target, taught.reference)),
        error.amax(-1) - error.amin(-1),
    )


def _hinge_optimum(beta: float, taught: Lesson) -> Float[Tensor, "R Y"]:
    """The hinge has corners, where L-BFGS stalls: Adam with a step that decays."""
    policy, weight, objective = TabularPolicy(taught.reference), taught.weight, Hinge(beta=beta)

    def loss(step: int) -> Tensor:
        return expected_loss(objective, policy.logp(), taught.reference, weight).sum()

    anneal(policy, loss, steps=1500, lr=0.05)
    return policy.logp().detach()


def mismatch(
    rng: torch.Generator, rejected: dict[str, float | str], problems: int = 20
) -> dict[str, tuple[float, float]]:
    """DPO at beta 0.5 on wrong rejected responses: (mean JS to target, largest JS to the law).

    `rejected` maps a name to the beta' that the rejected ones were built for, or to "uniform",
    "reference", "target".
    """
    taught = lesson(rng, problems, 16, beta=0.5)
    fixed = {
        "uniform": torch.zeros_like(taught.reference).log_softmax(-1),
        "reference": taught.reference,
        "target": taught.target,
    }
    results = {}
    for name, kind in rejected.items():
        drawn = (
            fixed[kind]
            if isinstance(kind, str)
            else did.optimal_rejected(taught.reference, taught.target, taught.reference, kind)
        )
        weight = independent_pairs(taught.reference, drawn)
        logp = population_optimum(DPO(beta=taught.beta), taught.reference, weight)
        law = did.learned_target(taught.reference, drawn, taught.reference, taught.beta)
        to_target = float(jensen_shannon(logp, taught.target).mean())
        results[name] = (to_target, float(jensen_shannon(logp, law).max()))
    return results


class Flow(NamedTuple):
    """Changes of expected log-likelihood along gradient flow from the reference, (steps, R)."""

    chosen: Float[Tensor, "S R"]
    rejected: Float[Tensor, "S R"]
    entropy: Float[Tensor, "S R"]
    beta: float


def flow(objective: PairLoss, taught: Lesson, steps: int = 800, rate: float = 3.0) -> Flow:
    """Small steps of plain gradient descent on the expected loss, recorded before each step.

    The step is rate / beta^2 in the margin's own units, so that all betas move at one speed.
    """
    policy, weight = TabularPolicy(taught.reference), taught.weight
    reference = taught.reference
    rows = []
    for _ in range(steps):
        logp = policy.logp()
        fixed = logp.detach()
        rows.append(
            (
                did.expected_change(taught.chosen, fixed, reference),
                did.expected_change(taught.rejected, fixed, reference),
                -(fixed.exp() * fixed).sum(-1),
            )
        )
        loss = expected_loss(objective, logp, reference, weight).sum()
        slope = torch.autograd.grad(loss, policy.logits)[0]
        with torch.no_grad():
            policy.logits.sub_(rate / taught.beta**2 * slope)
    return Flow(*(torch.stack(column) for column in zip(*rows, strict=True)), beta=taught.beta)


def flows(
    rng: torch.Generator,
    problems: int = 10,
    betas: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0),
    steps: int = 800,
) -> list[tuple[Flow, Flow]]:
    """Gradient flow of DPO at each beta: first the chosen from the reference, then the rejected."""
    pairs = []
    for beta in betas:
        taught = lesson(rng, problems, 32, beta, change=0.7)
        reference, target = taught.reference, taught.target
        chosen = (reference + beta * (target - reference)).log_softmax(-1)
        both = Lesson(
            reference.repeat(2, 1),
            target.repeat(2, 1),
            torch.cat([reference, chosen]),
            torch.cat([taught.rejected, reference]),
            beta,
        )
        run = flow(DPO(beta=beta), both, steps)
        sides = zip(*(part.tensor_split(2, dim=1) for part in run[:3]), strict=True)
        first, second = (Flow(*side, beta=beta) for side in sides)
        pairs.append((first, second))
    return pairs
