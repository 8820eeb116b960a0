"""`prefloop mixture` and `prefloop aggregate` on a tiny language model, end to end."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from prefloop import em
from prefloop.aggregate import mixture
from prefloop.aggregating import Types, accuracy_by_annotator, answer, load_types, posterior, solve
from prefloop.aggregating.forms import (
    Imitation,
    answers_of,
    distil_by_kl,
    draw_one_type,
    pool_logits,
    pooled_answers,
)
from prefloop.aggregating.teaching import Student
from prefloop.cli import main
from prefloop.data import read
from prefloop.data.tokens import tokenize
from prefloop.mixture import Votes
from prefloop.policies import Lora, Sampling, load_policy
from prefloop.policies.policy import evaluating
from prefloop.policies.sampling import sample
from prefloop.report import write_report
from prefloop.report.section_json import read_section
from prefloop.runs import read_json, read_jsonl, write_jsonl
from prefloop.settings import TrainSettings
from prefloop.types import Logps, judgement, score

WORDS = [f"w{number}" for number in range(60)]
LOOP = [
    *("--lora-rank", "2", "--batch-size", "24", "--epochs", "4", "--lr", "0.03"),
    *("--save-every", "4", "--max-grad-norm", "1000"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mixture")


@pytest.fixture(scope="module", autouse=True)
def cache(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFLOOP_CACHE", str(folder / "cache"))
        yield


@pytest.fixture(scope="module")
def model(folder) -> str:
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    return str(folder / "model")


def row(n: int, person: int) -> dict:
    """Even people like the first word of the two kinds, odd people the second."""
    likes = person % 2
    return {
        "id": f"{person}-{n}",
        "prompt": f"{WORDS[(n + person) % 20]} {WORDS[n % 7]}",
        "responses": [f"w30 {WORDS[n % 20]}", f"w45 {WORDS[n % 20]}"],
        "rank": [1, 2] if likes == 0 else [2, 1],
        "annotator": f"person-{person}",
    }


@pytest.fixture(scope="module")
def votes(folder) -> Path:
    write_jsonl(folder / "votes.jsonl", (row(n, person) for person in range(6) for n in range(4)))
    return folder / "votes.jsonl"


@pytest.fixture(scope="module")
def prompts(folder) -> Path:
    write_jsonl(folder / "prompts.jsonl", ({"id": f"p{n}", "prompt": WORDS[n]} for n in range(4)))
    return folder / "prompts.jsonl"


def train(model: str, data: Path, out: Path, *more: str) -> int:
    words = ["mixture", "--model", model, "--data", str(data), "--out", str(out)]
    return main([*words, *LOOP, "--rounds", "2", *more])


@pytest.fixture(scope="module")
def run(model, votes, folder) -> Path:
    assert train(model, votes, folder / "run", "--objective", "PlackettLuce(beta=1.0)") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def types(run) -> Types:
    return load_types(run)


def test_planted_types_of_a_language_model_are_found_and_written_down(run):
    gamma = torch.tensor([line["gamma"] for line in read_jsonl(run / "responsibilities.jsonl")])
    assert em.type_accuracy(torch.arange(6) % 2, gamma) == 1
    torch.testing.assert_close(gamma.sum(-1), torch.ones(6))
    rounds = list(read_jsonl(run / "rounds.jsonl"))
    assert [line["round"] for line in rounds] == [1, 2]
    said = read_json(run / "mixture.json")
    assert said["policies"] == ["policy-1", "policy-2"]
    assert said["dead"] == []
    assert said["loglik"] == rounds[-1]["loglik"] > 24 * torch.tensor(0.5).log()
    assert said["annotators"] == 6
    assert said["judgements"] == 24


def test_the_policies_load_with_plain_peft_and_differ(run):
    logits = [
        AutoPeftModelForCausalLM.from_pretrained(run / name)(torch.tensor([[5, 6]])).logits
        for name in ("policy-1", "policy-2")
    ]
    assert (logits[0] - logits[1]).abs().max() > 0.01


def test_one_type_is_plain_training_weight_for_weight(model, votes, folder):
    words = ["--model", model, "--data", str(votes), "--objective", "DPO(beta=0.5)", *LOOP]
    plain, mixed = folder / "plain", folder / "one"
    assert main(["train", *words, "--out", str(plain), "--held-out-share", "0"]) == 0
    one = ["mixture", *words, "--out", str(mixed), "--types", "1", "--rounds", "1"]
    assert main(one) == 0
    trained = load_file(plain / "policy" / "adapter_model.safetensors")
    found = load_file(mixed / "policy-1" / "adapter_model.safetensors")
    assert trained.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in trained.items())


def test_several_starts_keep_the_likeliest_and_a_dirichlet_start_runs(model, votes, folder):
    out = folder / "starts"
    assert (
        train(model, votes, out, "--start", "Dirichlet()", "--restarts", "2", "--rounds", "1") == 0
    )
    logliks = [list(read_jsonl(out / f"start-{n}" / "rounds.jsonl"))[-1]["loglik"] for n in (1, 2)]
    said = read_json(out / "mixture.json")
    assert said["loglik"] == max(logliks)
    assert said["start"] == 1 + logliks.index(max(logliks))
    assert (out / "rounds.jsonl").read_bytes() == (
        out / f"start-{said['start']}" / "rounds.jsonl"
    ).read_bytes()


def test_the_number_of_types_is_chosen_by_held_out_votes(model, votes, folder, capsys):
    out = folder / "auto"
    strong = ["--objective", "PlackettLuce(beta=1.0)", "--rounds", "1"]
    assert train(model, votes, out, "--types", "auto", "--most-types", "2", *strong) == 0
    said = read_json(out / "types.json")
    one, two = said["candidates"]
    assert said["chosen"] == 2
    assert two["held_out"] > one["held_out"]
    assert one["held_out"] < -0.5 < two["held_out"]  # a coin is -log 2 = -0.69
    assert "2 types:" in capsys.readouterr().out
    assert read_json(out / "mixture.json")["types"] == 2


def test_going_on_with_a_finished_run_changes_nothing(run, model, votes):
    before = (run / "policy-1" / "adapter_model.safetensors").read_bytes()
    assert train(model, votes, run, "--objective", "PlackettLuce(beta=1.0)", "--resume") == 0
    assert (run / "policy-1" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotator": None}, "no annotator, as in 24 of 24 rows"),
        ({"annotator": "me"}, "2 types are more than the 1 annotators"),
    ],
)
def test_votes_that_cannot_be_used_write_nothing(change, message, model, folder, capsys):
    data, out = folder / "bad.jsonl", folder / "bad"
    write_jsonl(data, (row(n, person) | change for person in range(6) for n in range(4)))
    assert train(model, data, out) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_regret_is_zero_on_the_diagonal_and_the_mixture_is_certified(types, run, prompts):
    coder = types.reference.tokenizer
    tokens = [tuple(coder(f"w{n}")["input_ids"]) for n in range(4)]
    answered = answer(types, tokens, 2, Sampling(max_new_tokens=5), seed=0)
    solved = solve(types, answered, ())
    matrix = solved.regret.matrix
    assert matrix.diagonal().tolist() == [0, 0]
    first = types.logps(
        [tiny_row(tokens[0], [one.tokens for one in answered.answers[1][0]])]
    )  # what type 2 said to prompt 0
    expected = (first[1] - first[0])[0]  # under type 1
    torch.testing.assert_close(answered.log_ratio[1, 0, 0], expected, atol=1e-4, rtol=0)
    assert solved.min_max.gap < 1e-9
    assert (
        solved.min_max.worst
        <= min(solved.loss(weights)["worst"] for weights in solved.weights().values()) + 1e-9
    )


def tiny_row(prompt, responses):
    made = tiny.row(1, [2])
    return type(made)(prompt=tuple(prompt), responses=tuple(map(tuple, responses)))


def test_a_new_annotator_is_put_where_their_votes_belong(types, folder):
    new = folder / "new.jsonl"
    write_jsonl(new, (row(n, person) for person in (10, 11) for n in range(3)))
    rows, _ = tokenize(read(new), types.reference.tokenizer)
    gamma = posterior(types, Votes.of(rows))
    assert gamma[0].argmax() != gamma[1].argmax()
    assert gamma.max(-1).values.min() > 0.8
    known = types.gamma["person-0"]
    assert gamma[0].argmax() == torch.tensor(known).argmax()  # both even


def test_personal_mixtures_please_every_annotator_where_one_policy_cannot(types, votes):
    rows, _ = tokenize(read(votes), types.reference.tokenizer)
    weights = {
        "type 1": torch.tensor([1.0, 0.0]).double(),
        "both": torch.tensor([0.5, 0.5]).double(),
    }
    found = accuracy_by_annotator(types, Votes.of(rows), weights)
    assert found["personal"]["worst"] > 0.9
    assert found["type 1"]["worst"] < 0.1  # it answers the other half of people the wrong way
    assert set(found) == {"type 1", "both", "both, geometric", "personal"}


def test_drawing_one_type_answers_each_prompt_as_that_type(types):
    prompts, settings = [(5, 6), (7, 8), (9, 4)], Sampling(max_new_tokens=4)
    for index in (0, 1):
        weights = torch.eye(2, dtype=torch.float64)[index]
        mixed = draw_one_type(types, prompts, weights, settings, 3)
        alone = sample(types.use(index), prompts, 1, settings, 3)
        assert mixed == [drawn[0].tokens for drawn in alone]


def test_a_pool_with_all_weight_on_one_type_is_that_type(types):
    prompts, greedy = [(5, 6), (7, 8, 9)], Sampling(max_new_tokens=5, temperature=0.0)
    for index in (0, 1):
        weights = torch.eye(2, dtype=torch.float64)[index]
        assert pool_logits(types, prompts, weights, greedy, 0) == draw_one_type(
            types, prompts, weights, greedy, 0
        )


def test_pooled_answers_follow_from_seed_and_prompt_and_not_from_the_batch(types):
    prompts, weights = [(5, 6), (7, 8, 9), (4,)], torch.tensor([0.3, 0.7]).double()
    settings = Sampling(max_new_tokens=6)
    together = pooled_answers(types, prompts, weights, settings, 2, 3)
    narrow = Sampling(max_new_tokens=6, rows=1)
    assert pooled_answers(types, prompts[::-1], weights, narrow, 2, 3) == together[::-1]
    assert pool_logits(types, prompts, weights, settings, 3) == [one[0] for one in together]
    assert pool_logits(types, prompts, weights, settings, 4) != [one[0] for one in together]


def test_the_pool_draws_from_the_geometric_mean_of_its_types(types):
    weights, prompt = torch.tensor([0.3, 0.7]).double(), (5, 6)
    one = Sampling(max_new_tokens=1, rows=512)
    drawn = pooled_answers(types, [prompt], weights, one, 2048, 0)[0]
    rows = [tiny.row(2, [1] * 64)]
    rows = [
        replace(
            rows[0], prompt=prompt, responses=tuple((token,) for token in range(tiny.VOCABULARY))
        )
    ]
    logps = types.logps(rows)[:, 0]  # (1 + K, V): every answer of one token
    expected = (0.3 * logps[1] + 0.7 * logps[2]).softmax(-1)
    found = (
        torch.bincount(torch.tensor([answer[0] for answer in drawn]), minlength=tiny.VOCABULARY)
        / 2048
    )
    assert 0.5 * (found - expected).abs().sum() < 0.1  # type 2 alone is 0.2 away


def test_imitation_is_the_negative_log_probability_of_the_answers():
    token = torch.tensor([[[-1.0, -2.0], [-4.0, 0.0]], [[-3.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[[True, True], [True, False]], [[True, False], [False, False]]])
    rows = [tiny.row(1, [2, 1], label=(True, True)), tiny.row(1, [1], label=(True,))]
    loss = Imitation().per_comparison(Logps(token, mask), None, judgement(rows))
    assert loss.tolist() == [3.5, 3.0]  # (3 + 4) / 2
    assert 3 / 1


def test_mixing_whole_responses_weighs_probabilities(types, votes):
    rows, _ = tokenize(read(votes)[:3], types.reference.tokenizer)
    logps = types.logps(rows)
    mixed = mixture(logps[1:], torch.tensor([0.25, 0.75]).double())
    torch.testing.assert_close(mixed.exp(), 0.25 * logps[1].exp() + 0.75 * logps[2].exp())


def test_aggregate_writes_regrets_forms_and_one_distilled_policy(run, prompts, votes, folder):
    out = folder / "aggregate"
    words = f"aggregate {run} --data {prompts} --out {out} --n 2 --max-new-tokens 4"
    more = f"--held-out {votes} --new {votes} --distil 2 --form geometric --importance 1 2"
    loop = "--lora-rank 2 --epochs 1 --batch-size 2"
    assert main(f"{words} {more} {loop}".split()) == 0
    found = read_json(out / "regret.json")
    assert found["importance"] == [1, 2]
    assert {"min-max", "population", "uniform"} <= found["mixtures"].keys()
    assert len(list(read_jsonl(out / "personal.jsonl"))) == 6
    assert read_json(out / "annotators.json")["personal"]["worst"] > 0.9
    assert (out / "policy" / "adapter_model.safetensors").exists()
    page = write_report([run, out], folder / "report.html").read_text()
    assert "Annotator types" in page
    assert "One policy for all types" in page


@pytest.mark.parametrize("form", ["draw", "geometric"])
def test_a_student_that_is_the_teacher_has_no_kl_and_a_teacher_alone_is_its_type(form, types):
    rows = [tiny_row((5, 6), [(7, 8, 9), (4,)]), tiny_row((9,), [(5, 5)])]
    weights = torch.tensor([1.0, 0.0]).double()
    student = Student(types.use(0), types, form, weights)
    with torch.no_grad(), evaluating(types.policies[0].model):
        minus_kl = score(student, rows)  # the student is whichever type the teacher left in use
        found = score(student, rows).token
    assert minus_kl.mask.sum() == 3 + 1 + 2
    assert found.max() <= 1e-6  # KL is never negative
    base = load_policy(types.model)
    other = Student(base, types, form, weights)
    with torch.no_grad():
        apart = score(other, rows).token.sum()
        expected = kl_by_hand(types.use(0), base, rows)
    assert float(-apart) == pytest.approx(expected, abs=1e-4)
    assert expected > 0.01


def kl_by_hand(teacher, student, rows) -> float:
    """Sum over all response tokens of KL, one response at a time, from plain logits."""
    total = 0.0
    for one in rows:
        for response in one.responses:
            tokens = torch.tensor([[*one.prompt, *response]])
            p, q = (policy.model(tokens).logits[0] for policy in (teacher, student))
            places = slice(len(one.prompt) - 1, tokens.shape[1] - 1)
            p, q = p[places].log_softmax(-1), q[places].log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
    return total


@pytest.mark.parametrize("form", ["draw", "geometric"])
def test_kl_brings_a_student_closer_to_its_teacher(form, types, folder):
    weights = torch.tensor([0.7, 0.3]).double()
    prompts = [(5, 6), (7, 8, 9)]
    settings = Sampling(max_new_tokens=4)
    drawn = list(answers_of(form, types, prompts, weights, settings, range(2)))
    answers = [tuple(one[place] for one in drawn) for place in range(2)]
    policy = load_policy(types.model, adapter=Lora(rank=2, alpha=4.0))
    out, loop = folder / f"kl-{form}", TrainSettings(lr=0.02, epochs=12, batch_size=2, warmup=0.0)
    training = (loop, Accelerator(cpu=True))
    last = distil_by_kl(policy, prompts, answers, (types, form, weights), training, out)
    first = next(read_jsonl(out / "metrics.jsonl"))["loss"]
    assert 0 < last["loss"] < 0.7 * first
    assert (out / "policy" / "adapter_model.safetensors").exists()


def test_every_form_is_evaluated_by_annotator(run, model, prompts, votes, folder, capsys):
    out = folder / "fair"
    words = f"aggregate {run} --data {prompts} --out {out} --n 2 --max-new-tokens 4 --new {votes}"
    last = "--distil 1 --by kl --weights personal --annotator person-3 --lora-rank 2"
    loop = "--batch-size 4 --epochs 6 --lr 0.03"
    assert main(f"{words} {last} {loop}".split()) == 0
    assert len(list(read_jsonl(out / "answers.jsonl"))) == 4
    said = f"evaluate {out} --data {votes} --by annotator --max-new-tokens 4"
    assert main(said.split()) == 0
    found = read_json(out / "evaluation.json")
    forms = found["forms"]
    assert {"min-max", "max-min", "population", "type 1", "personal", "distilled"} <= forms.keys()
    assert {"min-max, geometric", "reference"} <= forms.keys()
    assert "win_rate" not in forms["uniform, geometric"]  # pools that nobody deploys are not drawn
    assert forms["reference"]["win_rate"]["average"] == pytest.approx(0.5)  # itself: ties
    assert forms["distilled"]["regret"]["average"] < forms["reference"]["regret"]["average"]
    assert forms["personal"]["accuracy"]["worst"] > 0.9
    assert forms["type 1"]["accuracy"]["worst"] < 0.1
    assert forms["personal"]["regret"]["worst"] < forms["type 1"]["regret"]["worst"]
    assert found["result"][0]["name"].startswith("accuracy, ")
    page = read_section(out / "annotators.section.json")
    accuracy, wins, regret = page.tables
    told = {row[0]: row[1:] for row in regret.rows}
    assert told.keys() == {name for name, one in forms.items() if "regret" in one}
    assert told["type 1"][1] == forms["type 1"]["regret"]["worst_group"]
    assert len(accuracy.rows) == len(forms) - 1  # the reference orders nothing by itself
    assert len(wins.rows) == len(regret.rows)
    assert "distilled" in capsys.readouterr().out
    assert main([*said.split(), "--reward", "vader"]) == 2
    assert "leave --reward out" in capsys.readouterr().err


def test_a_plain_run_is_evaluated_by_annotator_too(model, votes, folder):
    out = folder / "single"
    words = f"train --model {model} --data {votes} --out {out} --held-out-share 0 --max-steps 2"
    assert main(words.split() + LOOP) == 0
    assert main(f"evaluate {out} --data {votes} --by annotator".split()) == 0
    forms = read_json(out / "evaluation.json")["forms"]
    assert set(forms) == {"reference", "policy", "implicit reward"}
    accuracy = forms["implicit reward"]["accuracy"]
    groups = [one["value"] for one in accuracy["groups"].values()]
    assert accuracy["worst"] == min(groups)
    assert accuracy["average"] == pytest.approx(sum(groups) / 6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--importance 1 2 3", "--importance has 3 numbers for 2 types"),
        ("--weights personal --annotator nobody", "one of the 6 annotators"),
    ],
)
def test_what_cannot_be_aggregated_is_said(words, message, run, prompts, folder, capsys):
    out = folder / "refused"
    base = f"aggregate {run} --data {prompts} --max-new-tokens 2 --out {out}/{len(message)}"
    assert main(f"{base} {words}".split()) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_holds_no_mixture_is_refused(folder):
    with pytest.raises(Exception, match=r"no mixture\.json, so this is no finished run"):
        load_types(folder)
