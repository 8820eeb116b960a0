"""The practical samplers of a language model, on policies small enough to be exact.

Over texts a uniform base is useless: the policy is the base, and the tilt is a mixture of logits.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.aggregate import geometric
from prefloop.pair_weights import Couple, PairSampler, PairWeights, Tilt, arms, joint
from prefloop.reproduce.claims import Claim, Reproduction, Table, at_least, at_most, in_order
from prefloop.reproduce.samplers_theory import gaps, loss_gradient
from prefloop.tabular import entropy, kl, random_logp, sequence_logp


def language(seed: int) -> Reproduction:
    """C4: token-level mixing of logits, and the four methods over three rounds."""
    mixing = mixing_claims(seed)
    claims, table = rounds_of_methods(seed)
    return Reproduction(name="samplers", claims=(*mixing, *claims), tables=(table,))


def mixing_claims(seed: int, models: int = 200) -> list[Claim]:
    """Mixing next-token logits against the sequence-level product it approximates."""
    rng = torch.Generator().manual_seed(seed)
    nodes, vocabulary, length = 1 + 4 + 16, 4, 3
    reference = torch.randn((models, nodes, vocabulary), generator=rng, dtype=torch.float64)
    shift = torch.randn((models, nodes, vocabulary), generator=rng, dtype=torch.float64)
    policy = reference + 0.7 * shift
    ratio = _whole(policy, length) - _whole(reference, length)
    distance, mean_ratio = {}, {}
    for name, share in (("sampler 1", 1.5), ("policy", 1.0), ("sampler 2", 0.5)):
        token = _whole(_mixed(policy, reference, share), length)
        whole = (
            _whole(policy, length) * share + _whole(reference, length) * (1 - share)
        ).log_softmax(-1)
        distance[name] = float((token.exp() - whole.exp()).abs().sum(-1).mean() / 2)
        mean_ratio[name] = float((token.exp() * ratio).sum(-1).mean())
    same = _mixed(reference, reference, 1.5)
    source = "spec C4"
    off = float((_whole(same, length) - _whole(reference, length)).abs().max())
    name = "token-level mixture against the sequence-level one: mean total variation"
    return [
        at_most(f"{name}, sampler 1 (3/2, -1/2)", distance["sampler 1"], 0.07, source, "derived"),
        at_most(f"{name}, sampler 2 (1/2, 1/2)", distance["sampler 2"], 0.07, source, "derived"),
        at_most(
            "coefficients (1, 0) are the policy itself",
            distance["policy"],
            1e-15,
            source,
            "derived",
        ),
        at_most(
            "policy = reference: every mixture is the reference", off, 1e-13, source, "derived"
        ),
        in_order("mean log pi/pi_ref of what is sampled", mean_ratio, source, "derived"),
    ]


def _mixed(policy: Tensor, reference: Tensor, share: float) -> Tensor:
    return geometric(policy.unsqueeze(0), reference, torch.tensor([share], dtype=policy.dtype))


def _whole(logits: Tensor, length: int) -> Tensor:
    return sequence_logp(logits.log_softmax(-1), length)


def methods(beta: float) -> Mapping[str, PairWeights]:
    """The four methods as pair samplers over the base pi: exponents of (pi/pi_ref) beside it."""
    policy = Tilt()
    reference = Tilt(implicit=-1 / beta)
    first, second = Tilt(implicit=0.5 / beta), Tilt(implicit=-0.5 / beta)
    return {
        "Mix-P (3/2, -1/2) x (1/2, 1/2)": PairSampler((Couple(first, second),), (1.0,)),
        "hybrid: policy x reference": PairSampler((Couple(policy, reference),), (1.0,)),
        "on-policy": PairSampler((Couple(policy, policy),), (1.0,)),
        "vanilla: reference": PairSampler((Couple(reference, reference),), (1.0,)),
    }


def rounds_of_methods(seed: int) -> tuple[list[Claim], Table]:
    """C6.4: three rounds of 64 labelled pairs each, on 300 problems of 20 answers."""
    rng = torch.Generator().manual_seed(seed)
    reference = random_logp((300, 20), rng)
    reward = 2 * torch.randn((300, 20), generator=rng, dtype=torch.float64)
    beta, rows, mean = 0.5, [], {}
    best = beta * (reference + reward / beta).logsumexp(-1)
    for name, sampler in methods(beta).items():
        implicit = _three_rounds(sampler, reference, reward, beta, seed)
        policy = (reference + implicit / beta).log_softmax(-1)
        value = (policy.exp() * reward).sum(-1) - beta * kl(policy, reference)
        lost = best - value
        mean[name] = float(-lost.mean())
        spread = float(lost.std() / lost.numel() ** 0.5)
        rows.append((name, float(lost.mean()), spread, float(entropy(policy).mean())))
    table = Table(
        title="Three rounds of 64 labelled pairs, 300 problems: regularised value lost",
        columns=("method", "lost", "standard error", "entropy of the policy"),
        rows=tuple(rows),
    )
    ours, *others = mean.values()
    claim = at_least(
        "three rounds: Mix-P's value over the best other method's",
        ours - max(others),
        0.0,
        "spec C6.4",
        "guessed",
    ).conditional("an expectation of small margins, not a theorem: it depends on pairs and rewards")
    return [claim], table


def _three_rounds(
    sampler: PairWeights,
    reference: Float[Tensor, "G Y"],
    reward: Float[Tensor, "G Y"],
    beta: float,
    seed: int,
) -> Float[Tensor, "G Y"]:
    """Implicit rewards after three rounds: sample pairs, label them, train on all of that round.

    The first round is on-policy from the reference for every method, as in the paper's protocol.
    """
    draws = np.random.default_rng(seed)
    preferred = gaps(reward).sigmoid().numpy()
    theta = torch.zeros_like(reward)
    for number in range(3):
        policy = (reference + theta).log_softmax(-1)
        way = sampler if number else PairSampler((Couple(),), (1.0,))
        chance = joint(way(arms(reward, beta * theta, policy))).numpy()
        counts = draws.multinomial(64, chance.reshape(len(chance), -1)).reshape(chance.shape)
        won = draws.binomial(counts, preferred)
        weight = torch.from_numpy(won + (counts - won).swapaxes(-1, -2)) / 64
        for _ in range(100):
            theta = theta - 4.0 * loss_gradient(beta, theta, weight)
    return beta * theta
