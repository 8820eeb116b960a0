"""Files and data sets: read as they are, written and read back, refused with the line."""

import gzip
import json
import time
from pathlib import Path

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from prefloop.data import iterate, read, read_prompts, write
from prefloop.data.columns import NAMES
from prefloop.data.files import read_row
from prefloop.errors import UserError
from prefloop.types import Comparison

SHARED = Path(__file__).parents[2] / "shared" / "data" / "pandalm"
needs_pandalm = pytest.mark.skipif(not SHARED.exists(), reason="PandaLM is not on this machine")

ROWS = [
    {"prompt": "q1", "chosen": "a", "rejected": "b, with a comma", "source": "x"},
    {"prompt": "q2", "chosen": "c\nd", "rejected": "ü", "source": "y"},
]
TEXTS = [("q1", ("a", "b, with a comma")), ("q2", ("c\nd", "ü"))]


def as_json_lines(path):
    path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS), encoding="utf-8-sig")


def as_gzip(path):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def as_json(path):
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def as_csv(path):
    path.write_text(
        'prompt,chosen,rejected,source\nq1,a,"b, with a comma",x\n\nq2,"c\nd",ü,y\n',
        encoding="utf-8",
    )


def as_parquet(path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def as_arrow_stream(path):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(path, table.schema) as file:
        file.write_table(table)


def as_arrow_file(path):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


FILES = [
    ("a.jsonl", as_json_lines, ["a.jsonl:1", "a.jsonl:3"]),
    ("a.jsonl.gz", as_gzip, ["a.jsonl.gz:1", "a.jsonl.gz:2"]),
    ("a.json", as_json, ["a.json:2 (row 1)", "a.json:8 (row 2)"]),
    ("lines.json", as_json_lines, ["lines.json:1", "lines.json:3"]),
    ("a.csv", as_csv, ["a.csv:2", "a.csv:4"]),
    ("a.parquet", as_parquet, ["a.parquet row 1", "a.parquet row 2"]),
    ("a.arrow", as_arrow_stream, ["a.arrow row 1", "a.arrow row 2"]),
    ("b.arrow", as_arrow_file, ["b.arrow row 1", "b.arrow row 2"]),
]


@pytest.mark.parametrize(("name", "make", "places"), FILES, ids=[name for name, *_ in FILES])
def test_every_format_gives_the_same_comparisons_with_their_places(tmp_path, name, make, places):
    make(tmp_path / name)
    rows = read(tmp_path / name)
    assert [(row.prompt, row.responses) for row in rows] == TEXTS
    assert [row.place for row in rows] == [f"{tmp_path}/{place}" for place in places]
    assert [row.extra["source"] for row in rows] == ["x", "y"]
    assert all(row.id.startswith(f"{name}:") for row in rows)
    assert rows == list(iterate(str(tmp_path / name)))


def test_the_cells_of_a_csv_hold_json_where_a_row_needs_more_than_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "prompt,responses,rank,weight,annotator,note\n"
        'q,"[""1"", ""b""]","[2, null]",0.5,,7\n'
        'q,"[""1"", ""b""]",,,ann,\n'
    )
    first, second = read(path)
    assert (first.responses, first.rank, first.weight) == (("1", "b"), (2, None), 0.5)
    assert (first.annotator, first.extra) == (None, {"note": "7"})
    assert (second.rank, second.weight, second.annotator) == (None, 1.0, "ann")


def test_renamed_cells_of_a_tsv_are_decoded_for_their_new_part(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("q\t1st\t2nd\ts1\ts2\nwhy\t10\t[x]\t1\t2.5\n")
    names = {"prompt": "q", "responses": ("1st", "2nd"), "scores": ("s1", "s2")}
    (row,) = read(path, names)
    assert (row.responses, row.scores) == (("10", "[x]"), (1.0, 2.5))


def test_csv_labels_may_be_capitalised(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label\nq,a,True\nq,b,false\n")
    assert [row.label for row in read(path)] == [(True,), (False,)]


def test_a_csv_cell_may_be_longer_than_pythons_limit(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,chosen,rejected\nq,{'a' * 200_000},b\n")
    assert len(read(path)[0].responses[0]) == 200_000


def test_a_saved_data_set_is_read_and_one_of_its_splits_is_named(tmp_path):
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    one = read(tmp_path / "one")
    assert [(row.prompt, row.responses) for row in one] == TEXTS
    assert one[1].place == f"{tmp_path}/one row 2"
    halves = datasets.DatasetDict({"train": whole.select([0]), "test": whole.select([1])})
    halves.save_to_disk(tmp_path / "two")
    (row,) = read(f"{tmp_path}/two:test")
    assert row.prompt == "q2"
    with pytest.raises(UserError, match=r"has the splits train, test; say which, as .*two:train"):
        read(tmp_path / "two")
    with pytest.raises(UserError, match="has no split 'dev'; it has train, test"):
        read(f"{tmp_path}/two:dev")
    with pytest.raises(UserError, match="has no splits, so 'train' cannot be chosen"):
        read(f"{tmp_path}/one:train")


def test_a_hub_name_carries_its_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(name, configuration):
        asked.append((name, configuration))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read("org/name")) == 2
    assert len(read("org/name/config:train")) == 2
    assert asked == [("org/name", None), ("org/name", "config")]


def test_a_hub_that_cannot_be_reached_is_a_line(monkeypatch):
    def load_dataset(name, configuration):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"org/name: neither a file here nor.*: no network"):
        read("org/name")


GOOD = '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'

BAD_FILES = [
    ("a.jsonl", GOOD + '{"prompt": \n', "a.jsonl:2: not JSON: Expecting value"),
    ("a.jsonl", GOOD + "\n[1]\n", r"a.jsonl:3: a row must be a JSON object.*found \[1\]"),
    ("a.jsonl", "[" * 200_000, "a.jsonl:1: not JSON"),
    ("a.jsonl", b"\n\xff\n", "a.jsonl:2: not UTF-8: byte 0xff"),
    ("a.jsonl", GOOD + '{"prompt": "q", "chosen": "a"}', "a.jsonl:2: missing rejected"),
    ("a.jsonl", "", "a.jsonl: holds no row"),
    ("a.json", f"[{GOOD},\n{{]", r"a.json:3 \(row 2\): not JSON"),
    ("a.json", f"[{GOOD}\n{GOOD}]", r"a.json:1 \(row 1\): behind this row must stand"),
    ("a.json", f"[{GOOD},\n7]", r"a.json:3 \(row 2\): a row must be a JSON object"),
    ("a.json", f"[{GOOD}", r"a.json:1 \(row 1\): behind this row must stand"),
    ("a.json", "[]", "a.json: holds no row"),
    ("a.json", b"[\xff]", "a.json: not UTF-8"),
    ("a.jsonl", (GOOD * 2).encode("utf-16"), "a.jsonl: UTF-16; save it as UTF-8"),
    ("a.csv", "prompt,chosen".encode("utf-16"), "a.csv: UTF-16; save it as UTF-8"),
    ("a.json", b"\xfe\xff\0[", "a.json: UTF-16"),
    ("a.csv", "prompt,chosen,rejected\nq,a\n", "a.csv:2: 2 cells under 3 columns"),
    ("a.csv", "prompt,prompt\nq,a\n", "a.csv:1: every column needs its own name"),
    ("a.csv", 'prompt,chosen\n"q,a\n', "a.csv:2: not CSV: unexpected end of data"),
    ("a.csv", b"prompt,chosen\nq,\xff\n", "a.csv:2: not UTF-8"),
    (
        "a.csv",
        'prompt,responses,rank\nq,"[""a"", ""b""]","1 2"\n',
        "a.csv:2: the cell of rank holds '1 2', which is not JSON",
    ),
    ("a.parquet", "PAR1", "a.parquet: not a Parquet file"),
    ("a.arrow", "nothing", "a.arrow: not an Arrow file"),
    ("a.jsonl.gz", "nothing", "a.jsonl.gz: cannot be read: Not a gzipped file"),
    ("a.txt", "x", "a.txt: files of type '.txt' cannot be read; allowed are .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_refused_with_the_line(tmp_path, name, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"(?s)^{tmp_path}/{message}") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_not_a_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: there is no such file or folder"):
        read("gone.jsonl")
    with pytest.raises(UserError, match="there is no such file or folder"):
        read(tmp_path / "gone")
    with pytest.raises(UserError, match="a folder must be a data set written by save_to_disk"):
        read(tmp_path)


def test_bad_rows_are_handed_over_and_the_others_go_on(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + "nonsense\n" + '{"prompt": 3}\n' + GOOD)
    errors = []
    rows = list(iterate(path, refuse=errors.append))
    assert [row.place for row in rows] == [f"{path}:1", f"{path}:4"]
    assert [str(error).split(": ")[0] for error in errors] == [f"{path}:2", f"{path}:3"]


def test_an_id_that_repeats_is_refused_with_both_places(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "id": "same"}
    path.write_text(2 * (json.dumps(row) + "\n"))
    with pytest.raises(UserError, match=r"a.jsonl:2: the id 'same' is used already at .*jsonl:1;"):
        read(path)
    assert len(read(path, {"id": ""})) == 2


def test_one_row_is_found_by_its_number_bad_rows_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + "nonsense\n\n" + GOOD)
    assert read_row(path, 1).place == f"{path}:1"
    assert read_row(path, 3).place == f"{path}:4"
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):
        read_row(path, 2)
    with pytest.raises(UserError, match="there is no row 4; it has 3"):
        read_row(path, 4)
    with pytest.raises(UserError, match="there is no row 0"):
        read_row(path, 0)


def test_each_prompt_is_read_once_in_order(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": "b"}, {"prompt": "a", "topic": 1}, {"prompt": "b"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_prompts(path)
    assert [(row.prompt, row.id) for row in rows] == [("b", "a.jsonl:1"), ("a", "a.jsonl:2")]
    assert rows[1].extra == {"topic": 1}
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(tmp_path / "none.jsonl")


text = st.text(st.characters(exclude_categories=["Cs"]))
words = text.filter(str.strip)
messages = st.tuples(
    st.fixed_dictionaries({"role": st.just("system"), "content": text}),
    st.fixed_dictionaries({"role": st.just("user"), "content": text}),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)


other_names = text.filter(lambda name: name not in NAMES)


@st.composite
def fields(draw):
    """What a comparison is made of; made in the test, since beartype's checks draw at random."""
    count = draw(st.integers(2, 4))

    def some(one):
        return draw(st.none() | st.tuples(*[one] * count))

    return {
        "prompt": draw(words | messages),
        "responses": draw(st.tuples(*[text] * count)),
        "rank": some(st.none() | st.integers(1, 9)),
        "scores": some(st.floats(allow_nan=False, allow_infinity=False)),
        "label": some(st.booleans()),
        "ensemble": some(st.tuples(*[st.floats(-9, 9)] * 2)),
        "annotator": draw(st.none() | words),
        "weight": draw(st.floats(0, 1e9)),
        "extra": draw(
            st.dictionaries(text.filter(lambda key: key not in NAMES), plain, max_size=3)
        ),
    }


@settings(deadline=None, max_examples=40)
@given(made=st.lists(fields(), min_size=1, max_size=3))
def test_what_is_written_is_read_back_the_same(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("round") / "rows.jsonl"
    rows = [
        Comparison(**one, id=f"id {number}", place=f"{path}:{number}")
        for number, one in enumerate(made, 1)
    ]
    assert write(path, rows) == len(rows)
    assert read(path) == rows


def test_prompts_without_responses_are_written_and_read_back(tmp_path):
    rows = [Comparison(prompt="q", responses=(), id="one", extra={"topic": "x"})]
    write(tmp_path / "p.jsonl", rows)
    (row,) = read_prompts(tmp_path / "p.jsonl")
    assert (row.prompt, row.responses, row.id, row.extra) == ("q", (), "one", {"topic": "x"})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rank": 3}, "extra holds rank, a name that means something"),
        ({"when": {1, 2}}, "the column when cannot be written as JSON"),
    ],
)
def test_columns_that_cannot_be_written_are_refused_and_no_file_is_left(tmp_path, extra, message):
    rows = [Comparison("q", ("a", "b")), Comparison("q", ("a", "b"), id="x", extra=extra)]
    with pytest.raises(UserError, match=message):
        write(tmp_path / "rows.jsonl", rows)
    assert list(tmp_path.iterdir()) == []


@needs_pandalm
def test_the_human_votes_of_pandalm_are_read_ties_included():
    rows = read(SHARED / "votes.jsonl")
    assert len(rows) == 2997
    assert sum(row.rank == (1, 1) for row in rows) == 326
    assert {row.annotator for row in rows} == {"annotator1", "annotator2", "annotator3"}
    assert len(read_prompts(SHARED / "votes.jsonl")) == 170


@needs_pandalm
def test_the_booleans_among_pandalms_published_responses_are_reported():
    names = {"prompt": ("instruction", "input"), "responses": ("response1", "response2")}
    errors = []
    rows = list(iterate(SHARED / "testset-v1.json", names, errors.append))
    assert len(rows) + len(errors) == 999
    assert [str(error).split(" (row ")[1].split(":")[0] for error in errors] == [
        "158)", "159)", "160)", "162)", "163)", "165)",
    ]  # fmt: skip
    assert all("is the boolean true, not text" in str(error) for error in errors)


@pytest.mark.slow
def test_a_hundred_thousand_rows_are_read_in_seconds(tmp_path):
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for number in range(100_000):
            row = {"prompt": f"q{number} " * 20, "chosen": "word " * 50, "rejected": "wörd " * 40}
            file.write(json.dumps(row) + "\n")
    started = time.process_time()  # whatever else the machine does
    assert sum(1 for _ in iterate(path)) == 100_000
    assert time.process_time() - started < 30
