"""What objectives refuse, in words; and that an object is its own configuration."""

import math
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from objective_cases import CASES, F
from objective_world import random_world, ratios, rearranged

from prefloop import objectives as o
from prefloop.expression import parse
from prefloop.types import UserError

NOT_POSITIVE = [0.0, -1.0, math.inf, math.nan]


def with_field(kind: type, name: str) -> bool:
    return kind is not o.Sum and name in {field.name for field in fields(kind)}


@pytest.mark.parametrize("value", NOT_POSITIVE)
@pytest.mark.parametrize("kind", [kind for kind in o.ALL if with_field(kind, "beta")])
def test_beta_must_be_positive_everywhere(kind, value):
    with pytest.raises(UserError, match=rf"{kind.__name__}\.beta must be positive and finite.*got"):
        kind(beta=value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: o.DPO(label_smoothing=0.5),
            r"DPO\.label_smoothing must be in \[0, 0.5\).*0.5",
        ),
        (lambda: o.CPO(label_smoothing=-0.1), r"CPO\.label_smoothing must be in \[0, 0.5\)"),
        (lambda: o.RobustDPO(label_smoothing=0.6), r"RobustDPO\.label_smoothing must be in"),
        (lambda: o.AOT(label_smoothing=0.5), r"AOT\.label_smoothing must be in"),
        (lambda: o.AOTUnpaired(label_smoothing=0.5), r"AOTUnpaired\.label_smoothing must be in"),
        (lambda: o.EXOPair(label_smoothing=0.0), r"the loss is infinite at 0.*got 0.0"),
        (lambda: o.RPO(eta=-1.0), r"RPO\.eta must be 0 or more"),
        (lambda: o.CPO(alpha=-1.0), r"CPO\.alpha must be 0 or more"),
        (lambda: o.ChosenHinge(slack=-1.0), r"ChosenHinge\.slack must be 0 or more"),
        (lambda: o.DPOP(penalty=-1.0), r"DPOP\.penalty must be 0 or more"),
        (lambda: o.StraightThroughDPO(chosen_scale=-1.0), "chosen_scale must be 0 or more"),
        (lambda: o.StraightThroughDPO(rejected_scale=-1.0), "rejected_scale must be 0 or more"),
        (lambda: o.SimPO(gamma=-1.0), r"SimPO\.gamma must be 0 or more"),
        (lambda: o.SLiC(delta=0.0), r"SLiC\.delta must be positive"),
        (lambda: o.SLiC(sft=-1.0), r"SLiC\.sft must be 0 or more"),
        (lambda: o.DiscoPOP(tau=1.0), r"DiscoPOP\.tau must be in \(0, 1\).*got 1.0"),
        (lambda: o.KLDPO(tau=0.0), r"KLDPO\.tau must be positive"),
        (lambda: o.KLDPO(cap=0.5), r"KLDPO\.cap must be 1 or more"),
        (lambda: o.DrDPO(temperature=0.0), r"DrDPO\.temperature must be positive"),
        (lambda: o.WassersteinDPO(rho=-1.0), r"WassersteinDPO\.rho must be 0 or more"),
        (lambda: o.AlphaDPO(gamma=-1.0), r"AlphaDPO\.gamma must be 0 or more"),
        (lambda: o.AlphaDPO(alpha=-1.0), r"AlphaDPO\.alpha must be 0 or more"),
        (lambda: o.RaoKupper(nu=1.0), r"RaoKupper\.nu must be above 1"),
        (lambda: o.Davidson(nu=0.0), r"Davidson\.nu must be positive"),
        (lambda: o.TopK(k=0), r"TopK\.k must be 1 or more, got 0"),
        (lambda: o.SoftLabelDPO(margin_scale=0.0), r"margin_scale must be positive"),
        (lambda: o.SPPO(margin_scale=0.0), r"SPPO\.margin_scale must be positive"),
        (lambda: o.EXO(temperature=0.0), r"EXO\.temperature must be positive"),
        (lambda: o.InfoNCA(temperature=0.0), r"InfoNCA\.temperature must be positive"),
        (lambda: o.NCA(temperature=0.0), r"NCA\.temperature must be positive"),
        (lambda: o.EnsembleDistillation(gamma=-1.0), r"gamma must be 0 or more"),
        (lambda: o.KTO(desirable=-1.0), r"KTO\.desirable must be 0 or more"),
        (lambda: o.KTO(undesirable=-1.0), r"KTO\.undesirable must be 0 or more"),
        (lambda: o.LD(alpha=1.5), r"LD\.alpha must be in \[0, 1\]"),
        (lambda: o.WPO(max_weight=0.0), r"WPO\.max_weight must be positive"),
        (lambda: o.AlphaDivergence(alpha=math.nan), r"AlphaDivergence\.alpha must be finite"),
        (lambda: o.Sum(objectives=()), r"Sum\.objectives is empty"),
        (
            lambda: o.Sum(objectives=(o.DPO(), o.SFT()), weights=(1.0,)),
            "has 1 numbers for 2 objectives",
        ),
        (
            lambda: o.Sum(objectives=(o.DPO(),), weights=(-1.0,)),
            r"Sum\.weights must be 0 or more",
        ),
        (lambda: o.GPM(tau=0.0), r"GPM\.tau must be positive"),
        (lambda: o.GPM(margin=-1.0), r"GPM\.margin must be 0 or more"),
    ],
)
def test_a_hyperparameter_out_of_range_is_refused_with_its_value(make, message):
    with pytest.raises(UserError, match=message):
        make()


WORDS = {
    "IPO": "log_ratios",
    "MIPO": "log_ratios",
    "ChosenHinge": "log_ratios",
    "RPO": "log_likelihood",
    "CPO": "log_likelihood",
    "SFT": "log_likelihood",
    "EnsembleDistillation": "reduce",
    "KTO": "baseline",
    "LD": "sides",
}


def test_a_word_that_a_field_does_not_know_is_refused_with_the_words_it_knows():
    # in a process of its own: here, the type checks of the tests would speak first
    script = """
import sys
from prefloop import objectives
from prefloop.types import UserError
for kind, name in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        getattr(objectives, kind)(**{name: "other"})
    except UserError as error:
        print(error)
"""
    words = [word for pair in WORDS.items() for word in pair]
    ran = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True
    )
    for line, (kind, name) in zip(ran.stdout.splitlines(), WORDS.items(), strict=True):
        assert re.fullmatch(rf'{kind}\.{name} must be "\w+"( or "\w+")+, got other', line)


BATCHWISE = [o.AOT(), o.AOTUnpaired(), o.DrDPO(), o.PooledSFT()]
TIED = ratios([1.0, -1.0], [0.0, 0.0], rank=[[1, 2], [1, 1]])


@pytest.mark.parametrize("objective", [o.DPO(), o.AOT(), o.PlackettLuce(), o.LD()], ids=repr)
def test_a_comparison_without_an_order_is_refused_and_named(objective):
    with pytest.raises(UserError, match=r"comparisons \[1\] of the batch order no two responses"):
        TIED.losses(objective)


def test_a_comparison_that_nobody_judged_is_refused_by_models_of_ties_too():
    with pytest.raises(UserError, match=r"comparisons \[0\]"):
        ratios([1.0, -1.0], rank=[[0, 2]]).losses(o.Davidson())


def test_a_comparison_without_scores_is_refused():
    with pytest.raises(UserError, match=r"comparisons \[0\].*fewer than two scores"):
        ratios([1.0, -1.0], scores=[[1.0, math.nan]]).losses(o.EXO())


def test_an_ensemble_is_refused_where_it_is_missing():
    with pytest.raises(UserError, match="not every comparison of the batch has them"):
        F.losses(o.EnsembleDistillation())


def test_a_comparison_without_labels_or_an_order_is_refused_by_unpaired_objectives():
    with pytest.raises(UserError, match=r"comparisons \[1\] of the batch have no label"):
        TIED.losses(o.BCO())


def test_kto_says_where_mismatched_responses_come_from():
    with pytest.raises(UserError, match=r"pairing\.with_mismatched"):
        F.losses(o.KTO())


def test_best_of_n_wants_exactly_one_best():
    with pytest.raises(UserError, match=r"exactly one response of rank 1; comparisons \[0, 1\]"):
        ratios([1.0, 0.0, 0.0], [1.0, 0.0, 0.0], rank=[[1, 1, 2], [2, 3, 0]]).losses(o.BestOfN())


def test_an_unbiased_estimate_wants_two_responses_a_group():
    with pytest.raises(UserError, match=r"two responses or more in each group; comparisons \[0\]"):
        F.losses(o.MIPO(unbiased=True))


def test_wpo_without_collisions_says_what_it_reads():
    with pytest.raises(UserError, match="sum of squared probabilities"):
        F.losses(o.WPO())


def test_wasserstein_dpo_without_embeddings_says_so_and_is_dpo_where_gradients_are_off():
    with pytest.raises(UserError, match="differentiates by the input embeddings"):
        o.WassersteinDPO().per_comparison(F.policy, F.reference, F.judged)
    with torch.no_grad():
        loss = o.WassersteinDPO().per_comparison(F.policy, F.reference, F.judged)
    assert loss.item() == pytest.approx(0.598139, abs=1e-6)


@pytest.mark.parametrize("objective", BATCHWISE, ids=repr)
def test_a_loss_for_the_batch_refuses_weights_but_leaves_zeros_out(objective):
    world = random_world()
    weighted = replace(world.judged, weight=torch.tensor([1.0, 2.0, 1.0, 1.0]))
    with pytest.raises(UserError, match=r"one loss for the whole batch.*from 1 to 2"):
        replace(world, judged=weighted).losses(objective)
    halved = replace(world.judged, weight=torch.tensor([0.5, 0.0, 0.5, 0.5]))
    fewer = rearranged(world, lambda tensor: tensor[[0, 2, 3]])
    found = replace(world, judged=halved).losses(objective)
    assert found.tolist() == pytest.approx([fewer.losses(objective)[0].item()] * 4)
    nothing = replace(world.judged, weight=torch.zeros(4))
    assert replace(world, judged=nothing).losses(objective).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"objective": o.SFT()}, "FDivergence of SFT with JensenShannon is not defined"),
        ({"divergence": o.DPO()}, "FDivergence of DPO with DPO is not defined"),
    ],
)
def test_an_f_divergence_refuses_what_reads_more_than_the_ratio_and_what_is_none(parts, message):
    with pytest.raises(UserError, match=message):
        o.FDivergence(**parts)


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.objective))
def test_the_text_of_an_objective_makes_the_same_objective(case):
    assert parse(repr(case.objective), (*o.ALL, *o.PARTS)) == case.objective


def test_exports_are_complete():
    assert len(set(o.__all__)) == len(o.__all__)
    assert {kind.__name__ for kind in (*o.ALL, *o.PARTS)} <= set(o.__all__)
    for name in o.__all__:
        assert hasattr(o, name)
