"""Commands under torchrun with two processes: what one process gives, said once."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny

from prefloop.cli import main
from prefloop.runs import read_json, read_jsonl, write_jsonl

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
LOOP = "--lora-rank 2 --batch-size 8 --epochs 1 --lr 0.01 --warmup 0"


def odd_words(prompt, response: str) -> float:
    """The share of odd words."""
    words = [word for word in response.split() if word.startswith("w")]
    return sum(int(word[1:]) % 2 for word in words) / max(1, len(words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, prompts, votes of four people, a trained run and a mixture."""
    folder = tmp_path_factory.mktemp("several")
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    prompts = [f"w{n} w{n + 20}" for n in range(7)]
    write_jsonl(
        folder / "prompts.jsonl",
        ({"id": p, "prompt": p, "topic": n} for n, p in enumerate(prompts)),
    )
    rows = (
        {
            "prompt": prompts[(n + person) % 7],
            "responses": [f"w30 w{n + 3}", f"w45 w{n + 11} w{person}"],
            "rank": [1, 2] if person % 2 else [2, 1],
            "annotator": f"person-{person}",
        }
        for person in range(4)
        for n in range(6)
    )
    write_jsonl(folder / "votes.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFLOOP_CACHE", str(folder / "cache"))
        data = f"--model {folder}/model --data {folder}/votes.jsonl {LOOP}"
        assert main(f"train {data} --out {folder}/run".split()) == 0
        assert main(f"mixture {data} --rounds 1 --out {folder}/mixture".split()) == 0
    return folder


def both(folder: Path, words: str) -> tuple[Path, Path, str]:
    """Run the command by one process and by two; where each wrote, and what the two said."""
    name = f"{words.split()[0]}-{len(list(folder.iterdir()))}"
    outs = folder / f"one-{name}", folder / f"two-{name}"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PREFLOOP_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent))),
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]
    said = ""
    for out, start in zip(outs, (["-m"], launcher), strict=True):
        command = [sys.executable, *start, "prefloop.cli", *words.split(), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        said = done.stdout
    return *outs, said


def same(one: Any, two: Any, within: float = 1e-3) -> None:
    """Equal but for the last bits of its numbers."""
    if isinstance(one, Mapping):
        assert one.keys() == two.keys()
        for name in one:
            same(one[name], two[name], within)
    elif isinstance(one, list):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            same(left, right, within)
    elif isinstance(one, float):
        assert two == pytest.approx(one, abs=within, nan_ok=True)
    else:
        assert one == two


def test_sample(folder):
    words = f"sample --model {folder}/run/policy --data {folder}/prompts.jsonl --n 3"
    one, two, said = both(folder, f"{words} --max-new-tokens 6 --rows 6")
    rows = [list(read_jsonl(out / "responses.jsonl")) for out in (one, two)]
    assert len(rows[0]) == 7
    same(*rows, within=1e-5)
    assert said.count("wrote") == 1


def test_evaluate_by_a_reward(folder):
    words = f"evaluate {folder}/run --data {folder}/prompts.jsonl --reward test_several:odd_words"
    one, two, said = both(folder, f"{words} --max-new-tokens 6")
    same(*(read_json(out / "evaluation.json") for out in (one, two)))
    same(*(list(read_jsonl(out / "samples.jsonl")) for out in (one, two)))
    assert said.count("wrote") == 1


def test_diagnose_with_sampled_answers(folder):
    words = f"diagnose {folder}/run --data {folder}/votes.jsonl --samples 2 --max-new-tokens 6"
    one, two, said = both(folder, words)
    same(*(read_json(out / "diagnosis.json") for out in (one, two)))
    assert said.count("wrote") == 1


@pytest.mark.parametrize("by", ["sft", "kl"])
def test_aggregate_with_a_distilled_policy(folder, by):
    words = f"aggregate {folder}/mixture --data {folder}/prompts.jsonl --distil 2 --by {by} {LOOP}"
    one, two, said = both(folder, f"{words} --max-new-tokens 6 --new {folder}/votes.jsonl")
    same(*(read_json(out / "regret.json") for out in (one, two)))
    for name in ("answers.jsonl", "personal.jsonl"):
        same(*(list(read_jsonl(out / name)) for out in (one, two)))
    losses = [[row["loss"] for row in read_jsonl(out / "metrics.jsonl")] for out in (one, two)]
    same(*losses)
    assert said.count("distilled draw of min-max") == 1


def test_evaluate_by_annotator(folder):
    given = f"--data {folder}/prompts.jsonl --max-new-tokens 6 --out {folder}/fair"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFLOOP_CACHE", str(folder / "cache"))
        assert main(f"aggregate {folder}/mixture {given}".split()) == 0
    words = f"evaluate {folder}/fair --data {folder}/votes.jsonl --by annotator"
    outs = both(folder, f"{words} --max-new-tokens 6")
    same(*(read_json(out / "evaluation.json") for out in outs[:2]))
    assert outs[2].count("wrote") == 1
