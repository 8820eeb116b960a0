"""What is logged: numbers by hand, rounding that is no change, and a name in docs/metrics.md."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator

from prefloop.logps import Scorer
from prefloop.objectives import BCO, DPO, SFT, EnsembleDistillation, RewardDistillation
from prefloop.runs import read_jsonl
from prefloop.settings import TrainSettings
from prefloop.stable import StableGradient
from prefloop.trainer import build_trainer, fit
from prefloop.trainer.metrics import ROUNDING, batch_totals, means
from prefloop.types import Logps, Tokenized, judgement, score

HALF = DPO(beta=0.5)


def logps(*responses: list[float]) -> Logps:
    """(1, N, T): one comparison with a list of token log-probabilities a response."""
    token = torch.tensor([responses])
    return Logps(token, torch.ones_like(token, dtype=torch.bool))


def logged(judged: dict, policy: Logps, reference: Logps | None, rounding: float = 0.0) -> dict:
    count = policy.token.shape[1]
    row = Tokenized(prompt=(5,), responses=((3, 4),) * count, **judged)
    losses = torch.zeros(1)
    return means(batch_totals(HALF, policy, reference, judgement([row]), losses, rounding))


THREE = logps([-1.0, -1.0], [-2.0, -2.0], [-4.0, -4.0])  # sums -2, -4, -8
START = logps([-1.5, -1.5], [-1.5, -1.5], [-3.0, -3.0])  # sums -3, -3, -6: changes +1, -1, -2
RANKED = {"rank": (1, 2, 0)}


@pytest.mark.parametrize(
    "judged",
    [
        {"rank": (1, 2, 0)},
        {"label": (True, False, None)},
        {"scores": (0.9, -3.0, float("nan"))},
        {"ensemble": ((0.5, 3.0), (1.0, 1.0), (float("nan"), float("nan")))},
        {"rank": (1, 2, 0), "scores": (0.0, 1.0, 2.0), "label": (False, True, True)},
    ],
    ids=lambda judged: "+".join(judged),
)
def test_whatever_orders_the_responses_says_which_is_chosen(judged):
    found = logged(judged, THREE, START)
    expected = {
        "rewards/chosen": 0.5,
        "rewards/rejected": -0.5,
        "rewards/margins": 1.0,
        "rewards/accuracies": 1.0,
        "logps/chosen": -2.0,
        "logps/rejected": -4.0,
        "displacement/chosen": 1.0,
        "displacement/rejected": -1.0,
        "displacement/chosen_fell": 0.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_scores_order_every_pair_and_equal_scores_none():
    # pairs (1, 2), (1, 3): margins 0.5 (1 + 1) and 0.5 (1 + 2)
    found = logged({"scores": (2.0, 1.0, 1.0)}, THREE, START)
    assert found["rewards/margins"] == pytest.approx((1.0 + 1.5) / 2)
    assert found["rewards/rejected"] == pytest.approx((-0.5 - 1.0) / 2)
    assert "rewards/margins" not in logged({"scores": (1.0, 1.0, 1.0)}, THREE, START)


@pytest.mark.parametrize(("good", "side"), [(True, "chosen"), (False, "rejected")])
def test_a_response_labelled_alone_counts_on_its_side_and_has_no_margin(good, side):
    found = logged({"label": (good,)}, logps([-1.0, -3.0]), logps([-1.0, -1.0]))
    assert found[f"rewards/{side}"] == pytest.approx(-1.0)
    assert found[f"displacement/{side}"] == pytest.approx(-2.0)
    other = {"chosen": "rejected", "rejected": "chosen"}[side]
    assert not {f"rewards/{other}", "rewards/margins", "rewards/accuracies"} & set(found)
    assert ("displacement/chosen_fell" in found) == good


@pytest.mark.parametrize(
    ("apart", "accuracy", "fell"),
    [(0.0, 0.5, 0.0), (1e-6, 0.5, 0.0), (1e-3, 0.0, 1.0), (-1e-6, 0.5, 0.0), (-1e-3, 1.0, 0.0)],
)
def test_a_policy_at_its_reference_is_neither_right_nor_wrong(apart, accuracy, fell):
    """The chosen response is `apart` nats less likely than under the reference, by rounding or
    more; rounding may reach 2e-5 nats times the square root of two tokens."""
    policy, start = logps([-1.0 - apart, -1.0], [-2.0, -2.0]), logps([-1.0, -1.0], [-2.0, -2.0])
    found = logged({"rank": (1, 2)}, policy, start, rounding=ROUNDING[torch.float32])
    assert found["rewards/accuracies"] == accuracy
    assert found["displacement/chosen_fell"] == fell


def test_rounding_makes_no_tie_of_a_pair_of_which_one_response_moved():
    policy, start = logps([-1.0, -1.0], [-2.1, -2.0]), logps([-1.0, -1.0], [-2.0, -2.0])
    assert logged({"rank": (1, 2)}, policy, start, 1e-5)["rewards/accuracies"] == 1.0


@pytest.mark.parametrize(("precision", "last"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_evaluation_before_the_first_step_is_undecided_whatever_rounding_does(precision, last):
    """A reference that was scored in other company differs in its last digits."""
    model = tiny.llama().to(precision)
    rows = tiny.batch(12, responses=(2,), seed=3)
    rng = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def reference(batch) -> Logps:
        found = score(Scorer(model), batch)
        return Logps(found.token + last * torch.randn(found.token.shape, generator=rng), found.mask)

    settings = TrainSettings(token_budget=100)
    made = build_trainer(Scorer(model), DPO(), reference, settings, Accelerator(cpu=True))
    assert made.rounding() == ROUNDING[precision]
    found = made.evaluate(rows)
    assert found["eval_rewards/accuracies"] == 0.5
    assert found["eval_displacement/chosen_fell"] == 0.0


def test_every_number_that_is_logged_has_a_line_in_the_documentation(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    cells = re.findall(r"^\| (`[^|]*`) \|", page, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    found = set()
    ranked = tiny.batch(4, responses=(2,))
    kinds = {
        "rank": (DPO(), ranked, StableGradient()),
        "plain": (SFT(), ranked, None),
        "label": (BCO(), [replace(row, rank=None, label=(True, False)) for row in ranked], None),
        "scores": (
            RewardDistillation(),
            [replace(row, rank=None, scores=(0.5, 0.0)) for row in ranked],
            None,
        ),
        "ensemble": (
            EnsembleDistillation(),
            [replace(row, rank=None, ensemble=((0.5, 1.0), (0.0, 1.0))) for row in ranked],
            None,
        ),
    }
    for kind, (objective, rows, gradient) in kinds.items():
        start = Scorer(tiny.llama())

        def reference(batch, start=start) -> Logps:
            with torch.no_grad():
                return score(start, batch)

        made = build_trainer(
            Scorer(tiny.llama()),
            objective,
            reference if objective.needs_reference else None,
            TrainSettings(batch_size=2),
            Accelerator(cpu=True),
            **({} if gradient is None else {"gradient": gradient}),
        )
        fit(made, rows, rows[:2], tmp_path / kind)
        lines = [set(row) for row in read_jsonl(tmp_path / kind / "metrics.jsonl")]
        seen = {name.removeprefix("eval_") for line in lines for name in line}
        assert {"rewards/margins", "rewards/accuracies"} <= seen, kind
        found |= seen
    assert found == named
