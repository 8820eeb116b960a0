"""Bilevel solvers by hand on quadratics, the objective's laws, and both around the trainer."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator

from prefloop.logps import Scorer
from prefloop.logps.head import chunked, exact
from prefloop.objectives import DPO, SFT, ChosenHinge, SimPO, Sum
from prefloop.reproduce import stable_theory
from prefloop.stable import (
    Adaptive,
    Alternating,
    Bilevel,
    ConstantPull,
    DifferenceProduct,
    Hinge,
    Losses,
    OneStep,
    OneStepFirstOrder,
    Params,
    Penalty,
    SafeRegion,
    SafeRegionEach,
    Solver,
    Stable,
    StableGradient,
    sft_optimum,
    training,
)
from prefloop.stable.objective import best_responses, sft_loss
from prefloop.tabular import LogLinearPolicy, TabularPolicy, comparison_rows
from prefloop.trainer import Trainer, TrainSettings, backward, build_trainer
from prefloop.types import Judgement, Logps, UserError, score

SOLVERS: list[Solver] = [
    Penalty(lam=0.3),
    Hinge(lam=0.3),
    OneStep(step=0.1, penalty=Hinge(lam=0.3)),
    OneStep(step=0.1, product=DifferenceProduct()),
    OneStepFirstOrder(step=0.1, penalty=Penalty(lam=0.3)),
    Alternating(steps=3, step=0.1),
    Adaptive(),
]
CURVE = torch.tensor([1.0, 4.0], dtype=torch.float64)
GOAL = torch.tensor([3.0, -1.0], dtype=torch.float64)


def quadratics(params: Params) -> Losses:
    """upper = |x - (3, -1)|^2 / 2, lower = (x_1^2 + 4 x_2^2) / 2, best 0: one a row of x."""
    x = params["x"]
    upper = (x - GOAL).square().sum(-1) / 2
    lower = (CURVE * x.square()).sum(-1) / 2
    return Losses(upper, lower, torch.zeros_like(lower))


def at(*rows: tuple[float, float]) -> Params:
    return {"x": torch.tensor(rows, dtype=torch.float64)}


def solve(solver: Solver, *rows: tuple[float, float]) -> list[list[float]]:
    return solver(Bilevel([quadratics]), at(*rows)).gradient["x"].tolist()


def test_each_solver_by_hand():
    # At x = (1, 1): g_upper = (-2, 2), g_lower = (1, 4), lower = 2.5.
    (found,) = solve(Penalty(lam=0.5), (1.0, 1.0))
    assert found == pytest.approx([-1.5, 4.0])
    # Excess 2.5 is outside eps = 1 and inside eps = 3.
    (found,) = solve(Hinge(lam=0.5, eps=1.0), (1.0, 1.0))
    assert found == pytest.approx([-1.5, 4.0])
    assert solve(Hinge(lam=0.5, eps=3.0), (1.0, 1.0)) == [[-2.0, 2.0]]
    # phi = (0.9, 0.6): g_upper(phi) = (-2.1, 1.6); times (1 - .1, 1 - .4): (-1.89, .96).
    (found,) = solve(OneStepFirstOrder(step=0.1), (1.0, 1.0))
    assert found == pytest.approx([-2.1, 1.6])
    (found,) = solve(OneStep(step=0.1), (1.0, 1.0))
    assert found == pytest.approx([-1.89, 0.96])
    (found,) = solve(OneStep(step=0.1, penalty=Penalty(lam=1.0)), (1.0, 1.0))
    assert found == pytest.approx([-0.89, 4.96])
    # Two SFT steps: (1, 1) -> (.9, .6) -> (.81, .36), gradients (1, 4) + (.9, 2.4), then
    # g_upper(.81, .36) = (-2.19, 1.36).
    (found,) = solve(Alternating(steps=2, step=0.1), (1.0, 1.0))
    assert found == pytest.approx([-0.29, 7.76])
    # <g_lower, g_upper> = 6 > 0: no pull. At (1, -1), g = (-2, 0), (1, -4): lam = 2 / 17.
    assert solve(Adaptive(), (1.0, 1.0)) == [[-2.0, 2.0]]
    (found,) = solve(Adaptive(), (1.0, -1.0))
    assert found == pytest.approx([-2 + 2 / 17, -8 / 17])


def test_the_one_step_gradient_is_that_of_the_loss_after_the_step():
    x = torch.tensor([[1.0, 1.0], [-2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    after = quadratics({"x": x - 0.1 * CURVE * x}).upper.sum()
    (expected,) = torch.autograd.grad(after, x)
    found = solve(OneStep(step=0.1), (1.0, 1.0), (-2.0, 0.5))
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected)


def test_the_difference_product_is_the_exact_one_on_a_quadratic_and_0_at_a_zero_vector():
    found = solve(OneStep(step=0.1, product=DifferenceProduct()), (1.0, 1.0))[0]
    assert found == pytest.approx([-1.89, 0.96], abs=1e-10)
    problem = Bilevel([quadratics])
    nothing = DifferenceProduct()(problem, at((1.0, 1.0)), at((0.0, 0.0)))
    assert nothing["x"].tolist() == [[0.0, 0.0]]


def test_alternating_is_k_steps_of_sft_and_one_of_preference():
    x = torch.tensor([1.0, 1.0], dtype=torch.float64)
    for _ in range(3):
        x = x - 0.1 * CURVE * x
    x = x - 0.1 * (x - GOAL)
    (found,) = solve(Alternating(steps=3, step=0.1), (1.0, 1.0))
    torch.testing.assert_close(1.0 - 0.1 * torch.tensor(found, dtype=torch.float64), x)


def test_adaptive_keeps_the_lower_loss_to_first_order():
    step = Adaptive()(Bilevel([quadratics]), at((1.0, -1.0), (1.0, 1.0)))
    lower_gradient = torch.tensor([[1.0, -4.0], [1.0, 4.0]], dtype=torch.float64)
    change = (lower_gradient * step.gradient["x"]).sum(-1)
    assert change[0].item() == pytest.approx(0.0, abs=1e-12)
    assert change[1].item() > 0
    assert step.weight.tolist() == pytest.approx([2 / 17, 0.0])


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_problems_side_by_side_are_independent_and_pieces_add_up(solver):
    together = solve(solver, (1.0, 1.0), (1.0, -1.0))
    alone = solve(solver, (1.0, 1.0)) + solve(solver, (1.0, -1.0))
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone))

    def share(part: float):
        return lambda params: Losses(*(part * loss for loss in quadratics(params)))

    split = Bilevel([share(0.25), share(0.75)])
    cut = solver(split, at((1.0, 1.0), (1.0, -1.0)))
    torch.testing.assert_close(cut.gradient["x"], torch.tensor(together, dtype=torch.float64))
    assert cut.losses.lower.tolist() == pytest.approx([2.5, 2.5])
    assert isinstance(solver, Solver)


def test_a_sum_over_processes_reaches_the_gate_of_the_hinge():
    # This process sees an excess of 2.5, all of them together 2.5 * 0.1: inside the region.
    shrunk = Bilevel([quadratics], reduce=lambda total: 0.1 * total)
    step = Hinge(lam=1.0, eps=1.0)(shrunk, at((1.0, 1.0)))
    assert step.weight.tolist() == [0.0]
    assert step.gradient["x"].tolist()[0] == pytest.approx([-0.2, 0.2])


def test_a_process_without_rows_takes_part():
    step = Hinge()(Bilevel([]), {"x": torch.ones(3)})
    assert step.gradient["x"].tolist() == [0.0, 0.0, 0.0]
    assert step.losses.lower.item() == 0.0


def test_sft_descends_to_its_optimum():
    point, loss = sft_optimum(Bilevel([quadratics]), at((1.0, 1.0)), steps=200, step=0.2)
    assert point["x"].abs().max().item() < 1e-12
    assert loss.item() == pytest.approx(0.0, abs=1e-20)


def judged(rank: list[list[int]], weight: list[float] | None = None) -> Judgement:
    ranks = torch.tensor(rank)
    return Judgement(
        rank=ranks,
        scores=torch.full(ranks.shape, torch.nan),
        label=torch.full_like(ranks, -1),
        weight=torch.ones(len(rank)) if weight is None else torch.tensor(weight),
    )


def whole(values: list[list[float]], requires_grad: bool = False) -> Logps:
    token = torch.tensor(values, dtype=torch.float64).unsqueeze(-1)
    return Logps(token.requires_grad_(requires_grad), torch.ones_like(token, dtype=torch.bool))


REFERENCE = whole([[-1.0, -2.0], [-1.0, -1.0]])
RANK = [[1, 2], [2, 1]]


def test_the_objective_by_hand():
    # Chosen: -1.5 and -0.8 against -1 and -1: excess (.5, -.2), mean .15.
    policy = whole([[-1.5, -3.0], [-2.0, -0.8]])
    plain = DPO(beta=0.1).per_comparison(policy, REFERENCE, judged(RANK))
    # Margins: .1 (-.5 + 1) = .05 and .1 (.2 + 1) = .12.
    assert plain.tolist() == pytest.approx(
        [math.log1p(math.exp(-0.05)), math.log1p(math.exp(-0.12))]
    )

    def added(pull: SafeRegion | SafeRegionEach | ConstantPull, weight=None) -> list[float]:
        stable = Stable(objective=DPO(beta=0.1), pull=pull)
        losses = stable.per_comparison(policy, REFERENCE, judged(RANK, weight))
        return (losses - plain).tolist()

    assert added(SafeRegion(lam=2.0)) == pytest.approx([0.3, 0.3])
    assert added(SafeRegion(lam=2.0, eps=0.1)) == pytest.approx([0.1, 0.1])
    assert added(SafeRegion(lam=2.0), [3.0, 1.0]) == pytest.approx([0.65, 0.65])
    assert added(SafeRegionEach(lam=2.0)) == pytest.approx([1.0, 0.0])
    assert added(SafeRegionEach(lam=2.0, eps=0.2)) == pytest.approx([0.6, 0.0])
    assert added(ConstantPull(lam=2.0)) == pytest.approx([1.0, -0.4])


def test_the_value_may_be_a_number_and_then_simpo_needs_no_reference():
    policy = whole([[-1.5, -3.0], [-2.0, -0.8]])
    stable = Stable(objective=SimPO(), pull=ConstantPull(lam=1.0), value=0.5)
    assert not stable.needs_reference
    added = stable.per_comparison(policy, None, judged(RANK)) - SimPO().per_comparison(
        policy, None, judged(RANK)
    )
    assert added.tolist() == pytest.approx([1.0, 0.3])
    assert Stable(objective=SimPO()).needs_reference
    with pytest.raises(UserError, match="reference is None"):
        Stable(objective=SimPO()).per_comparison(policy, None, judged(RANK))


def gradient_of(objective, policy: Logps) -> torch.Tensor:
    losses = objective.per_comparison(policy, REFERENCE, judged(RANK))
    (found,) = torch.autograd.grad(losses.mean(), policy.token)
    return found


@pytest.mark.parametrize(
    "pull", [SafeRegion(lam=0.0), SafeRegionEach(lam=0.0), ConstantPull(lam=0.0)]
)
def test_without_a_pull_it_is_the_objective_bit_for_bit(pull):
    policy = whole([[-1.5, -3.0], [-2.0, -0.8]], requires_grad=True)
    stable = Stable(objective=DPO(), pull=pull)
    assert torch.equal(gradient_of(stable, policy), gradient_of(DPO(), policy))
    assert torch.equal(
        stable.per_comparison(policy, REFERENCE, judged(RANK)),
        DPO().per_comparison(policy, REFERENCE, judged(RANK)),
    )


def test_inside_the_region_the_gradient_is_the_objectives():
    inside = whole([[-0.9, -3.0], [-2.0, -0.8]], requires_grad=True)
    assert torch.equal(gradient_of(Stable(), inside), gradient_of(DPO(), inside))
    outside = whole([[-1.9, -3.0], [-2.0, -0.8]], requires_grad=True)
    assert not torch.equal(gradient_of(Stable(), outside), gradient_of(DPO(), outside))


def test_a_large_pull_points_where_sft_does():
    policy = whole([[-1.5, -3.0], [-2.0, -1.8]], requires_grad=True)
    pulled = gradient_of(Stable(pull=ConstantPull(lam=1e9)), policy) / 1e9
    (sft,) = torch.autograd.grad(sft_loss(policy, judged(RANK)).mean(), policy.token)
    torch.testing.assert_close(pulled, sft, rtol=0, atol=1e-8)


def test_no_gradient_flows_through_the_reference():
    reference = whole([[-1.0, -2.0], [-1.0, -1.0]], requires_grad=True)
    policy = whole([[-1.5, -3.0], [-2.0, -1.8]], requires_grad=True)
    losses = Stable(objective=SimPO(), pull=ConstantPull(lam=1.0)).per_comparison(
        policy, reference, judged(RANK)
    )
    losses.sum().backward()
    assert reference.token.grad is None


def test_the_best_responses_are_ranked_first_or_good_or_scored_highest():
    none = torch.nan
    mixed = Judgement(
        rank=torch.tensor([[2, 3, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]),
        scores=torch.tensor([[0.0, 9.0, 9.0], [none] * 3, [1.0, 3.0, none], [none] * 3]),
        label=torch.tensor([[-1, -1, -1], [0, 1, 1], [-1, -1, -1], [0, -1, -1]]),
        weight=torch.ones(4),
    )
    assert best_responses(mixed).int().tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 0], [0, 0, 0]]
    # Two good responses of log-probabilities -1 and -3 count half each: 2 nats. None: 0.
    policy = whole([[-5.0, -1.0, -1.0], [-9.0, -1.0, -3.0], [-1.0, -4.0, -1.0], [-7.0, -1.0, -1.0]])
    assert sft_loss(policy, mixed).tolist() == [5.0, 2.0, 4.0, 0.0]


def test_what_the_trainer_asks_is_answered():
    assert Stable().couples_batch
    assert not Stable(pull=SafeRegionEach()).couples_batch
    assert Stable().data == ("rank",)
    assert not Stable().uses_ties
    assert not Stable().needs_collision
    policy = whole([[-1.5, -3.0]])
    torch.testing.assert_close(
        Stable(objective=DPO(beta=0.2)).rewards(policy, whole([[-1.0, -2.0]])),
        torch.tensor([[-0.1, -0.2]], dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Penalty(lam=-1.0), "Penalty.lam must be 0 or more and finite, got -1.0"),
        (lambda: SafeRegion(eps=-0.5), "Hinge.eps must be 0 or more and finite, got -0.5"),
        (lambda: OneStep(step=math.inf), "OneStep.step must be 0 or more and finite, got inf"),
        (lambda: Alternating(steps=0), "Alternating.steps must be 1 or more, got 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@dataclass
class World:
    """A policy, rows and a trainer of them: a table or a tiny language model."""

    scorer: torch.nn.Module
    rows: list

    def trainer(self, objective, gradient, budget: int) -> Trainer:
        start = {name: value.clone() for name, value in self.scorer.state_dict().items()}
        with torch.no_grad():
            known = {row.id: score(self.scorer, [row]) for row in self.rows}

        def reference(batch) -> Logps:
            parts = [known[row.id] for row in batch]
            width = max(part.token.shape[-1] for part in parts)

            def padded(value: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.pad(value, (0, width - value.shape[-1]))

            return Logps(
                torch.cat([padded(part.token) for part in parts]),
                torch.cat([padded(part.mask) for part in parts]),
            )

        self.scorer.load_state_dict(start)
        settings = TrainSettings(lr=0.02, token_budget=budget, max_grad_norm=1e9)
        accelerator = Accelerator(cpu=True)
        return build_trainer(self.scorer, objective, reference, settings, accelerator, gradient)


def table() -> World:
    rng = torch.Generator().manual_seed(0)
    policy = TabularPolicy(torch.randn((4, 5), generator=rng, dtype=torch.float64))
    prompt = torch.arange(8).unsqueeze(-1) % 4
    responses = torch.stack([torch.randperm(5, generator=rng)[:2] for _ in range(8)])
    rank = torch.tensor([[1, 2]]).expand(8, -1)
    return World(policy, comparison_rows(prompt, responses, rank))


def language_model(head=exact) -> World:
    rows = tiny.batch(4, responses=(2,), longest=6)
    return World(Scorer(tiny.llama(), head=head), rows)


def moved(world: World) -> None:
    """Leave the reference, so that the SFT loss is not at its best."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in world.scorer.parameters():
            value += 0.05 * torch.randn(value.shape, generator=rng, dtype=value.dtype)


def gradients(world: World, trainer: Trainer) -> tuple[torch.Tensor, dict[str, float]]:
    """The flat gradient of one step at learning rate 0, and its metrics."""
    metrics = trainer.step(world.rows, 0, 0.0)
    flat = [value.grad.flatten() for value in world.scorer.parameters() if value.grad is not None]
    return torch.cat(flat), metrics


@pytest.mark.parametrize("make", [table, language_model])
@pytest.mark.parametrize(
    ("solver", "objective"),
    [
        (Penalty(lam=0.0), DPO()),
        (Penalty(lam=0.3), Stable(pull=ConstantPull(lam=0.3))),
        (Hinge(lam=0.3), Stable(pull=SafeRegion(lam=0.3))),
        (Hinge(lam=0.3, eps=1e3), DPO()),
    ],
)
def test_a_solver_around_the_trainer_fills_the_gradient_of_the_objective(make, solver, objective):
    world = make()
    plain = world.trainer(objective, backward, budget=10**6)
    solved = world.trainer(DPO(), StableGradient(solver=solver), budget=10**6)
    moved(world)
    expected, _ = gradients(world, plain)
    found, metrics = gradients(world, solved)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert metrics["stable/weight"] == pytest.approx(
        solver.weight(torch.tensor(metrics["stable/excess"])).item()
    )


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_no_cut_of_the_batch_changes_what_a_solver_does(solver):
    world = language_model()
    one = world.trainer(DPO(), StableGradient(solver=solver), budget=10**6)
    many = world.trainer(DPO(), StableGradient(solver=solver), budget=40)
    moved(world)
    expected, once = gradients(world, one)
    found, often = gradients(world, many)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-5)
    for name in ("loss", "stable/sft", "stable/excess", "stable/weight", "rewards/margins"):
        assert often[name] == pytest.approx(once[name], rel=1e-3, abs=1e-6)


def test_the_exact_and_the_difference_product_agree_on_a_language_model():
    world = language_model()
    trainers = [
        world.trainer(DPO(), StableGradient(solver=OneStep(step=0.5, product=product)), 10**6)
        for product in (OneStep().product, DifferenceProduct(radius=0.05))
    ]
    first_order = world.trainer(DPO(), StableGradient(solver=OneStepFirstOrder(step=0.5)), 10**6)
    moved(world)
    (twice, _), (difference, _) = (gradients(world, trainer) for trainer in trainers)
    without, _ = gradients(world, first_order)
    bent = (twice - without).norm()
    assert (twice - difference).norm() < 0.05 * bent
    assert bent > 0.01 * without.norm()


def test_a_fused_head_cannot_be_differentiated_twice_and_the_message_says_what_to_do():
    world = language_model(head=chunked)
    trainer = world.trainer(DPO(), StableGradient(solver=OneStep()), 10**6)
    with pytest.raises(UserError, match=r"cannot be differentiated twice \(.*head=prefloop"):
        trainer.step(world.rows, 0, 0.0)


def toy_world() -> World:
    """The specification's toy as a scorer: its chosen and rejected responses look alike."""
    toy = stable_theory.toy(cosines=(0.9,))
    policy = LogLinearPolicy(toy.features, torch.zeros_like(toy.reference), toy.weight)
    one = torch.tensor([[0]])
    return World(policy, comparison_rows(one, torch.tensor([[0, 1]]), torch.tensor([[1, 2]])))


@pytest.mark.parametrize(
    ("gradient", "holds"),
    [
        (backward, False),
        (StableGradient(solver=Hinge(lam=1.0)), True),
        (StableGradient(solver=Adaptive()), True),
    ],
    ids=["DPO", "hinge", "adaptive"],
)
def test_the_toy_around_the_trainer_collapses_or_holds_as_it_should(gradient, holds):
    world = toy_world()
    trainer = world.trainer(DPO(beta=0.5), gradient, 10**6)
    for number in range(40):
        trainer.step(world.rows, number, 0.05)
    after = trainer.evaluate(world.rows)
    assert after["eval_rewards/margins"] > 0.5
    if holds:
        assert after["eval_displacement/chosen"] > -0.05
    else:
        assert after["eval_displacement/chosen"] < -1


def test_the_hinge_of_each_comparison_is_the_hinge_on_the_chosen():
    policy = whole([[-1.5, -3.0], [-2.0, -0.8]], requires_grad=True)
    ours = Stable(pull=SafeRegionEach(lam=0.7, eps=0.1))
    theirs = Sum(objectives=(DPO(), ChosenHinge(slack=0.1)), weights=(1.0, 0.7))
    torch.testing.assert_close(gradient_of(ours, policy), gradient_of(theirs, policy))
    constant = Stable(pull=ConstantPull(lam=0.7))
    nll = Sum(objectives=(DPO(), SFT(log_likelihood="sum")), weights=(1.0, 0.7))
    torch.testing.assert_close(gradient_of(constant, policy), gradient_of(nll, policy))


def test_sharded_parameters_are_refused(monkeypatch):
    world = table()
    trainer = world.trainer(DPO(), StableGradient(), 10**6)
    monkeypatch.setattr(training, "DTensor", torch.nn.Parameter)
    with pytest.raises(UserError, match="but logits is sharded"):
        trainer.step(world.rows, 0, 0.0)


def test_activations_that_are_computed_again_are_refused():
    world = language_model()
    trainer = world.trainer(DPO(), StableGradient(solver=OneStepFirstOrder()), 10**6)
    world.scorer.model.model.layers[0].gradient_checkpointing = True
    with pytest.raises(UserError, match=r"activation checkpointing, which is on in .*layers.0"):
        trainer.step(world.rows, 0, 0.0)


@pytest.mark.slow
def test_two_processes_find_the_direction_of_one(tmp_path):
    worker = Path(__file__).with_name("stable_worker.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(worker.parents[1])}
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", str(worker), str(tmp_path)]
        subprocess.run(command, env=environment, check=True, timeout=300)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    for name, (gradient, metrics) in one.items():
        found, theirs = two[name]
        assert (found - gradient).norm() < 1e-4 * gradient.norm(), name
        assert name == "Adaptive" or metrics["stable/weight"] == pytest.approx(0.3)
        assert theirs["stable/weight"] == pytest.approx(metrics["stable/weight"], rel=1e-4)
        assert theirs["stable/sft"] == pytest.approx(metrics["stable/sft"], rel=1e-4)
