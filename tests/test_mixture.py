"""EM around the trainer: what it must equal, what it must find, what it refuses."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_file

from prefloop import em
from prefloop.data.verdict import check
from prefloop.mixture import (
    Clusters,
    Dirichlet,
    Given,
    Halves,
    HeldOut,
    Mixture,
    Steps,
    Trained,
    Votes,
    refuse_divided,
    refuse_unlearnable,
    run_em,
    with_annotators,
)
from prefloop.mixture.choosing import deal
from prefloop.mixture.evidence import deal_annotators
from prefloop.mixture.rounds import LOGLIK, NEGLIGIBLE
from prefloop.mixture.starts import vote_means
from prefloop.mixture.steps import refuse_long_pairs, refuse_no_likelihood
from prefloop.objectives import DPO, IPO, PlackettLuce
from prefloop.runs import read_jsonl, write_jsonl
from prefloop.settings import TrainSettings
from prefloop.tabular import TabularPolicy, comparison_rows
from prefloop.types import Comparison, UserError, score

ITEMS = 6
SETTINGS = TrainSettings(
    lr=0.2, batch_size=512, epochs=10, warmup=0.0, max_grad_norm=1e9, save_every=5
)


def planted(annotators: int = 12, votes: int = 10, seed: int = 0) -> tuple[Votes, torch.Tensor]:
    """Pairs over six items by two opposite types, in turn; the truth beside them."""
    rng = torch.Generator().manual_seed(seed)
    reward = torch.linspace(-2.5, 2.5, ITEMS)
    truth = torch.arange(annotators) % 2
    who = torch.arange(annotators).repeat_interleave(votes)
    shown = torch.stack([torch.randperm(ITEMS, generator=rng)[:2] for _ in who])
    signed = torch.where(truth[who] == 0, 1.0, -1.0).unsqueeze(-1) * reward[shown]
    first = torch.rand(len(who), generator=rng) < (signed[:, 0] - signed[:, 1]).sigmoid()
    rank = torch.where(first.unsqueeze(-1), torch.tensor([1, 2]), torch.tensor([2, 1]))
    rows = comparison_rows(torch.zeros(len(who), 1, dtype=torch.long), shown, rank)
    named = [replace(row, annotator=f"a{i}") for row, i in zip(rows, who.tolist(), strict=True)]
    return Votes.of(named), truth


def items(rows) -> torch.Tensor:
    """One-hot features of a row's two items."""
    shown = torch.tensor([[answer[0] for answer in row.responses] for row in rows])
    return torch.nn.functional.one_hot(shown, ITEMS).double()


def tabular_steps(settings: TrainSettings = SETTINGS) -> Steps:
    frozen, policy = (TabularPolicy(torch.zeros(1, ITEMS)) for _ in range(2))
    return Steps(
        make_scorer=lambda: policy,
        objective=PlackettLuce(beta=1.0),
        reference=lambda batch: score(frozen, batch).detach(),
        settings=settings,
        accelerator=Accelerator(cpu=True),
    )


def test_planted_types_are_found_by_the_trainer_itself(tmp_path):
    votes, truth = planted()
    start = Clusters()(votes, 2, 0, items)
    fitted = run_em(tabular_steps(), votes, Mixture(types=2, rounds=2), start, tmp_path)
    assert em.type_accuracy(truth, fitted.gamma) >= 11 / 12
    torch.testing.assert_close(fitted.gamma.sum(-1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(fitted.shares, fitted.gamma.mean(0))
    policies = torch.stack([load_file(fitted.weights(k))["logits"][0] for k in (1, 2)])
    ends = policies[:, -1] > policies[:, 0]
    assert ends.tolist() in ([True, False], [False, True])  # one likes the last item, one the first


def test_two_types_explain_the_votes_better_than_one(tmp_path):
    votes, _ = planted()
    one = run_em(
        tabular_steps(),
        votes,
        Mixture(types=1, rounds=1),
        torch.ones(12, 1).double(),
        tmp_path / "1",
    )
    start = Clusters()(votes, 2, 0, items)
    two = run_em(tabular_steps(), votes, Mixture(types=2, rounds=2), start, tmp_path / "2")
    assert two.loglik > one.loglik + 15


def test_crossfitting_scores_the_half_that_was_not_trained_on_and_leaves_a_random_start(tmp_path):
    votes, truth = planted(votes=14)
    start = Dirichlet()(votes, 2, 3, items)
    mixture = Mixture(types=2, rounds=4, evidence=Halves())
    fitted = run_em(tabular_steps(), votes, mixture, start, tmp_path)
    assert fitted.scored == len(votes.rows) // 2
    assert em.type_accuracy(truth, fitted.gamma) >= 10 / 12


def test_hard_assignment_trains_each_type_on_its_likeliest_annotators_alone(tmp_path):
    votes, truth = planted(annotators=6, votes=4)
    start = torch.where(truth.unsqueeze(-1) == torch.arange(2), 0.6, 0.4).double()
    mixture = Mixture(types=2, rounds=2, assign="hard")
    fitted = run_em(tabular_steps(), votes, mixture, start, tmp_path / "em")
    first = fitted.history[0].belief.responsibilities
    assert ((first > 0.01) & (first < 0.99)).any()  # soft types would train on both
    likeliest = first.argmax(-1)
    for kind in (0, 1):
        steps = tabular_steps()
        steps.train(votes.where(likeliest[votes.annotator] == kind).rows, tmp_path / str(kind))
        assert torch.equal(load_file(fitted.weights(kind + 1))["logits"], steps.weights()["logits"])


def test_weights_that_are_divided_over_processes_are_refused_with_the_reason():
    class Divided(Accelerator):
        distributed_type = property(lambda self: DistributedType.FSDP)  # pyright: ignore[reportAssignmentType]

    with pytest.raises(UserError, match="take turns in weights that each process holds whole"):
        refuse_divided(Divided(cpu=True))
    refuse_divided(Accelerator(cpu=True))


def test_one_hot_responsibilities_train_each_type_on_its_cluster_alone(tmp_path):
    votes, truth = planted(annotators=6, votes=4)
    start = em.given_start(truth, 2)
    fitted = run_em(tabular_steps(), votes, Mixture(types=2, rounds=1), start, tmp_path / "em")
    for kind in (0, 1):
        steps = tabular_steps()
        steps.train(votes.where(truth[votes.annotator] == kind).rows, tmp_path / str(kind))
        alone = steps.weights()["logits"]
        assert torch.equal(load_file(fitted.weights(kind + 1))["logits"], alone)


def test_responsibilities_are_bayes_rule_on_the_log_likelihoods_on_disk(tmp_path):
    votes, truth = planted(annotators=6, votes=4)
    start = em.given_start(truth, 2)
    fitted = run_em(tabular_steps(), votes, Mixture(types=2, rounds=1), start, tmp_path)
    loglik = torch.stack(
        [load_file(tmp_path / "round-1" / f"type-{k}" / LOGLIK)["loglik"] for k in (1, 2)], -1
    )
    joint = torch.stack([loglik[votes.annotator == i].sum(0) for i in range(6)]).exp() * 0.5
    torch.testing.assert_close(fitted.gamma, joint / joint.sum(-1, keepdim=True))


def test_an_averaged_e_step_reads_the_rounds_before_too(tmp_path):
    votes, _ = planted(annotators=6, votes=2)
    start = Clusters()(votes, 2, 0, items)
    fitted = run_em(tabular_steps(), votes, Mixture(types=2, rounds=2, average=2), start, tmp_path)
    told = [
        torch.stack(
            [load_file(tmp_path / f"round-{t}" / f"type-{k}" / LOGLIK)["loglik"] for k in (1, 2)],
            -1,
        )
        for t in (1, 2)
    ]
    mean = em.by_annotator(sum(told) / 2, votes.annotator, 6)
    shares = fitted.history[0].belief.responsibilities.mean(0)
    torch.testing.assert_close(fitted.gamma, (mean + shares.log()).softmax(-1))
    last = em.by_annotator(told[1], votes.annotator, 6)
    assert not torch.allclose(fitted.gamma, (last + shares.log()).softmax(-1))


@pytest.mark.parametrize(("warm", "average"), [(False, 1), (True, 1), (False, 2)])
def test_a_run_killed_in_the_second_round_ends_in_the_same_files(warm, average, tmp_path):
    votes, _ = planted(annotators=8, votes=4)
    start = Dirichlet()(votes, 2, 0, items)
    mixture = Mixture(types=2, rounds=3, warm=warm, average=average)

    class Killed(Exception):
        pass

    def kill(progress) -> None:
        calls.append(progress.step)
        if len(calls) == 37:  # 10 steps a type, 20 a round, a checkpoint every 5
            raise Killed

    calls: list[int] = []
    whole = run_em(tabular_steps(), votes, mixture, start, tmp_path / "whole")
    steps = tabular_steps()
    steps.on_step = kill
    with pytest.raises(Killed):
        run_em(steps, votes, mixture, start, tmp_path / "killed")
    assert not (tmp_path / "killed" / "round-2" / "type-2" / LOGLIK).exists()
    again = run_em(tabular_steps(), votes, mixture, start, tmp_path / "killed")
    assert torch.equal(whole.gamma, again.gamma)
    for name in ("rounds.jsonl", "responsibilities.jsonl", "round-3/type-2/weights.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_restarted_rounds_begin_at_the_origin_and_warm_ones_where_they_were(tmp_path):
    votes, truth = planted(annotators=6, votes=4)
    start = em.given_start(truth, 2)
    short = replace(SETTINGS, max_steps=2)
    gaps = {}
    for warm in (False, True):
        folder = tmp_path / str(warm)
        mixture = Mixture(types=2, rounds=4, warm=warm)
        fitted = run_em(tabular_steps(short), votes, mixture, start, folder)
        gaps[warm] = float(load_file(fitted.weights(1))["logits"].abs().max())
    assert gaps[False] < 0.41 < gaps[True]  # Adam moves 0.2 a step or less: 2 steps against 8


def test_a_type_that_nobody_is_of_stays_where_it_starts_and_is_named(tmp_path):
    votes, _ = planted(annotators=6, votes=4)
    start = em.given_start(torch.zeros(6, dtype=torch.long), 2)
    fitted = run_em(tabular_steps(), votes, Mixture(types=2, rounds=2), start, tmp_path)
    assert fitted.dead == [2]
    assert load_file(fitted.weights(2))["logits"].abs().max() == 0
    assert list(read_jsonl(tmp_path / "rounds.jsonl"))[-1]["dead"] == [2]
    assert fitted.gamma.isfinite().all()


def test_only_the_last_rounds_weights_and_no_checkpoint_stay_on_disk(tmp_path):
    votes, truth = planted(annotators=6, votes=4)
    mixture = Mixture(types=2, rounds=2)
    run_em(tabular_steps(), votes, mixture, em.given_start(truth, 2), tmp_path)
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("weights.safetensors"))
    assert kept == [f"round-2/type-{k}/weights.safetensors" for k in (1, 2)]
    assert not list(tmp_path.rglob("checkpoint"))


def test_votes_become_the_mean_direction_of_each_annotator():
    rows = comparison_rows(
        torch.zeros(3, 1, dtype=torch.long),
        torch.tensor([[0, 1], [0, 1], [1, 0]]),
        torch.tensor([[1, 2], [2, 1], [2, 1]]),
    )
    votes = Votes.of([replace(row, annotator=who) for row, who in zip(rows, "aab", strict=True)])
    # directions item 0 - item 1: +1, -1 of a; +1 of b. Spread of (1, -1, 1) is sqrt(8/9).
    expected = torch.zeros(2, ITEMS, dtype=torch.float64)
    expected[1, 0], expected[1, 1] = (9 / 8) ** 0.5, -((9 / 8) ** 0.5)
    torch.testing.assert_close(vote_means(votes, items), expected)


def test_more_types_than_annotators_are_refused():
    votes, _ = planted(annotators=3, votes=2)
    with pytest.raises(UserError, match="4 types are more than the 3 annotators"):
        refuse_unlearnable(votes, 4, allow_unidentified=True)


def test_one_binary_judgement_each_is_refused_and_the_way_out_is_named():
    votes, _ = planted(annotators=5, votes=1)
    with pytest.raises(UserError, match=r"second\s+vote of each annotator, or the best of three"):
        refuse_unlearnable(votes, 2, allow_unidentified=False)
    refuse_unlearnable(votes, 2, allow_unidentified=True)
    refuse_unlearnable(votes, 1, allow_unidentified=False)
    triple = replace(votes.rows[0], responses=((0,), (1,), (2,)), rank=(1, 2, 2))
    refuse_unlearnable(Votes.of([triple, *votes.rows[1:]]), 2, allow_unidentified=False)


def test_a_row_without_an_annotator_is_named_or_made_its_own():
    rows = [
        Comparison("p", ("a", "b"), (1, 2), annotator="unnamed-1", place="f:1"),
        Comparison("p", ("a", "b"), (1, 2), place="f:2"),
        Comparison("p", ("a", "b"), (1, 2), place="f:3"),
    ]
    with pytest.raises(UserError, match="f:2: no annotator, as in 2 of 3 rows"):
        with_annotators(rows, "refuse")
    named = [row.annotator for row in with_annotators(rows, "own")]
    assert named == ["unnamed-1", "unnamed-2", "unnamed-3"]


@pytest.mark.parametrize("objective", [IPO(), DPO(label_smoothing=0.1)])
def test_an_objective_that_is_no_likelihood_is_refused(objective):
    with pytest.raises(UserError, match="no likelihood of a judgement"):
        refuse_no_likelihood(objective)


def test_dpo_on_rankings_is_refused_since_it_averages_over_pairs():
    row = tiny.row(2, [2, 3, 4], rank=(1, 2, 3))
    with pytest.raises(UserError, match="likelihood for two only; use PlackettLuce"):
        refuse_long_pairs(DPO(), [row])
    refuse_long_pairs(PlackettLuce(), [row])


def test_bad_starts_and_numbers_say_what_is_allowed(tmp_path):
    votes, _ = planted(annotators=2, votes=2)
    file = tmp_path / "gamma.jsonl"
    with pytest.raises(UserError, match="no such file of responsibilities"):
        Given(path=str(file))(votes, 2, 0, items)
    write_jsonl(file, [{"annotator": "a0", "gamma": [0.5, 0.6]}])
    with pytest.raises(UserError, match=r"gamma.jsonl:1: a row is an annotator and gamma"):
        Given(path=str(file))(votes, 2, 0, items)
    write_jsonl(file, [{"annotator": "a0", "gamma": [0.25, 0.75]}])
    with pytest.raises(UserError, match="says nothing of annotator 'a1'"):
        Given(path=str(file))(votes, 2, 0, items)
    write_jsonl(file, [{"annotator": f"a{i}", "gamma": [0.25, 0.75]} for i in (1, 0)])
    assert Given(path=str(file))(votes, 2, 0, items).tolist() == [[0.25, 0.75]] * 2
    with pytest.raises(UserError, match="3 numbers for 2 types"):
        Dirichlet(concentration=(1.0, 2.0, 3.0))(votes, 2, 0, items)
    with pytest.raises(UserError, match="directions must be 1 or more"):
        Clusters(directions=0)
    with pytest.raises(UserError, match="rounds must be at least 1"):
        Mixture(rounds=0)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([("a", 2), ("b", 2)], "no: one judgement between two responses each"),
        ([("a", 2), ("a", 2), ("b", 2)], "yes, by 1 of 2 annotators"),
        ([("a", 3), ("b", 2)], "yes, by 1 of 2 annotators"),
        ([("a", 2), ("a", 2)], "no: one annotator has one type"),
    ],
)
def test_check_says_whether_types_can_be_told_apart(rows, sentence, tmp_path):
    path = tmp_path / "votes.jsonl"
    write_jsonl(
        path,
        (
            {"prompt": "p", "responses": [f"r{at}-{n}" for n in range(size)], "annotator": name}
            | {"rank": [1, 2, 2][:size]}
            for at, (name, size) in enumerate(rows)
        ),
    )
    found = check(path).types
    assert found is not None
    assert str(found).startswith(sentence)
    assert (found.sets, sum(found.judged.values())) == (len(rows), len(rows))


def test_check_warns_where_everybody_saw_the_same_responses(tmp_path):
    path = tmp_path / "votes.jsonl"
    one = {"prompt": "p", "responses": ["a", "b", "c"], "rank": [1, 2, 2]}
    write_jsonl(path, (one | {"annotator": name} for name in "ab"))
    assert str(check(path).types).endswith("all saw the same responses, show others too")
    write_jsonl(path, [one])
    assert check(path).types is None


def test_folds_share_out_each_annotators_judgements_evenly():
    votes, _ = planted(annotators=3, votes=4)
    fold = deal(votes, 2, seed=0)
    for annotator in range(3):
        assert fold[votes.annotator == annotator].sum() == 2  # 4 judgements, 2 in fold 1
    with pytest.raises(UserError, match="--folds must be 2 to 12"):
        deal(votes, 1, seed=0)


class Remembering(torch.nn.Module):
    """A policy with one taste and a memory: reward = taste * the answer's value + its memory."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value
        self.taste = torch.nn.Parameter(torch.zeros(()))
        self.memory = torch.nn.Parameter(torch.zeros(len(value)))

    def forward(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        shown = torch.tensor([[answer[0] for answer in row.responses] for row in batch])
        reward = self.taste * self.value[shown] + self.memory[shown]
        return reward.unsqueeze(-1), torch.ones_like(reward, dtype=torch.bool).unsqueeze(-1)


def remembering(annotators: int = 24, each: int = 8) -> tuple[Votes, torch.Tensor, Steps]:
    """Opposite tastes, no answer shown twice, and a policy that remembers every answer."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.arange(annotators) % 2
    who = torch.arange(annotators).repeat_interleave(each)
    value = torch.randn(2 * len(who), generator=rng)
    shown = torch.arange(2 * len(who)).reshape(-1, 2)
    sign = torch.where(truth[who] == 0, 2.0, -2.0)
    first = (
        torch.rand(len(who), generator=rng) < (sign * -value[shown].diff().squeeze(-1)).sigmoid()
    )
    rank = torch.where(first.unsqueeze(-1), torch.tensor([1, 2]), torch.tensor([2, 1]))
    rows = comparison_rows(torch.zeros(len(who), 1, dtype=torch.long), shown, rank)
    named = [replace(row, annotator=f"a{i}") for row, i in zip(rows, who.tolist(), strict=True)]
    policy, frozen = Remembering(value), Remembering(value)
    steps = Steps(
        make_scorer=lambda: policy,
        objective=PlackettLuce(beta=1.0),
        reference=lambda batch: score(frozen, batch).detach(),
        settings=replace(SETTINGS, lr=0.4, save_every=1000),
        accelerator=Accelerator(cpu=True),
    )
    return Votes.of(named), truth, steps


@pytest.mark.parametrize(
    ("evidence", "least", "most"), [(Trained(), 0, 0.7), (HeldOut(folds=2), 0.9, 1)]
)
def test_held_out_annotators_leave_a_random_start_in_which_remembered_votes_freeze(
    evidence, least, most, tmp_path
):
    votes, truth, steps = remembering()
    start = em.dirichlet_start(len(votes.names), (1.0, 1.0), 0)
    assert 0.5 <= em.type_accuracy(truth, start) < 0.6
    mixture = Mixture(types=2, rounds=3, evidence=evidence)
    fitted = run_em(steps, votes, mixture, start, tmp_path)
    accuracy = em.type_accuracy(truth, fitted.gamma)
    assert least <= accuracy <= most


def test_held_out_evidence_is_of_policies_that_read_nothing_of_the_annotator(tmp_path):
    votes, truth = planted(annotators=6, votes=4)
    start = em.given_start(truth, 2)
    mixture = Mixture(types=2, rounds=1, evidence=HeldOut(folds=3))
    fitted = run_em(tabular_steps(), votes, mixture, start, tmp_path / "em")
    fold = deal_annotators(6, 3, mixture.seed)
    assert fold.bincount().tolist() == [2, 2, 2]
    assert fitted.scored == 24
    total = torch.zeros(6, 2, dtype=torch.float64)
    for annotator in range(6):
        for kind in (0, 1):
            steps = tabular_steps()
            others = (fold != fold[annotator]) & (truth == kind)
            steps.train(votes.where(others[votes.annotator]).rows, tmp_path / f"{annotator}{kind}")
            total[annotator, kind] = steps.loglik(
                votes.where(votes.annotator == annotator).rows
            ).sum()
    torch.testing.assert_close(fitted.gamma, (total + math.log(0.5)).softmax(-1))
    # What is kept is trained on everybody, by the responsibilities that came out.
    steps = tabular_steps()
    weight = fitted.gamma[votes.annotator, 0]
    steps.train(votes.weighted(torch.where(weight > NEGLIGIBLE, weight, 0.0)), tmp_path / "all")
    kept = load_file(fitted.weights(1))["logits"]
    assert torch.equal(kept, steps.weights()["logits"])


def test_a_run_with_held_out_annotators_killed_anywhere_ends_in_the_same_files(tmp_path):
    votes, _ = planted(annotators=6, votes=3)
    start = em.dirichlet_start(6, (1.0, 1.0), 0)
    mixture = Mixture(types=2, rounds=2, evidence=HeldOut(folds=2))

    class Killed(Exception):
        pass

    def kill(progress) -> None:
        calls.append(progress.step)
        if len(calls) in (33, 70):  # in a part of round 1, and in the last training on everything
            raise Killed

    calls: list[int] = []
    short = replace(SETTINGS, epochs=8, save_every=4)  # 8 steps a type: 32 a round of two parts
    whole = run_em(tabular_steps(short), votes, mixture, start, tmp_path / "whole")
    for _ in range(2):
        steps = tabular_steps(short)
        steps.on_step = kill
        with pytest.raises(Killed):
            run_em(steps, votes, mixture, start, tmp_path / "killed")
    again = run_em(tabular_steps(short), votes, mixture, start, tmp_path / "killed")
    assert torch.equal(whole.gamma, again.gamma)
    for number in (1, 2):
        assert whole.weights(number).read_bytes() == again.weights(number).read_bytes()
    assert (tmp_path / "whole" / "final" / "type-1" / "weights.safetensors").exists()
    assert len(list((tmp_path / "killed").rglob("weights.safetensors"))) == 2


def test_evidence_that_cannot_be_had_is_refused():
    votes, _ = planted(annotators=3, votes=2)
    with pytest.raises(UserError, match="folds must be 2 or more, got 1"):
        HeldOut(folds=1)
    with pytest.raises(UserError, match="folds is 4, more than the 3 annotators"):
        HeldOut(folds=4)(votes, 0, 0)
    with pytest.raises(UserError, match="leave --warm out, or hold annotators out"):
        Mixture(warm=True, evidence=Halves())
