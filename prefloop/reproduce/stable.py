"""`prefloop reproduce stable`: where probability goes under DPO, and solvers that hold it.

Paper: "Stable Preference Optimization", arXiv 2507.07723. Its equations and tables were not
available to us: the analysis is our own derivation, the toy that of the project's specification
("spec"); nothing here is a number of the paper.
"""

from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from torch import Tensor

from prefloop.objectives import CPO, DPO, IPO, Objective, SimPO
from prefloop.reproduce import stable_theory as theory
from prefloop.reproduce.claims import (
    Claim,
    Reproduction,
    Table,
    at_least,
    at_most,
    joined,
    near,
)
from prefloop.reproduce.drawing import COLORS, curves, panels
from prefloop.reproduce.stable_theory import CHOSEN, REJECTED, Course, SideBySide
from prefloop.stable import (
    Adaptive,
    Alternating,
    Hinge,
    OneStep,
    OneStepFirstOrder,
    Penalty,
    Solver,
)
from prefloop.tabular import random_logp

COSINES = ("cos 0.2", "cos 0.9")
NOTHING = Penalty(lam=0.0)


def reproduce(seed: int) -> Reproduction:
    """Check the laws of one step and the flow of mass, and run the toy with every solver."""
    return joined("stable", [laws(seed), flow(), toy(), plug_ins()])


def laws(seed: int, draws: int = 2000) -> Reproduction:
    """D1: gradients, one-step velocities and sign laws on random policies."""
    rng = torch.Generator().manual_seed(seed)
    claims = [*_gradient_claims(rng, draws), *_tabular_claims(rng, draws)]
    return Reproduction(name="stable", claims=(*claims, *_shared_claims(rng, draws)))


def _gradient_claims(rng: torch.Generator, draws: int) -> list[Claim]:
    """Eqs. (2) and (3): the pressure on the chosen over that on the rejected is x_l / x_w."""
    ratio = torch.randn((draws, 2), generator=rng, dtype=torch.float64).exp()
    off, ratio_off = 0.0, 0.0
    for beta in (0.1, 0.5, 2.0):
        found, closed = theory.ratio_gradients(beta, ratio)
        off = max(off, float((found / closed - 1).abs().max()))
        pressure = found[:, CHOSEN].abs() / found[:, REJECTED].abs()
        expected = ratio[:, REJECTED] / ratio[:, CHOSEN]
        ratio_off = max(ratio_off, float((pressure / expected - 1).abs().max()))
    source = "spec D1, Eqs. 2, 3"
    return [
        at_most(
            "dL/dx_w, dL/dx_l: relative error of the closed form", off, 1e-12, source, "derived"
        ),
        at_most("|dL/dx_w| / |dL/dx_l| = x_l / x_w: error", ratio_off, 1e-12, source, "derived"),
    ]


def _tabular_claims(rng: torch.Generator, draws: int) -> list[Claim]:
    """A table: the chosen always rises; mass goes to the others exactly while pi_l > pi_w."""
    logp, reference = random_logp((draws, 6), rng, 2.0), random_logp((draws, 6), rng, 2.0)
    measured, _ = theory.velocity(_table, 0.3, logp, reference)
    off = float((measured - theory.tabular_velocity(logp)).abs().max())
    leads = (logp[:, REJECTED] > logp[:, CHOSEN]).unsqueeze(-1)
    wrong = int(((measured[:, 2:] > 0) != leads).sum())
    source = "spec D1"
    return [
        at_most(
            "table: d log pi of one step, error of the closed form", off, 1e-8, source, "derived"
        ),
        at_least(
            "table: slowest rise of the chosen", float(measured[:, 0].min()), 0.0, source, "derived"
        ),
        at_most("table: fastest rejected", float(measured[:, 1].max()), 0.0, source, "derived"),
        at_most(
            "table: others that rise unless pi_l > pi_w, or the reverse",
            wrong,
            0,
            source,
            "derived",
        ),
    ]


def _shared_claims(rng: torch.Generator, draws: int) -> list[Claim]:
    """Shared features: the chosen falls iff <g_w, g_l> > |g_w|^2."""
    features = torch.randn((draws, 6, 3), generator=rng, dtype=torch.float64)
    theta = torch.randn((draws, 3), generator=rng, dtype=torch.float64)

    def logp_of(weight: Tensor) -> Tensor:
        return theory.log_linear(features, weight).log_softmax(-1)

    measured, _ = theory.velocity(logp_of, 0.3, theta, logp_of(theta))
    products = theory.score_products(features, theta)
    predicted = products[:, :, CHOSEN] - products[:, :, REJECTED]
    off = float(((measured - predicted) / (1 + predicted.abs())).abs().max())
    falls = measured[:, CHOSEN] < 0
    similar = products[:, CHOSEN, REJECTED] > products[:, CHOSEN, CHOSEN]
    wrong, share = int((falls != similar).sum()), float(falls.double().mean())
    source = "spec D1"
    return [
        at_most("features: d log pi = <g, g_w - g_l>, error", off, 1e-7, source, "derived"),
        at_most("features: falls of the chosen that the law misses", wrong, 0, source, "derived"),
        at_least(
            "features: share of random problems in which it falls", share, 0.05, source, "derived"
        ).noting("six responses, three features: a table (no sharing) has none"),
    ]


def _table(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


STARTS = {(0.1, 0.3): 0.634, (0.02, 0.5): 0.706, (0.001, 0.7): 0.850, (0.3, 0.1): 0.6}
"""Initial (pi_w, pi_l) and the largest mass of the others on the way (the last never rises)."""


def flow() -> Reproduction:
    """D1: the mass of irrelevant responses peaks where pi_w = pi_l; how the start decides."""
    start = torch.tensor([[w, b, 1 - w - b] for w, b in STARTS], dtype=torch.float64)
    path = theory.flow(start)
    peak = path[..., 2].amax(0)
    ratio = path[..., 2] / (path[..., 0] * path[..., 1]).sqrt()
    drift = float((ratio / ratio[0] - 1).abs().max())
    source = "spec D1"
    claims = [
        at_most("pi_o / sqrt(pi_w pi_l) stays, relative drift", drift, 1e-9, source, "derived")
    ]
    for (first, second), golden, found, closed in zip(
        STARTS, STARTS.values(), peak.tolist(), theory.predicted_peak(start).tolist(), strict=True
    ):
        name = f"start ({first}, {second}, {1 - first - second:.3g}): peak of the others"
        claims.append(
            near(name, found, golden, 1e-3, source, "derived").noting(f"closed form {closed:.4f}")
        )
    swept, sweep_table, sweep_ax = _sweep()
    figure, axes = panels(
        ["Mass of the others, for pi_w(0), pi_l(0)", "Sweep of pi_w(0), pi_l(0) = 0.5"]
    )
    names = [f"{w}, {b}" for w, b in STARTS]
    curves(axes[0], range(len(path)), {n: path[:, i, 2].tolist() for i, n in enumerate(names)})
    axes[0].set(xlabel="update", ylabel="pi_o")
    axes[1].plot(*sweep_ax, color=COLORS[0], marker="o", ms=3)
    axes[1].set(xscale="log", xlabel="pi_w(0)", ylabel="largest gain of the others")
    return Reproduction(
        name="stable",
        claims=(*claims, *swept),
        figures={"stable-flow": figure},
        tables=(sweep_table,),
    )


def _sweep() -> tuple[list[Claim], Table, tuple[list[float], list[float]]]:
    """Less initial mass on the chosen: more goes astray first, and it takes longer."""
    chosen = torch.logspace(-4, -0.31, 12, dtype=torch.float64)
    start = torch.stack([chosen, torch.full_like(chosen, 0.5), 0.5 - chosen], -1)
    path = theory.flow(start, steps=4000)
    gain = path[..., 2].amax(0) - start[:, 2]
    half = (path[..., 0] >= 0.5).int().argmax(0)  # every start gets there
    source = "spec D1, initialization"
    reached = int((path[-1, :, 0] >= 0.5).sum())
    claims = [
        at_least("starts that reach pi_w = 1/2, of 12", reached, 12, source, "derived"),
        at_most(
            "gain of the others: largest rise with pi_w(0)",
            float(gain.diff().max()),
            0.0,
            source,
            "derived",
        ),
        at_most(
            "updates to pi_w = 1/2: largest rise with pi_w(0)",
            int(half.diff().max()),
            0,
            source,
            "derived",
        ),
    ]
    rows = zip(chosen.tolist(), gain.tolist(), half.tolist(), strict=True)
    columns = ("pi_w(0)", "gain of the others", "updates to pi_w = 1/2")
    table = Table(title="Start: pi_l = 0.5, the others the rest", columns=columns, rows=tuple(rows))
    return claims, table, (chosen.tolist(), gain.tolist())


def solvers() -> Mapping[str, Solver]:
    """Solvers of the toy that need a run of their own, all at learning rate 0.2 but adaptive."""
    return {
        "one step": OneStep(step=0.1),
        "one step + hinge 0.2": OneStep(step=0.1, penalty=Hinge(lam=0.2)),
        "one step, first order": OneStepFirstOrder(step=0.1),
        "alternating (k = 1)": Alternating(steps=1, step=0.2),
        "adaptive": Adaptive(),
    }


PULLS: Mapping[str, tuple[Penalty | Hinge, float]] = {
    "DPO": (NOTHING, 0.2),
    "penalty 0.2": (Penalty(lam=0.2), 0.2),
    "hinge 0.2": (Hinge(lam=0.2), 0.2),
    "hinge 0.01, lr 0.05": (Hinge(lam=0.01), 0.05),
    "hinge 0.03, lr 0.05": (Hinge(lam=0.03), 0.05),
    "hinge 0.1, lr 0.05": (Hinge(lam=0.1), 0.05),
    "hinge 0.3, lr 0.05": (Hinge(lam=0.3), 0.05),
    "hinge 1, lr 0.05": (Hinge(lam=1.0), 0.05),
}
"""Solvers that are a weight on the SFT gradient, and their learning rates: one run for all."""


def toy(steps: int = 3000) -> Reproduction:
    """D3: all solvers on the specification's toy."""
    courses = dict(pulled_courses(DPO(beta=0.5), PULLS, steps))
    problem = theory.toy()
    for name, solver in solvers().items():
        lr = 0.05 if name == "adaptive" else 0.2
        courses[name] = theory.run(problem, solver, DPO(beta=0.5), lr, steps // 2)
    rows = [
        (name, cosine, *(float(value) for value in _summary(course, place)))
        for name, course in courses.items()
        for place, cosine in enumerate(COSINES)
    ]
    columns = (
        "solver",
        "pair",
        "pi_w",
        "largest other",
        "worst excess",
        "margin",
        "largest weight",
    )
    title = (
        f"After {steps} updates (from `one step` on: half of that); at the start pi_w is .152 and "
        ".126, the largest other .219 and .186"
    )
    table = Table(title=title, columns=columns, rows=tuple(rows))
    claims = [*_collapse_claims(courses), *_hold_claims(courses), *_equality_claims(problem)]
    return Reproduction(
        name="stable", claims=tuple(claims), figures={"stable-toy": _draw(courses)}, tables=(table,)
    )


def pulled_courses(
    objective: Objective, pulls: Mapping[str, tuple[Penalty | Hinge, float]], steps: int
) -> Mapping[str, Course]:
    """One course a pull, all in one run."""
    problem = theory.toy()
    size = len(problem.weight)
    together = SideBySide(tuple(pull for pull, _ in pulls.values()))
    lr = torch.tensor([lr for _, lr in pulls.values()], dtype=torch.float64)
    rates = lr.repeat_interleave(size).unsqueeze(-1)
    course = theory.run(problem.repeated(len(pulls)), together, objective, rates, steps)
    return {name: course.block(number, size) for number, name in enumerate(pulls)}


def _summary(course: Course, place: int) -> tuple[Tensor, ...]:
    return (
        course.chosen[-1, place],
        course.other[-1, place],
        course.excess[:, place].amax(),
        course.margin[-1, place],
        course.pull[:, place].amax(),
    )


def _collapse_claims(courses: Mapping[str, Course]) -> list[Claim]:
    """(2): DPO gives up the chosen response for an irrelevant one; one step alone does so too."""
    dpo, source = courses["DPO"], "spec D3"
    ends = zip(COSINES, dpo.chosen[-1].tolist(), (0.016, 0.0), strict=True)
    others = zip(COSINES, dpo.other[-1].tolist(), (0.779, 0.837), strict=True)
    lookahead = max(
        float(courses[name].chosen[-1].amax()) for name in ("one step", "one step, first order")
    )
    return [
        *(
            near(f"DPO, {name}: final pi_w", end, golden, 1e-3, source, "derived")
            for name, end, golden in ends
        ),
        *(
            near(f"DPO, {name}: largest irrelevant response", end, golden, 1e-3, source, "derived")
            for name, end, golden in others
        ),
        at_most(
            "one step, with or without Hessian: final pi_w", lookahead, 0.05, source, "derived"
        ).noting(
            "a negative finding: looking one SFT step ahead does not prevent the collapse here"
        ),
        at_least(
            "smallest final margin of any solver",
            min(float(course.margin[-1].min()) for course in courses.values()),
            0.0,
            source,
            "derived",
        ),
    ]


def _hold_claims(courses: Mapping[str, Course]) -> list[Claim]:
    """(3): who keeps the SFT loss, who returns late, who does not return."""
    source = "spec D3"
    weak, strong = courses["hinge 0.01, lr 0.05"], ("0.1", "0.3", "1")
    late = courses["hinge 0.03, lr 0.05"].excess
    held = max(float(courses[f"hinge {lam}, lr 0.05"].excess.amax()) for lam in strong)
    raised = ("penalty 0.2", "alternating (k = 1)")
    smallest = min(float(courses[name].chosen[-1].amin()) for name in raised)
    ahead = float(courses["one step + hinge 0.2"].excess.amax())
    measured: tuple[Claim, ...] = (
        at_most("hinge, lam >= 0.1: worst excess, nats", held, 0.0065, source, "derived"),
        near(
            "hinge, lam = 0.03, cos 0.9: worst excess",
            float(late[:, 1].amax()),
            1.028,
            0.01,
            source,
            "derived",
        ),
        at_most("hinge, lam = 0.03: final excess", float(late[-1].amax()), 0.01, source, "derived"),
        near(
            "hinge, lam = 0.01, cos 0.9: final pi_w",
            float(weak.chosen[-1, 1]),
            0.008,
            1e-3,
            source,
            "derived",
        ).noting("a negative finding: too small a lam leaves the region and has not returned"),
        at_least("penalty, alternating: smallest final pi_w", smallest, 0.97, source, "derived"),
        at_most("one step + hinge: worst excess", ahead, 0.03, source, "derived"),
    )
    return [*measured, *_adaptive_claims(courses["adaptive"])]


def _adaptive_claims(course: Course) -> list[Claim]:
    """The smallest pull: no excess at all, and little of it used."""
    source, fall = "spec D3", float(course.chosen.diff(dim=0).amin())
    largest = float(course.pull.amax())
    return [
        at_most("adaptive: worst excess", float(course.excess.amax()), 1e-9, source, "derived"),
        at_least("adaptive: largest fall of pi_w in a step", fall, -1e-4, source, "derived").noting(
            "zero to first order; a finite step may lose a little"
        ),
        near("adaptive: largest weight it used", largest, 0.08, 0.005, source, "derived"),
    ]


def _equality_claims(problem: theory.Toy) -> list[Claim]:
    """(5), (6): limits that hold to the bit, or as directions."""
    params, upper = {"weight": problem.weight}, DPO(beta=0.5)
    bilevel = problem.bilevel(upper)
    plain = theory.descend(problem, upper, 0.2, 30)
    weight = problem.weight
    for _ in range(30):
        weight = weight - 0.2 * NOTHING(bilevel, {"weight": weight}).gradient["weight"]
    alone, _ = bilevel.gradient(params, 1.0, 0.0)
    inside = Hinge(lam=1.0, eps=0.1)(bilevel, params).gradient["weight"]
    sft, _ = bilevel.gradient(params, 0.0, 1.0)
    pulled = Penalty(lam=1e9)(bilevel, params).gradient["weight"]
    cosine = torch.cosine_similarity(pulled, sft["weight"], -1)
    source = "spec D3 (5), (6)"
    return [
        at_most(
            "lam = 0 is DPO: largest difference after 30 updates",
            float((weight - plain).abs().max()),
            0.0,
            source,
            "derived",
        ),
        at_most(
            "inside the region the hinge is DPO: largest difference",
            float((inside - alone["weight"]).abs().max()),
            0.0,
            source,
            "derived",
        ),
        at_least(
            "lam = 1e9: cosine with the SFT gradient",
            float(cosine.min()),
            1 - 1e-12,
            source,
            "derived",
        ),
    ]


def _draw(courses: Mapping[str, Course]) -> Figure:
    figure, axes = panels(
        ["pi_w, cos 0.9", "largest irrelevant response, cos 0.9", "margin, cos 0.9"]
    )
    shown = ("DPO", "penalty 0.2", "hinge 0.2", "one step", "one step + hinge 0.2", "adaptive")
    for place, name in enumerate(shown):
        course = courses[name]
        for ax, values in zip(axes, (course.chosen, course.other, course.margin), strict=True):
            ax.plot(values[:, 1], color=COLORS[place], label=name, linewidth=1)
    for ax in axes:
        ax.set(xlabel="update")
    axes[0].set(yscale="log", ylim=(1e-6, 2))
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def plug_ins(steps: int = 1000) -> Reproduction:
    """D0: the penalty as a plug-in for other losses; who collapses alone and who is held."""
    uppers: Mapping[str, Objective] = {"SimPO": SimPO(), "CPO": CPO(), "IPO": IPO()}
    pulls: Mapping[str, tuple[Penalty | Hinge, float]] = {
        "alone": (NOTHING, 0.05),
        "hinge 1": (Hinge(lam=1.0), 0.05),
    }
    source, claims, rows = "spec D0", [], []
    ours = "that the penalty serves other losses is reported; the toy and the numbers are ours"
    for name, objective in uppers.items():
        courses = pulled_courses(objective, pulls, steps)
        for way, course in courses.items():
            for place, cosine in enumerate(COSINES):
                rows.append((name, way, cosine, *map(float, _summary(course, place)[:4])))
        held = float(courses["hinge 1"].excess[-1].amax())
        alone = float(courses["alone"].excess[-1, 1])
        collapse = f"{name} alone, cos 0.9: final excess"
        claims += [
            at_most(f"{name} + hinge: final excess", held, 0.05, source, "reported").noting(ours),
            at_least(collapse, alone, 0.5, source, "reported").conditional(
                "depends on the pair and the loss; CPO has an SFT term of its own"
            ),
        ]
    columns = ("loss", "", "pair", "pi_w", "largest other", "worst excess", "margin")
    title = f"Other losses on the toy, {steps} updates at lr 0.05"
    table = Table(title=title, columns=columns, rows=tuple(rows))
    return Reproduction(name="stable", claims=tuple(claims), tables=(table,))
