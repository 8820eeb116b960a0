"""E1 to E4 of the PVar reproduction: arms, robustness, a tenth against all, other objectives."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from prefloop.objectives import DPO, ORPO, SimPO
from prefloop.objectives.unpaired import KTO
from prefloop.reproduce import pvar_experiments as experiments
from prefloop.reproduce.claims import (
    Claim,
    Reproduction,
    Table,
    at_most,
    joined,
    mean_and_error,
)
from prefloop.reproduce.drawing import bars, curves, logarithmic, panels
from prefloop.reproduce.pvar_experiments import (
    Outcome,
    TableLoss,
    World,
    on_both_responses,
    on_pairs,
)

SEEDS = 12
"""Worlds of every training experiment."""

ARMS = ("top", "random", "bottom", "gap")

SETTINGS = {
    ("best/worst", 0.0): (0.865, 0.831, 0.734),
    ("best/worst", 2.0): (0.855, 0.831, 0.782),
    ("Bradley-Terry", 0.0): (0.807, 0.742, 0.589),
    ("Bradley-Terry", 2.0): (0.793, 0.742, 0.651),
}
"""(labels, noise of the reward model): win rates of top, random, bottom in the specification."""

OBJECTIVES: dict[str, tuple[TableLoss, tuple[float, ...]]] = {
    "DPO": (on_pairs(DPO(beta=0.1)), (0.1, 0.5, 2.0)),
    "KTO": (on_both_responses(KTO(beta=0.1)), (0.5, 2.0, 8.0)),
    "ORPO": (on_pairs(ORPO(beta=0.1)), (0.005, 0.02, 0.08)),
    "SimPO": (on_pairs(SimPO(beta=2.0, gamma=1.0)), (0.005, 0.02, 0.1, 0.4)),
}
"""Objectives and their step sizes; none is tuned, and they are not comparable with each other."""


NARROW: dict[str, str] = dict.fromkeys(
    ("KTO", "ORPO"),
    ". The specification's run kept the order at larger steps too: it normalized the policy over "
    "the five samples instead of all 24 candidates",
)
"""Why the two objectives that read more than ratios differ from the specification."""


def training(seed: int) -> Reproduction:
    """E1 to E4 on the same worlds."""
    rng = torch.Generator().manual_seed(seed)
    world = experiments.make_world(rng, SEEDS)
    parts = [halves(rng, world), robustness(rng), tenth(rng, world), objectives(rng, world)]
    return joined("pvar", parts)


def arms_claim(name: str, wins: Tensor, source: str, expected: str) -> Claim:
    """Claim that top > random > bottom in mean win rate; `wins` is (arms, seeds)."""
    means = wins.mean(-1)
    shown = (mean_and_error(row) for row in wins[:3])
    return Claim(
        name=name,
        source=source,
        provenance="derived",
        expected=expected,
        measured=", ".join(f"{mean:.3f} ({error:.3f})" for mean, error in shown),
        holds=bool(means[0] > means[1] > means[2]),
    )


def halves(rng: torch.Generator, world: World) -> Reproduction:
    """E1 and E2: top against random against bottom half; PVar against the reward gap."""
    outcomes = {
        setting: experiments.compare_arms(rng, world, on_pairs(DPO(beta=0.1)), (0.5,), *setting)[1]
        for setting in SETTINGS
    }
    claims, rows, off = [], [], 0.0
    for (labels, noise), golden in SETTINGS.items():
        outcome = outcomes[labels, noise]
        name = f"{labels} labels, reward noise {noise:g}: top > random > bottom"
        expected = " > ".join(f"{value:.3f}" for value in golden)
        claims.append(arms_claim(name, outcome.win, "spec 1.10 E1", expected))
        means = outcome.win.mean(-1)
        off = max(off, max(abs(float(means[arm]) - golden[arm]) for arm in range(3)))
        for arm, arm_name in enumerate(ARMS):
            win, gain = mean_and_error(outcome.win[arm]), mean_and_error(outcome.gain[arm])
            loss = float(outcome.loss[arm].mean())
            rows.append((labels, noise, arm_name, *win, *gain, loss))
    name = "E1 win rates: largest deviation from the specification"
    claims.append(at_most(name, off, 0.015, "spec 1.10 E1", "derived"))
    clean = outcomes["best/worst", 0.0]
    claims += [loss_claim(clean), gap_claim(outcomes)]
    columns = ("labels", "noise", "arm", "win", "s.e.", "reward gain", "s.e.", "final loss")
    table = Table(title=f"E1, E2: held out, {SEEDS} worlds", columns=columns, rows=tuple(rows))
    return Reproduction(
        name="pvar",
        claims=tuple(claims),
        figures=halves_figure(outcomes),
        tables=(reported_table(), table),
    )


def loss_claim(clean: Outcome) -> Claim:
    """The training loss falls fastest on the top half (reported), with our numbers."""
    loss = clean.loss.mean(-1)
    return Claim(
        name="training loss: top < random < bottom",
        source="training curves",
        provenance="reported",
        expected="0.310 < 0.496 < 0.652 in the specification's run",
        measured=", ".join(f"{float(value):.3f}" for value in loss[:3]),
        holds=bool(loss[0] < loss[1] < loss[2]),
    )


def gap_claim(outcomes: dict[tuple[str, float], Outcome]) -> Claim:
    """PVar against the reward gap: the paper says that PVar wins; here it is a tie."""
    ahead = {}
    for setting, outcome in outcomes.items():
        ahead[setting] = mean_and_error(outcome.win[0] - outcome.win[3])
    shown = "; ".join(f"{mean:+.4f} ({error:.4f})" for mean, error in ahead.values())
    return Claim(
        name="top by PVar beats top by reward gap, light-tailed noise",
        source="reward-gap baseline",
        provenance="reported",
        expected="> 0 (paper); a tie (specification)",
        measured=shown,
        holds=all(mean > 2 * error for mean, error in ahead.values()),
    ).conditional(
        "paired differences of win rate in the order of the table; the paper's result needs "
        "heavy-tailed errors of the reward model, see E2"
    )


def reported_table() -> Table:
    """The paper's own numbers, for context: nothing here was measured by us."""
    return Table(
        title="Reported by the paper (Llama-3.1-8B-Instruct, UltraFeedback); not measured here",
        columns=("benchmark", "top 50 %", "random 50 %", "bottom 50 %"),
        rows=(
            ("AlpacaEval 2.0, length-controlled", 36.2, 34.9, 34.8),
            ("Arena-Hard win rate", 32.2, 31.0, 30.7),
        ),
    )


def halves_figure(outcomes: dict[tuple[str, float], Outcome]) -> dict[str, Figure]:
    """Win rates of the arms, and their training loss with clean best/worst labels."""
    figure, (left, right) = panels(["Held-out win rate over the start", "Training loss"], width=5.5)
    groups = [f"{labels}\nnoise {noise:g}" for labels, noise in outcomes]
    series = {
        arm: [mean_and_error(outcome.win[place]) for outcome in outcomes.values()]
        for place, arm in enumerate(ARMS)
    }
    bars(left, groups, series)
    left.set_ylim(0.5, 0.95)
    curve = outcomes["best/worst", 0.0].curve
    lines = {arm: curve[:, place].tolist() for place, arm in enumerate(ARMS[:3])}
    curves(right, list(range(len(curve))), lines)
    right.set_xlabel("step")
    return {"pvar-arms": figure}


def robustness(rng: torch.Generator) -> Reproduction:
    """E2: which score still finds the diverse prompts when the reward model errs."""
    rows, ahead = [], {}
    for samples in (5, 8):
        for error in experiments.ERRORS:
            variance, gap = experiments.overlap_with_truth(rng, error, samples)
            rows.append((samples, error, variance, gap))
            ahead[samples, error] = variance - gap
    heavy = [ahead[8, error] for error in ("Cauchy", "Student t, 2 degrees", "5 % outliers, x20")]
    claims = (
        Claim(
            name="heavy-tailed reward errors, n = 8: PVar finds more than the gap",
            source="spec 1.10 E2",
            provenance="derived",
            expected="+0.11, +0.05, +0.12",
            measured=", ".join(f"{value:+.3f}" for value in heavy),
            holds=min(heavy) > 0.02,
        ),
        Claim(
            name="Gaussian errors, sd 3, n = 8: PVar loses to the gap",
            source="spec 1.10 E2",
            provenance="derived",
            expected="-0.013",
            measured=ahead[8, "Gaussian, sd 3"],
            holds=-0.04 < ahead[8, "Gaussian, sd 3"] < 0,
        ).noting("a negative finding for PVar"),
    )
    title = "E2: share of the truly most diverse half that a score keeps (20,000 prompts)"
    columns = ("n", "error of the reward model", "PVar", "reward gap")
    return Reproduction(
        name="pvar",
        claims=claims,
        figures=robustness_figure([row for row in rows if row[0] == 8]),
        tables=(Table(title=title, columns=columns, rows=tuple(rows)),),
    )


def robustness_figure(rows: list[tuple[int, str, float, float]]) -> dict[str, Figure]:
    """Overlap with the truth of PVar and of the gap, for every error of the reward model."""
    figure, (ax,) = panels(["Top half found, n = 8"], width=8.0)
    scores = {
        "PVar": [(variance, 0.0) for _, _, variance, _ in rows],
        "gap": [(gap, 0.0) for _, _, _, gap in rows],
    }
    bars(ax, [error.replace(", ", "\n") for _, error, _, _ in rows], scores)
    return {"pvar-robustness": figure}


def tenth(rng: torch.Generator, world: World) -> Reproduction:
    """E3: when the top tenth beats all the data."""
    biases = (0.0, 1.0, 2.0, 4.0)
    wins = experiments.tenth_against_all(rng, world, on_pairs(DPO(beta=0.1)), biases)
    lead = wins["top 10 %"] - wins["all"]
    leads = [mean_and_error(row) for row in lead]
    rows = tuple(
        (bias, *(f"{m:.3f} ({e:.3f})" for m, e in (mean_and_error(v[i]) for v in wins.values())))
        for i, bias in enumerate(biases)
    )
    measured = ", ".join(f"{mean:+.3f} ({error:.3f})" for mean, error in leads)
    claims = (
        Claim(
            name="equal steps, unbiased annotators: top 10 % against all",
            source="top 10 % against full data",
            provenance="reported",
            expected="10 % ahead (paper, human labels); a tie (specification)",
            measured=f"{leads[0][0]:+.3f} ({leads[0][1]:.3f})",
            holds=leads[0][0] > 2 * leads[0][1],
        ).conditional("the paper compares with the best checkpoint of a full run on other data"),
        Claim(
            name="equal steps, annotators with a bias of fixed size 1, 2, 4: 10 % ahead",
            source="spec 1.10 E3",
            provenance="derived",
            expected="+0.05, +0.09, +0.08",
            measured=measured.split(", ", 1)[1],
            holds=all(mean > 2 * error for mean, error in leads[1:]),
        ).noting("a sufficient mechanism, true by construction; no confirmation of the paper"),
    )
    figure, (ax,) = panels(["Win rate after 400 steps"])
    curves(ax, biases, {name: v.mean(-1).tolist() for name, v in wins.items()}, style="o-")
    ax.set_xlabel("size of the annotators' bias")
    columns = ("bias", *wins)
    table = Table(title="E3: win rate (s.e.) after 400 steps", columns=columns, rows=rows)
    return Reproduction(name="pvar", claims=claims, figures={"pvar-tenth": figure}, tables=(table,))


def objectives(rng: torch.Generator, world: World) -> Reproduction:
    """E4: the same arms under other objectives, a sweep of step sizes each."""
    small = World(*(part[:6] for part in world))
    rows, claims, found = [], [], {}
    for name, (objective, rates) in OBJECTIVES.items():
        for labels in ("best/worst", "Bradley-Terry"):
            outcome = experiments.compare_arms(rng, small, objective, rates, labels)[1]
            wins = outcome.win.unflatten(0, (len(rates), len(ARMS)))
            found[name, labels] = wins.mean(-1)
            for place, rate in enumerate(rates):
                means = (mean_and_error(row) for row in wins[place, :3])
                rows.append((name, labels, rate, *(f"{m:.3f} ({e:.3f})" for m, e in means)))
            claims.append(sweep_claim(name, labels, rates, wins))
    shown = {key: value for key, value in found.items() if key[0] != "DPO"}
    figure, axes = panels([f"{name}, {labels}" for name, labels in shown], columns=2)
    for ax, ((name, _), means) in zip(axes, shown.items(), strict=True):
        rates = OBJECTIVES[name][1]
        curves(ax, rates, {arm: means[:, i].tolist() for i, arm in enumerate(ARMS[:3])}, "o-")
        logarithmic(ax, rates)
        ax.set(xlabel="step size", ylabel="win rate")
    table = Table(
        title="E4: win rate (s.e.) by objective, labels and step size; 6 worlds",
        columns=("objective", "labels", "step size", *ARMS[:3]),
        rows=tuple(rows),
    )
    return Reproduction(
        name="pvar", claims=tuple(claims), figures={"pvar-objectives": figure}, tables=(table,)
    )


def sweep_claim(name: str, labels: str, rates: tuple[float, ...], wins: Tensor) -> Claim:
    """At how many step sizes top > random > bottom; `wins` is (rates, arms, seeds)."""
    means = wins.mean(-1)
    falling = (means[:, 0] > means[:, 1]) & (means[:, 1] > means[:, 2])
    rising = (means[:, 0] < means[:, 1]) & (means[:, 1] < means[:, 2])
    count = int(falling.sum())
    reversed_at = [f"{rate:g}" for rate, up in zip(rates, rising.tolist(), strict=True) if up]
    claim = Claim(
        name=f"{name}, {labels} labels: top > random > bottom at every step size",
        source="spec 1.10 E4" if name == "DPO" else "ICLR abstract, other algorithms",
        provenance="derived" if name == "DPO" else "reported",
        expected=f"{len(rates)} of {len(rates)} step sizes",
        measured=f"{count} of {len(rates)}"
        + (f"; reversed at {', '.join(reversed_at)}" if reversed_at else ""),
        holds=count == len(rates),
    )
    if name == "DPO":
        return claim
    return claim.conditional(
        "the abstract says that the method carries over; here that depends on labels and step size"
        + NARROW.get(name, "")
    )
