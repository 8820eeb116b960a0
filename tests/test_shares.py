"""Processes that share a file: each its pieces, and together what one would do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from together import together

from prefloop.shares import Worker, this_worker


def test_every_piece_has_one_owner():
    workers = [Worker(index, 3) for index in range(3)]
    for number in range(10):
        assert [worker.owns(number) for worker in workers].count(True) == 1
    assert [worker.leads for worker in workers] == [True, False, False]


def test_a_process_alone_owns_everything_and_waits_for_nobody():
    worker = this_worker()
    worker.wait()
    assert (worker.index, worker.count) == (0, 1)


@pytest.mark.parametrize(("count", "items"), [(1, 5), (2, 5), (3, 7), (3, 2), (2, 0)])
def test_shares_come_together_in_the_order_of_the_whole(count, items):
    whole = [f"item {number}" for number in range(items)]

    def work(worker: Worker) -> list[str]:
        return worker.gathered([item.upper() for item in worker.share(whole)])

    assert together(count, work) == [[item.upper() for item in whole]] * count


def test_what_is_led_is_done_once_and_known_to_all():
    done = []

    def work(worker: Worker) -> int:
        return worker.led(lambda: done.append(worker.index) or len(done))

    assert together(3, work) == [1, 1, 1]
    assert done == [0]


def test_an_error_of_what_is_led_stops_all_of_them():
    stopped = []

    def work(worker: Worker) -> None:
        try:
            worker.led(lambda: 1 // 0)
        except ZeroDivisionError:
            stopped.append(worker.index)

    together(2, work)
    assert sorted(stopped) == [0, 1]


@pytest.mark.slow
def test_two_processes_score_and_select_what_one_does(tmp_path):
    rows = [
        {"id": f"r{at}", "prompt": f"p{at}", "responses": ["a" * (at % 7), "bb", "c" * (at % 5)]}
        for at in range(700)
    ]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(processes: int, *words: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "-m", "prefloop.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("wrote") == 1  # one process speaks

    for processes in (1, 2):
        scored, chosen = (str(tmp_path / f"{name}{processes}") for name in ("scored", "chosen"))
        run(processes, "score", "--data", str(data), "--out", scored, "--reward", "brevity")
        words = ("--data", f"{scored}/scored.jsonl", "--out", chosen, "--also", "Random()")
        run(processes, "select", *words)
    for name in ("scored{}/scored.jsonl", "chosen{}/selected.jsonl", "chosen{}/selection.json"):
        one, two = (Path(tmp_path, name.format(count)).read_bytes() for count in (1, 2))
        assert one == two, name
