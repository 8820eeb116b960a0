"""Diagnostics of log-probabilities: by hand, against the exact world, and planted displacement."""

import math
from itertools import pairwise

import pytest
import tiny
import torch

from prefloop.diagnostics.displacement import (
    ches,
    ches_per_token,
    displacement,
    first_order_change,
    mass_shift,
)
from prefloop.diagnostics.gradients import first_order, gradient_bound, inner_products
from prefloop.diagnostics.information import information_of_chosen, information_of_samples
from prefloop.diagnostics.ranking import (
    margin_calibration,
    margins,
    margins_by_annotator,
    margins_by_score,
    ranking,
)
from prefloop.diagnostics.roles import roles
from prefloop.did import did_entropy
from prefloop.logps import Scorer, hidden_sums
from prefloop.tabular import TabularPolicy, as_logps
from prefloop.types import Logps, Tokenized, UserError, judgement, score

RANK = torch.tensor([[1, 2, 0], [1, 2, 0]])


def of_sums(*rows: list[float], tokens: int = 2) -> Logps:
    """(B, N, T) with the given log p(y|x), spread evenly over `tokens`."""
    sums = torch.tensor(rows, dtype=torch.float64).unsqueeze(-1)
    token = (sums / tokens).expand(-1, -1, tokens)
    return Logps(token, torch.ones_like(token, dtype=torch.bool))


# Chosen: -10 -> -12 (-2) and -10 -> -9 (+1). Rejected: -8 -> -13 (-5), -8 -> -7 (+1).
# Other: -20 -> -14 (+6), -20 -> -21 (-1).
BEFORE = of_sums([-10, -8, -20], [-10, -8, -20])
AFTER = of_sums([-12, -13, -14], [-9, -7, -21])


def test_roles_by_rank():
    rank = torch.tensor([[1, 2, 2, 0], [2, 1, 1, 3], [1, 1, 0, 0], [0, 0, 0, 0]])
    exists = torch.tensor([[True] * 4, [True] * 4, [True] * 4, [True, True, False, False]])
    found = roles(rank, exists)
    assert found.chosen.tolist() == [
        [True, False, False, False],
        [False, True, True, False],
        [False] * 4,
        [False] * 4,
    ]
    assert found.rejected.int().sum(-1).tolist() == [2, 2, 0, 0]
    assert found.other.tolist() == [[False, False, False, True]] + [[False] * 4] * 3
    assert found.ordered.tolist() == [True, True, False, False]


def test_a_response_that_does_not_exist_has_no_role():
    found = roles(torch.tensor([[1, 2, 0]]), torch.tensor([[True, True, False]]))
    assert not found.other.any()


def test_displacement_by_hand():
    found = displacement(AFTER, BEFORE, RANK)
    assert found.chosen.mean.value == pytest.approx(-0.5)
    assert found.chosen.token.value == pytest.approx(-0.25)
    assert found.chosen.fell.value == 0.5
    assert found.chosen.median == pytest.approx(-0.5)
    assert found.rejected.mean.value == pytest.approx(-2)
    assert found.other.mean.value == pytest.approx(2.5)
    assert found.both_fell.value == 0.5
    assert (found.tied, found.chosen.responses) == (0, 2)


def test_a_change_a_token_counts_long_responses_more():
    # Chosen of 1 and of 3 tokens change by -1 and by +6: 5 nats over 4 tokens.
    mask = torch.tensor([[[True, False, False]] * 2, [[True] * 3] * 2])
    before = Logps(torch.where(mask, -1.0, 0.0), mask)
    after = Logps(torch.where(mask, torch.tensor([-2.0, 1.0])[:, None, None], 0.0), mask)
    found = displacement(after, before, RANK[:, :2])
    assert found.chosen.mean.value == 2.5
    assert found.chosen.token.value == 1.25


def test_a_policy_that_equals_its_reference_displaces_nothing():
    found = displacement(BEFORE, BEFORE, RANK)
    assert found.chosen.fell.value == found.rejected.fell.value == found.both_fell.value == 0
    assert found.chosen.mean.value == 0


def test_tied_comparisons_are_left_out_and_counted():
    rank = torch.tensor([[1, 2, 0], [1, 1, 0]])
    found = displacement(AFTER, BEFORE, rank)
    assert found.tied == 1
    assert found.chosen.mean.value == pytest.approx(-2)
    assert found.other.responses == 1


def test_without_other_responses_there_is_no_other():
    rank = torch.tensor([[1, 2, 2], [1, 2, 3]])
    assert displacement(AFTER, BEFORE, rank).other is None
    assert mass_shift(AFTER, BEFORE, rank).other is None


def test_mass_by_hand():
    # Before: (.2, .3, .1); after (.1, .1, .6): of the scored, chosen 1/3 -> 1/8, other 1/6 -> 3/4.
    before, after = ([math.log(p) for p in row] for row in ([0.2, 0.3, 0.1], [0.1, 0.1, 0.6]))
    found = mass_shift(of_sums(after), of_sums(before), RANK[:1])
    assert (found.chosen.before.value, found.chosen.after.value) == pytest.approx((1 / 3, 1 / 8))
    assert (found.other.before.value, found.other.after.value) == pytest.approx((1 / 6, 3 / 4))
    assert found.rejected.log_change.value == pytest.approx(math.log(0.1 / 0.3))
    assert found.chosen.log_change.value == pytest.approx(math.log(1 / 2))


def test_mass_goes_to_other_responses_exactly_while_the_rejected_is_likelier():
    # One exact gradient step of DPO on logits: d log pi_o = -c (pi_w - pi_l), D1 of the theory.
    for start, rises in (([0.1, 0.3, 0.6], True), ([0.3, 0.1, 0.6], False)):
        logits = torch.tensor(start, dtype=torch.float64).log()
        policy = TabularPolicy(logits.clone())
        before = as_logps(policy.logp().detach().unsqueeze(0))
        margin = policy.logp()[0] - policy.logp()[1]
        (-torch.nn.functional.logsigmoid(margin)).backward()
        moved = (logits - 0.01 * next(policy.parameters()).grad).log_softmax(-1)
        found = mass_shift(as_logps(moved.unsqueeze(0)), before, RANK[:1])
        assert (found.other.log_change.value > 0) == rises
        assert found.chosen.log_change.value > 0
        assert found.chosen.after.value == pytest.approx(float(moved[0].exp()))


@pytest.mark.parametrize(
    ("start", "peak"),
    [([0.1, 0.3, 0.6], 0.634), ([0.02, 0.5, 0.48], 0.706), ([0.001, 0.7, 0.299], 0.850)],
)
def test_the_peak_of_other_mass_under_the_exact_flow(start, peak):
    # pi_o / sqrt(pi_w pi_l) stays, so along the flow log pi = (s, -s, 0) + start, normalised.
    logp = torch.tensor(start, dtype=torch.float64).log()
    shift = torch.linspace(0, 6, 2001, dtype=torch.float64).unsqueeze(-1)
    path = (logp + shift * torch.tensor([1.0, -1.0, 0.0])).log_softmax(-1)
    masses = [
        mass_shift(as_logps(row.unsqueeze(0)), as_logps(logp.unsqueeze(0)), RANK[:1])
        for row in path[::20]
    ]
    assert max(found.other.after.value for found in masses) == pytest.approx(peak, abs=1e-3)


def test_the_order_of_responses_and_padding_change_nothing():
    turn = torch.tensor([2, 0, 1])
    turned = [Logps(part.token[:, turn], part.mask[:, turn]) for part in (AFTER, BEFORE)]
    pad = torch.nn.functional.pad
    padded = [Logps(pad(p.token, (0, 3, 0, 2)), pad(p.mask, (0, 3, 0, 2))) for p in (AFTER, BEFORE)]
    expected = displacement(AFTER, BEFORE, RANK)
    assert displacement(*turned, RANK[:, turn]) == expected
    assert displacement(*padded, pad(RANK, (0, 2))) == expected
    assert mass_shift(*padded, pad(RANK, (0, 2))) == mass_shift(AFTER, BEFORE, RANK)


# First order, CHES --------------------------------------------------------------------------------


def test_ches_by_hand():
    # E_w = (1, 1), E_l = (2, 0): 2 - 2 = 0; with lengths 4 and 2: 2/8 - 2/16 = 1/8.
    chosen, rejected = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    assert ches(chosen, rejected).tolist() == [0]
    found = ches_per_token(chosen, rejected, torch.tensor([4]), torch.tensor([2]))
    assert found.tolist() == [0.125]
    assert ches(chosen, chosen).tolist() == [0]


def test_ches_of_a_language_model_masks_its_padding():
    rows = [
        Tokenized(prompt=(1, 5, 6), responses=((7, 8, 9, 2), (7, 2)), rank=(1, 2)),
        Tokenized(prompt=(1, 5), responses=((9, 2), (8, 7, 2)), rank=(1, 2)),
    ]
    scorer = Scorer(tiny.llama())
    sums, length = hidden_sums(scorer, rows), torch.tensor([[4, 2], [2, 3]])
    together = ches_per_token(sums[:, 0], sums[:, 1], length[:, 0], length[:, 1])
    for place, row in enumerate(rows):
        alone = hidden_sums(scorer, [row])
        one = ches_per_token(
            alone[:, 0], alone[:, 1], length[place : place + 1, 0], length[place : place + 1, 1]
        )
        assert together[place].item() == pytest.approx(one.item(), abs=1e-5)


def test_the_first_order_test_predicts_the_sign_of_a_real_step():
    torch.manual_seed(0)
    model = tiny.llama(seed=3)
    scorer = Scorer(model)
    similar = Tokenized(prompt=(1, 5), responses=((7, 7), (7, 7, 7, 7)), rank=(1, 2))
    distinct = Tokenized(prompt=(1, 5, 6), responses=((20, 2), (40, 41, 2)), rank=(1, 2))
    for row, lowered in ((similar, True), (distinct, False)):
        found = first_order(inner_products(scorer, [row]), [row])
        assert found.falls.value == lowered
        before = score(scorer, [row]).sum[0].double()
        parameters = list(scorer.parameters())
        sums = score(scorer, [row]).sum[0]
        grads = torch.autograd.grad(sums[0] - sums[1], parameters)
        size = 1e-4
        with torch.no_grad():
            for part, grad in zip(parameters, grads, strict=True):
                part += size * grad
        step = (score(scorer, [row]).sum[0].double() - before)[0].item() / size
        predicted = found.chosen_norm[0] ** 2 * (1 - found.overlap[0])
        assert (step < 0) == lowered
        assert step == pytest.approx(predicted, rel=0.05, abs=0.02 * found.chosen_norm[0] ** 2)
        with torch.no_grad():
            for part, grad in zip(parameters, grads, strict=True):
                part -= size * grad


def test_equal_responses_have_cosine_one_and_sit_on_the_border():
    row = Tokenized(prompt=(1, 5), responses=((7, 8, 2), (7, 8, 2)), rank=(1, 2))
    found = first_order(inner_products(Scorer(tiny.llama()), [row]), [row])
    assert found.overlap[0] == pytest.approx(1, abs=1e-4)
    assert found.cosine.value == pytest.approx(1, abs=1e-4)


def test_the_tabular_gradients_are_known():
    # g_w = e_w - pi, g_l = e_l - pi at pi = (.2, .3, .5): |g_w|^2 = .64 + .09 + .25 = .98;
    # <g_w, g_l> = -.16 - .21 + .25 = -.12.
    policy = TabularPolicy(torch.tensor([[0.2, 0.3, 0.5]]).log())
    rows = [Tokenized(prompt=(0,), responses=((0,), (1,), (2,)), rank=(1, 2, 0))]
    found = first_order(inner_products(policy, rows), rows)
    assert found.chosen_norm[0] ** 2 == pytest.approx(0.98, abs=1e-6)
    assert found.overlap[0] == pytest.approx(-0.12 / 0.98, abs=1e-6)
    assert found.falls.value == 0
    both = torch.tensor([[0.8, -0.3, -0.5]]), torch.tensor([[-0.2, 0.7, -0.5]])
    assert first_order_change(*both).item() == pytest.approx(0.98 + 0.12)


def test_the_gradient_bound_by_hand_and_attained():
    # pi = (1/2, 1/2): s = (1/2, -1/2), (-1/2, 1/2), |s_0 - s_1|^2 = 2. Rewards log 3 and 0:
    # sigmoid - 1/2 = 1/4, PVar 1/16. Norm beta 1/4 sqrt 2, which is the bound.
    policy = TabularPolicy(torch.zeros(1, 2))
    row = Tokenized(prompt=(0,), responses=((0,), (1,)), rank=(1, 2))
    found = gradient_bound(
        inner_products(policy, [row]), torch.tensor([[math.log(3), 0.0]]), beta=0.5
    )
    assert found.variance[0] == pytest.approx(1 / 16)
    assert found.norm[0] == pytest.approx(0.5 / 4 * math.sqrt(2))
    assert found.bound[0] == pytest.approx(found.norm[0])


def test_the_gradient_norm_is_that_of_the_loss_and_under_its_bound():
    rng = torch.Generator().manual_seed(5)
    policy = TabularPolicy(torch.randn(3, 4, generator=rng))
    rewards = torch.randn(3, 4, generator=rng)
    rows = [
        Tokenized(prompt=(place,), responses=((0,), (1,), (2,), (3,)), rank=(1, 2, 3, 4))
        for place in range(3)
    ]
    found = gradient_bound(inner_products(policy, rows), rewards, beta=0.3)
    for place, row in enumerate(rows):
        sums = score(policy, [row]).sum[0]
        implicit = rewards[place] + 0.3 * (sums - sums.detach())  # rhat, with its gradient
        gap = implicit.unsqueeze(1) - implicit.unsqueeze(0)
        loss = -torch.nn.functional.logsigmoid(gap)[~torch.eye(4, dtype=torch.bool)].mean()
        (grad,) = torch.autograd.grad(loss, list(policy.parameters()))
        assert found.norm[place] == pytest.approx(float(grad.norm()), rel=1e-5)
        assert found.norm[place] <= found.bound[place]


# Ranking ------------------------------------------------------------------------------------------


def test_ranking_by_hand():
    # Policy: -12 > -13 right, -9 < -7 wrong. Reference: both wrong. Implicit: -2 > -5, 1 = 1: tie.
    found = ranking(AFTER, BEFORE, RANK)
    assert found.policy.accuracy.value == 0.5
    assert found.reference.accuracy.value == 0
    assert found.implicit.accuracy.value == 0.75
    assert found.implicit.tied == 1
    assert found.idealized is None


def test_length_decides_between_sum_and_mean():
    # Sums -4 and -6 over 1 and 3 tokens: the sum prefers the first, the mean the second.
    token = torch.tensor([[[-4.0, 0, 0], [-2.0, -2, -2]]], dtype=torch.float64)
    mask = torch.tensor([[[True, False, False], [True] * 3]])
    logps = Logps(token, mask)
    found = ranking(logps, logps, torch.tensor([[1, 2]]))
    assert (found.policy.accuracy.value, found.policy_token.accuracy.value) == (1, 0)


def test_the_idealized_policy_can_rank_no_better_than_its_reference_lets_it():
    # Reference margins -2; reward margins 1 and 0.1. With beta = 0.1 the optimum adds 10 and 1.
    rewards = torch.tensor([[1.0, 0, 0], [0.1, 0, 0]])
    assert ranking(AFTER, BEFORE, RANK, rewards, beta=0.1).idealized.accuracy.value == 0.5
    assert ranking(AFTER, BEFORE, RANK, rewards, beta=0.01).idealized.accuracy.value == 1
    assert ranking(AFTER, BEFORE, RANK, rewards, beta=10.0).idealized.accuracy.value == 0


def test_margins_and_their_calibration():
    margin, row = margins(AFTER, BEFORE, RANK, beta=0.5)
    assert margin.tolist() == pytest.approx([1.5, 0])  # (-2 + 5) / 2 and (1 - 1) / 2
    assert row.tolist() == [0, 1]
    found = margin_calibration(AFTER, BEFORE, RANK, beta=0.5)
    assert found.nll == pytest.approx((math.log1p(math.exp(-1.5)) + math.log(2)) / 2)


def test_margins_by_annotator_and_by_score():
    margin, row = torch.tensor([1.0, 3.0, -1.0, 5.0]), torch.tensor([0, 0, 1, 2])
    people = margins_by_annotator(margin, row, ["ann", None, "ann"])
    assert people.groups["ann"].value == 3
    assert people.worst == "unknown"
    low, high = margins_by_score(margin, row, torch.tensor([0.0, 0.1, 0.2]), bins=2)
    assert (low.low, low.high, low.margin.value) == (0, 0, 2)
    assert high.low == pytest.approx(0.1)
    assert (high.margin.value, high.accuracy.wrong) == (2, 1)


def test_equal_scores_share_a_bin():
    margin, row = torch.ones(4), torch.arange(4)
    assert len(margins_by_score(margin, row, torch.zeros(4), bins=4)) == 1


def test_bins_hold_every_pair_once():
    scores = torch.randn(101, generator=torch.Generator().manual_seed(0))
    bins = margins_by_score(torch.ones(101), torch.arange(101), scores, bins=4)
    assert [part.margin.values for part in bins] == [25, 25, 25, 26]
    assert all(first.high < second.low for first, second in pairwise(bins))


# Information --------------------------------------------------------------------------------------


def test_information_of_chosen_is_zero_for_an_equal_policy_and_log_n_at_most():
    assert information_of_chosen(BEFORE, BEFORE, RANK).value == pytest.approx(0)
    far = of_sums([30, -8, -20], [30, -8, -20])
    assert information_of_chosen(far, BEFORE, RANK).value == pytest.approx(math.log(3))
    # Changes (-2, -5, 6) and (1, 1, -1): by the definition, row by row.
    moved = torch.tensor([[-2.0, -5, 6], [1, 1, -1]], dtype=torch.float64).log_softmax(-1)
    expected = float(moved[:, 0].mean()) + math.log(3)
    assert information_of_chosen(AFTER, BEFORE, RANK).value == pytest.approx(expected)


def test_information_of_samples_reaches_the_exact_entropy_from_all_responses():
    rng = torch.Generator().manual_seed(1)
    reference = torch.randn(2, 6, generator=rng, dtype=torch.float64).log_softmax(-1)
    policy = torch.randn(2, 6, generator=rng, dtype=torch.float64).log_softmax(-1)
    uniform = torch.full((2, 6), -math.log(6), dtype=torch.float64)
    found = information_of_samples(as_logps(policy), as_logps(reference), uniform)
    assert found.entropy.value == pytest.approx(float(did_entropy(policy - reference).mean()))
    assert found.samples == 6
    assert 1 <= found.effective_samples.value <= 6
    assert found.divergence.value == pytest.approx(float((policy - reference).mean()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: displacement(AFTER, BEFORE, RANK * 0), "none of the 2 comparisons orders"),
        (lambda: mass_shift(AFTER, BEFORE, RANK * 0), "none of the 2 comparisons orders"),
        (lambda: displacement(of_sums([1, 2, 3]), BEFORE, RANK), "scored different tokens"),
        (lambda: displacement(BEFORE, of_sums([math.nan, 1, 1], [1, 1, 1]), RANK), "1 of 6"),
        (lambda: ranking(AFTER, BEFORE, RANK * 0), "orders two responses"),
        (lambda: information_of_chosen(AFTER, BEFORE, RANK * 0), "orders two responses"),
        (
            lambda: information_of_samples(of_sums([1]), of_sums([1]), torch.zeros(1, 1)),
            "two or more",
        ),
        (
            lambda: margins_by_score(
                torch.ones(1), torch.zeros(1, dtype=torch.long), torch.ones(1), 0
            ),
            "bins",
        ),
        (
            lambda: ches_per_token(
                torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0]), torch.tensor([1])
            ),
            "one token or more",
        ),
        (
            lambda: first_order(
                [torch.eye(2)], [Tokenized(prompt=(0,), responses=((0,), (1,)), rank=(1, 1))]
            ),
            "orders two responses",
        ),
        (
            lambda: inner_products(TabularPolicy(torch.zeros(1, 2)).requires_grad_(False), []),
            "no parameter is trained",
        ),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_the_trainer_and_the_diagnosis_agree_on_what_judgements_mean():
    rows = [Tokenized(prompt=(0,), responses=((0,), (1,), (2,)), rank=(2, 1, 0))]
    rank = judgement(rows).rank
    logps = score(TabularPolicy(torch.zeros(1, 3)), rows)
    assert roles(rank, logps.exists).chosen.tolist() == [[False, True, False]]
