"""Answers in a file: what is kept of each, and that it is what the model gives the answer again."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from together import together

from prefloop import data
from prefloop.cli import main
from prefloop.collecting import Draw, collect, sample_to_file
from prefloop.comparing import compare
from prefloop.data import encoder
from prefloop.labelling.store import Store
from prefloop.labelling.tasks import tasks_of
from prefloop.policies import Policy, Sampling
from prefloop.runs import read_jsonl
from prefloop.scoring import WithLogps
from prefloop.shares import Worker
from prefloop.types import Comparison

PROMPTS = [
    Comparison(prompt=f"w{n} w{n + 20}", responses=(), id=f"p{n}", extra={"topic": n})
    for n in range(6)
]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(tiny.llama(), tiny.tokenizer(chat=False), "tiny").with_frozen_copy()


@pytest.fixture(scope="module")
def rows(policy, tmp_path_factory) -> list[Comparison]:
    """Answers of up to 8 tokens, as drawn at temperature 1 without a warp."""
    out: Path = tmp_path_factory.mktemp("answers")
    draw = Draw(n=8, settings=Sampling(max_new_tokens=8), seed=3)
    sample_to_file(policy, PROMPTS, out, draw)
    return data.read(out / "responses.jsonl")


def test_a_row_says_how_each_answer_was_drawn(rows):
    assert [row.extra["topic"] for row in rows] == [*range(6)]
    for row in rows:
        assert row.finished is not None
        assert {len(row.extra[name]) for name in ("sampler", "tokens", "drawn_logps")} == {8}
        assert all(
            ended or count == 8
            for ended, count in zip(row.finished, row.extra["tokens"], strict=True)
        )


def test_what_was_cut_is_known_at_every_later_stage(rows, tmp_path):
    source, cut = tmp_path / "responses.jsonl", {row.id: row.finished for row in rows}
    data.write(source, rows)
    assert (
        main(["score", "--data", str(source), "--reward", "brevity", "--out", f"{tmp_path}/s"]) == 0
    )
    select = ["--data", f"{tmp_path}/s/scored.jsonl", "--rule", "PVar()"]
    assert main(["select", *select, "--out", f"{tmp_path}/k"]) == 0
    for stage in ("s/scored.jsonl", "k/selected.jsonl"):
        assert {row.id: row.finished for row in data.read(tmp_path / stage)} == cut
    base = Store(tmp_path / "labels.sqlite")
    (task,) = tasks_of(rows[:1])
    base.add([task])
    base.judge(task.row.id, "Ada", task.ranks("Ada", (1, 2, 3)))
    (labelled,) = base.comparisons()
    base.close()
    assert (labelled.finished, labelled.annotator) == (rows[0].finished, "Ada")


def test_the_log_probabilities_of_the_draw_are_those_of_scoring_whole_and_cut(policy, rows):
    coder = encoder(policy.tokenizer)
    seen = {True: 0, False: 0}
    for row, again in zip(rows, WithLogps(policy=policy)(rows), strict=True):
        shown = [len(ids) for ids in coder.responses(row.responses)]
        for place, ended in enumerate(row.ends):
            if shown[place] + ended < row.extra["tokens"][place]:
                continue  # it drew a special token, which its text does not show
            drawn = row.extra["drawn_logps"][place]
            assert again.extra["policy_logps"][place] == pytest.approx(drawn, abs=1e-4)
            seen[ended] += 1
    assert seen == {True: 7, False: 20}


def numbered(worker: Worker, out: Path, stop_at: str = "") -> list[Comparison]:
    """Answers that are the prompt again, two prompts at a time, by a worker among several."""

    def answer(chunk: Sequence[Comparison]) -> list[Comparison]:
        if stop_at in {row.id for row in chunk}:
            raise KeyboardInterrupt
        return [replace(row, responses=(f"again {row.prompt}", "no")) for row in chunk]

    return collect(answer, PROMPTS, out, 2, worker)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_workers_share_the_prompts_and_write_the_file_of_one(count, tmp_path):
    (alone := tmp_path / "alone").mkdir()
    (shared := tmp_path / "shared").mkdir()
    one = [row.responses for row in numbered(Worker(), alone)]
    for found in together(count, lambda worker: numbered(worker, shared)):
        assert [row.responses for row in found] == one
    assert [path.name for path in shared.iterdir()] == ["responses.jsonl"]
    file = "responses.jsonl"
    assert (shared / file).read_bytes() == (alone / file).read_bytes()


@pytest.mark.parametrize("then", [1, 2, 3])
def test_what_three_workers_began_any_number_finishes(then, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        together(3, lambda worker: numbered(worker, tmp_path, stop_at="p4"))
    kept = {row["id"] for part in tmp_path.iterdir() for row in read_jsonl(part)}
    assert kept <= {"p0", "p1", "p2", "p3"}
    asked: list[str] = []

    def answer(chunk: Sequence[Comparison]) -> list[Comparison]:
        asked.extend(row.id for row in chunk)
        return [replace(row, responses=(f"again {row.prompt}", "no")) for row in chunk]

    together(then, lambda worker: collect(answer, PROMPTS, tmp_path, 2, worker))
    assert sorted(asked) == sorted({row.id for row in PROMPTS} - kept)
    assert [path.name for path in tmp_path.iterdir()] == ["responses.jsonl"]
    assert [row.id for row in data.read(tmp_path / "responses.jsonl")] == [r.id for r in PROMPTS]


def test_workers_give_the_log_probabilities_of_one(policy):
    batch = tiny.batch(7, responses=(1, 4), longest=9)
    whole = policy.logps(batch)
    for found in together(3, lambda worker: policy.logps(batch, worker=worker)):
        torch.testing.assert_close(found.token, whole.token, rtol=0, atol=1e-5)
        assert torch.equal(found.mask, whole.mask)
    base = policy.reference_logps(batch, worker=Worker())
    torch.testing.assert_close(base.token, whole.token, rtol=0, atol=1e-5)


def test_one_answer_to_one_prompt_has_no_win_rate_at_equal_length(policy, tmp_path):
    def length(prompts: Sequence[object], responses: Sequence[Sequence[str]]) -> list:
        return [tuple(float(len(text)) for text in texts) for texts in responses]

    draw = Draw(n=1, settings=Sampling(max_new_tokens=3), seed=0)
    found = compare(policy.with_frozen_copy(), PROMPTS[:1], length, tmp_path, draw)
    names = [row["name"] for row in found["result"]]
    assert names[0] == "win rate against the reference"
    assert not any("equal length" in name for name in names)
