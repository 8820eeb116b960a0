"""Two gloo processes on the CPU: the update of one process, no row lost, no hang."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from prefloop.runs import read_jsonl, write_jsonl

WORKER = Path(__file__).with_name("process_worker.py")
ALL = 6  # optimizer steps of the whole run


needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: prefloop[deepspeed]"
)
ZERO = [pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (1, 2, 3)]


def environment(cache: Path) -> dict[str, str]:
    here = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])}
    return os.environ | here | {"XDG_CACHE_HOME": str(cache)}


def start(processes: int, out: Path, kind: str, steps: int | str = ALL) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(WORKER), str(out), kind, str(steps)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(out / "cache"),
    )


def run(processes: int, out: Path, kind: str, steps: int | str = ALL) -> dict:
    out.mkdir(parents=True, exist_ok=True)
    process = start(processes, out, kind, steps)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return json.loads((out / "last.json").read_text())


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "policy" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[dict, dict]:
    out = tmp_path_factory.mktemp("alone")
    metrics = run(1, out, "ddp")
    return weights(out), metrics


def assert_same(first: dict, second: dict) -> None:
    """Weights after AdamW, which divides by the root of a small moment in the first steps: what
    differs by 1e-7 in the gradient (`test_coupling.py`) differs by more of a step of 0.01."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=5e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", *ZERO])
def test_two_processes_take_the_steps_of_one_and_save_its_policy(alone, tmp_path, kind):
    metrics = run(2, tmp_path, kind)
    assert_same(alone[0], weights(tmp_path))
    for name, value in alone[1].items():
        if name != "comparisons_per_second":
            assert metrics[name] == pytest.approx(value, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "processes", "then"),
    [
        ("ddp", 1, "ddp"),
        ("fsdp", 1, "ddp"),
        ("ddp", 2, "fsdp"),
        pytest.param("zero3", 1, "ddp", marks=needs_deepspeed),
        pytest.param("ddp", 2, "zero1", marks=needs_deepspeed),
        pytest.param("zero2", 2, "zero3", marks=needs_deepspeed),
    ],
)
def test_a_checkpoint_of_two_processes_is_resumed_by_any_others(
    alone, tmp_path, first, processes, then
):
    run(2, tmp_path, first, 3)
    run(processes, tmp_path, then)
    assert_same(alone[0], weights(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", pytest.param("zero2", marks=needs_deepspeed)])
def test_two_processes_refuse_a_loss_that_is_no_number_before_a_weight_moves(tmp_path, kind):
    said = run(2, tmp_path, kind, "broken")["refused"]
    assert "step 1: loss nan" in said
    assert "the weights have not moved" in said


@pytest.mark.slow
def test_one_killed_worker_ends_the_run_instead_of_hanging(tmp_path):
    process = start(2, tmp_path, "ddp", 100000)
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[0]), signal.SIGKILL)
    said, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "Signal 9" in said or "SIGKILL" in said


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node={}", "-m", "prefloop.cli")
DEEPSPEED = (
    "accelerate.commands.launch",
    "--use_deepspeed",
    "--zero_stage=2",
    "--num_processes={}",
    str(WORKER.with_name("deepspeed_command.py")),
)


def train_command(launcher: tuple[str, ...], processes: int, folder: Path, out: str) -> str:
    command = [sys.executable, "-m", *(part.format(processes) for part in launcher), "train"]
    command += ["--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")]
    command += ["--lr", "0.01", "--batch-size", "7", "--out", str(folder / out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(folder / f"cache-{out}"),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, pytest.param(DEEPSPEED, marks=needs_deepspeed)])
def test_the_train_command_on_two_processes_trains_one_policy(tmp_path, launcher):
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(
        tmp_path / "rows.jsonl",
        (
            {"prompt": f"w{i} w1", "responses": [f"w{i} w3", f"w{7 * i % 60} w5"], "rank": [1, 2]}
            for i in range(30)
        ),
    )
    train_command(TORCHRUN, 1, tmp_path, "one")
    said = train_command(launcher, 2, tmp_path, "two")
    assert said.count("training on 27 comparisons") == 1
    name = "policy/adapter_model.safetensors"
    assert_same(load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name))
    logged = [list(read_jsonl(tmp_path / out / "metrics.jsonl")) for out in ("one", "two")]
    assert [row["step"] for row in logged[0]] == [row["step"] for row in logged[1]]
