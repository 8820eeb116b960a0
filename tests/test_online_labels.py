"""Online rounds in which a model on a server or people judge, or a server answers."""

from pathlib import Path

import pytest
import tiny
from loopback import completion, scripted

from prefloop.cli import main
from prefloop.labelling import Store
from prefloop.runs import read_json, read_jsonl, write_jsonl

WORDS = "--lr 0.02 --batch-size 4 --epochs 1 --lora-rank 2 --max-new-tokens 5 --rounds 1"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    rows = ({"id": f"p{n}", "prompt": f"w{n} w{n + 20} w{n + 40}"} for n in range(8))
    write_jsonl(folder / "prompts.jsonl", rows)
    return f"online --model {folder / 'model'} --data {folder / 'prompts.jsonl'} --reward brevity"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))


def run(base: str, out: Path, more: str) -> int:
    return main([*f"{base} --out {out} {WORDS}".split(), *more.split()])


def judge(body, headers, calls):
    """Prefers the answer with more letters "w3"."""
    text = body["messages"][0]["content"]
    if "<request-" not in text:
        return 200, {}, completion(body)
    shown = [part.split(">\n")[1].split("\n</")[0] for part in text.split("<answer-")[1:]]
    first, second = (len(one) for one in shown)
    return 200, {}, completion(body, text="T" if first == second else "AB"[second > first])


def answers(body, headers, calls):
    return 200, {}, completion(body, text=f"w{body['seed'] % 80} w1")


def test_a_judge_labels_in_the_rewards_place(base, tmp_path):
    with scripted(judge) as (url, _):
        assert run(base, tmp_path / "run", f"--judge {url} --objective DPO(beta=0.1)") == 0
    pairs = list(read_jsonl(tmp_path / "run/round-1/pairs.jsonl"))
    assert {row["annotator"] for row in pairs} == {"judge:the-model"}
    for row in pairs:
        first, second = (len(text) for text in row["responses"])
        assert (row["rank"][0] < row["rank"][1]) == (first > second)
    assert read_json(tmp_path / "run/round-1/judge.json")["unread"] == 0


def test_a_round_waits_for_people_and_goes_on_with_what_they_said(base, tmp_path, capsys):
    more = "--people --objective DPO(beta=0.1)"
    folder = tmp_path / "run" / "round-1"
    assert run(base, tmp_path / "run", more) == 0
    said = capsys.readouterr().out
    assert "prompts of round-1 wait for a person" in said
    assert f"prefloop label --data {folder / 'asked.jsonl'}" in said
    asked = list(read_jsonl(folder / "asked.jsonl"))
    assert asked
    assert all(row.get("rank") is None for row in asked)
    store = Store(folder / "labels.sqlite")
    for row in asked[1:]:
        store.judge(row["id"], "Ada", (2, 1))
    store.close()
    assert run(base, tmp_path / "run", f"{more} --resume") == 0
    assert f"1 of {len(asked)} prompts of round-1 wait" in capsys.readouterr().out
    store = Store(folder / "labels.sqlite")
    store.judge(asked[0]["id"], "Ada", None)  # skipped
    store.close()
    assert run(base, tmp_path / "run", f"{more} --resume") == 0
    pairs = list(read_jsonl(folder / "pairs.jsonl"))
    assert [(row["annotator"], row["rank"]) for row in pairs] == [("Ada", [2, 1])] * len(asked[1:])
    assert (folder / "policy").is_dir()


def test_a_server_answers_in_the_references_place(base, tmp_path):
    with scripted(answers) as (url, _):
        assert run(base, tmp_path / "run", f"--server {url} --recipe vanilla") == 0
    rows = list(read_jsonl(tmp_path / "run/round-1/responses.jsonl"))
    assert {name for row in rows for name in row["sampler"]} == {"server:the-model"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--people --judge http://127.0.0.1:9", "choose one"),
        ("--server http://127.0.0.1:9", "a server holds one model that training does not change"),
        ("--people", "learns from the reward's scores"),
        ("--people --objective SoftLabelDPO(beta=0.1)", "learns from the reward's scores"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(more, said, base, tmp_path, capsys):
    assert run(base, tmp_path / "run", more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
