"""Blocks of a source: the same rows in the same blocks however the file is cut."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from prefloop.data.blocks import Sizes, blocks, column_names, is_columnar
from prefloop.types import UserError

ROWS = [
    {"id": f"r{at}", "prompt": f"p{at}", "responses": ["a", "b"], "scores": [0.0, float(at)]}
    for at in range(11)
]
TABLE = pyarrow.Table.from_pylist(ROWS)


@pytest.fixture(params=["lines", "groups of 3", "one group", "stream of 2", "file of 5"])
def source(request, tmp_path):
    kind = request.param
    if kind == "lines":
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif "group" in kind:
        path = tmp_path / "d.parquet"
        parquet.write_table(TABLE, path, row_group_size=3 if kind == "groups of 3" else 11)
    else:
        path = tmp_path / "d.arrow"
        opened = pyarrow.ipc.new_stream if kind == "stream of 2" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, opened(sink, TABLE.schema) as writer:
            writer.write_table(TABLE, max_chunksize=2 if kind == "stream of 2" else 5)
    return path


def test_every_row_is_in_its_block_whatever_the_file(source):
    found = list(blocks(source, sizes=Sizes(text=4, columns=4)))
    assert [(block.number, block.start, len(block)) for block in found] == [
        (0, 0, 4),
        (1, 4, 4),
        (2, 8, 3),
    ]
    rows = [row for block in found for row in block.comparisons()]
    assert [row.id for row in rows] == [row["id"] for row in ROWS]
    assert [row.scores for row in rows] == [tuple(row["scores"]) for row in ROWS]


def test_unwanted_blocks_are_passed_over_and_still_counted(source):
    asked = []

    def odd(number: int) -> bool:
        asked.append(number)
        return number % 2 == 1

    found = list(blocks(source, wanted=odd, sizes=Sizes(text=4, columns=4)))
    assert asked == [0, 1, 2]
    assert [(block.number, block.start) for block in found] == [(1, 4)]
    assert [row.id for row in found[0].comparisons()] == ["r4", "r5", "r6", "r7"]


def test_of_columns_only_those_asked_for_are_read(tmp_path):
    path = tmp_path / "d.parquet"
    parquet.write_table(TABLE, path)
    assert is_columnar(path)
    assert column_names(path) == ("id", "prompt", "responses", "scores")
    block = next(blocks(path, ["scores", "absent"]))
    assert block.table.column_names == ["scores"]
    assert len(block) == 11
    with pytest.raises(UserError, match="has none of the columns absent; it has id, prompt"):
        next(blocks(path, ["absent"]))
