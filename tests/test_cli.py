"""The commands end to end on a tiny model; a user's mistake is one line and writes nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from prefloop.cli import COMMANDS, main
from prefloop.errors import UserError
from prefloop.runs import read_json, read_jsonl, start_run, write_jsonl
from prefloop.settings import TrainSettings

WORDS = [f"w{number}" for number in range(60)]


def score_words(prompt, response: str) -> float:
    """A reward for tests: the share of even words."""
    words = [word for word in response.split() if word.startswith("w")]
    return sum(int(word[1:]) % 2 == 0 for word in words) / max(1, len(words))


def score_nothing(prompt, response: str) -> float:
    return float("nan")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def new_accelerator():
    """A process has one precision; here many commands with their own run in one."""
    AcceleratorState._reset_state(reset_partial_state=True)


def sentence(start: int, length: int) -> str:
    return " ".join(WORDS[(start * 7 + place * 3) % 60] for place in range(length))


def comparisons(path: Path, count: int = 12) -> Path:
    rows = [
        {
            "id": f"row-{n}",
            "prompt": sentence(n, 3),
            "responses": [sentence(n + 1, 4), sentence(n + 2, 6)],
            "rank": [1, 2] if n % 2 else [2, 1],
            "annotator": f"person-{n % 3}",
        }
        for n in range(count)
    ]
    write_jsonl(path, rows)
    return path


TRAIN = ["--lora-rank", "2", "--batch-size", "4", "--epochs", "2", "--lr", "0.01"]


def train(model: str, data: Path, out: Path, *more: str) -> int:
    return main(["train", "--model", model, "--data", str(data), "--out", str(out), *TRAIN, *more])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "policy" / "adapter_model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def test_the_loop_runs_from_prompts_to_a_report(model, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    write_jsonl(prompts, ({"id": f"p{n}", "prompt": sentence(n, 4)} for n in range(6)))
    short = "--max-new-tokens 6"
    reward = "--reward test_cli:score_words"
    at = tmp_path
    steps = [
        f"sample --model {model} --data {prompts} --out {at}/a --n 3 {short}",
        f"score --data {at}/a/responses.jsonl --out {at}/b {reward}",
        f"select --data {at}/b/scored.jsonl --out {at}/c",
        f"train --model {model} --data {at}/c/selected.jsonl --out {at}/run --held-out-share 0 "
        + " ".join(TRAIN),
        f"evaluate {at}/run --data {prompts} {reward} {short} --n 2",
        f"report {at}/run",
    ]
    for words in steps:
        assert main(words.split()) == 0, words
    selected = list(read_jsonl(tmp_path / "c/selected.jsonl"))
    assert len(selected) == 6
    assert sum(row.get("weight", 1.0) for row in selected) == 3
    cut = read_json(tmp_path / "c/selection.json")["cut"]
    assert all((row["pvar"] >= cut) == row["kept"] for row in selected)
    assert [r["name"] for r in read_json(tmp_path / "run/evaluation.json")["result"]]
    assert "<svg" in (tmp_path / "run/report.html").read_text()
    assert "next: prefloop" in capsys.readouterr().out


def test_training_sees_rows_sorted_by_a_column_as_a_curriculum(model, tmp_path, capsys):
    rows = list(read_jsonl(comparisons(tmp_path / "data.jsonl")))
    places = [(5 * n) % 12 for n in range(12)]
    write_jsonl(
        tmp_path / "places.jsonl",
        ({**row, "place": at} for row, at in zip(rows, places, strict=True)),
    )
    in_turn = sorted(range(12), key=places.__getitem__)
    write_jsonl(tmp_path / "sorted.jsonl", (rows[at] for at in in_turn))
    as_given = ["--held-out-share", "0", "--order", "AsGiven()"]
    by_place = [*as_given, "--sort", "place"]
    assert train(model, tmp_path / "sorted.jsonl", tmp_path / "a", *as_given) == 0
    assert train(model, tmp_path / "places.jsonl", tmp_path / "b", *by_place) == 0
    assert train(model, tmp_path / "places.jsonl", tmp_path / "c", *as_given) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "b"), weights(tmp_path / "c"))
    assert train(model, tmp_path / "places.jsonl", tmp_path / "d", "--sort", "place") == 2
    assert 'add --order "AsGiven()"' in capsys.readouterr().err


def test_a_run_is_replayed_from_its_config(model, tmp_path):
    data = comparisons(tmp_path / "data.jsonl")
    assert train(model, data, tmp_path / "first", "--objective", "IPO(beta=0.2)") == 0
    config = str(tmp_path / "first" / "config.json")
    assert main(["train", "--config", config, "--out", str(tmp_path / "second")]) == 0
    assert same(weights(tmp_path / "first"), weights(tmp_path / "second"))
    assert read_json(tmp_path / "second/config.json")["settings"]["objective"] == "IPO(beta=0.2)"


def test_a_run_killed_without_warning_resumes_to_the_same_bits(model, tmp_path):
    data = comparisons(tmp_path / "data.jsonl", 16)
    settings = ["--epochs", "40", "--save-every", "3"]
    assert train(model, data, tmp_path / "whole", *settings) == 0
    command = [sys.executable, "-m", "prefloop.cli", "train", "--model", model, "--data", data]
    words = [*map(str, command), "--out", str(tmp_path / "killed"), *TRAIN, *settings]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    saved = tmp_path / "killed" / "checkpoint"
    deadline = time.monotonic() + 120
    while not list(saved.glob("step-*/state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "policy").exists(), "it ended before it could be killed"
    assert train(model, data, tmp_path / "killed", *settings, "--resume") == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_ctrl_c_leaves_a_run_that_goes_on(model, tmp_path):
    data = comparisons(tmp_path / "data.jsonl", 16)
    words = ["train", "--model", model, "--data", data, "--out", tmp_path / "run", *TRAIN]
    words += ["--epochs", "200", "--save-every", "100000"]
    command = [sys.executable, "-m", "prefloop.cli", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size > 2000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in said
    assert "Traceback" not in said
    assert list((tmp_path / "run" / "checkpoint").glob("step-*/state.json"))


def bad_json(folder: Path) -> list[str]:
    path = comparisons(folder / "data.jsonl", 3)
    path.write_text(path.read_text().replace('"row-1"', '"row-1', 1))
    return ["--data", str(path)]


def edited(change):
    def make(folder: Path) -> list[str]:
        path = comparisons(folder / "data.jsonl", 4)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows[2])
        write_jsonl(path, rows)
        return ["--data", str(path)]

    return make


def good_data(*more: str):
    return lambda folder: ["--data", str(comparisons(folder / "data.jsonl")), *more]


BAD_TRAINING = {
    "malformed JSON": (bad_json, ["data.jsonl:2"]),
    "a missing column": (edited(lambda row: row.pop("responses")), ["data.jsonl:3", "responses"]),
    "an empty response": (
        edited(lambda row: row.update(responses=["", "w1"])),
        ["data.jsonl:3", "empty"],
    ),
    "a prompt past the context": (
        edited(lambda row: row.update(prompt="w1 " * 600)),
        ["data.jsonl:3", "512"],
    ),
    "ranks of the wrong length": (
        edited(lambda row: row.update(rank=[1, 2, 3])),
        ["data.jsonl:3", "rank"],
    ),
    "an unknown objective": (good_data("--objective", "DPQ()"), ["perhaps you meant DPO"]),
    "an unknown field": (good_data("--objective", "DPO(betta=1)"), ["perhaps you meant beta"]),
    "a setting out of range": (good_data("--lr", "-1"), ["lr", "-1"]),
    "no such file": (lambda folder: ["--data", str(folder / "none.jsonl")], ["none.jsonl"]),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_input_ends_in_one_line_and_writes_nothing(model, tmp_path, capsys, case):
    make, said = BAD_TRAINING[case]
    out = tmp_path / "run"
    words = ["train", "--model", model, "--out", str(out), *TRAIN, *make(tmp_path)]
    assert exit_status(words) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in said), error
    assert "Traceback" not in error
    assert not out.exists()


def exit_status(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as stopped:  # the option parser's way
        return int(stopped.code or 0)


def test_an_unknown_option_gets_a_suggestion(model, tmp_path, capsys):
    words = ["train", "--model", model, "--data", "d", "--out", "o", "--batch-sise", "3"]
    assert exit_status(words) == 2
    assert "--batch-size" in "".join(capsys.readouterr())


def test_an_unknown_command_gets_a_suggestion(capsys):
    assert main(["trian"]) == 2
    assert "train" in capsys.readouterr().err


def test_a_run_folder_is_never_overwritten(model, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious").write_text("mine")
    assert train(model, comparisons(tmp_path / "data.jsonl"), out) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_a_folder_that_is_no_model_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "run"
    assert train(str(tmp_path / "empty"), comparisons(tmp_path / "data.jsonl"), out) == 2
    assert str(tmp_path / "empty") in capsys.readouterr().err
    assert not out.exists()


def test_a_reward_that_is_no_number_names_the_row_and_ends_no_file(tmp_path, capsys):
    data = comparisons(tmp_path / "data.jsonl", 3)
    words = ["score", "--data", str(data), "--out", str(tmp_path / "s")]
    assert main([*words, "--reward", "test_cli:score_nothing"]) == 2
    assert "data.jsonl:1" in capsys.readouterr().err
    assert not (tmp_path / "s" / "scored.jsonl").exists()


def test_what_a_killed_process_was_writing_goes_away_with_the_resume(tmp_path):
    start_run(tmp_path / "run", "score", {"seed": 1}, False)
    deep = tmp_path / "run" / "round-1"
    (deep / ".policy.x7.part").mkdir(parents=True)
    (deep / ".policy.x7.part" / ".a.json.9.part").write_text("{")
    (deep / ".scoring.json.123.part").write_text("{")
    (deep / "responses.part.jsonl").write_text("kept: it is gone on with")
    with pytest.raises(UserError, match="seed was 1, is 2"):
        start_run(tmp_path / "run", "score", {"seed": 2}, True)
    assert (deep / ".scoring.json.123.part").exists()  # a folder that is refused is not touched
    start_run(tmp_path / "run", "score", {"seed": 1}, True)
    assert [path.name for path in deep.iterdir()] == ["responses.part.jsonl"]


def test_a_run_killed_while_its_settings_were_written_is_begun_anew(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.77.part").write_text("{")
    start_run(tmp_path / "run", "score", {"seed": 1}, True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".mine.part").write_text("of somebody else")
    with pytest.raises(UserError, match="exists already"):
        start_run(tmp_path / "other", "score", {}, True)
    assert (tmp_path / "other" / ".mine.part").exists()


def test_in_half_precision_a_policy_begins_at_its_reference(model, tmp_path):
    data = comparisons(tmp_path / "data.jsonl")
    assert train(model, data, tmp_path / "run", "--precision", "bf16", "--lora-rank", "0") == 0
    first = next(row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["displacement/chosen"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("command", ["heads", "reward", "diagnose"])
def test_one_of_several_processes_is_refused_where_no_work_is_shared(
    command, tmp_path, capsys, monkeypatch
):
    data, run = comparisons(tmp_path / "data.jsonl"), tmp_path / "run"
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = {
        "heads": ["--data", str(data), "--out", str(run)],
        "reward": ["--data", str(data), "--out", str(run)],
        "diagnose": [str(run), "--data", str(data), "--init-sweep", "0"],
    }
    assert main([command, *given[command]]) == 2
    said = capsys.readouterr().err
    assert f"prefloop {command}, as it is asked here, runs in one process" in said
    assert "one of 2" in said
    assert not run.exists()


def test_resuming_with_other_settings_is_refused_by_name(model, tmp_path, capsys):
    data = comparisons(tmp_path / "data.jsonl")
    assert train(model, data, tmp_path / "run") == 0
    assert train(model, data, tmp_path / "run", "--seed", "5", "--resume") == 2
    assert "seed was 0, is 5" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_starts_fast(command):
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "prefloop.cli", command, "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout
    assert time.perf_counter() - started < 3


def test_the_help_of_train_names_every_setting_of_the_loop(capsys):
    exit_status(["train", "--help"])
    said = capsys.readouterr().out
    for name in TrainSettings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in said


def test_a_comparison_of_weight_zero_is_not_trained_on(model, tmp_path, capsys):
    rows = [json.loads(line) for line in comparisons(tmp_path / "d.jsonl").read_text().splitlines()]
    for row in rows[:4]:
        row["weight"] = 0.0
    write_jsonl(tmp_path / "d.jsonl", rows)
    assert train(model, tmp_path / "d.jsonl", tmp_path / "run", "--held-out-share", "0") == 0
    assert "8 comparisons (4 not selected left out)" in capsys.readouterr().out


@pytest.mark.parametrize("solver", ["Hinge()", "OneStepFirstOrder()", "Adaptive()"])
def test_training_may_be_kept_to_the_region_that_sft_allows(model, tmp_path, solver):
    data = comparisons(tmp_path / "data.jsonl")
    assert train(model, data, tmp_path / "run", "--stable", solver) == 0
    logged = [row for row in read_jsonl(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert all("stable/excess" in row for row in logged)


def test_the_region_may_be_of_demonstrations_and_need_no_reference(model, tmp_path, capsys):
    data, shown = comparisons(tmp_path / "data.jsonl"), tmp_path / "shown.jsonl"
    write_jsonl(
        shown, [{"prompt": "w1 w2", "completion": f"w{n}", "label": True} for n in range(3)]
    )
    options = ["--stable", "Hinge()", "--stable-level", "RunningLevel(decay=0.9)"]
    options += ["--demonstrations", str(shown), "--objective", "SimPO()"]
    assert train(model, data, tmp_path / "run", *options, "--no-log-displacement") == 0
    logged = [row for row in read_jsonl(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert all("stable/sft" in row and "displacement/chosen" not in row for row in logged)
    assert train(model, data, tmp_path / "no", "--demonstrations", str(shown)) == 2
    assert "is of no use without a solver" in capsys.readouterr().err


def test_the_region_may_be_part_of_the_objective(model, tmp_path):
    data = comparisons(tmp_path / "data.jsonl")
    plain = "Stable(objective=DPO(beta=0.1), pull=ConstantPull(lam=0.0))"
    assert train(model, data, tmp_path / "stable", "--objective", plain) == 0
    assert train(model, data, tmp_path / "dpo", "--objective", "DPO(beta=0.1)") == 0
    assert same(weights(tmp_path / "stable"), weights(tmp_path / "dpo"))


@pytest.mark.parametrize(
    "objective", ["KTO()", "FDivergence(divergence=ForwardKL())", "Sum(objectives=[DPO(), SFT()])"]
)
def test_objectives_of_other_families_train_from_the_command_line(model, tmp_path, objective):
    data = comparisons(tmp_path / "data.jsonl")
    more = ["--objective", objective, "--held-out-share", "0"]
    assert train(model, data, tmp_path / "run", *more) == 0


def test_the_scores_of_several_reward_models_are_read_from_the_file(model, tmp_path):
    data = comparisons(tmp_path / "data.jsonl")
    scored = [row | {"ensemble": [[1.0, 0.5], [0.0, 0.2]]} for row in read_jsonl(data)]
    write_jsonl(data, scored)
    more = ["--objective", "EnsembleDistillation()", "--held-out-share", "0"]
    assert train(model, data, tmp_path / "run", *more) == 0
    # At the start r = 0: the error is the score gap squared, and the nearest model's is 0.3^2.
    assert next(read_jsonl(tmp_path / "run/metrics.jsonl"))["loss"] == pytest.approx(0.09)


def test_training_is_swept_over_starts_and_gone_on_with(model, tmp_path, capsys):
    data, held_out = comparisons(tmp_path / "data.jsonl"), comparisons(tmp_path / "held.jsonl", 9)
    assert train(model, data, tmp_path / "run", "--held-out-share", "0") == 0
    words = [
        "diagnose",
        str(tmp_path / "run"),
        "--data",
        str(held_out),
        "--out",
        str(tmp_path / "s"),
    ]
    words += ["--init-sweep", "0", "2", "--sft-lr", "0.01"]
    assert main(words) == 0
    first, second = read_json(tmp_path / "s" / "init_sweep.json")["starts"]
    begun = "chosen at the start, nats a token"
    assert second[begun] > first[begun]  # SFT on the chosen
    assert second["chosen"] != first["chosen"]
    capsys.readouterr()
    assert main(words) == 0
    assert "[" not in capsys.readouterr().out  # every stage is on disk
    assert main(["report", str(tmp_path / "s")]) == 0
    assert "Initialization" in (tmp_path / "s" / "report.html").read_text()
    assert main([*words[:-5], "--init-sweep", "2"]) == 2
    assert "two starts or more" in capsys.readouterr().err


def test_a_trained_policy_is_diagnosed_and_the_report_shows_it(model, tmp_path, capsys):
    data = comparisons(tmp_path / "data.jsonl")
    assert train(model, data, tmp_path / "run", "--held-out-share", "0") == 0
    held_out = comparisons(tmp_path / "held_out.jsonl", 9)
    more = ["--samples", "2", "--max-new-tokens", "4", "--rejected-policy", str(model)]
    assert main(["diagnose", str(tmp_path / "run"), "--data", str(held_out), *more]) == 0
    held = read_json(tmp_path / "run" / "diagnosis.json")
    for number in (
        "answers to other prompts, mean change, nats",
        "CHES, mean",
        "DID entropy, nats",
        "gradient norm over its PVar bound, mean",
        "power law, beta of the data",
    ):
        assert math.isfinite(held["numbers"][number]), number
    scored = [
        {"prompt": row["prompt"], "responses": row["responses"], "scores": [0.5, 0.1]}
        for row in read_jsonl(held_out)
    ]
    write_jsonl(tmp_path / "scored.jsonl", scored)
    words = ["diagnose", str(tmp_path / "run"), "--data", str(tmp_path / "scored.jsonl")]
    assert main([*words, "--out", str(tmp_path / "scored")]) == 0
    told = read_json(tmp_path / "scored" / "diagnosis.json")
    assert "beta of the data, by the scores" in str(told["sections"])
    assert "DPO's optimum for the true reward" in str(told["sections"])
    weights = list(read_jsonl(tmp_path / "run" / "rejected_weights.jsonl"))
    assert all(sum(row["weights"]) == pytest.approx(1) for row in weights)
    assert held["verdict"][0] in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(held_out)]) == 0
    names = [row["name"] for row in read_json(tmp_path / "run/evaluation.json")["result"]]
    assert "accuracy, implicit reward" in names
    assert main(["report", str(tmp_path / "run")]) == 0
