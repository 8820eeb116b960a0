"""Reward heads that know who voted: exact solutions, laws, planted types, what they refuse."""

import math
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch

from prefloop import em
from prefloop.cli import main
from prefloop.heads import (
    Compared,
    Descent,
    Folds,
    GeneralPreference,
    LinearTypes,
    PairVotes,
    PrototypeMixture,
    answer_features,
    compare,
    pair_votes,
    told,
)
from prefloop.heads.descent import trained
from prefloop.heads.linear import maximum
from prefloop.runs import read_json, read_jsonl, write_jsonl
from prefloop.types import Comparison, UserError


def planted(annotators: int = 40, votes: int = 12, seed: int = 0) -> tuple[PairVotes, torch.Tensor]:
    """Two opposite tastes over the last of three features, in turn; the truth beside them."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(30, 3, generator=rng)
    truth = torch.arange(annotators) % 2
    who = torch.arange(annotators).repeat_interleave(votes)
    shown = torch.stack([torch.randperm(30, generator=rng)[:2] for _ in who])
    liked = (
        3
        * torch.where(truth[who] == 0, 1.0, -1.0)
        * (features[shown[:, 0], 2] - features[shown[:, 1], 2])
    )
    first = torch.rand(len(who), generator=rng) < liked.sigmoid()
    ordered = torch.where(first.unsqueeze(-1), shown, shown.flip(-1))
    names = tuple(f"a{i}" for i in range(annotators))
    return PairVotes(features, ordered[:, 0], ordered[:, 1], who, shown[:, 0] % 5, names), truth


def test_the_m_step_is_the_exact_maximum():
    # One feature, direction +1 in 3 votes and -1 in 1: without a ridge sigmoid(w) = 3/4, w = log 3.
    direction = torch.tensor([[1.0], [1.0], [1.0], [-1.0]], dtype=torch.float64)
    found = maximum(direction, torch.ones(4).double(), 1e-9, torch.zeros(1).double())
    assert float(found) == pytest.approx(math.log(3), abs=1e-6)
    # Weights are counts: the last vote three times over gives a tie, w = 0.
    weight = torch.tensor([1.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    assert float(maximum(direction, weight, 1e-9, found)) == pytest.approx(0, abs=1e-6)
    # With ridge 1 the slope vanishes: 3 (1 - s) - (1 - (1 - s)) = w, s = sigmoid(w).
    held = float(maximum(direction, torch.ones(4).double(), 1.0, torch.zeros(1).double()))
    s = 1 / (1 + math.exp(-held))
    assert 3 * (1 - s) - s == pytest.approx(held, abs=1e-6)


def test_the_penalised_likelihood_never_falls_from_round_to_round():
    votes, _ = planted()
    reached = [
        LinearTypes(types=2, rounds=count, restarts=1)(votes, 3).penalized for count in range(1, 7)
    ]
    assert all(after >= before - 1e-9 for before, after in pairwise(reached))


@pytest.mark.parametrize("crossfit", [False, True])
def test_planted_types_are_found_and_described(crossfit):
    votes, truth = planted()
    head = LinearTypes(types=2, crossfit=crossfit)
    fits = [head(votes, seed) for seed in (0, 1)]
    assert em.type_accuracy(truth, fits[0].gamma) > 0.95
    said = told(votes, fits)
    assert said.stability == pytest.approx(1)
    assert sorted(said.longer_won)[0] < 0.2  # the last feature stands for the length
    assert sorted(said.longer_won)[1] > 0.8
    assert min(said.length_weight) < -1 < 1 < max(said.length_weight)
    assert sum(said.votes) == pytest.approx(len(votes))


def test_one_type_is_logistic_regression_and_types_predict_held_out_votes_better():
    votes, _ = planted()
    heads = {f"{k}": LinearTypes(types=k, restarts=1) for k in (1, 2)}
    said: list[str] = []
    folds = Folds(count=3, by="pair")
    found = compare(heads, votes, folds, (0,), on_found=lambda name, one: said.append(name))
    assert found["1"].loglik.value == pytest.approx(
        -math.log(2), abs=0.05
    )  # opposite tastes: a coin
    assert found["2"].gain.low > 0.1
    assert found["1"].gain.value == 0
    assert found["2"].parameters == 2 * 3 + 1
    one = LinearTypes(types=1)(votes, 0)
    by_hand = maximum(
        votes.direction.double(), torch.ones(len(votes)).double(), 1.0, torch.zeros(3).double()
    )
    torch.testing.assert_close(one.weights[0], by_hand, atol=1e-5, rtol=0)
    assert found["1"].bic == pytest.approx(3 * math.log(len(votes)) - 2 * one.loglik)
    assert said == ["1", "2"]
    again = compare(heads, votes, folds, (0,), found, lambda name, one: said.append(name))
    assert again == found
    assert said == ["1", "2", "1"]  # what is known is not fitted again
    assert Compared.of(asdict(found["2"])) == found["2"]


def test_pal_tells_opposite_tastes_apart_and_one_prototype_cannot():
    votes, _ = planted()
    short = Descent(epochs=200, lr=1e-2)
    fold = Folds(count=3, by="pair")(votes, 0)
    scores = []
    for types in (1, 2):
        head = PrototypeMixture(types=types, hidden=16, out=4, spread=3.0, descent=short)
        fitted = head(votes.where(fold > 0), 0)
        scores.append(float(fitted.probability(votes.where(fold == 0)).log().mean()))
    assert scores[0] < -0.6  # a coin is -0.69
    assert scores[1] > -0.5
    assert fitted.parameters == 3 * 16 + 16 + 16 * 4 + 4 + 2 * 4 + 40 * 2


def test_the_log_odds_of_pal_are_differences_of_distances():
    # f the identity, ideal point 0, f(better) = 1, f(worse) = 3: log-odds 2, loss 0.126928.
    votes, _ = planted(annotators=1, votes=1)
    features = torch.tensor([[1.0], [3.0]])
    zero = torch.zeros(1, dtype=torch.long)
    one = PairVotes(features, zero, zero + 1, zero, zero, ("a",))
    fitted = PrototypeMixture(types=2, hidden=1, out=1, descent=Descent(epochs=1, lr=1e-9))(one, 0)
    module = fitted.module
    with torch.no_grad():
        module.prototypes.copy_(torch.tensor([[1.0], [-1.0]]))  # mixed half and half: 0
        module.mix.zero_()
        module.project = torch.nn.Sequential(torch.nn.Identity())
    loss = -fitted.probability(one).log()
    assert float(loss) == pytest.approx(0.126928, abs=1e-6)
    assert len(votes) == 1


def test_a_general_preference_goes_in_circles_and_is_skew():
    # Rock, scissors, paper: 0 beats 1 beats 2 beats 0. No reward can say so.
    features = torch.eye(3)
    better, worse = torch.tensor([0, 1, 2] * 20), torch.tensor([1, 2, 0] * 20)
    who = torch.zeros(60, dtype=torch.long)
    votes = PairVotes(features, better, worse, who, who, ("a",))
    linear = LinearTypes(types=1)(votes, 0).probability(votes)
    torch.testing.assert_close(
        linear, torch.full((60,), 0.5, dtype=torch.float64), atol=1e-6, rtol=0
    )
    head = GeneralPreference(blocks=1, hidden=8, descent=Descent(epochs=200, lr=1e-2))
    fitted = head(votes, 0)
    assert fitted.probability(votes).min() > 0.9
    turned = PairVotes(features, worse, better, who, who, ("a",))
    torch.testing.assert_close(fitted.probability(turned), 1 - fitted.probability(votes))


def test_a_seed_gives_the_same_head_and_leaves_the_global_generator_alone():
    votes, _ = planted(annotators=4, votes=4)
    head = PrototypeMixture(hidden=4, out=2, descent=Descent(epochs=2))
    before = torch.random.get_rng_state()
    first, again, other = (head(votes, seed).probability(votes) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())
    assert callable(trained)


def test_folds_hold_out_whole_prompts_or_pairs():
    votes, _ = planted()
    fold = Folds(count=2)(votes, 0)
    for prompt in range(5):
        assert len(fold[votes.prompt == prompt].unique()) == 1
    by_pair = Folds(count=2, by="pair")(votes, 0)
    assert len(by_pair.unique()) == 2
    shown = {
        (min(b, w), max(b, w), p)
        for b, w, p in zip(
            votes.better.tolist(), votes.worse.tolist(), votes.prompt.tolist(), strict=True
        )
    }
    assert int(votes.question.max()) + 1 == len(shown)
    with pytest.raises(UserError, match="must be 2 to 5, the different prompts"):
        Folds(count=6)(votes, 0)


def test_votes_are_the_strictly_ordered_pairs_of_judgements():
    rows = [
        Comparison("p", ("a b", "c", "d"), (1, 2, 2), annotator="x"),
        Comparison("q", ("c", "e"), (1, 1), annotator="y"),
        Comparison("q", ("c", "e"), (2, 1), annotator="y"),
        Comparison("q", ("c", "e"), (1, None), annotator="z"),
    ]
    votes = pair_votes(rows, answer_features(None, 0))
    assert len(votes) == 3
    assert votes.annotator.tolist() == [0, 0, 1]
    assert votes.prompt.tolist() == [0, 0, 1]
    assert votes.longer_won.tolist() == [1, 1, 0.5]
    assert votes.names == ("x", "y", "z")
    with pytest.raises(UserError, match="none of 1 rows puts one response before another"):
        pair_votes(rows[1:2], answer_features(None, 0))


@pytest.mark.parametrize(
    "made",
    [
        lambda: LinearTypes(types=0),
        lambda: LinearTypes(ridge=0.0),
        lambda: PrototypeMixture(out=0),
        lambda: PrototypeMixture(spread=0.0),
        lambda: GeneralPreference(blocks=0),
        lambda: GeneralPreference(tau=0.0),
        lambda: Descent(lr=0.0),
    ],
)
def test_numbers_out_of_range_are_refused(made):
    with pytest.raises(UserError, match="must be"):
        made()


def test_the_rand_index_is_one_for_the_same_and_zero_by_chance():
    first = torch.tensor([0, 0, 1, 1])
    assert em.adjusted_rand_index(first, 1 - first) == 1
    # Pairs together in both: 0; a = b = 2, of 6: E = 2/3; (0 - 2/3) / (2 - 2/3) = -1/2.
    assert em.adjusted_rand_index(first, torch.tensor([0, 1, 0, 1])) == pytest.approx(-0.5)
    assert em.adjusted_rand_index(first, torch.zeros(4, dtype=torch.long)) == 0


def test_the_command_compares_heads_and_writes_what_types_differ_in(tmp_path, capsys):
    rows = [
        {
            "prompt": f"p{n % 4}",
            "responses": [f"w{n}", f"w{n} and some more"],
            "rank": [1, 2] if person % 2 else [2, 1],
            "annotator": f"person-{person}",
        }
        for person in range(6)
        for n in range(6)
    ]
    write_jsonl(tmp_path / "votes.jsonl", rows)
    words = ["heads", "--data", str(tmp_path / "votes.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*words, "--types", "2", "--folds", "2", "--seeds", "2"]) == 0
    found = read_json(tmp_path / "out" / "heads.json")
    assert list(found["compared"]) == ["LinearTypes 1", "LinearTypes 2", "PAL 1", "PAL 2", "GPM"]
    assert found["compared"]["LinearTypes 2"]["gain"]["value"] > 0.3
    assert sorted(found["types"]["LinearTypes 2"]["longer_won"]) == pytest.approx([0, 1], abs=0.05)
    assert len(list(read_jsonl(tmp_path / "out" / "responsibilities-2.jsonl"))) == 6
    assert "adjusted Rand index between seeds 1.000" in capsys.readouterr().out
    before = (tmp_path / "out" / "heads.json").read_bytes()
    assert main([*words, "--types", "2", "--folds", "2", "--seeds", "2", "--resume"]) == 0
    assert (tmp_path / "out" / "heads.json").read_bytes() == before
    capsys.readouterr()
    assert main([*words[:-1], str(tmp_path / "no"), "--types", "9"]) == 2
    assert "--types 9 is more than the 6 annotators" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "no"), "--folds", "5"]) == 2
    assert "the different prompts" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
