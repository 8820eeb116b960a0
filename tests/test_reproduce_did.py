"""`prefloop reproduce did`: the measured parts at small size, and the whole run."""

import pytest
import torch

from prefloop.objectives import IPO, SimPO
from prefloop.reproduce import did, did_experiments, did_measured, did_projected, did_theory


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def test_objectives_on_sampled_pairs_leave_from_one_start_for_their_own_ends(rng):
    start, curves = did_experiments.sampled_curves(rng, 1.0, problems=2, steps=50, batch=256)
    assert curves["DPO"].steps == (0, 50)
    for curve in curves.values():
        assert curve.divergence[0] == pytest.approx(start)
    assert curves["DPO"].end < 0.6 * start
    assert curves["DPO"].end < curves["log pi"].end  # which turns towards q
    assert curves["SFT"].end > 0.9 * start  # the chosen come from the reference


def test_a_logistic_loss_fits_the_reward_in_its_own_coin_and_ipo_does_not(rng):
    taught = did_theory.lesson(rng, 2, 10, beta=0.5)
    length = torch.randint(1, 4, (2, 10), generator=rng)
    simpo = did_theory.learned(SimPO(beta=2.0, gamma=0.0), taught, length)
    odds = did_theory.learned(did_theory.LogOdds(beta=0.5), taught)
    ipo = did_theory.learned(IPO(beta=0.5, log_ratios="sum"), taught)
    assert max(float(value.reward_error.max()) for value in (simpo, odds)) < 0.01
    assert ipo.reward_error.min() > 0.1
    # and none of them is the target
    assert min(float(value.to_target.min()) for value in (simpo, odds, ipo)) > 1e-3


def test_wrong_rejected_responses_end_where_the_law_says(rng):
    found = did_theory.mismatch(rng, {"right": 0.5, "twice": 1.0, "none": "reference"}, problems=2)
    assert found["right"][0] < 1e-8
    assert found["twice"][0] > 1e-3
    assert max(law for _, law in found.values()) < 1e-8


def test_claims_that_need_no_training_hold(rng):
    for part in (did.algebra(rng), did.margins(rng)):
        assert not part.failed, [claim.name for claim in part.failed]


def test_the_projected_run_displaces_less(rng):
    world = did_projected.clustered_world(rng, 3, responses=100)
    path = did_projected.train(rng, world, steps=240)
    assert path.moved.shape == (12, 3, 3)
    assert path.moved[0].abs().max() < 1e-12
    # DPO, per pair, per batch: the chosen falls less and less
    ends = path.chosen[-5:].mean((0, 2))
    assert ends[0] < ends[1] < ends[2]
    # all of them started as one policy, whose information is uniform
    assert (path.entropy[0] - torch.tensor(100.0).log()).abs().max() < 1e-6


def test_the_plain_mode_is_the_gradient_of_dpo(rng):
    world = did_projected.clustered_world(rng, 2, responses=30)
    path = did_projected.train(rng, world, steps=21)
    # one step from the reference raises the chosen over the rejected in every mode
    assert (path.chosen[1] > path.rejected[1]).all()


def test_entropy_at_equal_size_is_interpolated_and_nan_where_never_reached():
    moved = torch.tensor([0.0, 0.2, 0.6], dtype=torch.float64).view(3, 1, 1)
    entropy = torch.tensor([5.0, 4.0, 2.0], dtype=torch.float64).view(3, 1, 1)
    path = did_projected.Path(moved, entropy, moved, moved)
    # halfway between 0.2 and 0.6: 3
    assert did_projected.entropy_at_equal_size(path, 0.4).item() == pytest.approx(3.0)
    assert did_projected.entropy_at_equal_size(path, 0.7).isnan().all()


def test_a_biased_estimate_is_called_biased():
    values = {"mean": 3.0, "deviation": 1.0, "effective_samples": 4.0, "repeats": 100}
    assert did_experiments.Estimated(exact=3.3, **values).unbiased
    assert not did_experiments.Estimated(exact=3.5, **values).unbiased
    good = did_experiments.Estimated(exact=3.0, **values)
    bad = did_experiments.Estimated(exact=5.0, **values)
    assert did_measured.sequential_claim("small", [good, good]).holds
    assert did_measured.sequential_claim("small", [good, bad]).failed
    assert not did_measured.sequential_claim("smooth", [good, bad]).failed


@pytest.mark.parametrize("family", did_measured.SMOOTHING)
def test_families_of_references_have_full_support(rng, family):
    logp = did_experiments.REFERENCES[family](rng, (3, 40)).log_softmax(-1)
    assert logp.shape == (3, 40)
    assert logp.isfinite().all()
