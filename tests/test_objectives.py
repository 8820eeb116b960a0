"""Objectives against numbers worked out by hand, and against laws they must all obey."""

import torch
from torch.testing import assert_close

from prefloop.objectives import ALL, DPO, IPO, SFT, BestOfN, Hinge, PlackettLuce, SimPO
from prefloop.types import Judgement, Logps, Pair


def logps(*rows: list[float]) -> Logps:
    """One response per row; shorter rows are padded, as a collator would."""
    width = max(map(len, rows))
    token = torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return Logps(token, mask)


# Fixture F of the equations: sums -4 and -6 against -5 and -5, four and two tokens, so that
# h = (1, -1), d = 2, means of the policy (-1, -3), log-ratios per token (0.25, -0.5).
POLICY = Pair(logps([-1.0] * 4), logps([-3.0, -3.0]))
REFERENCE = Pair(logps([-1.25] * 4), logps([-2.5, -2.5]))


def test_the_core_losses_on_fixture_f():
    def loss(objective):
        return objective(POLICY, REFERENCE).item()

    assert_close(loss(DPO(beta=0.1)), 0.598139, atol=1e-6, rtol=0)  # log(1 + e^-0.2)
    assert_close(loss(Hinge(beta=0.1)), 0.8)  # 1 - 0.2
    assert_close(loss(IPO(beta=0.1, log_ratios="sum")), 9.0)  # (2 - 5)^2
    assert_close(loss(IPO(beta=0.1)), 18.0625)  # (0.75 - 5)^2
    assert_close(loss(SimPO(beta=2.0, gamma=1.0)), 0.048587, atol=1e-6, rtol=0)  # log(1 + e^-3)
    assert_close(loss(SFT()), 1.0)
    assert_close(loss(SFT(log_likelihood="sum")), 4.0)


def test_every_objective_gives_one_finite_loss_a_comparison():
    token = -torch.rand(2, 3, 4, dtype=torch.float64)
    policy = Logps(token, torch.ones(2, 3, 4, dtype=torch.bool))
    judgement = Judgement(
        rank=torch.tensor([[1, 2, 3], [2, 2, 1]]),
        scores=torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.5, 2.0]]),
        label=torch.tensor([[1, 0, 0], [0, 0, 1]]),
        weight=torch.ones(2),
    )
    for objective in ALL:
        losses = objective().per_comparison(policy, policy, judgement)
        assert losses.shape == (2,)
        assert losses.isfinite().all()


def test_two_responses_make_plackett_luce_and_best_of_n_equal_to_dpo():
    policy = Logps(torch.tensor([[[-4.0], [-6.0]]]), torch.ones(1, 2, 1, dtype=torch.bool))
    reference = Logps(torch.full((1, 2, 1), -5.0), policy.mask)
    rank = torch.tensor([[1, 2]])
    expected = torch.tensor([0.598139])
    assert_close(PlackettLuce()(policy, reference, rank), expected)
    assert_close(BestOfN()(policy, reference, rank), expected)
