"""Losses of reward models by hand, draws and doubts of an ensemble, what a reward is worth."""

import math

import pytest
import torch

from prefloop.errors import UserError
from prefloop.intervals import wilson
from prefloop.reward_training import BradleyTerry, PlackettLuce, doubts, draws, measure, pairs_of
from prefloop.reward_training.members import weighted
from prefloop.reward_training.section import section
from prefloop.types import Comparison, Judgement, Logps


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def judged(rank, scores=None):
    table = torch.tensor([rank])
    return Judgement(
        rank=table,
        scores=torch.tensor([scores or [math.nan] * len(rank)]),
        label=torch.full_like(table, -1),
        weight=torch.ones(1),
    )


# d = r_better - r_worse. Two responses of rewards 2 and 0.5: d = 1.5, sum 2.5.
PAIR = [2.0, 0.5]
CASES = [
    (BradleyTerry(), PAIR, [1, 2], softplus(-1.5)),
    (BradleyTerry(), PAIR, [2, 1], softplus(1.5)),
    (BradleyTerry(margin=0.5), PAIR, [1, 2], softplus(-1.0)),
    # flipped labels would ask for the same lead the other way: softplus(0.5 + 1.5)
    (
        BradleyTerry(margin=0.5, label_smoothing=0.1),
        PAIR,
        [1, 2],
        0.9 * softplus(-1.0) + 0.1 * softplus(2.0),
    ),
    (BradleyTerry(centre=0.01), PAIR, [1, 2], softplus(-1.5) + 0.01 * 2.5**2),
    # pairs of 1 > 2 = 2: (3, 1) and (3, 0); the tie of the others is not read
    (BradleyTerry(), [3.0, 1.0, 0.0], [1, 2, 2], (softplus(-2.0) + softplus(-3.0)) / 2),
    (PlackettLuce(), PAIR, [1, 2], softplus(-1.5)),
    (PlackettLuce(margin=0.5), PAIR, [1, 2], softplus(-1.0)),
    (
        PlackettLuce(margin=1.0, centre=0.1),
        [1.0, 0.0, -1.0],
        [1, 2, 3],
        math.log(1 + 1 + math.exp(-1)) + math.log(1 + 1),  # leads 1 - 1, 1 - 2; then 1 - 1
    ),
    # the mean reward is 4 / 3 over the judged; rank 0 is not judged
    (
        PlackettLuce(centre=0.3),
        [3.0, 1.0, 9.0],
        [1, 2, 0],
        softplus(-2.0) + 0.3 * 4.0,
    ),
]


@pytest.mark.parametrize(("loss", "rewards", "rank", "expected"), CASES, ids=lambda v: str(v)[:40])
def test_the_loss_is_the_one_worked_out_by_hand(loss, rewards, rank, expected):
    found = loss.of_rewards(torch.tensor([rewards], dtype=torch.float64), judged(rank))
    assert found.tolist() == pytest.approx([expected], abs=1e-12)


def test_a_margin_may_follow_the_scores_of_the_row():
    # s_better - s_worse = 3, so m = 0.5 * 3: softplus(1.5 - 1.5) = log 2
    found = BradleyTerry(score_margin=0.5).of_rewards(
        torch.tensor([PAIR]), judged([1, 2], [4.0, 1.0])
    )
    assert found.tolist() == pytest.approx([math.log(2)])
    plain = BradleyTerry(score_margin=0.5).of_rewards(torch.tensor([PAIR]), judged([1, 2]))
    assert plain.tolist() == pytest.approx([softplus(-1.5)])  # no scores, no margin


def test_the_trainer_reads_the_reward_where_it_reads_a_log_probability():
    policy = Logps(torch.tensor([[[2.0], [0.5]]]), torch.ones(1, 2, 1, dtype=torch.bool))
    loss = BradleyTerry()
    assert loss.per_comparison(policy, None, judged([1, 2])).tolist() == pytest.approx(
        [softplus(-1.5)]
    )
    assert loss.rewards(policy, None).tolist() == [[2.0, 0.5]]


@pytest.mark.parametrize("loss", [BradleyTerry(), PlackettLuce()])
def test_a_row_that_orders_nothing_is_refused(loss):
    with pytest.raises(UserError, match="order"):
        loss.of_rewards(torch.tensor([PAIR]), judged([1, 1]))


@pytest.mark.parametrize("loss", [BradleyTerry(margin=0.2, centre=0.1), PlackettLuce(margin=0.2)])
def test_gradients_are_finite_where_a_response_is_last(loss):
    rewards = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    loss.of_rewards(rewards, judged([2, 1, 0])).sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.isfinite().all()
    assert rewards.grad[0, 1] < 0 < rewards.grad[0, 0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BradleyTerry(margin=-1.0), "BradleyTerry.margin must be 0 or more.*got -1.0"),
        (lambda: BradleyTerry(label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\)"),
        (lambda: PlackettLuce(centre=math.inf), "PlackettLuce.centre must be 0 or more"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


# Ensembles


def rows(count):
    return [Comparison("p", ("a", "b"), rank=(1, 2), id=str(number)) for number in range(count)]


def test_every_row_is_unseen_by_a_member_and_drawn_as_often_as_there_is_room():
    counts = draws(rows(200), 5, seed=3)
    assert ((counts == 0).sum(0) >= 1).all()
    assert ((counts > 0).sum(0) >= 1).float().mean() > 0.95
    assert (counts.sum(1) > 140).all()  # a fold of about 40 is left out
    assert torch.equal(counts, draws(rows(200), 5, seed=3))
    assert not torch.equal(counts, draws(rows(200), 5, seed=4))
    assert draws(rows(3), 1, seed=0).tolist() == [[1, 1, 1]]


def test_a_row_weighs_as_often_as_it_was_drawn():
    found = weighted(rows(3), torch.tensor([2, 0, 1]))
    assert [(row.id, row.weight) for row in found] == [("0", 2.0), ("2", 1.0)]


def test_doubt_asks_the_members_that_did_not_see_the_row():
    margins = torch.tensor([[9.0, 0.0], [-2.0, 1.0], [0.0, 9.0]], dtype=torch.float64)
    unseen = torch.tensor([[False, True], [True, True], [True, False]])
    first, second = doubts(margins, unseen)
    # sigmoid(-2) = 0.1192, sigmoid(0) = 0.5: 1 - 0.3096; mean -1, spread 1, one of two against
    assert first.flipped == pytest.approx(1 - (0.5 + 1 / (1 + math.e**2)) / 2)
    assert (first.margin, first.spread, first.against, first.asked) == (-1.0, 1.0, 1, 2)
    assert (second.margin, second.against) == (0.5, 0)


# What a reward is worth


def told(better: str, worse: str, name: str, prompt: str = "p") -> Comparison:
    return Comparison(prompt, (better, worse), rank=(1, 2), id=name)


def test_accuracy_length_and_uncertainty_are_counted_by_hand():
    data = [
        told("a a a", "b", "long wins"),
        told("a", "b b b", "short wins"),
        told("a a", "b", "long wins, missed"),
        told("a", "b", "as long", "q"),
    ]
    # two members; mean margins 2, 1, -1 and 0
    margins = [(2.5, 1.5), (4.0, -2.0), (-1.0, -1.0), (0.0, 0.0)]
    members = [((first, second), (0.0, 0.0)) for first, second in margins]
    pairs = pairs_of(data, members)
    assert pairs.margin.tolist() == [2.0, 1.0, -1.0, 0.0]
    assert pairs.spread.tolist() == [0.5, 3.0, 0.0, 0.0]
    found = measure("held out", pairs)
    assert found.accuracy == wilson(2, 4)  # 1 + 1 + 0 + 1/2, rounded down
    assert found.over_prompts.clusters == 2
    assert found.members == (2.5 / 4, 1.5 / 4)
    # of unequal length: words apart 2, -2, 1 with margins 2, 1, -1
    bias = found.length
    assert bias is not None
    assert bias.correlation == pytest.approx((4 - 2 - 1) / math.sqrt(6 * 9))
    assert (bias.people, bias.model) == (wilson(2, 3), wilson(1, 3))
    assert (bias.longer, bias.shorter) == (wilson(1, 2), wilson(1, 1))
    # |margin| / spread is 4, 1/3, infinite and 0: surest are the first and the third
    assert (found.sure, found.unsure) == (wilson(1, 2), wilson(1, 2))
    names = [row["name"] for row in found.rows()]
    assert names[0] == "accuracy, held out"
    assert "accuracy where the shorter was chosen, held out" in names


def test_pairs_of_equal_length_have_no_length_bias_and_still_a_page():
    pairs = pairs_of([told("a", "b", "1")], [((1.0,), (0.0,))])
    found = measure("held out", pairs)
    assert found.length is None
    assert found.sure is None
    page = section([found], [])
    assert page["tables"][1]["rows"] == []


def test_a_reward_is_not_measured_on_rows_without_an_order():
    tie = Comparison("p", ("a", "b"), rank=(1, 1), id="tie")
    with pytest.raises(UserError, match="no row orders two responses"):
        pairs_of([tie], [((1.0,), (0.0,))])
