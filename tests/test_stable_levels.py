"""Where v* comes from: by hand on a quadratic, around the trainer, and after a kill."""

import pytest
import tiny
import torch
from accelerate import Accelerator

from prefloop.logps import Scorer
from prefloop.objectives import SimPO
from prefloop.settings import TrainSettings
from prefloop.stable import (
    Bilevel,
    Demonstrations,
    DifferenceProduct,
    FixedLevel,
    Hinge,
    InnerLevel,
    Losses,
    Memory,
    Params,
    Penalty,
    ReferenceLevel,
    RunningLevel,
    StableGradient,
)
from prefloop.tabular import TabularPolicy, comparison_rows
from prefloop.trainer import Trainer, backward, build_trainer, checkpoint, fit
from prefloop.types import UserError, score

EMPTY = Memory()


def parabola(params: Params) -> Losses:
    """lower = x^2 / 2."""
    lower = params["x"].square() / 2
    return Losses(lower * 0.0, lower, torch.zeros_like(lower))


AT_TWO = {"x": torch.tensor(2.0, dtype=torch.float64)}
PROBLEM = Bilevel([parabola])


def test_the_running_mean_by_hand():
    level = RunningLevel(decay=0.5)
    # Nothing to look back on: the loss itself, 2, of weights that sum to 0.5 a row: 4 a response.
    assert level.of(PROBLEM, AT_TWO, 0.5, EMPTY) == 4.0
    memory = level.after(4.0, EMPTY)
    assert level.of(PROBLEM, AT_TWO, 0.5, memory) == 4.0
    memory = level.after(1.0, memory)  # (0.5 * 4 + 1) / (0.5 + 1)
    assert level.of(PROBLEM, AT_TWO, 0.5, memory) == 2.0
    assert RunningLevel(decay=0.0).of(PROBLEM, AT_TWO, 1.0, level.after(3.0, EMPTY)) == 3.0


def test_the_inner_run_by_hand_and_never_above_where_it_began():
    # x = 2 -> 2 - 0.5 * 2 = 1 -> 0.5: x^2 / 2 = 0.125; of weights 0.5 a row: 0.25 a response.
    assert InnerLevel(steps=2, step=0.5).of(PROBLEM, AT_TWO, 0.5, EMPTY) == 0.25
    assert InnerLevel(steps=1, step=3.0).of(PROBLEM, AT_TWO, 1.0, EMPTY) == 2.0  # 2 -> -4 climbs


def test_the_other_levels_remember_nothing():
    for level, value in ((ReferenceLevel(), None), (FixedLevel(nats=1.5), 1.5)):
        assert level.of(PROBLEM, AT_TWO, 1.0, EMPTY) == value
        assert level.after(3.0, EMPTY) == EMPTY
    assert InnerLevel().after(3.0, EMPTY) == EMPTY


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunningLevel(decay=1.0), r"RunningLevel.decay must be in \[0, 1\), got 1.0"),
        (lambda: InnerLevel(steps=0), "1 step or more of positive length, got steps=0"),
        (lambda: InnerLevel(step=-1.0), "got steps=3, step=-1.0"),
        (lambda: Demonstrations(rows=()), "there is no demonstration"),
        (
            lambda: Demonstrations(rows=[tiny.row(3, (2,))]),
            "row-0: no response of this demonstration is ranked first, labelled good or scored",
        ),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def table(seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    policy = TabularPolicy(torch.randn((4, 5), generator=rng, dtype=torch.float64))
    prompt = torch.arange(8).unsqueeze(-1) % 4
    responses = torch.stack([torch.randperm(5, generator=rng)[:2] for _ in range(8)])
    return policy, comparison_rows(prompt, responses, torch.tensor([[1, 2]]).expand(8, -1))


def trainer_of(scorer, objective, gradient, budget: int = 10**6, steps: int = 8) -> Trainer:
    """Without a reference: SFT-free."""
    settings = TrainSettings(
        lr=0.05,
        batch_size=4,
        epochs=10**3,
        max_steps=steps,
        save_every=3,
        token_budget=budget,
        max_grad_norm=1e9,
        schedule="constant",
    )
    return build_trainer(scorer, objective, None, settings, Accelerator(cpu=True), gradient)


def test_simpo_with_a_running_mean_needs_no_reference_and_holds_the_chosen():
    ends = {}
    for name, gradient in (
        ("plain", backward),
        ("running", StableGradient(solver=Hinge(lam=2.0), level=RunningLevel(decay=0.9))),
        ("inner", StableGradient(solver=Hinge(lam=2.0), level=InnerLevel(steps=2, step=0.5))),
    ):
        policy, rows = table()
        trainer = trainer_of(policy, SimPO(), gradient)
        metrics = {}
        for number in range(8):
            metrics = trainer.step(rows, number, 0.05)
        ends[name] = trainer.evaluate(rows)["eval_logps/chosen"]
        assert name == "plain" or metrics["stable/sft"] > 0
    assert ends["running"] >= ends["plain"]
    assert ends["inner"] > ends["plain"]


def test_without_reference_and_level_the_message_says_so():
    policy, rows = table()
    with pytest.raises(UserError, match="reference"):
        trainer_of(policy, SimPO(), StableGradient()).step(rows, 0, 0.05)


def test_a_run_that_was_stopped_remembers_its_running_mean(tmp_path):
    class Stop(Exception):
        pass

    def stopping(progress) -> None:
        if progress.step == 4:
            raise Stop

    def trainer():
        policy, rows = table()
        gradient = StableGradient(solver=Hinge(lam=1.0), level=RunningLevel(decay=0.9))
        return trainer_of(policy, SimPO(), gradient), rows

    whole, rows = trainer()
    fit(whole, rows, [], tmp_path / "whole")
    cut, _ = trainer()
    with pytest.raises(Stop):
        fit(cut, rows, [], tmp_path / "cut", stopping)
    assert checkpoint.remembered(tmp_path / "cut" / "checkpoint")["weight"] > 1
    again, _ = trainer()
    fit(again, rows, [], tmp_path / "cut")
    assert torch.equal(again.scorer.logits, whole.scorer.logits)


def weights_of(scorer) -> torch.Tensor:
    return torch.cat([v.grad.flatten() for v in scorer.parameters() if v.grad is not None])


@pytest.mark.parametrize("budget", [10**6, 30])
def test_demonstrations_take_the_place_of_the_chosen(budget):
    # With lam = 0.5 and a level of 0: gradient of DPO without its reference (SimPO) + 0.5 SFT.
    rows, shown = tiny.batch(4, responses=(2,), longest=6), tiny.batch(4, responses=(1,), seed=9)
    gradient = StableGradient(
        solver=Penalty(lam=0.5), level=FixedLevel(nats=0.0), demonstrations=Demonstrations(shown)
    )
    scorer = Scorer(tiny.llama())
    trainer = trainer_of(scorer, SimPO(), gradient, budget)
    metrics = trainer.step(rows, 0, 0.0)
    found = weights_of(scorer)
    scorer.zero_grad()
    preference = trainer_of(scorer, SimPO(), backward)
    preference.step(rows, 0, 0.0)
    nll = -score(scorer, shown).sum.sum(-1).mean()
    (0.5 * nll).backward()
    torch.testing.assert_close(found, weights_of(scorer), rtol=1e-3, atol=1e-5)
    assert metrics["stable/sft"] == pytest.approx(nll.item(), rel=1e-4)


@pytest.mark.parametrize("length", [0.0, 0.1, 30.0])
def test_the_difference_product_is_linear_in_the_vector_however_long(length):
    bend = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)

    def bowl(params: Params) -> Losses:
        lower = (bend * params["x"].square()).sum() / 2
        return Losses(lower * 0.0, lower, torch.zeros_like(lower))

    vector = length * torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    at = {"x": torch.ones(3, dtype=torch.float64)}
    found = DifferenceProduct()(Bilevel([bowl]), at, {"x": vector})["x"]
    torch.testing.assert_close(found, bend * vector, rtol=1e-6, atol=1e-12)
