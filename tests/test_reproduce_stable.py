"""Stable Preference Optimization: laws of one step by hand, the flow, the toy, a planted bug."""

import math
from dataclasses import dataclass

import pytest
import torch

from prefloop.objectives import DPO
from prefloop.reproduce import stable
from prefloop.reproduce import stable_theory as theory
from prefloop.stable import Hinge, Penalty, Step

DOUBLE = torch.float64


def unsettled(claims) -> list[str]:
    return [claim.name for claim in claims if not claim.holds]


def test_the_pressure_on_chosen_and_rejected_by_hand():
    # x = (.7, .2), beta 1: dL/dx_w = -.2 / (.7 * .9) = -.317460, dL/dx_l = 1 / .9 = 1.111111.
    found, closed = theory.ratio_gradients(1.0, torch.tensor([[0.7, 0.2]], dtype=DOUBLE))
    assert found[0].tolist() == pytest.approx([-0.3174603, 1.1111111])
    torch.testing.assert_close(found, closed)


def test_one_step_on_a_table_by_hand():
    # pi = (.1, .3, .6): velocities 1 - .1 + .3, -1 - .1 + .3, .3 - .1.
    logp = torch.tensor([[0.1, 0.3, 0.6]], dtype=DOUBLE).log()
    measured, pace = theory.velocity(lambda theta: theta.log_softmax(-1), 0.5, logp, logp)
    assert measured[0].tolist() == pytest.approx([1.2, -0.8, 0.2], abs=1e-8)
    assert pace.item() == pytest.approx(0.25)  # beta sigmoid(0)
    torch.testing.assert_close(measured, theory.tabular_velocity(logp), rtol=0, atol=1e-8)


def test_laws_hold_on_random_policies():
    assert unsettled(stable.laws(seed=5, draws=300).claims) == []


def test_the_peak_of_the_others_in_closed_form():
    # .6 / (.6 + 2 sqrt(.03)) = .63397; a start with pi_w > pi_l only loses.
    start = torch.tensor([[0.1, 0.3, 0.6], [0.3, 0.1, 0.6]], dtype=DOUBLE)
    assert theory.predicted_peak(start).tolist() == pytest.approx([0.6339746, 0.6])
    path = theory.flow(start, lr=4.0, steps=40)
    assert path[..., 2].amax(0).tolist() == pytest.approx([0.634, 0.6], abs=1e-3)
    ratio = path[..., 2] / (path[..., 0] * path[..., 1]).sqrt()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_the_toy_is_the_specifications():
    toy = theory.toy()
    cosine = torch.cosine_similarity(toy.features[:, 0], toy.features[:, 1], dim=-1)
    assert cosine.tolist() == pytest.approx([0.2, 0.9])
    length = toy.features.norm(dim=-1)
    assert (length[:, 1] / length[:, 0]).tolist() == pytest.approx([1.25, 1.25])
    assert toy.reference[:, 0].exp().tolist() == pytest.approx([0.152, 0.126], abs=1e-3)


def test_dpo_gives_up_the_chosen_response_and_the_hinge_does_not():
    pulls = {"DPO": (Penalty(lam=0.0), 0.2), "hinge": (Hinge(lam=0.3), 0.2)}
    courses = stable.pulled_courses(DPO(beta=0.5), pulls, steps=80)
    dpo, hinge = courses["DPO"], courses["hinge"]
    assert dpo.chosen[-1, 1] < 0.25 * dpo.chosen[0, 1]
    assert (dpo.other[-1] > dpo.other[0] + 0.05).all()
    assert hinge.excess.amax() < 0.04
    assert (hinge.margin[-1] > 1).all()


def test_blocks_that_run_together_go_as_they_would_alone():
    pulls = {"a": (Penalty(lam=0.1), 0.2), "b": (Hinge(lam=0.5, eps=0.1), 0.05)}
    together = stable.pulled_courses(DPO(beta=0.5), pulls, steps=20)
    for name, (pull, lr) in pulls.items():
        alone = theory.run(theory.toy(), pull, DPO(beta=0.5), lr, steps=20)
        torch.testing.assert_close(together[name].chosen, alone.chosen)
        torch.testing.assert_close(together[name].pull, alone.pull)


def test_limits_hold_to_the_bit():
    claims = stable._equality_claims(theory.toy())
    assert unsettled(claims) == []
    assert len(claims) == 3


@dataclass(frozen=True)
class Backwards:
    """A planted bug: it pushes away from the SFT optimum."""

    def __call__(self, problem, params) -> Step:
        gradient, losses = problem.gradient(params, 1.0, -0.2)
        return Step(gradient, losses, torch.full_like(losses.lower, -0.2))


def test_a_pull_of_the_wrong_sign_leaves_the_region_faster():
    plain = theory.run(theory.toy(), Penalty(lam=0.0), DPO(beta=0.5), 0.2, 25)
    wrong = theory.run(theory.toy(), Backwards(), DPO(beta=0.5), 0.2, 25)
    assert (wrong.excess[-1] > plain.excess[-1] + 0.2).all()


def test_the_excess_is_in_nats_of_the_chosen_response():
    course = theory.run(theory.toy(), Penalty(lam=0.0), DPO(beta=0.5), 0.2, 30)
    expected = course.chosen[0].log() - course.chosen.log()
    torch.testing.assert_close(course.excess, expected)
    assert course.margin[0].tolist() == [0.0, 0.0]
    assert math.isfinite(float(course.margin[-1].sum()))
