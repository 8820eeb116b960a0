"""`prefloop reproduce pvar`: the experiments at small size, the frame of claims, the whole run."""

import json

import pytest
import torch
from matplotlib.figure import Figure

from prefloop.cli.reproduce import Reproduce
from prefloop.objectives import DPO, SimPO
from prefloop.objectives.unpaired import KTO
from prefloop.reproduce import PAPERS, claims, papers_of, pvar, pvar_arms, reproduce
from prefloop.reproduce import pvar_experiments as experiments
from prefloop.reproduce.claims import Claim, Reproduction, Table
from prefloop.types import UserError


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def world():
    return experiments.make_world(torch.Generator().manual_seed(0), 3, prompts=400)


def test_a_world_has_rewards_linear_in_its_features(world):
    torch.testing.assert_close(
        world.reward[1, 7, 3], (world.features[1, 7, 3] * world.direction[1]).sum()
    )
    overlap = (world.direction * world.spurious).sum(-1)
    torch.testing.assert_close(overlap, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(world.spurious.norm(dim=-1), torch.ones(3, dtype=torch.float64))


def test_redrawing_the_spurious_feature_leaves_the_reward_alone(rng, world):
    changed = experiments.with_fixed_bias(rng, world)
    along = torch.einsum("sxyd,sd->sxy", changed.features, world.spurious)
    kept = torch.einsum("sxyd,sd->sxy", changed.features, world.direction)
    torch.testing.assert_close(kept, world.reward)
    assert abs(float(along.std()) - 1) < 0.05
    spread = along.std(-1).flatten()
    assert spread.max() < 2  # one spread for every prompt


def test_samples_are_different_candidates_with_their_own_reward(rng, world):
    samples = experiments.draw_samples(rng, world, count=5)
    assert samples.candidates.shape == (3, 200, 5)
    assert all(len(set(row)) == 5 for row in samples.candidates.flatten(0, 1).tolist())
    at = samples.candidates[2, 11, 4]
    assert samples.reward[2, 11, 4] == 1.5 * world.reward[2, 11, at]


def test_best_and_worst_are_the_ends_of_the_reward(rng, world):
    samples = experiments.draw_samples(rng, world)
    labels = experiments.best_and_worst(samples, samples.reward)
    chosen = world.reward[:, :200].gather(-1, labels.chosen[0].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(1.5 * chosen, samples.reward.amax(-1))


def test_bradley_terry_labels_follow_the_gap(rng):
    candidates = torch.tensor([4, 9]).expand(1, 20000, 2)
    reward = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 20000, 2)
    labels = experiments.bradley_terry(rng, experiments.Samples(candidates, reward), reward)
    # sigmoid(1) = 0.7311, whichever of the two was drawn first
    assert float((labels.chosen == 4).double().mean()) == pytest.approx(0.7311, abs=0.01)
    assert (labels.chosen != labels.rejected).all()


def test_arms_are_disjoint_halves_of_equal_size(rng):  # A8
    reward = torch.randn((2, 100, 5), generator=rng, dtype=torch.float64)
    kept = experiments.arms(rng, reward, 50)
    for top, bottom in zip(kept["top"].tolist(), kept["bottom"].tolist(), strict=True):
        assert sorted(top + bottom) == list(range(100))
    assert {len(row) for rows in kept.values() for row in rows.tolist()} == {50}


def test_batches_pass_over_everything_that_is_kept(rng):
    kept = torch.tensor([[3, 5, 8, 13] * 16])  # 64 entries, two batches a pass
    order = experiments.batches(rng, kept, steps=4)
    assert order.shape == (1, 4, experiments.BATCH)
    first = torch.bincount(order[0, :2].flatten(), minlength=14)
    assert first[[3, 5, 8, 13]].tolist() == [16, 16, 16, 16]


def test_training_descends_the_very_objective(rng, world):
    samples = experiments.draw_samples(rng, world)
    labels = experiments.best_and_worst(samples, samples.reward)
    kept = torch.arange(200).expand(3, -1)
    order = experiments.batches(rng, kept, steps=1).unsqueeze(0)
    rate = 0.3
    outcome = experiments.train(world, labels, order, experiments.on_pairs(DPO(beta=0.1)), rate)
    # at the uniform start: weight = rate * beta / 2 * mean of (chosen - rejected) features
    at = order[0, :, 0]
    seed = torch.arange(3).unsqueeze(-1)
    chosen = world.features[seed, at, labels.chosen[0].gather(-1, at)]
    rejected = world.features[seed, at, labels.rejected[0].gather(-1, at)]
    weight = rate * 0.05 * (chosen - rejected).mean(1)
    losses = torch.zeros((1, 1, 3), dtype=torch.float64)
    expected = experiments.evaluate(world, weight.unsqueeze(0), losses)
    torch.testing.assert_close(outcome.gain, expected.gain)
    torch.testing.assert_close(outcome.win, expected.win)


def test_the_start_wins_half_of_the_time(world):
    weight = torch.zeros((1, 3, 24), dtype=torch.float64)
    found = experiments.evaluate(world, weight, torch.zeros((1, 1, 3), dtype=torch.float64))
    torch.testing.assert_close(found.win, torch.full((1, 3), 0.5, dtype=torch.float64))
    torch.testing.assert_close(found.gain, torch.zeros((1, 3), dtype=torch.float64))


def test_kto_reads_the_exact_divergence_of_its_own_run(rng):
    logp = torch.randn((1, 2, 4, 6), generator=rng, dtype=torch.float64).log_softmax(-1)
    chosen, rejected = torch.randint(6, (2, 1, 2, 4), generator=rng)
    found = experiments.on_both_responses(KTO(beta=0.1))(logp, chosen, rejected)
    ratio = 0.1 * (logp + torch.tensor(6.0).log())
    base = (logp.exp() * ratio).sum(-1).mean(-1, keepdim=True)
    good = (base - ratio.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)).sigmoid()
    bad = (ratio.gather(-1, rejected.unsqueeze(-1)).squeeze(-1) - base).sigmoid()
    torch.testing.assert_close(found, good + bad)


def test_the_top_half_teaches_more_than_the_bottom_half(rng, world):  # E1
    objective = experiments.on_pairs(DPO(beta=0.1))
    names, outcome = experiments.compare_arms(rng, world, objective, (2.0,), "best/worst")
    win = dict(zip(names, outcome.win.mean(-1).tolist(), strict=True))
    assert win["top"] > win["random"] > win["bottom"] > 0.5
    assert outcome.loss[0].mean() < outcome.loss[1].mean() < outcome.loss[2].mean()


def test_simpo_turns_the_order_around_with_best_and_worst_pairs(rng):  # E4
    world = experiments.make_world(rng, 2)
    objective = experiments.on_pairs(SimPO(beta=2.0, gamma=1.0))
    names, outcome = experiments.compare_arms(rng, world, objective, (0.02, 0.1), "best/worst")
    wins = outcome.win.mean(-1).unflatten(0, (2, len(names)))
    assert (wins[:, 0] < wins[:, 1]).all()
    assert (wins[:, 1] < wins[:, 2]).all()


def test_the_top_tenth_wins_where_annotators_are_biased(rng):  # E3
    world = experiments.make_world(rng, 2, prompts=800)
    objective = experiments.on_pairs(DPO(beta=0.1))
    wins = experiments.tenth_against_all(rng, world, objective, (2.0,), steps=100)
    assert wins["top 10 %"].mean() > wins["all"].mean() > wins["random 10 %"].mean()


def test_heavy_tailed_errors_hurt_the_gap_more(rng):  # E2
    variance, gap = experiments.overlap_with_truth(rng, "Cauchy", 8, prompts=4000)
    assert variance > gap + 0.05
    variance, gap = experiments.overlap_with_truth(rng, "none", 8, prompts=4000)
    assert abs(variance - gap) < 0.02


def test_student_errors_have_the_quantiles_of_two_degrees_of_freedom(rng):
    drawn = experiments.ERRORS["Student t, 2 degrees"](rng, (200_000,))
    # P(|t_2| < 1) = 1 / sqrt(3), P(|t_2| < 3) = 3 / sqrt(11)
    assert float((drawn.abs() < 1).double().mean()) == pytest.approx(0.5774, abs=0.005)
    assert float((drawn.abs() < 3).double().mean()) == pytest.approx(0.9045, abs=0.005)


def test_more_samples_rank_prompts_better(rng):
    few, many = experiments.fidelity(rng, 2, prompts=4000), experiments.fidelity(rng, 8, 4000)
    assert few[0] < 0.7 < 0.9 < many[0]
    assert few[1] < many[1]


def test_claims_of_the_estimator_and_the_start_hold():
    assert not pvar.start(0).failed
    assert not [claim for claim in pvar.golden_claims() if claim.failed]
    assert not [claim for claim in pvar.invariance_claims(0) if claim.failed]


def test_an_order_of_arms_that_is_broken_is_seen():
    wins = torch.tensor([[0.8, 0.8], [0.7, 0.7], [0.75, 0.75]], dtype=torch.float64)
    assert not pvar_arms.arms_claim("order", wins, "here", "falls").holds
    assert pvar_arms.arms_claim("order", wins[[0, 2, 1]], "here", "falls").holds


def claim(holds: bool) -> Claim:
    return Claim(
        name="it", source="Sec. 1", provenance="derived", expected=1, measured=2, holds=holds
    )


def test_only_a_claim_that_must_hold_can_fail():
    assert claim(False).failed
    assert claim(False).verdict == "FAILS"
    assert not claim(False).conditional("it depends").failed
    assert claim(False).conditional("it depends").verdict == "does not hold here"
    assert claim(True).conditional("it depends").verdict == "holds here"
    assert not claim(True).failed


@pytest.mark.parametrize(
    ("made", "holds"),
    [
        (claims.near("a", 1.05, 1.0, 0.1, "s", "derived"), True),
        (claims.near("a", 1.15, 1.0, 0.1, "s", "derived"), False),
        (claims.near("a", float("nan"), 1.0, 0.1, "s", "derived"), False),
        (claims.at_most("a", 2, 2, "s", "code"), True),
        (claims.at_most("a", 2.1, 2, "s", "code"), False),
        (claims.at_most("a", float("nan"), 2, "s", "code"), False),
        (claims.at_least("a", 2, 2, "s", "choice"), True),
        (claims.at_least("a", 1.9, 2, "s", "choice"), False),
        (claims.in_order("a", {"x": 3.0, "y": 2.0, "z": 1.0}, "s", "reported"), True),
        (claims.in_order("a", {"x": 3.0, "y": 3.0}, "s", "reported"), False),
    ],
)
def test_comparisons_hold_or_not(made, holds):
    assert made.holds is holds


def test_the_text_table_shows_origin_numbers_and_notes():
    result = Reproduction(name="paper", claims=(claim(True).noting("mind this"),))
    text = claims.claims_table(result)
    assert "Sec. 1 [derived]" in text
    assert "holds" in text
    assert "it: mind this" in text


def test_a_saved_reproduction_is_json_and_pictures_that_do_not_change(tmp_path):
    figure = Figure()
    figure.subplots().plot([1, 2])
    result = Reproduction(
        name="paper",
        claims=(claim(True),),
        figures={"line": figure},
        tables=(Table(title="t", columns=("a", "b"), rows=((1, "x"),)),),
    )
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        claims.save(result, tmp_path / folder)
    document = json.loads((tmp_path / "one" / "reproduction.json").read_text())
    assert set(document) == {"name", "claims", "figures", "tables"}
    assert document["figures"] == ["line.svg"]
    assert document["claims"][0]["provenance"] == "derived"
    assert document["tables"] == [{"title": "t", "columns": ["a", "b"], "rows": [[1, "x"]]}]
    first, second = ((tmp_path / name / "line.svg").read_bytes() for name in ("one", "two"))
    assert first == second


def test_parts_join_in_order():
    part = Reproduction(name="a", claims=(claim(True),), figures={"x": Figure()})
    whole = claims.joined("b", [part, Reproduction(name="a", claims=(claim(False),))])
    assert [c.holds for c in whole.claims] == [True, False]
    assert list(whole.figures) == ["x"]
    assert len(whole.failed) == 1


def test_an_unknown_paper_is_refused_by_name():
    with pytest.raises(UserError, match="nothing to reproduce under 'nothing'; choose one of pvar"):
        papers_of("nothing")
    assert papers_of("all") == list(PAPERS)


def stub_paper(monkeypatch, holds: bool) -> None:
    monkeypatch.setattr(
        pvar, "reproduce", lambda seed: Reproduction(name="pvar", claims=(claim(holds),))
    )


def test_the_command_prints_saves_and_reports(monkeypatch, tmp_path, capsys):
    stub_paper(monkeypatch, holds=True)
    Reproduce(name="pvar", out=tmp_path / "new")()
    assert "pvar: claims" in capsys.readouterr().out
    assert (tmp_path / "new" / "pvar" / "reproduction.json").is_file()
    assert "Reproduction" in (tmp_path / "new" / "report.html").read_text()


def test_the_command_ends_with_one_when_a_claim_fails(monkeypatch, capsys):
    stub_paper(monkeypatch, holds=False)
    with pytest.raises(SystemExit) as ended:
        Reproduce(name="pvar")()
    assert ended.value.code == 1
    assert "1 claims that must hold do not" in capsys.readouterr().out


def test_a_folder_that_holds_something_is_not_overwritten(monkeypatch, tmp_path):
    stub_paper(monkeypatch, holds=True)
    (tmp_path / "old").write_text("mine")
    with pytest.raises(UserError, match="never overwritten"):
        list(reproduce("pvar", tmp_path))
