"""`prefloop reproduce mixture`: who is of which type, what data can tell, one policy for all.

Papers: "Direct Preference Optimization with Unobserved Preference Heterogeneity", arXiv 2405.15065,
and its successor 2510.15716 (EM-DPO, MMRA). Their tables were not available to us; algorithms are
after the authors' public code. "spec" is the project's specification.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.em import dirichlet_start, given_start, kmeans, type_accuracy, vote_features
from prefloop.reproduce import mixture_items as items
from prefloop.reproduce.claims import (
    Claim,
    Reproduction,
    Table,
    at_least,
    at_most,
    in_order,
    joined,
    near,
)
from prefloop.reproduce.drawing import COLORS, panels
from prefloop.reproduce.mixture_bandit import SHARES, best_arm_accuracy, train, vote
from prefloop.reproduce.mixture_items import KINDS, Fit, Kind
from prefloop.reproduce.mixture_known import identifiability
from prefloop.reproduce.mixture_one import aggregation

TIMES = (1, 2, 4, 8, 16)
GOLDEN_ACCURACY = {
    "pairs": (0.60, 0.77, 0.86, 0.93, 0.99),
    "best of three": (0.71, 0.81, 0.89, 0.96, 0.99),
    "rankings": (0.81, 0.87, 0.94, 0.99, 1.0),
}
GOLDEN_ERROR = {"pairs": 0.56, "best of three": 0.52, "rankings": 0.05}
"""Mean reward error at one judgement an annotator."""


def reproduce(seed: int) -> Reproduction:
    """Check identifiability, EM, min-max regret and the neural bandit."""
    parts = [
        identifiability(seed),
        evidence(seed),
        baselines(seed),
        aggregation(seed),
        bandit(seed),
    ]
    return joined("mixture", parts)


def evidence(seed: int, seeds: int = 4, restarts: int = 3) -> Reproduction:
    """E2: two opposite types over six items: how much each annotator's judgements say."""
    first = torch.from_numpy(np.random.default_rng(0).standard_normal(6) * 2)
    truth = torch.stack([first, -first])
    accuracy: dict[str, list[float]] = {}
    error: dict[str, list[float]] = {}
    lowest = 0.0
    for name, make in KINDS.items():
        accuracy[name], error[name] = [], []
        for times in TIMES:
            right, off, growth = _recovery(make(6), truth, times, seed, (seeds, restarts, 30))
            accuracy[name].append(right)
            error[name].append(off)
            lowest = min(lowest, growth)
    claims = [*_evidence_claims(accuracy, error), _monotone_claim(lowest)]
    figure, axes = panels(["Annotators put into their type", "Mean error of the rewards"])
    for place, name in enumerate(KINDS):
        for ax, values in zip(axes, (accuracy, error), strict=True):
            ax.plot(TIMES, values[name], color=COLORS[place], marker="o", ms=3, label=name)
    for ax in axes:
        ax.set(xscale="log", xlabel="judgements an annotator")
    axes[0].legend(fontsize=8, frameon=False)
    rows = [
        (name, times, accuracy[name][place], GOLDEN_ACCURACY[name][place], error[name][place])
        for name in KINDS
        for place, times in enumerate(TIMES)
    ]
    table = Table(
        title="Two opposite types, about 3,000 annotators, best of three starts",
        columns=("data", "judgements", "accuracy", "spec", "reward error"),
        rows=tuple(rows),
    )
    figures = {"mixture-evidence": figure}
    return Reproduction(name="mixture", claims=tuple(claims), figures=figures, tables=(table,))


def _recovery(
    kind: Kind, truth: Float[Tensor, "K Y"], times: int, seed: int, size: tuple[int, int, int]
) -> tuple[float, float, float]:
    """Mean type accuracy, mean reward error, and the smallest gain of likelihood in any round.

    `size` is how many seeds, restarts of each, and rounds.
    """
    seeds, restarts, count = size
    annotators = 3000 // max(1, times // 2)
    types, counts, starts = [], [], []
    for place in range(seeds):
        rng = torch.Generator().manual_seed(1000 * seed + place)
        types.append(torch.randint(len(truth), (annotators,), generator=rng))
        counts.append(items.ask(kind, truth, types[-1], times, rng))
        starts.append(_dirichlet(annotators, len(truth), restarts, 1000 * seed + 10 * place))
    every = items.fit_types(kind, torch.stack(counts).unsqueeze(1), torch.stack(starts), count)
    fit = items.best_restart(every)
    gamma = fit.last.belief.responsibilities
    right = [type_accuracy(z, gamma[place]) for place, z in enumerate(types)]
    off = float(items.reward_error(truth, fit.reward).mean())
    return float(np.mean(right)), off, float(every.history.diff(dim=0).min())


def _dirichlet(annotators: int, types: int, restarts: int, seed: int) -> Tensor:
    flat = (1.0,) * types
    return torch.stack([dirichlet_start(annotators, flat, seed + q) for q in range(restarts)])


def _evidence_claims(
    accuracy: Mapping[str, list[float]], error: Mapping[str, list[float]]
) -> list[Claim]:
    claims, source = [], "spec E2"
    for name, golden in GOLDEN_ACCURACY.items():
        off = [abs(found - known) for found, known in zip(accuracy[name], golden, strict=True)]
        title = f"{name}: type accuracy for m = 2 to 16, largest deviation from the specification"
        claims.append(at_most(title, max(off[1:]), 0.03, source, "derived"))
        title = f"{name}: type accuracy at m = 1"
        claims.append(near(title, accuracy[name][0], golden[0], 0.06, source, "derived"))
        title, known = f"{name}: reward error at m = 1", GOLDEN_ERROR[name]
        claims.append(near(title, error[name][0], known, 0.2, source, "derived"))
        later = max(error[name][1:])
        title = f"{name}: largest reward error at m = 2 to 16"
        claims.append(at_most(title, later, 0.13, source, "derived"))
        growth = min(after - before for before, after in pairwise(accuracy[name]))
        title = f"{name}: smallest gain of accuracy with more judgements"
        claims.append(at_least(title, growth, 0.0, source, "derived"))
    one = {f"{name}, m = 1": values[0] for name, values in list(accuracy.items())[::-1]}
    claims.append(in_order("what one judgement says of a type", one, source, "derived"))
    return claims


def _monotone_claim(lowest: float) -> Claim:
    name = "exact M-steps: smallest change of the penalised likelihood in any round"
    return at_least(name, lowest, -1e-10, "spec E2", "derived").noting(
        "rounding: the likelihoods are of size 1e4"
    )


def baselines(seed: int, seeds: int = 12, count: int = 60) -> Reproduction:
    """E2: worst-type regret of one policy, of cluster-then-DPO, and of EM from several starts."""
    kind, annotators, types = items.pairs(6), 150, 3
    rng = torch.Generator().manual_seed(seed)
    truth = 2 * torch.randn((seeds, types, 6), generator=rng, dtype=torch.float64)
    shares = torch.tensor([0.2, 0.3, 0.5])
    kinds = torch.multinomial(shares, seeds * annotators, replacement=True, generator=rng)
    kinds = kinds.reshape(seeds, annotators)
    counts = torch.stack([items.ask(kind, truth[s], kinds[s], 16, rng) for s in range(seeds)])
    clusters = torch.stack(
        [given_start(kmeans(_votes(kind, counts[s]), types, seed + s), types) for s in range(seeds)]
    )
    random = torch.stack([_dirichlet(annotators, types, 5, seed + 10 * s) for s in range(seeds)])
    uniform = torch.full((seeds, annotators, types), 1 / types, dtype=torch.float64)
    nudge = 1e-6 * torch.randn(uniform.shape, generator=rng, dtype=torch.float64)
    alone = torch.ones((seeds, annotators, 1), dtype=torch.float64)
    found = {
        "vanilla DPO": items.fit_types(kind, counts, alone, 1),
        "EM, uniform start": items.fit_types(kind, counts, uniform, 5),
        "cluster, then DPO": items.fit_types(kind, counts, clusters, 1),
        "EM, uniform + 1e-6": items.fit_types(kind, counts, uniform + nudge, count),
        "EM, Dirichlet": items.fit_types(kind, counts, random[:, 0], count),
        "EM, k-means": items.fit_types(kind, counts, clusters, count),
        "EM, best of 5": items.best_restart(
            items.fit_types(kind, counts.unsqueeze(1), random, count)
        ),
    }
    accuracy = {
        name: _accuracy(kinds, fit, clusters if name.startswith("cluster") else None)
        for name, fit in found.items()
        if name != "vanilla DPO"
    }
    return _baseline_report(found, accuracy, truth)


def _votes(kind: Kind, counts: Float[Tensor, "I O"]) -> Float[Tensor, "I Y"]:
    """Wins minus losses of every item, for each annotator."""
    item = torch.eye(int(kind.responses.max()) + 1, dtype=torch.float64)
    direction = item[kind.responses[:, 0]] - item[kind.responses[:, 1]]
    cast = (counts.unsqueeze(-1) * direction).flatten(0, 1)
    annotator = torch.arange(len(counts)).repeat_interleave(counts.shape[1])
    return vote_features(cast, annotator, len(counts))


def _accuracy(types: Tensor, fit: Fit, start: Tensor | None) -> float:
    gamma = fit.last.belief.responsibilities if start is None else start
    return float(np.mean([type_accuracy(types[s], gamma[s]) for s in range(len(types))]))


def _baseline_report(
    found: Mapping[str, Fit], accuracy: Mapping[str, float], truth: Float[Tensor, "G K Y"]
) -> Reproduction:
    regret = {
        name: items.cross_regret(truth, fit.reward).amin(-1).amax(-1) for name, fit in found.items()
    }
    mean = {name: float(values.mean()) for name, values in regret.items()}
    error = {name: float(values.std() / len(values) ** 0.5) for name, values in regret.items()}
    rows = [(name, accuracy.get(name, "-"), mean[name], error[name]) for name in found]
    table = Table(
        title="Three types, 150 annotators, 16 pairs each: regret of the worst-off type with the "
        "best fitted policy",
        columns=("method", "type accuracy", "regret", "standard error"),
        rows=tuple(rows),
    )
    saddle = found["EM, uniform start"].last.belief.responsibilities
    away = float((saddle - 1 / 3).abs().max())
    ordered = {name: mean[name] for name in ("vanilla DPO", "cluster, then DPO", "EM, best of 5")}
    source = "spec E2"
    claims = [
        in_order("worst-type regret", ordered, source, "derived"),
        near("vanilla DPO: worst-type regret", mean["vanilla DPO"], 2.61, 1.0, source, "derived"),
        near("cluster-then-DPO", mean["cluster, then DPO"], 0.17, 0.12, source, "derived"),
        near("EM, best of 5", mean["EM, best of 5"], 0.066, 0.05, source, "derived"),
        near("cluster: accuracy", accuracy["cluster, then DPO"], 0.937, 0.05, source, "derived"),
        near("EM: accuracy", accuracy["EM, best of 5"], 0.967, 0.03, source, "derived"),
        at_most("a uniform start never leaves the saddle: distance", away, 1e-9, source, "derived"),
    ]
    return Reproduction(name="mixture", claims=tuple(claims), tables=(table,))


def bandit(seed: int, seeds: int = 3) -> Reproduction:
    """E6.5: the neural bandit of the first version; an expectation that nobody had run."""
    rows, ends, accuracy = [], [], []
    figure, axes = panels([f"Shares of the types, seed {place}" for place in range(seeds)])
    for place in range(seeds):
        votes = vote(10 * seed + place)
        outcome = train(votes, 10 * seed + place)
        path = torch.stack([done.belief.responsibilities.mean(0) for done in outcome.path])
        axes[place].plot(path, linewidth=1)
        axes[place].set(xlabel="round", ylim=(0, 1))
        shares = path[-1].sort(descending=True).values.tolist()
        ends.append(max(abs(a - b) for a, b in zip(shares, sorted(SHARES)[::-1], strict=True)))
        accuracy.append(best_arm_accuracy(outcome, votes, seed))
        rows.append((place, *shares, accuracy[-1], outcome.game.worst, outcome.game.gap))
    columns = (
        "seed",
        "largest",
        "middle",
        "smallest",
        "best-arm accuracy",
        "min-max regret",
        "gap",
    )
    table = Table(
        title="Neural bandit after 20 rounds: shares of the types",
        columns=columns,
        rows=tuple(rows),
    )
    died = sum(end < 0.1 for end in ends)
    claims = [
        at_least(
            "best-arm accuracy of the users' policies", min(accuracy), 0.95, "spec E6.5", "guessed"
        ),
        at_least(
            f"shares near (.8, .2, 0), of {seeds} seeds", died, seeds, "spec E6.5", "guessed"
        ).conditional(
            "two networks may share the majority: nothing tells them apart, and all answer alike"
        ),
    ]
    return Reproduction(
        name="mixture", claims=tuple(claims), figures={"mixture-bandit": figure}, tables=(table,)
    )
