"""Mistakes and refusals outside the data: a full disk, a taken folder, a wrong kind, Ctrl-C."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from prefloop import cli
from prefloop.cli import main
from prefloop.cli.machine import refusal
from prefloop.runs import write_jsonl, write_text


def scored(folder: Path) -> str:
    rows = [{"prompt": f"p{n}", "responses": ["a", "b"], "scores": [0.5, n]} for n in range(40)]
    write_jsonl(folder / "scored.jsonl", rows)
    return str(folder / "scored.jsonl")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "may read and write"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "Free some room"),
    ],
    ids=["full", "read-only", "safetensors"],
)
def test_what_the_machine_refuses_is_said_with_what_to_do(error, said):
    assert said in str(refusal(error))


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.EBADF, "Bad descriptor")])
def test_a_bug_keeps_its_traceback(error, monkeypatch, tmp_path):
    assert refusal(error) is None

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_refuse_taken", broken)
    with pytest.raises(type(error)):
        main(["check", scored(tmp_path)])


def test_a_full_disk_ends_in_one_line_and_leaves_no_half_written_file(tmp_path):
    command = [sys.executable, "-m", "prefloop.cli", "select", "--data", scored(tmp_path)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        # as a disk with room for the settings and no more; Python turns the signal into an error
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "Free some room" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").rglob("*.part"))


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "page.html", "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_under_a_file_is_refused(tmp_path, capsys):
    assert main(["select", "--data", scored(tmp_path), "--out", f"{scored(tmp_path)}/out"]) == 2
    assert "scored.jsonl/out: Not a directory. What stands before" in capsys.readouterr().err


def test_a_taken_folder_is_refused_before_the_model_is_looked_at(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    words = ["--data", scored(tmp_path), "--out", str(tmp_path)]
    assert main(["train", "--model", "no such model", *words]) == 2
    assert "never overwritten" in capsys.readouterr().err


def test_data_that_is_not_there_is_refused_before_the_model_is_looked_at(tmp_path, capsys):
    words = ["--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "run")]
    assert main(["train", "--model", "no such model", *words]) == 2
    assert "none.jsonl: there is no such file" in capsys.readouterr().err


def test_scoring_what_has_no_responses_makes_no_folder(tmp_path, capsys):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "p"}])
    words = ["--data", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out")]
    assert main(["score", *words, "--reward", "brevity"]) == 2
    assert "prompts.jsonl:1: missing responses" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [(["select", "--out", "never-made"], "Go on with --resume."), (["check"], "Run it again.")],
    ids=lambda words: words[0],
)
def test_ctrl_c_says_how_to_go_on(words, said, tmp_path, capsys, monkeypatch):
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_refuse_taken", pressed)
    data = [] if words == ["check"] else ["--data"]
    assert main([*words, *data, scored(tmp_path)]) == 130
    assert f"stopped by Ctrl-C. {said}" in capsys.readouterr().err
