"""`prefloop mixture`, killed with signal 9, ends in the same bytes; two processes in the types of
one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from prefloop.runs import read_json, read_jsonl, write_jsonl

WORDS = [f"w{number}" for number in range(60)]
LOOP = [
    *("--lora-rank", "2", "--batch-size", "8", "--epochs", "6", "--lr", "0.03"),
    *("--save-every", "2", "--rounds", "3", "--types", "2", "--warmup", "0"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model and votes of six people."""
    folder = tmp_path_factory.mktemp("killed")
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    rows = (
        {
            "prompt": f"{WORDS[(n + person) % 20]} {WORDS[n % 7]}",
            "responses": [f"w30 {WORDS[n % 20]}", f"w45 {WORDS[n % 20]}"],
            "rank": [1, 2] if person % 2 else [2, 1],
            "annotator": f"person-{person}",
        }
        for person in range(6)
        for n in range(8)
    )
    write_jsonl(folder / "votes.jsonl", rows)
    return folder


def start(folder: Path, out: Path, *more: str, processes: int = 1) -> subprocess.Popen:
    launcher = (
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "--",
    )
    program = ["-m", *(launcher if processes > 1 else ()), "prefloop.cli", "mixture"]
    words = ["--model", str(folder / "model"), "--data", str(folder / "votes.jsonl")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PREFLOOP_CACHE": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, *program, *words, "--out", str(out), *LOOP, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return said


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    finish(start(folder, folder / "whole"))
    return folder / "whole"


def after_a_round(out: Path) -> bool:
    """Round 1 has been written, round 2 has not begun to train its second type."""
    return (out / "rounds.jsonl").exists()


def within_a_round(out: Path) -> bool:
    """The second type of round 2 is being trained and has a checkpoint."""
    here = out / "round-2" / "type-2"
    return (here / "checkpoint").exists() and not (here / "loglik.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", [after_a_round, within_a_round])
def test_a_mixture_killed_and_resumed_gives_the_same_bytes(
    moment: Callable[[Path], bool], whole, folder
):
    out = folder / moment.__name__
    process = start(folder, out)
    deadline = time.monotonic() + 200
    while not moment(out) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, "it ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "mixture.json").exists()
    finish(start(folder, out, "--resume"))
    names = ["mixture.json", "rounds.jsonl", "responsibilities.jsonl"]
    names += [f"policy-{k}/adapter_model.safetensors" for k in (1, 2)]
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_find_the_types_of_one(folder):
    gentle = ("--epochs", "1", "--lr", "0.01", "--evidence", "HeldOut(folds=2)", "--warm")
    gentle += ("--start", "Dirichlet()")  # many steps blow up what two sums differ by in rounding
    runs = [folder / f"gentle-{count}" for count in (1, 2)]
    for count, out in enumerate(runs, 1):
        said = finish(start(folder, out, *gentle, processes=count))
        assert said.count("round 3: ") == 1  # one process speaks
    gammas = [list(read_jsonl(out / "responsibilities.jsonl")) for out in runs]
    for one, two in zip(*gammas, strict=True):
        assert two["annotator"] == one["annotator"]
        assert two["gamma"] == pytest.approx(one["gamma"], abs=1e-3)
    rounds = [list(read_jsonl(out / "rounds.jsonl")) for out in runs]
    for one, two in zip(*rounds, strict=True):
        assert two["loglik"] == pytest.approx(one["loglik"], abs=1e-3)
    for kind in (1, 2):
        name = f"policy-{kind}/adapter_model.safetensors"
        one, two = (load_file(out / name) for out in runs)
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=2e-4, msg=name)


@pytest.mark.slow
def test_two_processes_choose_the_number_of_types_that_one_chooses(folder):
    outs = [folder / f"auto-{count}" for count in (1, 2)]
    for count, out in enumerate(outs, 1):
        more = ("--types", "auto", "--most-types", "2", "--rounds", "1", "--epochs", "1")
        finish(start(folder, out, *more, processes=count))
    one, two = (read_json(out / "types.json") for out in outs)
    assert two["chosen"] == one["chosen"]
    for alone, shared in zip(one["candidates"], two["candidates"], strict=True):
        assert shared == pytest.approx(alone, abs=1e-3)
