"""Online rounds on a tiny model: what each round holds, and that a kill costs nothing."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from prefloop import online
from prefloop.cli import main
from prefloop.errors import UserError
from prefloop.objectives import DPO, SoftLabelDPO
from prefloop.online.loop import _displacement
from prefloop.online.section import section
from prefloop.report.section_json import read_section
from prefloop.runs import read_json, read_jsonl, write_json, write_jsonl
from prefloop.samplers import BestWorst, FromReference, Hybrid, Mixture, Tilted
from prefloop.types import Comparison, Judgement, Logps

WORDS = "--lr 0.02 --batch-size 4 --epochs 2 --lora-rank 2 --max-new-tokens 5 --save-every 1"


def even_words(prompt, response: str) -> float:
    """The share of even words."""
    words = [word for word in response.split() if word.startswith("w")]
    return sum(int(word[1:]) % 2 == 0 for word in words) / max(1, len(words))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_jsonl(path, ({"id": f"p{n}", "prompt": f"w{n} w{n + 20} w{n + 40}"} for n in range(10)))
    return path


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def words(model: str, prompts: Path, out: Path, more: str = "") -> list[str]:
    text = f"online --model {model} --data {prompts} --out {out} --reward test_online:even_words"
    return f"{text} --rounds 2 {WORDS} {more}".split()


def files(run: Path) -> dict[str, object]:
    """Everything a run left, but speeds, versions and its own place."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.name == "metrics.jsonl":
            rows = list(read_jsonl(path))
            found[name] = [{k: row[k] for k in row if "per_second" not in k} for row in rows]
        elif path.is_file() and name != "config.json":
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(model, prompts, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFLOOP_CACHE", str(out.parent / "cache"))
        patch.syspath_prepend(str(Path(__file__).parent))
        assert main(words(model, prompts, out, "--recipe tilted --budget 5")) == 0
    return out


def test_the_first_round_is_on_policy_and_later_ones_are_the_recipes(whole):
    first, second = (list(read_jsonl(whole / f"round-{r}/responses.jsonl")) for r in (1, 2))
    assert {tuple(row["sampler"]) for row in first} == {("policy", "policy")}
    tilted = ("1.5 policy -0.5 reference", "0.5 policy +0.5 reference")
    assert {tuple(row["sampler"]) for row in second} == {tilted}
    assert {row["id"] for row in first} == {row["id"] for row in second}


def test_a_round_spends_its_budget_on_the_prompts_of_highest_variance(whole):
    for number in (1, 2):
        rows = list(read_jsonl(whole / f"round-{number}/selected.jsonl"))
        kept = [row["pvar"] for row in rows if row["kept"]]
        assert len(kept) == 5
        assert min(kept) >= max(row["pvar"] for row in rows if not row["kept"])
        pairs = list(read_jsonl(whole / f"round-{number}/pairs.jsonl"))
        assert len(pairs) == 5
        assert all(
            (p["rank"][0] < p["rank"][1]) == (p["scores"][0] > p["scores"][1]) for p in pairs
        )


def test_the_second_round_trains_on_with_the_adapter_of_the_first(whole, model, prompts):
    from safetensors.torch import load_file

    first, second = (
        load_file(whole / f"round-{r}/policy/adapter_model.safetensors") for r in (1, 2)
    )
    moved = torch.cat([(second[name] - first[name]).flatten() for name in first]).norm()
    size = torch.cat([value.flatten() for value in first.values()]).norm()
    assert 0 < moved < 0.7 * size  # a fresh adapter would be about sqrt(2) sizes away
    config = read_json(whole / "round-2/policy/adapter_config.json")
    assert config["base_model_name_or_path"] == model


def test_rounds_are_logged_and_reported(whole):
    rows = list(read_jsonl(whole / "rounds.jsonl"))
    assert [row["round"] for row in rows] == [1, 2]
    assert [row["labels"] for row in rows] == [5, 5]
    assert all(row["answers"] == 16 and row["kl_se"] > 0 for row in rows)
    assert all("displacement/chosen" in row for row in rows)
    page = read_section(whole / "online.section.json")
    assert page.figures[-1].points[0].hollow
    assert [text.name for text in page.answers[0].texts] == ["reference", "after round 2"]
    reward = page.figures[0].series
    assert [line.name for line in reward] == ["reference", "policy"]
    assert reward[1].high[0] - reward[1].low[0] == pytest.approx(2 * rows[0]["reward_se"])
    assert [point.name for point in page.figures[-1].points] == ["reference", "round 1", "round 2"]
    assert main(["report", str(whole)]) == 0
    assert "Reward against KL" in (whole / "report.html").read_text()
    (whole / "report.html").unlink()


STAGES = (
    "round-1/selection.json",
    "round-1/policy",
    "round-2/scored.jsonl",
    "round-2/pairs.jsonl",
    "round-2/policy",
)


@pytest.mark.parametrize("last", STAGES)
def test_a_run_stopped_after_any_stage_ends_in_the_same_files(
    last, whole, model, prompts, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    kept, later = False, [out / name for name in ORDER]
    for path in later:
        if kept and path.is_dir():
            shutil.rmtree(path)
        elif kept:
            path.unlink()
        kept = kept or path == out / last
    assert not (out / "round-2/evaluation.json").exists()
    again = words(model, prompts, out, "--recipe tilted --budget 5 --resume")
    assert main(again) == 0
    assert files(out) == files(whole)


ORDER = [
    f"round-{number}/{name}"
    for number in (1, 2)
    for name in (
        "responses.jsonl",
        "scored.jsonl",
        "scoring.json",
        "selected.jsonl",
        "selection.json",
        "pairs.jsonl",
        "metrics.jsonl",
        "policy",
        "samples.jsonl",
        "evaluation.json",
    )
] + ["rounds.jsonl", "online.section.json"]


def test_a_run_stopped_within_a_stage_ends_in_the_same_files(whole, model, prompts, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ORDER[10:]:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    rows = (whole / "round-2/responses.jsonl").read_text().splitlines(keepends=True)
    torn = "".join(rows[:3]) + rows[3][:20]
    (out / "round-2/responses.part.jsonl").write_text(torn)
    assert main(words(model, prompts, out, "--recipe tilted --budget 5 --resume")) == 0
    assert files(out) == files(whole)


def test_what_a_run_left_that_was_killed_before_it_cleared_up_goes_away(
    whole, model, prompts, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ORDER[ORDER.index("round-2/pairs.jsonl") :]:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    left = out / "round-2"
    shutil.copyfile(left / "responses.jsonl", left / "responses.part.jsonl")
    shutil.copyfile(left / "responses.jsonl", left / "responses.part-1.jsonl")
    for folder in ("parts", "measured"):
        (left / folder).mkdir()
        (left / folder / "block-0000000.rows").write_text("what is in scored.jsonl already")
    assert main(words(model, prompts, out, "--recipe tilted --budget 5 --resume")) == 0
    assert files(out) == files(whole)


@pytest.mark.slow
@pytest.mark.parametrize("sign", ["round-1/checkpoint/step-*/state.json", "round-2/scored.jsonl"])
def test_a_run_killed_without_warning_ends_in_the_same_files(sign, whole, model, prompts, tmp_path):
    out = tmp_path / "run"
    line = words(model, prompts, out, "--recipe tilted --budget 5")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "prefloop.cli", *line], stdout=subprocess.PIPE, env=environment
    )
    deadline = time.monotonic() + 120
    while not list(out.glob(sign)) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "round-2/evaluation.json").exists()
    assert main([*line, "--resume"]) == 0
    assert files(out) == files(whole)


@pytest.mark.slow
def test_two_processes_do_the_rounds_of_one(whole, model, prompts, tmp_path):
    out = tmp_path / "run"
    line = words(model, prompts, out, "--recipe tilted --budget 5")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    here = Path(__file__).parent
    paths = os.pathsep.join((str(here), str(here.parent)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "--", "prefloop.cli", *line]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("[round 2] train") == 1  # one process speaks
    assert done.stdout.count("policy: ") == 1
    assert sorted(files(out)) == sorted(files(whole))
    for number in (1, 2):
        for name in ("selected.jsonl", "pairs.jsonl"):
            one, two = (run / f"round-{number}" / name for run in (whole, out))
            texts = [[(r["id"], r["responses"]) for r in read_jsonl(path)] for path in (one, two)]
            assert texts[0] == texts[1], (number, name)
        adapter = f"round-{number}/policy/adapter_model.safetensors"
        one, two = (load_file(run / adapter) for run in (whole, out))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-4, msg=name)
    assert_same_rounds(whole, out)
    for name in ("samples.jsonl", "evaluation.json", "selection.json", "pairs.jsonl"):
        (out / "round-2" / name).unlink()
    shutil.rmtree(out / "round-2/policy")
    assert main([*line, "--resume"]) == 0  # one process goes on with what two have begun
    assert_same_rounds(whole, out)


def assert_same_rounds(one: Path, two: Path) -> None:
    rows = [list(read_jsonl(run / "rounds.jsonl")) for run in (one, two)]
    for first, second in zip(*rows, strict=True):
        assert second == pytest.approx(first, abs=1e-3)


def test_a_moving_reference_is_the_policy_that_the_round_began_with(model, prompts, tmp_path):
    assert main(words(model, prompts, tmp_path / "run", "--reference moving")) == 0
    # Before the first step policy and reference are one, so that no reward is other than 0.
    for number in (1, 2):
        first = next(iter(read_jsonl(tmp_path / f"run/round-{number}/metrics.jsonl")))
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)


def test_a_fixed_reference_is_the_first_model_in_every_round(whole):
    first = [next(iter(read_jsonl(whole / f"round-{r}/metrics.jsonl"))) for r in (1, 2)]
    assert first[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert abs(first[1]["rewards/chosen"]) > 1e-3


def test_a_model_trained_whole_keeps_the_first_model_as_reference(model, prompts, tmp_path):
    out = tmp_path / "run"
    line = words(model, prompts, out, "--recipe hybrid --lr 0.001 --sampler Hybrid()")
    assert main([*line, "--lora-rank", "0"]) == 0
    rows = list(read_jsonl(out / "rounds.jsonl"))
    assert all(row["kl"] != 0 for row in rows)
    assert not (out / "round-2/policy/adapter_config.json").exists()


def test_hard_labels_choosers_and_threshold_pairs_run_through_the_same_loop(
    model, prompts, tmp_path
):
    source = "ThresholdPairs(candidates=4,threshold=0.5,cap=2)"
    more = f"--first BestWorst(candidates=3) --sampler {source} --objective DPO(beta=0.1)"
    assert main(words(model, prompts, tmp_path / "run", more)) == 0
    for number, most in ((1, 1), (2, 2)):
        rows = list(read_jsonl(tmp_path / f"run/round-{number}/pairs.jsonl"))
        assert {len(row["responses"]) for row in rows} == {2}
        asked = [row["id"].split("#")[0] for row in rows]
        assert max(asked.count(name) for name in asked) == most


def test_a_rule_may_read_what_the_policy_itself_prefers(model, prompts, tmp_path):
    more = "--rule OnlinePVar(beta=0.1) --budget 4"
    assert main(words(model, prompts, tmp_path / "run", more)) == 0
    first, second = (list(read_jsonl(tmp_path / f"run/round-{r}/selected.jsonl")) for r in (1, 2))
    # In the first round policy and reference are one model: no variance, up to rounding.
    assert max(row["onlinepvar"] for row in first) < 1e-10
    assert min(row["onlinepvar"] for row in second if row["kept"]) > 1e-6
    drawn = next(iter(first))
    # Finished answers: the log-probability of the text is the one they were drawn with.
    for at, finished in enumerate(drawn["finished"]):
        if finished:
            assert drawn["policy_logps"][at] == pytest.approx(drawn["drawn_logps"][at], abs=1e-3)


def test_the_mapping_table_names_its_samplers():
    named = {name: recipe.source for name, recipe in online.RECIPES.items()}
    assert named["vanilla"] == FromReference()
    assert named["hybrid"] == Hybrid()
    assert named["tilted"] == Tilted(k=0.5)
    assert named["mixture"] == Mixture(on_policy=0.3, k=0.5)
    assert isinstance(online.RECIPES["mixture"].objective, SoftLabelDPO)


def test_a_chooser_says_how_many_answers_to_draw():
    source = online.source_of(BestWorst(candidates=3), 2)
    row = Comparison(prompt="a", responses=("x", "y", "z"), scores=(0.0, 2.0, 1.0), id="r")
    assert source.answers == 3
    assert source.pairing(row, 0)[0].responses == ("y", "x")


def test_threshold_pairs_are_those_that_bradley_terry_is_sure_of():
    # sigmoid(2) = 0.881 > 0.85, sigmoid(1) = 0.731: of 3, 2, 1 only the ends are far enough apart.
    source = online.source_of(online.ThresholdPairs(candidates=3), 2)
    row = Comparison(prompt="a", responses=("x", "y", "z"), scores=(3.0, 2.0, 1.0), id="r")
    assert [pair.responses for pair in source.pairing(row, 0)] == [("x", "z")]


def test_the_exploration_bonus_is_alpha_times_the_first_log_probability():
    token = torch.tensor([[[-1.0, -2.0], [-0.5, 0.0]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    policy = Logps(token, mask)
    rank = Judgement(
        rank=torch.tensor([[2, 1]]),
        scores=torch.full((1, 2), float("nan")),
        label=torch.full((1, 2), -1),
        weight=torch.ones(1),
    )
    plain = DPO(beta=0.1).per_comparison(policy, policy, rank)
    bonus = online.XPO(objective=DPO(beta=0.1), alpha=0.5).per_comparison(policy, policy, rank)
    assert (bonus - plain).item() == pytest.approx(0.5 * -3.0)  # the first response is -1 - 2


def test_the_bonus_of_xpo_falls_from_round_to_round():
    falling = online.XPO(alpha=0.5, rounds=3)
    assert [falling.in_round(number).alpha for number in (1, 2, 3, 4)] == [0.5, 0.25, 0.0, 0.0]
    assert online.XPO(alpha=0.5).in_round(7) == online.XPO(alpha=0.5)
    with pytest.raises(UserError, match="the round in which alpha is 0"):
        online.XPO(rounds=1)


def test_each_round_minimises_the_objective_of_its_number(model, prompts, tmp_path):
    more = "--recipe xpo --max-steps 1 --held-out-n 1"
    assert main(words(model, prompts, tmp_path / "run", more)) == 0
    rows = list(read_jsonl(tmp_path / "run/rounds.jsonl"))
    assert ["alpha=1e-05" in row["objective"] for row in rows] == [True, False]
    assert ["alpha=5e-06" in row["objective"] for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--rounds 0", "rounds must be 1 or more"),
        ("--n 1", "2 are needed; got 1"),
        ("--sampler Tilt(k=1)", "perhaps you meant Tilted"),
        ("--sampler ThresholdPairs(candidates=1)", "2 are needed; got 1"),
        ("--sampler ThresholdPairs(cap=0)", "cap must be 1 or more"),
        ("--objective XPO(alpha=-1.0)", "alpha must be 0"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(more, said, model, prompts, tmp_path, capsys):
    assert main(words(model, prompts, tmp_path / "run", more)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_round_without_a_pair_is_refused(model, prompts, tmp_path, capsys):
    more = "--first ThresholdPairs(candidates=2,threshold=0.99)"  # a gap of 4.6; rewards are <= 1
    assert main(words(model, prompts, tmp_path / "run", more)) == 2
    assert "has a pair to compare" in capsys.readouterr().err


def test_displacement_is_the_mean_over_the_last_epoch_without_tied_steps():
    rows = [
        {"epoch": 0.5, "displacement/chosen": 9.0},
        {"epoch": 1.0, "displacement/chosen": 9.0},
        {"epoch": 1.5, "displacement/chosen": 1.0},
        {"epoch": 1.75},
        {"epoch": 2.0, "displacement/chosen": 2.0},
    ]
    assert _displacement(rows) == {"displacement/chosen": 1.5}


def test_a_section_survives_a_round_without_displacement(tmp_path):
    numbers = ("reward", "reward_se", "reference_reward", "reference_reward_se", "kl", "kl_se")
    numbers += ("win_rate", "win_rate_low", "win_rate_high")
    row = dict.fromkeys(numbers, 0.5) | {
        "round": 1,
        "source": "x",
        "objective": "DPO(beta=0.1)",
        "answers": 4,
        "labels": 2,
    }
    write_json(tmp_path / "online.section.json", section([row]))
    (said,) = section([row, row | {"round": 2, "objective": "IPO()"}])["paragraphs"][:1]
    assert "Minimised: DPO(beta=0.1) in round 1, IPO() in round 2." in said
    assert read_section(tmp_path / "online.section.json").tables[0].rows[0][-1] is None
