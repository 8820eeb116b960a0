"""`prefloop reproduce samplers`: which pairs online DPO is shown decides how fast it converges.

Paper: "The Crucial Role of Samplers in Online DPO", arXiv 2409.19605 (ICLR 2025). Its theorems were
not available to us: the rates come from notes of others and from memory, their conditions from our
own mathematics. "spec" is the project's specification.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from prefloop.pair_weights import (
    BASE,
    BY_POLICY,
    BY_REWARD,
    MIX_P,
    MIX_P_CLIPPED,
    MIX_R,
    UNIFORM,
    Couple,
    FixedMixture,
    PairSampler,
    PairWeights,
    Tilt,
)
from prefloop.reproduce import samplers_theory as theory
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
from prefloop.reproduce.samplers_text import language
from prefloop.reproduce.samplers_theory import Bandits, bandits

THREE: Mapping[str, PairSampler] = {"Unif": UNIFORM, "Mix-R": MIX_R, "Mix-P": MIX_P}


def reproduce(seed: int) -> Reproduction:
    """Check rates, closed forms, the ablation and the noise floor, and replay the bandit."""
    parts = [rates(seed), closed_forms(seed), ablation(), beyond(seed), noise(seed), bandit(seed)]
    return joined("samplers", [*parts, language(seed)])


def rates(seed: int, count: int = 3000) -> Reproduction:
    """C-T1 to C-T4: every pair of `count` bandits against the bounds, step by step."""
    problems = theory.unit_range_bandits(count, seed)
    bounds = {
        "Unif": ("C-T1", lambda step: 0.588**step),
        "Mix-R": ("C-T3", lambda step: 0.5 ** (2.0**step - 1)),
        "Mix-P": ("C-T4", lambda step: 0.611 ** (2.0**step - 1)),
    }
    golden = {
        "Unif": (1.0, 0.0758, 0.0151, 0.0032, 6.8e-4, 1.5e-4),
        "Mix-R": (1.0, 0.1752, 0.0072, 1.2e-5, 3.4e-11, 5e-19),
        "Mix-P": (1.0, 0.0758, 0.00125, 3.6e-7, 3e-14, 4e-19),
    }
    claims, rows = [], []
    figure, (ax,) = panels([f"Worst error over {count} bandits, and the bounds"])
    for place, (name, sampler) in enumerate(THREE.items()):
        worst = theory.descend_residuals(sampler, problems, 6).amax(-1).tolist()
        label, bound = bounds[name]
        allowed = [bound(step) for step in range(7)]
        ratio = max(value / limit for value, limit in zip(worst, allowed, strict=True))
        title = f"DPO-{name}: largest |delta| over its bound, T = 0..6"
        claims.append(at_most(title, ratio, 1.0, label, "third party"))
        claims.append(_golden_claim(name, worst, golden[name]))
        claims.append(_objective_claim(name, sampler, problems, worst))
        rows.append((name, "measured", *worst[:6]))
        rows.append((name, "spec", *golden[name]))
        ax.plot(worst, color=COLORS[place], marker="o", ms=3, label=name)
        ax.plot(allowed, color=COLORS[place], linestyle=":", linewidth=1)
    _log_axis(ax, "update", "largest |delta|", 1e-24)
    table = Table(
        title=f"Largest |delta| over {count} bandits; the specification's T = 5 is where long "
        "double ends, not where the recursion does",
        columns=("sampler", "", *(f"T = {step}" for step in range(6))),
        rows=tuple(rows),
    )
    figures = {"samplers-rates": figure}
    return Reproduction(name="samplers", claims=tuple(claims), figures=figures, tables=(table,))


def _golden_claim(name: str, worst: list[float], golden: tuple[float, ...]) -> Claim:
    """Worst errors agree with those that were found beforehand, on other random bandits."""
    off = max(abs(found / known - 1) for found, known in zip(worst[:5], golden[:5], strict=True))
    title = f"DPO-{name}: worst errors, T = 0..4, relative to those of the specification"
    return at_most(title, off, 0.05, "spec C2", "derived")


def _objective_claim(
    name: str, sampler: PairSampler, problems: Bandits, worst: list[float]
) -> Claim:
    """The same recursion, run as gradients of the package's DPO objective in float64."""
    path = theory.descend(sampler, problems, beta=1.0, steps=6)
    errors = [float(theory.largest_error(problems, implicit).max()) for implicit in path]
    off = max(abs(found - exact) for found, exact in zip(errors, worst, strict=True))
    title = f"DPO-{name}: the objective's gradients against the residual recursion"
    return at_most(title, off, 1e-14, "spec C1", "derived")


def closed_forms(seed: int) -> Reproduction:
    """Two arms in closed form, the linear rate of Unif from a spectrum, and where 0.588 is from."""
    source, claims = "spec C2", []
    for gap in (0.3, 1.0, 2.0):
        pair = bandits(torch.tensor([0.0, gap], dtype=torch.float64))
        paths = {name: theory.descend_residuals(way, pair, 30) for name, way in THREE.items()}
        start = gap - 2 * math.tanh(gap / 2)
        signed = theory.descend(MIX_R, pair, 1.0, 1)[1]
        first = float((pair.reward - signed).diff(dim=-1))
        rate = float(paths["Unif"][30] / paths["Unif"][29])
        linear, half = math.tanh(gap / 2) ** 2, 0.5 * math.tanh(gap / 2)
        step = f"two arms, R = {gap}:"
        sinh = gap - math.sinh(gap)
        claims += [
            near(
                f"{step} Unif's delta_1", float(paths["Unif"][1]), start, 1e-12, source, "derived"
            ),
            near(
                f"{step} Mix-P's delta_1", float(paths["Mix-P"][1]), start, 1e-12, source, "derived"
            ),
            near(f"{step} Mix-R's delta_1 = R - sinh R", first, sinh, 1e-12, source, "derived"),
            near(f"{step} Unif's rate", rate, linear, 1e-6, source, "derived"),
        ]
        if gap < 2:  # the quadratic regime needs a small error to start from
            for name in ("Mix-R", "Mix-P"):
                path = paths[name].tolist()
                last = max(t for t, error in enumerate(path) if error > 1e-8)
                ratio = path[last + 1] / path[last] ** 2
                title = f"{step} {name}'s delta_{last + 1} / delta_{last}^2"
                claims.append(near(title, ratio, half, 1e-3, source, "derived"))
    return Reproduction(name="samplers", claims=(*claims, *_spectral_claims(seed)))


def _spectral_claims(seed: int) -> list[Claim]:
    """C-T2: a computable lower bound on how slow Unif is; it is linear unless all rewards agree."""
    rng = np.random.default_rng(seed)
    claims, slowest, fastest, bound = [], 0.0, 1.0, math.tanh(0.5) ** 2
    for count in (3, 6, 10):
        drawn = torch.from_numpy(rng.random((200, count)))
        problems = bandits(theory.unit_range(drawn, torch.ones_like(drawn, dtype=torch.bool)))
        path = theory.descend_residuals(UNIFORM, problems, 60)
        predicted = theory.uniform_rate(problems.reward)
        off = float((path[60] / path[59] - predicted).abs().max())
        title = f"Unif's rate against its spectrum, 200 bandits of {count} arms"
        claims.append(at_most(title, off, 2e-3, "spec C2", "derived"))
        slowest, fastest = (
            max(slowest, float(predicted.max())),
            min(fastest, float(predicted.min())),
        )
    title = "largest spectral rate over its limit tanh^2(1/2)"
    return [
        *claims,
        at_most(title, slowest / bound, 1.0, "spec C2", "derived"),
        at_least(
            "smallest spectral rate: never faster than linear", fastest, 1e-3, "C-T2", "derived"
        ),
    ]


LINEAR: Mapping[str, tuple[PairWeights, float]] = {
    "uniform alone, W = 4 (Unif)": (UNIFORM, 0.136),
    "uniform alone, W = 2": (PairSampler((BASE,), (1.0,)), 0.568),
    "by reward alone, doubled": (PairSampler((BY_REWARD,), (2.0,)), 0.136),
    "by policy alone, doubled": (PairSampler((BY_POLICY,), (2.0,)), 0.136),
}
"""Samplers that converge linearly, with the specification's factor a step."""

QUADRATIC: Mapping[str, tuple[PairWeights, tuple[float, ...]]] = {
    "Mix-R": (MIX_R, (0.11, 1.8e-3, 4.4e-7, 2.7e-14)),
    "Mix-P": (MIX_P, (0.049, 3.3e-4, 1.6e-8, 3.6e-17)),
}
"""Samplers that converge quadratically, with the specification's errors after 1 to 4 updates."""


def ablation() -> Reproduction:
    """C6.3: each half of the mixture is linear on its own; only their sum is quadratic."""
    source, drawn = "spec C6.3", torch.from_numpy(np.random.default_rng(0).random(10))
    problem = bandits(theory.unit_range(drawn, torch.ones(10, dtype=torch.bool)))
    claims: list[Claim] = []
    paths: dict[str, list[float]] = {}
    for name, (sampler, golden) in LINEAR.items():
        path = paths[name] = theory.descend_residuals(sampler, problem, 12).tolist()
        rate = path[8] / path[7]
        claims.append(near(f"{name}: factor a step", rate, golden, 1e-3, source, "derived"))
    for name, (sampler, errors) in QUADRATIC.items():
        path = paths[name] = theory.descend_residuals(sampler, problem, 12).tolist()
        off = max(abs(found / known - 1) for found, known in zip(path[1:5], errors, strict=True))
        title = f"{name}: errors 1..4 relative to the specification's"
        claims.append(at_most(title, off, 0.05, source, "derived"))
        power = math.log(path[4]) / math.log(path[3])
        claims.append(near(f"{name}: order of convergence", power, 2.0, 0.25, source, "derived"))
    figure, (ax,) = panels(["Ten arms, rewards in [0, 1]: which part converges how"])
    for place, (name, path) in enumerate(paths.items()):
        ax.plot(path, color=COLORS[place], marker="o", ms=3, label=name)
    _log_axis(ax, "update", "largest |delta|", 1e-18)
    table = Table(
        title="Ablation at the theorem's scaling, the specification's bandit",
        columns=("sampler", *(f"T = {step}" for step in range(6)), "T = 8 / T = 7"),
        rows=tuple((name, *path[:6], path[8] / path[7]) for name, path in paths.items()),
    )
    figures = {"samplers-ablation": figure}
    return Reproduction(name="samplers", claims=tuple(claims), figures=figures, tables=(table,))


def beyond(seed: int) -> Reproduction:
    """Reward ranges beyond the theorem's [0, 1], at its learning rate."""
    ranges, count, limit = (1.0, 2.0, 3.0, 4.0, 6.0), 50, 200
    drawn = torch.from_numpy(np.random.default_rng(seed).random((count, 10)))
    unit = theory.unit_range(drawn, torch.ones_like(drawn, dtype=torch.bool))
    reward = torch.tensor(ranges, dtype=torch.float64)[:, None, None] * unit
    claims, rows = [], []
    failures: dict[str, Tensor] = {}
    for name, sampler in THREE.items():
        path = theory.descend(sampler, bandits(reward), 1.0, limit)
        errors = torch.stack([theory.largest_error(bandits(reward), state) for state in path])
        reached = theory.first_below(errors.nan_to_num(torch.inf), 1e-8)
        failed = reached.isinf().sum(-1)
        failures[name] = failed
        for place, width in enumerate(ranges):
            median = float(reached[place].median())
            rows.append((name, width, int(failed[place]), median))
        title = f"{name}: failures at ranges 1 to 4, of 200 bandits"
        claims.append(at_most(title, int(failed[:4].sum()), 0, "spec C2", "derived"))
    claims += [
        at_least(
            "Unif: failures at range 6, of 50", int(failures["Unif"][4]), 1, "spec C2", "derived"
        ),
        at_most(
            "Mix-P: failures at range 6, of 50", int(failures["Mix-P"][4]), 0, "spec C2", "derived"
        ),
    ]
    table = Table(
        title=f"Larger reward ranges: updates to 1e-8 (50 bandits of 10 arms, at most {limit})",
        columns=("sampler", "range", "failed", "median updates"),
        rows=tuple(rows),
    )
    return Reproduction(name="samplers", claims=tuple(claims), tables=(table,))


def noise(seed: int) -> Reproduction:
    """C-T5: with noisy gradients, straight down to a floor of about sqrt(2) sigma."""
    rng = torch.Generator().manual_seed(seed)
    levels = torch.tensor([1e-3, 1e-2, 5e-2], dtype=torch.float64)
    reward = torch.rand((3, 50, 10), generator=rng, dtype=torch.float64)
    problems, beta = bandits(reward), 1.0

    def disturb(gradient: Tensor) -> Tensor:
        drawn = torch.randn(gradient.shape, generator=rng, dtype=gradient.dtype)
        return gradient + beta * 10 * levels[:, None, None] * drawn

    claims = []
    figure, (ax,) = panels(["RMS error under gradient noise"])
    for place, (name, sampler) in enumerate({**THREE, "Mix-P*": MIX_P_CLIPPED}.items()):
        path = theory.descend(sampler, problems, beta, 60, disturb)
        error = theory.root_mean_square(problems, path).mean(-1)  # (S, levels)
        floor = error[30:].mean(0) / (2**0.5 * levels)
        for level, ratio in zip(levels.tolist(), floor.tolist(), strict=True):
            title = f"{name}: noise floor / (sqrt 2 sigma), sigma = {level}"
            claims.append(near(title, ratio, 1.0, 0.1, "C-T5, spec C2", "derived"))
        arrived = float(theory.first_below(error, float(1.1 * error[30:, 0].mean()))[0])
        golden = 3 if name == "Unif" else 2
        title = f"{name}: updates to the floor of sigma = 0.001"
        claims.append(near(title, arrived, golden, 0, "spec C2", "derived"))
        for level in range(3):
            label = name if level == 0 else None
            ax.plot(error[:11, level], color=COLORS[place], label=label, linewidth=1)
    _log_axis(ax, "update", "RMS delta", 1e-4)
    return Reproduction(name="samplers", claims=tuple(claims), figures={"samplers-noise": figure})


def bandit(seed: int) -> Reproduction:
    """C3: the authors' bandit (20 arms, N(0, 1) rewards, beta 3), exact and sampled."""
    reward = torch.from_numpy(np.random.default_rng(seed).standard_normal((16, 20)))
    halves = (0.5, 0.5)
    exact: Mapping[str, PairWeights] = {
        **THREE,
        "half uniform, half by reward": FixedMixture((BASE, BY_REWARD), halves),
        "half uniform, half by policy": FixedMixture((BASE, BY_POLICY), halves),
        "optimum x uniform": PairSampler((Couple(Tilt(reward=1 / 3)),), (1.0,)),
        "policy x uniform": PairSampler((Couple(Tilt(implicit=1 / 3)),), (1.0,)),
    }
    played = {name: theory.play(way, reward, 3.0, 10.0, 100) for name, way in exact.items()}
    rough: Mapping[str, PairWeights] = {"Unif": UNIFORM, "Mix-R": MIX_R, "Mix-P*": MIX_P_CLIPPED}
    sampled = {
        name: theory.play_sampled(way, reward[:4], 3.0, 0.05, 2000, seed)
        for name, way in rough.items()
    }
    figure, axes = panels(["exact, lr 10", "8192 sampled pairs, lr 0.05"])
    for ax, runs, start in zip(axes, (played, sampled), (1e-12, 1e-3), strict=True):
        for place, (name, run) in enumerate(runs.items()):
            ax.plot(run.error.median(-1).values, color=COLORS[place], label=name, linewidth=1)
        _log_axis(ax, "update", "mean |delta| (median bandit)", start)
    claims, table = _exact_claims(played)
    return Reproduction(
        name="samplers",
        claims=(*claims, *_sampled_claims(sampled)),
        figures={"samplers-bandit": figure},
        tables=(table,),
    )


def _exact_claims(played: Mapping[str, theory.Curves]) -> tuple[list[Claim], Table]:
    """How many updates each sampler takes at the authors' learning rate."""
    reached = {name: theory.first_below(run.error, 1e-6) for name, run in played.items()}
    rows = [
        (name, float(steps.median()), int(steps.isinf().sum()), float(played[name].error.max()))
        for name, steps in reached.items()
    ]
    table = Table(
        title="The authors' exact bandit, 16 reward draws: updates to a mean error of 1e-6",
        columns=("sampler", "median", "never in 100", "largest error"),
        rows=tuple(rows),
    )
    ratio = float(reached["Mix-P"].median() / reached["Unif"].median())
    rise = float((played["Mix-R"].error.amax(0) / played["Mix-R"].error[0]).median())
    slow = int(sum(reached[name].isinf().sum() for name in THREE))
    scaling = "at lr 10 and J = W / sum W, which is not the theorem's scaling: depends on the draw"
    name, source = "exact: median updates of Mix-P over Unif", "figure of the paper"
    return [
        at_most(name, ratio, 0.5, source, "figure"),
        at_least(
            "exact: Mix-R first rises, largest error over the first", rise, 1.2, source, "figure"
        ).conditional(scaling),
        at_most(
            "exact: runs of 48 not settled in 100 updates", slow, 0, "spec C3", "derived"
        ).conditional(scaling),
    ], table


def _sampled_claims(sampled: Mapping[str, theory.Curves]) -> list[Claim]:
    """The floor of the sampled updates and who arrives there first."""
    floor = {name: float(run.error[1600:].mean()) for name, run in sampled.items()}
    text = ", ".join(f"{name} {value:.4f}" for name, value in floor.items())
    lost = float(sampled["Unif"].loss[1600:].mean())
    arrival = {
        name: float(theory.first_below(run.error.mean(-1), 2 * floor["Unif"]))
        for name, run in sampled.items()
    }
    mixes, source = ("Mix-R", "Mix-P*"), "figure of the paper"
    return [
        near(
            "sampled: floor of the error, Unif", floor["Unif"], 0.0055, 0.002, source, "figure"
        ).noting(text),
        near("sampled: floor of V* - V, Unif", lost, 5e-6, 5e-6, source, "figure"),
        *(
            at_most(
                f"sampled: updates of {name} to twice the floor, over Unif's",
                arrival[name] / arrival["Unif"],
                0.85,
                source,
                "figure",
            )
            for name in mixes
        ),
    ]


def _log_axis(ax: Axes, x: str, y: str, lowest: float) -> None:
    ax.set(yscale="log", xlabel=x, ylabel=y)
    ax.set_ylim(bottom=lowest)
    ax.legend(fontsize=7, frameon=False)
