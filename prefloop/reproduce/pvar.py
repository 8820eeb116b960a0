"""`prefloop reproduce pvar`: what preference variance says, and when selecting by it pays.

Paper: "On the Role of Preference Variance in Preference Optimization", arXiv 2510.13022. "spec" is
the project's specification of it, where the paper itself could not be read.
"""

import math
from itertools import pairwise

import torch

from prefloop.bounds import expected_preference_variance
from prefloop.reproduce import pvar_theory as theory
from prefloop.reproduce.claims import (
    Claim,
    Reproduction,
    Table,
    at_least,
    at_most,
    joined,
    near,
)
from prefloop.reproduce.drawing import COLORS, panels
from prefloop.reproduce.pvar_arms import training
from prefloop.reproduce.pvar_experiments import fidelity
from prefloop.selection import bottom, preference_variance, top
from prefloop.tabular import random_logp

ATTAINED = 1 + 1e-9
"""Measured over bound where a bound is attained, up to rounding."""


def reproduce(seed: int) -> Reproduction:
    """Check every claim of the paper that can be checked exactly, and run E1 to E4."""
    return joined("pvar", [estimator(seed), bounds(seed), start(seed), training(seed)])


def estimator(seed: int) -> Reproduction:
    """The estimator: golden numbers, no bias, invariances, and how many samples it takes."""
    claims = [*golden_claims(), *bias_claims(seed), *invariance_claims(seed)]
    rng = torch.Generator().manual_seed(seed)
    golden = {2: (0.65, 0.75), 3: (0.77, 0.78), 4: (0.85, 0.83), 5: (0.89, 0.86), 8: (0.93, 0.90)}
    rows, off = [], 0.0
    for samples, (correlation, overlap) in golden.items():
        found = fidelity(rng, samples)
        spread = float(theory.estimates(2.0, samples, 20000, seed).std())
        rows.append((samples, spread, found[0], correlation, found[1], overlap))
        off = max(off, abs(found[0] - correlation), abs(found[1] - overlap))
    table = Table(
        title="How many responses a prompt needs (log-normal spread 0.8; sd at rewards N(0, 4))",
        columns=("n", "sd", "Spearman", "spec", "overlap of top halves", "spec"),
        rows=tuple(rows),
    )
    name = "ranking fidelity for n = 2 to 8: largest deviation from the specification"
    claims.append(
        at_most(name, off, 0.05, "spec 1.3", "derived").noting(
            "40,000 prompts here; the specification's numbers are one draw of 4,000, and its 0.65 "
            "at n = 2 is high: 0.61 here"
        )
    )
    return Reproduction(name="pvar", claims=tuple(claims), tables=(table,))


def golden_claims() -> list[Claim]:
    """Numbers that were worked out beforehand."""
    source = "spec 1.3"
    rewards = torch.tensor([0.0, 1, 3, -2], dtype=torch.float64)
    value = float(preference_variance(rewards))
    chance = (rewards.unsqueeze(-1) - rewards).sigmoid()
    full = float(chance.var(correction=0))
    gaps = torch.tensor([0.5, 1.0, 2.0, 5.0, 50.0], dtype=torch.float64)
    two = preference_variance(torch.stack([torch.zeros_like(gaps), gaps], -1))
    known = torch.tensor([0.014996, 0.053388, 0.145006, 0.243352, 0.25], dtype=torch.float64)
    spreads = theory.GAUSSIAN_SPREADS
    exact = torch.tensor(theory.gaussian_preference_variance(spreads), dtype=torch.float64)
    golden = (0.007363, 0.025377, 0.068419, 0.129994, 0.182763, 0.215180, 0.232425, 0.241192)
    off = float((exact - torch.tensor(golden, dtype=torch.float64)).abs().max())
    small = float(exact[0]) / (spreads[0] ** 2 / 8)
    return [
        near("PVar of rewards 0, 1, 3, -2", value, 0.1660665866, 1e-10, source, "derived"),
        near("variance with the diagonal (a common bug)", full, 0.124550, 1e-6, source, "derived"),
        at_most(
            "two responses, gaps 0.5 to 50: error",
            float((two - known).abs().max()),
            1e-6,
            source,
            "derived",
        ),
        at_most("rewards N(0, s^2), s = 0.25 to 32: error", off, 1e-6, source, "derived"),
        near("PVar / (Var/8) for small rewards, s = 1/4", small, 1, 0.1, source, "derived"),
    ]


def bias_claims(seed: int) -> list[Claim]:
    """The estimator has no bias at any n: by simulation and by enumerating every draw."""
    source = "spec 1.3"
    target = theory.gaussian_preference_variance((2.0,))[0]
    claims = []
    for samples in (2, 3, 5, 8):
        drawn = theory.estimates(2.0, samples, 40000, seed + samples)
        error = 4 * float(drawn.std()) / math.sqrt(len(drawn))
        name = f"mean estimate at n = {samples}, rewards N(0, 4)"
        claims.append(near(name, float(drawn.mean()), target, error, source, "derived"))
    rng = torch.Generator().manual_seed(seed)
    logp, rewards = random_logp((4,), rng), torch.randn(4, generator=rng, dtype=torch.float64)
    enumerated = theory.enumerated_mean(rewards, logp, 3)
    population = float(expected_preference_variance(rewards, logp))
    name = "mean over all 64 draws of 3 from 4 responses"
    return [*claims, near(name, enumerated, population, 1e-14, source, "derived")]


def invariance_claims(seed: int) -> list[Claim]:
    """Range, invariances and monotonicity in scale, on random prompts; halves do not overlap."""
    source = "spec 1.3"
    rng = torch.Generator().manual_seed(seed)
    rewards = 3 * torch.randn((2000, 6), generator=rng, dtype=torch.float64)
    value = preference_variance(rewards)
    changes = (rewards + 7.5, rewards[:, torch.randperm(6, generator=rng)], -rewards)
    same = max(float((preference_variance(other) - value).abs().max()) for other in changes)
    scaled = [preference_variance(rewards, scale=scale) for scale in (0.1, 0.5, 1.0, 2.0, 10.0)]
    growth = min(float((high - low).min()) for low, high in pairwise(scaled))
    equal = float(preference_variance(0 * rewards).max())
    shared = int(torch.isin(top(value, 1000), bottom(value, 1000)).sum())
    largest = float(scaled[-1].max())
    return [
        at_most("largest PVar, rewards scaled by 10", largest, 0.25, "Sec. 4", "reported"),
        at_most("PVar of equal rewards", equal, 0.0, source, "derived"),
        at_most("change under shift, order and sign", same, 1e-14, source, "derived"),
        at_least("smallest growth with the scale", growth, 0.0, source, "derived"),
        at_most("prompts in both the top and bottom half", shared, 0, "spec 1.9", "derived"),
    ]


def bounds(seed: int) -> Reproduction:
    """PVar bounds gradients, their noise and its own drift: 4,300 random policies."""
    problems = theory.random_problems(seed)
    plain = theory.gradient_ratios(problems)
    networks = theory.autoregressive_ratios(seed)
    labelled = theory.labelled_ratios(problems)
    claims = [*gradient_claims(plain, networks), *labelled_claims(labelled)]
    figure, axes = panels(["log-linear, |y| = 1", "autoregressive networks, |y| <= 4"])
    for ax, ratios in zip(axes, (plain, networks), strict=True):
        shown = ratios.variance > 1e-12
        for color, label, values in zip(
            COLORS,
            ("Cauchy-Schwarz", "martingale", "cube root (paper)"),
            (ratios.cauchy_schwarz, ratios.martingale, ratios.cube_root),
            strict=False,
        ):
            ax.scatter(
                ratios.variance[shown],
                values[shown],
                s=2,
                color=color,
                label=label,
                rasterized=True,
            )
        ax.set(xscale="log", xlabel="PVar of the policy", ylabel="||grad|| / bound")
        ax.axhline(1, color="black", linewidth=0.6)
        ax.legend(fontsize=7, loc="center left", markerscale=4)
    return Reproduction(name="pvar", claims=tuple(claims), figures={"pvar-bounds": figure})


def gradient_claims(plain: theory.GradientRatios, networks: theory.GradientRatios) -> list[Claim]:
    """Theorem 4.1 in the reading under which it holds, and the two tighter bounds."""
    loose = max(float(plain.cube_root.max()), float(networks.cube_root.max()))
    paper = at_most("||grad|| over 8 beta |y| gamma PVar^(1/3)", loose, 1.0, "Thm 4.1", "reported")
    return [
        paper.noting(
            "our reading: unlabelled pairs from the policy, gamma = largest norm of d logits / d "
            "theta; the paper's exact gamma is not known"
        ),
        at_most("that bound is loose: largest ratio", loose, 0.15, "spec 1.4 T3", "derived"),
        at_most(
            "||grad|| over the Cauchy-Schwarz bound",
            max(float(plain.cauchy_schwarz.max()), float(networks.cauchy_schwarz.max())),
            ATTAINED,
            "spec 1.4 T1",
            "derived",
        ),
        at_least(
            "and it is attained: largest ratio",
            float(plain.cauchy_schwarz.max()),
            0.99,
            "spec 1.4 T1",
            "derived",
        ),
        at_most(
            "||grad|| over sqrt(2 |y|) beta gamma sqrt(PVar)",
            max(float(plain.martingale.max()), float(networks.martingale.max())),
            1.0,
            "spec 1.4 T2",
            "derived",
        ),
    ]


def labelled_claims(ratios: theory.LabelledRatios) -> list[Claim]:
    """Bradley-Terry labels: gradient, signal-to-noise, drift from offline to online."""
    gradient, noise = float(ratios.gradient.max()), float(ratios.signal_to_noise.max())
    descent = float((ratios.descent > 0).double().mean())
    return [
        at_most("labelled ||grad|| over its bound", gradient, ATTAINED, "spec 1.4 T4", "derived"),
        at_least("and it is attained: largest ratio", gradient, 0.99, "spec 1.4 T4", "derived"),
        at_most("signal-to-noise over 4 PVar/(1 - 4 PVar)", noise, ATTAINED, "spec 1.6", "derived"),
        at_least("and it is attained: largest ratio", noise, 0.99, "spec 1.6", "derived"),
        at_most(
            "offline to online: (PVar_pi - PVar_offline) / Xi",
            float(ratios.drift.max()),
            1.0,
            "Thm 4.2 form, our Xi",
            "derived",
        ).noting("the paper's own Xi is three error terms whose expressions are not known"),
        at_most(
            "the same with Xi split in three terms",
            float(ratios.split_drift.max()),
            1.0,
            "Thm 4.2 form, our Xi",
            "derived",
        ),
        at_least(
            "share of first steps that raise the expected reward",
            descent,
            1.0,
            "spec 1.6",
            "derived",
        ).conditional("the paper's directional component is not known; not every step ascends"),
    ]


def start(seed: int) -> Reproduction:
    """At pi = pi_ref: online PVar is blind, hard labels are not covered, own labels are silent."""
    rng = torch.Generator().manual_seed(seed)
    logp = random_logp((500, 8), rng)
    blind = float(preference_variance(0.1 * (logp - logp)).max())
    rewards = 1e-3 * torch.tensor([0.3, 0.1, -0.1, -0.3], dtype=torch.float64)
    uniform = torch.zeros_like(rewards).log_softmax(-1)
    tiny = float(expected_preference_variance(rewards, uniform))
    hard = theory.hard_label_gradient(rewards, beta=0.1)
    logits = 2 * torch.randn((500, 8), generator=rng, dtype=torch.float64)
    own = theory.self_labelled_gradient(logits, beta=0.7)
    source = "spec 1.4"
    claims = (
        at_most("online PVar of any prompt at pi = pi_ref", blind, 0.0, source, "derived"),
        near("hard labels: ||grad|| while online PVar is 0", hard, 0.028, 5e-4, source, "derived"),
        near("and PVar of those rewards", tiny, 6e-9, 1e-9, source, "derived"),
        at_most("labels from the policy itself: ||grad||", own, 1e-14, source, "derived"),
    )
    return Reproduction(name="pvar", claims=claims)
