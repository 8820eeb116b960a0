"""Every paper's claims, all of them, by the command: at full speed, without checks of shapes."""

import os
import subprocess
import sys

import pytest

from prefloop.reproduce import PAPERS
from prefloop.runs import read_json

SEEDS = {"pvar": 1, "did": 1, "samplers": 1, "mixture": 1, "stable": 0}
FIGURES = {"pvar": 5, "did": 5}


def test_every_paper_is_here():
    assert SEEDS.keys() == set(PAPERS)


@pytest.mark.slow
@pytest.mark.parametrize("paper", SEEDS)
def test_every_claim_that_must_hold_does(paper, tmp_path):
    words = ["reproduce", paper, "--seed", str(SEEDS[paper]), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "prefloop.cli", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = read_json(tmp_path / "out" / paper / "reproduction.json")
    assert found["claims"]
    assert len(found["figures"]) == FIGURES.get(paper, len(found["figures"]))
