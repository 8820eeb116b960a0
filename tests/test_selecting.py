"""Selection over files: the same whatever the format, the processes or a kill; budgets, quotas."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from prefloop.cli import main
from prefloop.data import read
from prefloop.report.explaining import explain
from prefloop.runs import read_json, read_jsonl
from prefloop.selecting import Cut, QuotaOf, Selecting, parse_quota, scanning, select
from prefloop.selection import (
    AlignmentPotential,
    Different,
    FirstOfPrompt,
    LargestImplicitGap,
    Length,
    Ordered,
    Purse,
    PVar,
    Quota,
    Random,
    RewardGap,
    k_centres,
    overlap,
    rank_weights,
    ranking,
    within_quotas,
)
from prefloop.shares import Worker
from prefloop.types import UserError


def row(number: int, scores: list[float], **more) -> dict:
    responses = [f"answer {place}" for place in range(len(scores))]
    return {"id": f"r{number}", "prompt": f"p{number}", "responses": responses} | {
        "scores": scores,
        **more,
    }


GAPS = [0.5, 3.0, 2.0, 0.0, 2.5, 1.0]
ROWS = [row(at, [0.0, gap], topic="ab"[at % 2], annotator="x") for at, gap in enumerate(GAPS)]


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def arrow(path: Path, rows: list[dict]) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=4)
    else:
        with (
            pyarrow.OSFile(str(path), "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as w,
        ):
            w.write_table(table, max_chunksize=2)
    return path


def kept(out: Path) -> list[str]:
    file = out / read_json(out / "selection.json")["file"]
    return [one.id for one in read(file) if one.weight > 0]


def selected(tmp_path: Path, rows: list[dict], rule=None, name="s", **more) -> list[str]:
    """Ids of what is kept."""
    source, out = lines(tmp_path / f"{name}.jsonl", rows), tmp_path / name
    out.mkdir(exist_ok=True)
    filters = more.pop("filters", ())
    Selecting(rule=rule or RewardGap(), cut=Cut(**more), filters=filters)(source, out)
    return kept(out)


def test_top_and_bottom_halves_are_kept_in_the_order_of_the_file(tmp_path):
    assert selected(tmp_path, ROWS, name="t") == ["r1", "r2", "r4"]
    assert selected(tmp_path, ROWS, name="b", keep="bottom") == ["r0", "r3", "r5"]
    assert selected(tmp_path, ROWS, name="a", keep="above", threshold=2.0) == ["r1", "r2", "r4"]


def test_each_reason_says_the_score_the_place_the_cut_and_the_verdict(tmp_path):
    selected(tmp_path, ROWS)
    reasons = {one["id"]: one["reason"] for one in read_jsonl(tmp_path / "s/selected.jsonl")}
    assert reasons["r1"] == "kept: RewardGap 3 is place 1 of 6; 3 are kept, down to 2"
    beyond = "left out: beyond the cut: RewardGap 0 is place 6 of 6; 3 are kept, down to 2"
    assert reasons["r3"] == beyond
    selected(tmp_path, ROWS, name="above", keep="above", threshold=2.0)
    reasons = [one["reason"] for one in read_jsonl(tmp_path / "above/selected.jsonl")]
    assert "RewardGap 0.5 is below the threshold" in reasons[0]


@pytest.mark.parametrize(
    ("price", "budget", "expected"),
    [("pairs", 4, ["r1", "r2"]), ("responses", 6, ["r1", "r2"]), ("prompt", 3, ["r0", "r1", "r2"])],
)
def test_a_prompt_costs_its_comparisons_its_responses_or_one(tmp_path, price, budget, expected):
    # in the order of wanting: r1 (3 responses: 3 pairs), r2 (2: 1 pair), r0 (3), r3 (2)
    rows = [row(0, [0, 1, 2]), row(1, [0, 1, 9]), row(2, [0, 5]), row(3, [0, 1])]
    assert selected(tmp_path, rows, price=price, budget=budget) == expected
    found = read_json(tmp_path / "s/selection.json")
    assert found["labels"] == {"pairs": 4, "responses": 5, "prompt": 3}[price]


def test_quotas_pass_over_what_is_full_and_go_on(tmp_path):
    # down the ranking: r1 b, r4 a, r2 a (full), r5 b (full), r0 a (full), r3 b (full)
    quotas = (QuotaOf(column="topic", most=1.0),)
    assert selected(tmp_path, ROWS, budget=4, quotas=quotas) == ["r1", "r4"]
    found = read_json(tmp_path / "s/selection.json")
    assert found["why"] == {"kept": 2, "left out: a quota was full (topic=1)": 4}
    assert [(one["group"], one["kept"], one["labels"]) for one in found["quotas"]] == [
        ("a", 1, 1),
        ("b", 1, 1),
    ]


def test_a_quota_below_one_is_a_share_of_the_budget_and_several_hold_at_once(tmp_path):
    # half of 4 labels a topic: r1 b, r4 a, r2 a, then r5 b
    half = QuotaOf(column="topic", most=0.5)
    assert selected(tmp_path, ROWS, budget=4, quotas=(half,)) == ["r1", "r2", "r4", "r5"]
    both = (half, QuotaOf(column="annotator", most=3.0))
    assert selected(tmp_path, ROWS, name="both", budget=4, quotas=both) == ["r1", "r2", "r4"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 9))
def test_no_budget_and_no_quota_is_ever_overspent(seed, budget, most):
    rng = torch.Generator().manual_seed(seed)
    cost = torch.randint(1, 7, (40,), generator=rng)
    group = torch.randint(0, 3, (40,), generator=rng)
    order = ranking(torch.rand(40, generator=rng), "top")
    found = within_quotas(order, cost, budget, [Quota(group, float(most))])
    spent = cost[found.places]
    assert spent.sum() <= budget
    assert (torch.bincount(group[found.places], spent.double(), minlength=3) <= most).all()
    points = torch.randn(40, 3, generator=rng)
    apart = k_centres(points, 40, Purse(cost, budget, [Quota(group, float(most))]))
    assert cost[apart].sum() <= budget
    assert (torch.bincount(group[apart], cost[apart].double(), minlength=3) <= most).all()
    assert len(apart.unique()) == len(apart)
    free = within_quotas(order, cost, budget, [Quota(torch.zeros_like(group), math.inf)])
    assert free.places.tolist() == order[cost[order].cumsum(0) <= budget].tolist()


def test_filters_leave_rows_out_before_any_rule_sees_them(tmp_path):
    rows = [
        row(0, [0, 9], prompt="again"),
        row(1, [0, 8], prompt="again"),
        row(2, [1, 1]),
        row(3, [0, 1], responses=["same", "same"]),
        row(4, [0, 2], responses=["x" * 99, "y"]),
        row(5, [0, 3]),
    ]
    filters = (Ordered(), FirstOfPrompt(), Different(), Length(longest=50))
    assert selected(tmp_path, rows, filters=filters, fraction=1.0) == ["r0", "r5"]
    why = [one["reason"] for one in read_jsonl(tmp_path / "s/selected.jsonl")]
    assert "place 1 of 2" in why[0]
    for at, said in enumerate(["earlier row", "orders no two", "all the same", "too long"], 1):
        assert said in why[at]
        assert why[at].startswith("left out: ")


def test_a_rule_that_standardises_sees_only_the_rows_that_passed(tmp_path):
    more = {"policy_logps": [-1.0, -2.0], "reference_logps": [-1.0, -1.0]}
    rows = [row(at, [0, gap], **more) for at, gap in enumerate([1, 2, 3])]
    wild = row(3, [0, 1e6], responses=["same", "same"], **more)
    rule = AlignmentPotential()
    selected(tmp_path, rows, rule, name="without")
    selected(tmp_path, [*rows, wild], rule, name="with", filters=(Different(),))
    without, with_ = (
        [one["alignmentpotential"] for one in read_jsonl(tmp_path / name / "selected.jsonl")]
        for name in ("without", "with")
    )
    assert with_ == [*without, None]
    assert without == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])


def test_spread_keeps_what_lies_apart_among_the_most_wanted(tmp_path):
    where = [[0, 1], [1, 0], [1, 0.01], [0, -1], [-1, 0], [0, 1]]
    rows = [one | {"embedding": vector} for one, vector in zip(ROWS, where, strict=True)]
    # the four most wanted are r1, r4, r2, r5; r1 first, r4 is opposite
    assert selected(tmp_path, rows, budget=2, spread=2.0) == ["r1", "r4"]
    rows[4]["embedding"] = [1, 0]
    assert selected(tmp_path, rows, name="moved", budget=2, spread=2.0) == ["r1", "r5"]
    why = read_json(tmp_path / "moved/selection.json")["why"]
    assert why["left out: nearer to a kept prompt than others are"] == 2


def test_spread_and_quotas_hold_together(tmp_path):
    # r1 first; r5 is opposite but of r1's topic b, which is full; of topic a r2 is farther than r4
    where = [[0, 1], [1, 0], [1, 0.01], [0, -1], [1, 0], [-1, 0]]
    rows = [one | {"embedding": vector} for one, vector in zip(ROWS, where, strict=True)]
    assert selected(tmp_path, rows, name="free", budget=2, spread=2.0) == ["r1", "r5"]
    one_each = (QuotaOf(column="topic", most=1.0),)
    assert selected(tmp_path, rows, budget=2, spread=2.0, quotas=one_each) == ["r1", "r2"]
    why = read_json(tmp_path / "s/selection.json")["why"]
    assert why["left out: nearer to a kept prompt than others are"] == 2
    # two of each topic are looked at, and four labels are two budgets: r0 and r3 are beyond them
    assert why["left out: beyond the cut"] == 2


def test_weights_keep_every_row_and_the_order_alone_decides(tmp_path):
    source, out = lines(tmp_path / "d.jsonl", ROWS), tmp_path / "w"
    out.mkdir()
    found = Selecting(rule=RewardGap(), cut=Cut(), weights=True)(source, out)
    weights = [one.weight for one in read(out / "selected.jsonl")]
    # u = (place from below - 1/2) / 6 for gaps .5 3 2 0 2.5 1; w = u / mean(u), mean(u) = 1/2
    assert weights == pytest.approx([2 * (k - 0.5) / 6 for k in (2, 6, 4, 1, 5, 3)])
    assert found["kept"] == 6
    scores = torch.tensor(GAPS, dtype=torch.float64)
    torch.testing.assert_close(rank_weights(scores, 0.2), rank_weights(scores.exp(), 0.2))
    assert rank_weights(scores, 1.0).tolist() == [1.0] * 6
    assert rank_weights(torch.ones(3), 0.1).tolist() == [1.0] * 3
    flipped = rank_weights(scores, 0.5, "bottom")
    torch.testing.assert_close(flipped, rank_weights(-scores, 0.5))


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_columns_give_what_lines_give(tmp_path, name):
    ragged = [*map(dict, ROWS), row(6, [0, 1, 4], topic="a", annotator="y")]
    rules = {"rule": PVar(), "also": (Random(seed=3), LargestImplicitGap())}
    for at, one in enumerate(ragged):
        count = len(one["scores"])
        one |= {"policy_logps": [-float(at)] * count, "reference_logps": [-1.0] * count}
    filters, cut = (
        (FirstOfPrompt(), Length(), Ordered()),
        Cut(budget=5, quotas=(parse_quota("topic=4"),)),
    )
    work = Selecting(**rules, cut=cut, filters=filters)
    outs = []
    for source in (lines(tmp_path / "d.jsonl", ragged), arrow(tmp_path / name, ragged)):
        outs.append(tmp_path / source.suffix[1:])
        outs[-1].mkdir()
        work(source, outs[-1])
    first, second = (read_json(out / "selection.json") for out in outs)
    assert (first.pop("file"), second.pop("file")) == ("selected.jsonl", "selected.arrow")
    assert first == second
    text = {one["id"]: one for one in read_jsonl(outs[0] / "selected.jsonl")}
    for one in read(outs[1] / "selected.arrow"):
        assert one.weight == text[one.id].get("weight", 1.0)
        for column in ("pvar", "pvar_se", "place", "kept", "random", "largestimplicitgap"):
            assert one.extra[column] == text[one.id][column]
        assert text[one.id]["reason"].startswith(one.extra["reason"].split(";")[0])


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_chosen_and_rejected_are_the_order_of_a_pair(tmp_path, name):
    rows = [
        {"prompt": "p", "chosen": "good", "rejected": "bad", "policy_logps": [-1.0, gap - 1.0]}
        | {"reference_logps": [-1.0, -1.0], "scores": [0.0, 9.0]}
        for gap in (1.0, -1.0, 3.0)
    ]
    source = (lines if name == "d.jsonl" else arrow)(tmp_path / name, rows)
    select(source, tmp_path, LargestImplicitGap(beta=1.0), Cut(fraction=0.4))
    found = read_json(tmp_path / "selection.json")
    assert (found["kept"], found["highest"], found["lowest"]) == (1, 1.0, -3.0)
    assert [one.weight for one in read(tmp_path / found["file"])] == [0.0, 1.0, 0.0]


def test_an_arrow_result_is_a_data_set_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    select(arrow(tmp_path / "d.parquet", ROWS), tmp_path, RewardGap(), Cut())
    found = datasets.Dataset.from_file(str(tmp_path / "selected.arrow"))
    assert found["kept"][:] == [False, True, True, False, True, False]


MANY = [row(at, [0.0, (at * 7919 % 1000) / 100]) for at in range(500)]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(
        "prefloop.selecting.scanning.NUMBERS", scanning.NUMBERS._replace(text=32, columns=32)
    )


def test_two_processes_give_what_one_gives(tmp_path, small_blocks):
    source = arrow(tmp_path / "many.parquet", MANY)
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    for out in (alone, shared):
        out.mkdir()
    work = {"rule": PVar(), "cut": Cut(fraction=0.1), "also": (Random(),)}
    Selecting(**work)(source, alone)
    # the second process does its share first; it would then wait for the first
    waited = []
    second = Worker(1, 2, lambda: waited.append(len(list((shared / "measured").glob("block-*")))))
    with pytest.raises(UserError, match="no such file"):  # its share is done, nobody has merged
        Selecting(**work, worker=second)(source, shared)
    assert waited[0] == 8  # of 16 blocks of 32 rows
    Selecting(**work, worker=Worker(0, 2))(source, shared)
    assert read_json(alone / "selection.json") == read_json(shared / "selection.json")
    assert (alone / "selected.arrow").read_bytes() == (shared / "selected.arrow").read_bytes()


def test_a_killed_selection_goes_on_with_the_blocks_that_are_missing(
    tmp_path, small_blocks, monkeypatch
):
    source = lines(tmp_path / "many.jsonl", MANY)
    out, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (out, whole):
        folder.mkdir()
    work = Selecting(rule=PVar(), cut=Cut())
    work(source, whole)

    def kill(done: int) -> None:
        if done >= 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(source, out, kill)
    assert len(list((out / "measured").glob("block-*"))) == 4
    looked_at: list[int] = []
    measure = scanning._measure
    monkeypatch.setattr(
        "prefloop.selecting.scanning._measure",
        lambda block, *rest: (looked_at.append(block.number), measure(block, *rest)),
    )
    work(source, out)
    assert looked_at == list(range(4, 16))
    for name in ("selection.json", "selected.jsonl"):
        assert (out / name).read_text() == (whole / name).read_text()
    assert not (out / "measured").exists()


def test_measures_of_other_work_are_not_gone_on_with(tmp_path, small_blocks):
    source = lines(tmp_path / "many.jsonl", MANY)

    def kill(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Selecting(rule=PVar(), cut=Cut())(source, tmp_path, kill)
    with pytest.raises(UserError, match=r"another selection \(work differ\)"):
        Selecting(rule=RewardGap(), cut=Cut())(source, tmp_path)


GROWTH = """
import resource, sys, torch
from pathlib import Path
from prefloop.selecting import Cut, select
from prefloop.selection import PVar
torch.set_num_threads(1)
sizes = []
for name in sys.argv[1:]:
    out = Path(name).with_suffix(".out")
    out.mkdir()
    select(Path(name), out, PVar(), Cut(fraction=0.1))
    sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(sizes[1] - sizes[0])
"""


def test_memory_grows_by_numbers_a_row_and_not_by_the_text(tmp_path):
    text = "word " * 500

    def file(name: str, count: int) -> Path:
        scores = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
        columns = {
            "prompt": pyarrow.array([text] * count).dictionary_encode(),
            "responses": pyarrow.array([["a", "b"]] * count),
            "scores": pyarrow.array(list(scores.double().numpy())),
        }
        parquet.write_table(pyarrow.table(columns), tmp_path / name, row_group_size=5000)
        return tmp_path / name

    # 40,000 rows are 100 MB of prompts in memory, 10,000 already have every buffer at its size
    names = [str(file("small.parquet", 10_000)), str(file("large.parquet", 40_000))]
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, *names], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 30_000, f"{done.stdout} KiB more for 30,000 rows"


def test_overlap_is_the_share_of_what_the_first_keeps():
    first, second = torch.tensor([[True, True, False, False], [True, False, True, True]])
    assert overlap(first, second) == 0.5
    assert overlap(second, first) == pytest.approx(1 / 3)


def test_explain_shows_both_ends_and_hides_nothing_a_model_wrote(tmp_path, capsys):
    hostile = "\x1b[2J\u202egnp.exe\nsecond line"
    rows = [{**one, "prompt": f"{hostile} {at}"} for at, one in enumerate(ROWS)]
    rows[1]["responses"] = ["", "answer 1"]
    source = lines(tmp_path / "d.jsonl", rows)
    words = ["select", "--data", str(source), "--out", str(tmp_path / "o"), "--explain"]
    assert main([*words, "--also", "RewardGap()", "--quota", "topic=2"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "\u241b[2J[U+202E]gnp.exe second line 1" in said
    assert said.count("left out: beyond the cut") == 1 + 5  # counted once, then five examples
    assert "    best    answer 1\n    worst   answer 0\n" in said
    assert "    best    answer 1\n    worst   (says nothing)\n" in said
    for part in ("most wanted:", "last kept:", "first left out:", "least wanted:", "RewardGap()"):
        assert part in said
    assert main([*words, "--also", "RewardGap()", "--quota", "topic=2", "--resume"]) == 0
    assert "most wanted:" in capsys.readouterr().out
    assert "most wanted:" in explain(read_json(tmp_path / "o/selection.json"))


def test_the_scale_of_pvar_is_fitted_to_votes_on_the_command_line(tmp_path):
    # one gap, two of three votes right: the scale is log 2
    votes = [row(at, [0.0, 1.0], rank=[2, 1] if at else [1, 2]) for at in range(3)]
    at = lines(tmp_path / "votes.jsonl", votes)
    data = lines(tmp_path / "d.jsonl", ROWS)
    words = ["select", "--data", str(data), "--out", str(tmp_path / "o"), "--calibrate", str(at)]
    assert main(words) == 0
    rule = read_json(tmp_path / "o/selection.json")["rule"]
    assert float(re.fullmatch(r"PVar\(scale=(.*)\)", rule).group(1)) == pytest.approx(math.log(2))
    assert read_json(tmp_path / "o/calibration.json")["votes"] == 3


MISTAKES = [
    ("--rule CHES()", r"d.jsonl:1: .*'hidden_gram'.*prefloop score --policy MODEL --hidden"),
    ("--rule PredictiveEntropy()", r"'policy_logps'.*prefloop score --policy MODEL"),
    ("--rule LearningOrder()", r"'validation_loss'.*prefloop score --learning-order"),
    ("--rule DIDEntropy()", r"'policy_logps'"),
    ("--spread 2", r"'embedding'.*prefloop score --encoder minilm"),
    ("--quota language=3", r"'language'.*name a column that the rows have \(id, .*topic"),
    ("--quota topic", r"quota 'topic': write it as COLUMN=LABELS"),
    ("--quota topic=0", r"must be positive"),
    ("--spread 0.5", r"spread must be 1 or more"),
    ("--as weights --budget 3", r"weights keep every prompt"),
    ("--also PVar(scale=2.0)", r"two rules are called PVar"),
    ("--rule RewardGap() --calibrate d.jsonl", r"sets the scale of PVar\(\)"),
    ("--calibrate d.jsonl", r"a vote needs rank and scores, and this row has no rank"),
    ("--filters Length(shortest=1000)", r"the filters leave out all 6 rows"),
    ("--fraction 0.01", r"no prompt is kept of 6; a share of 0.01 is less than one"),
    ("--budget 1 --price responses", r"of 6; the first costs more than the budget of 1"),
    ("--keep above --threshold 99", r"of 6; no score reaches the threshold 99"),
    ("--keep above --threshold nan", r"threshold must be a number"),
    ("--threshold 0.3", r"threshold 0.3 is of use with keep above only, and keep is top"),
    ("--budget -1", r"budget must not be negative"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_said_with_what_to_do(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    lines(Path("d.jsonl"), ROWS)
    assert main(["select", "--data", "d.jsonl", "--out", "o", *words.split()]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not Path("o").exists()  # the same words are enough once the mistake is mended


def test_rows_with_one_id_are_refused(tmp_path, small_blocks):
    source = lines(tmp_path / "d.jsonl", [*MANY[:9], MANY[2]])
    with pytest.raises(UserError, match="rows 3 and 10 have the same id"):
        select(source, tmp_path, PVar(), Cut())


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_bad_row_is_refused_by_its_place(tmp_path, suffix):
    def refused(rows: list[dict], said: str) -> None:
        path = tmp_path / f"bad{suffix}"
        source = lines(path, rows) if suffix == ".jsonl" else arrow(path, rows)
        shutil.rmtree(tmp_path / "measured", ignore_errors=True)
        with pytest.raises(UserError, match=said):
            select(source, tmp_path, rule, Cut())

    place = r"bad.jsonl:2" if suffix == ".jsonl" else "bad.parquet row 2"
    rule = PVar()
    refused([ROWS[0], {**ROWS[1], "scores": None}], place)
    refused([ROWS[0], {**ROWS[1], "scores": [1.0, math.inf]}], f"{place}.*finite")
    rule = LargestImplicitGap()
    logps = {"policy_logps": [-1.0, -1.0], "reference_logps": [-1.0, -1.0]}
    rows = [{**one, **logps} for one in ROWS]
    refused([rows[0], {**rows[1], "policy_logps": [-1.0]}], f"{place}: .* 1 numbers|{place}: .* 2")
    refused([rows[0], {**rows[1], "scores": [1.0, 1.0]}], f"{place}: .*Ordered")
