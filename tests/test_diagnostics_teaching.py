"""What data teach, how alike pairs are, entropy at equal size: by hand and in the exact world."""

import math
from dataclasses import replace

import pytest
import torch
from test_diagnostics_verdict import planted

from prefloop import did
from prefloop.diagnostics.alike import alikeness, lengths
from prefloop.diagnostics.displacement import change_of
from prefloop.diagnostics.gradients import GradientBound
from prefloop.diagnostics.information import SIZES, information_of_samples
from prefloop.diagnostics.summary import diagnosis
from prefloop.diagnostics.teaching import (
    rejected_sampler,
    taught_by_policies,
    taught_by_scores,
)
from prefloop.diagnostics.verdict import FOLLOWS, OTHER_BETA, verdict
from prefloop.types import Logps, Tokenized, UserError


def of(sums: torch.Tensor) -> Logps:
    token = sums.double().unsqueeze(-1)
    return Logps(token, torch.ones_like(token, dtype=torch.bool))


def exact_policies(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 6, 8, generator=rng, dtype=torch.float64).log_softmax(-1)
    return logits[0], logits[1]


def test_the_update_is_shrunk_to_the_size_and_the_entropy_is_exact_there():
    policy, reference = exact_policies()
    # Every response once, drawn evenly: expectations are exact.
    even = torch.full_like(policy, -math.log(8))
    found = did.entropy_at_size(policy - reference, even, reference, 0.2)
    tilted = (reference + found.tilt * (policy - reference)).log_softmax(-1)
    size = (reference.exp() * (reference - tilted)).sum(-1).mean()
    assert size.item() == pytest.approx(0.2, abs=1e-9)
    expected = did.did_entropy(found.tilt * (policy - reference))
    torch.testing.assert_close(found.estimate.entropy, expected)
    whole = (reference.exp() * (reference - policy)).sum(-1).mean().item()
    assert did.entropy_at_size(policy - reference, even, reference, 1.01 * whole) is None
    assert did.entropy_at_size(policy - reference, even, reference, whole).tilt == pytest.approx(1)
    with pytest.raises(UserError, match=r"size of an update must be positive, got 0\.0 nats"):
        did.entropy_at_size(policy, even, reference, 0.0)


def test_only_sizes_that_the_update_reaches_are_told():
    policy, reference = exact_policies()
    small = (reference + 0.3 * (policy - reference)).log_softmax(-1)
    reached = [
        [at.size for at in information_of_samples(of(one), of(reference), reference).matched]
        for one in (reference + 1e-6 * policy, small, reference + 30 * (policy - reference))
    ]
    assert reached[0] == []
    assert len(reached[1]) < len(reached[2])
    assert reached[2] == list(SIZES)


def test_data_built_for_an_exponent_are_found_to_be():
    policy, reference = exact_policies(1)
    rank = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]).expand(6, -1)
    scores = 0.3 * (policy - reference)
    found = taught_by_scores(of(policy), of(reference), rank, scores)
    assert found.law.beta == pytest.approx(0.3)
    assert (found.law.matching, found.law.spread) == (1.0, pytest.approx(0.0, abs=1e-9))
    rejected = did.optimal_rejected(reference, policy, reference, 0.7)
    found = taught_by_policies(of(policy), of(reference), of(rejected), rank)
    assert found.law.beta == pytest.approx(0.7)
    assert taught_by_scores(of(policy), of(policy), rank, scores) is None
    with pytest.raises(UserError, match="orders two responses"):
        taught_by_scores(of(policy), of(reference), rank * 0, scores)


def test_the_optimal_rejected_weights_by_hand():
    # Likelihood ratios 4 and 1, beta 1/2: weights 1/2 : 1, so 1/3 and 2/3. The third is not there.
    policy = Logps(
        torch.tensor([[[math.log(4)], [0.0], [0.0]]]).double(),
        torch.tensor([[[True], [True], [False]]]),
    )
    reference = Logps(torch.zeros_like(policy.token), policy.mask)
    found = rejected_sampler(policy, reference, torch.tensor([[1, 2, 0]]), beta=0.5)
    assert found.weights[0] == pytest.approx((1 / 3, 2 / 3))
    assert found.rejected.value == pytest.approx(2 / 3)
    assert found.even == 0.5
    assert found.effective.value == pytest.approx(1 / (1 / 9 + 4 / 9) / 2)
    with pytest.raises(UserError, match="orders two responses"):
        rejected_sampler(policy, reference, torch.tensor([[1, 1, 0]]), beta=0.5)


def alike_rows():
    # E_w = (1, 0), E_l = (a, 0), one token each: CHES a - 1 for a = 0, 1, 3; chosen lost a nats.
    sums = torch.tensor([[[1.0, 0.0], [a, 0.0]] for a in (0.0, 1.0, 3.0)])
    rows = [Tokenized(prompt=(0,), responses=((1,), (2,)), id=name) for name in "xyz"]
    moved = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [-3.0, 0.0]]).double()
    return alikeness(sums, lengths(rows), moved, torch.tensor([[1, 2]] * 3), rows)


def test_ches_of_pairs_and_what_follows_it():
    found = alike_rows()
    assert found.values == (-1.0, 0.0, 2.0)
    assert found.score.value == pytest.approx(1 / 3)
    assert found.follows == pytest.approx(-1)
    assert found.highest == ("z", "y", "x")


def test_the_verdict_says_where_mass_went_who_fell_and_which_beta_fits():
    policy, reference = exact_policies(1)
    rank = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]).expand(6, -1)
    gained = change_of(torch.full((6,), 2.0), torch.full((6,), 3), torch.arange(6))
    found = replace(
        planted(-3.0, -5.0),
        others={"answers to other prompts": gained},
        alike=alike_rows(),
        bound=GradientBound(norm=(0.1, 0.0), bound=(0.2, 0.0), variance=(0.1, 0.0)),
        taught=taught_by_scores(of(policy), of(reference), rank, 0.3 * (policy - reference)),
        sampler=rejected_sampler(of(policy), of(reference), rank, 0.1),
        beta=0.1,
    )
    said = " ".join(verdict(found))
    assert "Answers to other prompts became likelier: +2.0 nats" in said
    assert "Which answers is not known" not in said
    assert "rank correlation -1.00" in said
    assert "the data are built for beta 0.3 and not for 0.1" in said
    assert "are built for" not in " ".join(verdict(replace(found, beta=0.3 / OTHER_BETA * 1.01)))
    mild = replace(found.alike, follows=FOLLOWS + 0.01)
    assert "rank correlation" not in " ".join(verdict(replace(found, alike=mild)))
    told = diagnosis(found)
    assert told["numbers"]["gradient norm over its PVar bound, mean"] == pytest.approx(0.5)
    titles = {section["title"] for section in told["sections"]}
    assert {"What the data teach", "How alike the pairs are"} <= titles
