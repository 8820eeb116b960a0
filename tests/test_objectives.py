"""Objectives against numbers worked out by hand."""

import math

import pytest
import torch
from objective_cases import CASES
from torch.testing import assert_close

from prefloop import objectives


def name(case) -> str:
    return repr(case.objective) if hasattr(case, "objective") else ""


@pytest.mark.parametrize("case", CASES, ids=name)
def test_loss_is_the_number_worked_out_by_hand(case):
    found = case.world.losses(case.objective).tolist()
    assert found == pytest.approx(case.losses, abs=1.5e-6, rel=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case.gradient], ids=name)
def test_slope_is_the_number_worked_out_by_hand(case):
    gradient = case.world.gradient(case.objective)
    expected = torch.tensor(case.gradient, dtype=torch.float64).unsqueeze(-1)
    expected = expected.expand_as(gradient) * case.world.policy.mask
    tolerance = 5.1e-5 if isinstance(case.objective, objectives.EXO) else 1.5e-6
    assert_close(gradient, expected, atol=tolerance, rtol=0)


def test_every_objective_has_a_row():
    assert {type(case.objective) for case in CASES} == set(objectives.ALL)


def test_dpo_at_the_reference_is_log_two():
    case = CASES[0]
    losses = case.objective.per_comparison(
        case.world.reference, case.world.reference, case.world.judged
    )
    assert losses.item() == pytest.approx(math.log(2))
