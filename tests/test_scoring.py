"""Columns added to files: right numbers, the same whatever the format, the processes or a kill."""

import json
import math
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
import tiny
import torch
from pyarrow import parquet

from prefloop import scoring
from prefloop.cli import main
from prefloop.crossfit import CrossFit, drawn, first_half
from prefloop.data import as_row, encoder, read
from prefloop.data.blocks import Sizes
from prefloop.logps import FullLogits, Scorer, hidden_sums, logps_and_hidden_sums
from prefloop.policies import Lora, Policy, load_policy
from prefloop.rewards.encoders import SentenceEncoder
from prefloop.runs import write_jsonl
from prefloop.scoring import WithEmbedding, WithLogps, WithNumbers, WithReward, score_file
from prefloop.selection import CHES, OnlinePVar, PredictiveEntropy
from prefloop.settings import TrainSettings
from prefloop.shares import Worker
from prefloop.trainer.build import accelerator_for
from prefloop.training import Training
from prefloop.types import Comparison, UserError, score


class Lengths:
    """The number of characters; counts how many rows it was asked about."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, prompts, responses) -> list[tuple[float, ...]]:
        self.rows += len(prompts)
        return [tuple(float(len(text)) for text in texts) for texts in responses]


def comparisons(count: int) -> list[Comparison]:
    words = ["w5", "w6 w7", "w8"]
    return [
        Comparison(f"w5 {'w6 ' * at}w7", tuple(words[: 2 + at % 2]), id=f"r{at}")
        for at in range(count)
    ]


def lines(path: Path, rows: list[Comparison]) -> Path:
    write_jsonl(path, map(as_row, rows))
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(scoring, "ROUND", Sizes(text=4, columns=4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    at = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(at)
    tiny.tokenizer().save_pretrained(at)
    return str(at)


@pytest.fixture(scope="module")
def policy(folder) -> Policy:
    made = load_policy(folder, adapter=Lora(rank=2))
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return made


def test_log_probabilities_and_hidden_products_are_those_of_the_engine(policy):
    rows = comparisons(5)
    found = WithLogps(policy=policy, hidden=True, token_budget=40)(rows)
    for row, tokens in zip(found, encoder(policy.tokenizer).encode(rows), strict=True):
        with torch.no_grad():
            alone = score(policy.scorer(), [tokens])
            sums = hidden_sums(policy.scorer(), [tokens])[0].double()
            base = policy.reference_logps([tokens])
        close = {"abs": 1e-4, "rel": 1e-4}
        assert row.extra["policy_logps"] == pytest.approx(alone.sum[0].tolist(), **close)
        assert row.extra["reference_logps"] == pytest.approx(base.sum[0].tolist(), **close)
        assert row.extra["policy_logps"] != pytest.approx(row.extra["reference_logps"], abs=1e-3)
        assert row.extra["tokens"] == [len(response) for response in tokens.responses]
        gram = torch.tensor(row.extra["hidden_gram"], dtype=torch.float64)
        torch.testing.assert_close(gram, sums @ sums.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_rows_that_are_too_long_are_left_out_where_that_is_asked_for(policy, tmp_path, name):
    rows = comparisons(6)
    rows[1] = Comparison("w5 " * 600, ("w6", "w7"), id="long")
    lines(tmp_path / "d.jsonl", rows)
    if name == "d.parquet":
        parquet.write_table(pyarrow.Table.from_pylist([*map(as_row, rows)]), tmp_path / name)
    done = score_file(
        tmp_path / name, tmp_path / "o", [WithLogps(policy=policy, drop_overlong=True)]
    )
    assert (done["rows"], done["left_out"]) == (5, 1)
    found = read(tmp_path / "o" / done["file"])
    assert [row.id for row in found] == ["r0", "r2", "r3", "r4", "r5"]
    assert all(len(row.extra["tokens"]) == len(row.responses) for row in found)
    long = [Comparison("w5 " * 600, ("w6", "w7"), id=f"long{at}") for at in range(4)]  # a block
    (tmp_path / name).unlink()
    lines(tmp_path / "d.jsonl", [*long, *rows])
    if name == "d.parquet":
        parquet.write_table(pyarrow.Table.from_pylist([*map(as_row, long + rows)]), tmp_path / name)
    column = WithLogps(policy=policy, drop_overlong=True)
    done = score_file(tmp_path / name, tmp_path / "more", [column])
    assert [row.id for row in read(tmp_path / "more" / done["file"])] == [row.id for row in found]


def test_without_an_adapter_and_a_reference_there_is_no_reference_column(folder, policy):
    plain = load_policy(folder)
    rows = comparisons(2)
    assert set(WithLogps(policy=plain)(rows)[0].extra) == {"policy_logps", "tokens"}
    against = WithLogps(policy=plain, reference=policy)(rows)[0].extra
    ours = WithLogps(policy=policy)(rows)[0].extra["policy_logps"]
    assert against["reference_logps"] == pytest.approx(ours, abs=1e-4)


@pytest.mark.parametrize("way", [None, FullLogits()], ids=["found", "full logits"])
def test_one_pass_gives_log_probabilities_and_hidden_sums(way):
    batch = tiny.batch(4, responses=(2, 3), longest=6)
    scorer = Scorer(tiny.llama(), way=way, token_budget=30)
    with torch.no_grad():
        logps, sums = logps_and_hidden_sums(scorer, batch)
        torch.testing.assert_close(logps.token, score(scorer, batch).token, rtol=0, atol=1e-5)
        torch.testing.assert_close(sums, hidden_sums(scorer, batch), rtol=1e-4, atol=1e-4)
    assert torch.equal(logps.mask, score(scorer, batch).mask)


def test_saying_nothing_is_an_answer_of_one_token(policy):
    row = Comparison("w5 w6", ("", "w7"), id="r")
    found = WithLogps(policy=policy)([row])[0].extra
    assert found["tokens"][0] == 1
    coder = encoder(policy.tokenizer)
    prompt = torch.tensor([coder.prompts([row])[0]])
    with torch.no_grad():
        end = policy.model(prompt).logits[0, -1].log_softmax(-1)[coder.end]
    assert found["policy_logps"][0] == pytest.approx(end.item(), abs=1e-4)


def test_what_the_policy_cannot_read_is_refused_by_its_place(policy):
    long = Comparison("w5 " * 600, ("w6", "w7"), place="pool.jsonl:7")
    with pytest.raises(UserError, match=r"pool.jsonl:7: 6\d\d tokens .* at most 512"):
        WithLogps(policy=policy)([long])


def test_one_pass_writes_what_the_rules_read(folder, policy, tmp_path):
    source, run = lines(tmp_path / "d.jsonl", comparisons(9)), tmp_path / "run"
    policy.save(run)
    words = ["score", "--data", str(source), "--out", str(tmp_path / "o"), "--policy", str(run)]
    assert main([*words, "--hidden", "--reward", "brevity"]) == 0
    scored = str(tmp_path / "o/scored.jsonl")
    rules = [repr(one()) for one in (CHES, OnlinePVar, PredictiveEntropy)]
    words = ["select", "--data", scored, "--out", str(tmp_path / "s"), "--rule", rules[0]]
    assert main([*words, "--also", *rules[1:]]) == 0
    for row in read(tmp_path / "s/selected.jsonl"):
        assert row.extra["onlinepvar"] > 0
        assert row.extra["entropy"] == -sum(row.extra["policy_logps"]) / len(row.responses)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_two_processes_and_a_kill_give_what_one_process_gives(tmp_path, suffix):
    rows = comparisons(18)
    source = lines(tmp_path / "d.jsonl", rows)
    if suffix == ".parquet":
        table = pyarrow.Table.from_pylist([*map(json.loads, source.read_text().splitlines())])
        source = tmp_path / "d.parquet"
        parquet.write_table(table, source, row_group_size=5)
    whole, shared = Lengths(), Lengths()
    done = score_file(source, tmp_path / "whole", [WithReward(whole)])
    assert (done["rows"], done["answers"]) == (18, sum(len(row.responses) for row in rows))
    out = tmp_path / "shared"
    with pytest.raises(UserError, match="no such file"):  # the second has done its share
        score_file(source, out, [WithReward(shared)], Worker(1, 2))
    assert shared.rows == 8  # blocks 1 and 3 of 0 to 4

    def kill(seen: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # the first is killed after a block, and comes again
        score_file(source, out, [WithReward(shared)], Worker(0, 2), kill)
    assert shared.rows == 12
    assert score_file(source, out, [WithReward(shared)], Worker(0, 2)) == done
    assert shared.rows == 18  # no row was asked about twice
    name = done["file"]
    assert (tmp_path / "whole" / name).read_bytes() == (out / name).read_bytes()
    assert not (out / "parts").exists()
    assert [row.scores for row in read(out / name)] == [
        tuple(float(len(text)) for text in row.responses) for row in rows
    ]
    assert done["reward"] == pytest.approx(
        sum(len(text) for row in rows for text in row.responses) / done["answers"]
    )


def test_scoring_holds_two_blocks_and_not_the_file(tmp_path):
    seen: list[weakref.ref[Comparison]] = []
    alive: list[int] = []

    def watched(rows: Sequence[Comparison]) -> list[Comparison]:
        seen.extend(map(weakref.ref, rows))
        alive.append(sum(row() is not None for row in seen))
        return list(rows)

    source = lines(tmp_path / "d.jsonl", comparisons(40))
    score_file(source, tmp_path / "o", [watched])
    assert len(alive) == 10  # blocks of four rows
    assert max(alive) <= 8


def test_columns_of_an_arrow_file_keep_their_types(policy, tmp_path):
    table = pyarrow.Table.from_pylist([as_row(row) for row in comparisons(6)])
    parquet.write_table(table, tmp_path / "d.parquet")
    columns = [WithReward(Lengths()), WithLogps(policy=policy, hidden=True)]
    columns.append(WithNumbers("validation_loss", {f"r{at}": at / 2 for at in range(6)}))
    score_file(tmp_path / "d.parquet", tmp_path / "o", columns)
    rows = read(tmp_path / "o/scored.arrow")
    assert [row.extra["validation_loss"] for row in rows] == [at / 2 for at in range(6)]
    lines_ = WithLogps(policy=policy, hidden=True)(comparisons(6))
    for row, expected in zip(rows, lines_, strict=True):
        for name in ("policy_logps", "reference_logps", "tokens", "hidden_gram"):
            found = torch.tensor(row.extra[name], dtype=torch.float64)
            wanted = torch.tensor(expected.extra[name], dtype=torch.float64)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_embeddings_are_the_encoders_whatever_the_order(monkeypatch):
    def length(self, texts) -> torch.Tensor:
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    monkeypatch.setattr(SentenceEncoder, "__call__", length)
    encoder_ = SentenceEncoder(tiny.llama(), tiny.tokenizer(), "tiny", "tiny", 512)
    rows = comparisons(5)
    assert [row.extra["embedding"] for row in WithEmbedding(encoder_, rows=2)(rows)] == [
        [float(len(row.prompt)), 1.0] for row in rows
    ]


MISTAKES = [
    ("", "nothing to score with"),
    ("--hidden --reward brevity", "belong to a policy"),
    ("--reward brevity --data empty.jsonl", "holds no row"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_a_mistake_is_said_with_what_to_do(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    lines(Path("d.jsonl"), comparisons(2))
    Path("empty.jsonl").write_text("")
    assert main(["score", "--data", "d.jsonl", "--out", "o", *words.split()]) == 2
    assert said in capsys.readouterr().err


def votes(count: int) -> list[Comparison]:
    return [
        Comparison(f"w5 {'w6 ' * (at % 4)}", ("w7", f"w8 {'w9 ' * at}"), (1, 2), id=f"v{at}")
        for at in range(count)
    ]


def crossfit(folder: str, tmp_path: Path, **more) -> CrossFit:
    return CrossFit(
        model=folder,
        adapter=Lora(rank=2),
        settings=TrainSettings(lr=0.01, batch_size=4, warmup=0.0),
        accelerator=accelerator_for((), tmp_path, "no"),
        beta=0.1,
        **more,
    )


def test_the_learning_order_never_looks_at_the_half_it_trained_on(folder, tmp_path, monkeypatch):
    rows = votes(12)
    trained, asked = [], []

    def trains(self, tokenized):
        trained.append({row.id for row in tokenized})
        return train(self, tokenized)

    def asks(self, policy, tokenized, objective):
        asked.append({row.id for row in tokenized})
        return ask(self, policy, tokenized, objective)

    train, ask = Training.__call__, CrossFit._losses
    monkeypatch.setattr(Training, "__call__", trains)
    monkeypatch.setattr(CrossFit, "_losses", asks)
    work = crossfit(folder, tmp_path, seeds=1)
    losses = work(lambda: rows, tmp_path)
    assert trained[0] == asked[1]
    assert trained[1] == asked[0]
    prompts = [{row.prompt for row in rows if row.id in half} for half in trained]
    assert not prompts[0] & prompts[1]
    assert trained[0] | trained[1] == {row.id for row in rows}
    # an untrained model has the loss log 2 everywhere; these learnt that the longer one loses
    found = [losses[row.id] for row in rows]
    assert len(set(found)) == 12
    assert sum(found) / 12 < math.log(2) / 2
    assert [work(lambda: rows, tmp_path)[row.id] for row in rows] == found  # out of the files
    assert len(trained) == 2


def test_losses_are_of_their_rows_whatever_the_rounds_and_the_order(folder, tmp_path, monkeypatch):
    rows = votes(12)
    work = crossfit(folder, tmp_path, seeds=1)

    def found(name: str, given: list[Comparison]) -> list[float]:
        (tmp_path / name).mkdir()
        losses = work(lambda: given, tmp_path / name)
        return [losses[row.id] for row in rows]

    whole = found("whole", rows)
    monkeypatch.setattr("prefloop.crossfit.ROUND", 3)
    assert found("rounds", rows) == pytest.approx(whole, abs=1e-5)


def test_a_model_may_be_fitted_on_some_of_its_half(folder, tmp_path, monkeypatch):
    sizes = []

    def trains(self, tokenized):
        sizes.append(len(tokenized))
        return train(self, tokenized)

    train = Training.__call__
    monkeypatch.setattr(Training, "__call__", trains)
    losses = crossfit(folder, tmp_path, seeds=1, most=2)(lambda: votes(12), tmp_path)
    assert sizes == [2, 2]
    assert all(math.isfinite(losses[row.id]) for row in votes(12))
    with pytest.raises(UserError, match="rows to fit on must be 0"):
        crossfit(folder, tmp_path, most=-1)


def test_the_learning_order_holds_few_rows_at_a_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("prefloop.crossfit.ROUND", 3)
    alive: list[weakref.ref[Comparison]] = []
    most = 0

    def rows() -> Iterator[Comparison]:
        nonlocal most
        for row in votes(40):
            fresh = replace(row)
            alive[:] = [one for one in alive if one() is not None]
            alive.append(weakref.ref(fresh))
            most = max(most, len(alive))
            del row
            yield fresh
            del fresh

    losses = crossfit(folder, tmp_path, seeds=1, most=4)(rows, tmp_path)
    assert math.isfinite(losses["v39"])
    assert most <= 4 + 3 + 2  # to train on, to ask about, and the row in hand


def test_halves_follow_from_the_seed_and_part_the_prompts_evenly():
    prompt = torch.tensor([0, 3, 1, 0, 2, 3, 0])
    first = first_half(prompt, 1)
    assert len(prompt[first].unique()) == len(prompt[~first].unique()) == 2
    assert not set(prompt[first].tolist()) & set(prompt[~first].tolist())
    assert torch.equal(first_half(prompt, 1), first)
    assert any(not torch.equal(first_half(prompt, seed), first) for seed in range(2, 9))
    some = drawn(first, 1, seed=0)
    assert some.sum() == 1
    assert (some & ~first).sum() == 0
    assert torch.equal(drawn(first, 0, seed=0), first)


def test_what_has_no_validation_loss_is_refused(folder, tmp_path):
    work = crossfit(folder, tmp_path)
    tied = Comparison("w5", ("w6", "w7"), (1, 1), place="d.jsonl:3")
    with pytest.raises(UserError, match=r"d.jsonl:3: orders no two"):
        work(lambda: [*votes(4), tied], tmp_path)
    with pytest.raises(UserError, match="two different prompts"):
        work(lambda: votes(1), tmp_path)
    twice = [*votes(3), replace(votes(1)[0], place="d.jsonl:9")]
    with pytest.raises(UserError, match=r"d.jsonl:9: the id 'v0' is that of comparison 'v0' too"):
        work(lambda: twice, tmp_path)
    with pytest.raises(UserError, match="seeds of the learning order"):
        crossfit(folder, tmp_path, seeds=0)


GROWTH = """
import resource, sys, torch
from pathlib import Path
from prefloop.rewards.rules import Brevity
from prefloop.scoring import WithReward, score_file
torch.set_num_threads(1)
sizes = []
for name in sys.argv[1:]:
    out = Path(name).with_suffix(".out")
    out.mkdir()
    score_file(Path(name), out, [WithReward(Brevity())])
    sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(sizes[1] - sizes[0], sizes[3] - sizes[2])
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    def file(count: int, kind: str) -> str:
        rows = [{"prompt": "word " * 2000, "responses": ["a", "b c"]}] * count
        path = tmp_path / f"{count}-{kind}.{kind}"
        if kind == "jsonl":
            write_jsonl(path, rows)
        else:
            parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=500)
        return str(path)

    # 6,000 rows are 60 MB of prompts, 1,500 already have every buffer at its size
    names = [file(count, kind) for kind in ("jsonl", "parquet") for count in (1500, 6000)]
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, *names], capture_output=True, text=True, check=True
    )
    lines_, columns = map(int, done.stdout.split())
    assert lines_ < 20_000, f"{lines_} KiB more for 4,500 rows of text"
    assert columns < 20_000, f"{columns} KiB more for 4,500 rows in columns"
