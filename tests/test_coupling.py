"""Two processes and one: the gradient and the metrics of every objective that couples a batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefloop.trainer.coupling import everyones
from prefloop.types import Logps

WORKER = Path(__file__).with_name("coupling_worker.py")


@pytest.mark.slow
def test_two_processes_find_the_gradient_of_one_to_a_millionth(tmp_path):
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", str(WORKER), str(out)]
        subprocess.run(command, env=environment, check=True, timeout=300)
        metrics = json.loads((out / "metrics.json").read_text())
        found.append((load_file(out / "gradients.safetensors"), metrics))
    (alone, said), (together, said_together) = found
    assert len(alone) > 20
    for name, gradient in alone.items():
        assert gradient.norm() > 0.1, name
        assert (together[name] - gradient).norm() < 1e-6 * gradient.norm(), name
        assert said_together[name] == pytest.approx(said[name], rel=1e-6, abs=1e-6), name


def test_tables_of_all_processes_are_padded_to_the_largest(monkeypatch):
    mine = Logps(torch.full((2, 2, 3), -1.0, requires_grad=True), torch.ones(2, 2, 3).bool())
    theirs = [torch.full((1, 3, 2), -2.0), torch.ones(1, 3, 2).bool(), None]

    def gathered(found: list, sent: list) -> None:
        assert [value is None for value in sent] == [False, False, True]
        assert not sent[0].requires_grad
        found[:] = [theirs, sent]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    whole = everyones(mine, 1)
    assert whole.token.sum(-1).tolist() == [[-4.0, -4.0, -4.0], [-3.0, -3.0, 0.0]]
    assert whole.length.tolist() == [[2, 2, 2], [3, 3, 0]]
    (gradient,) = torch.autograd.grad(whole.token.sum(), mine.token)
    assert gradient.sum((-1, -2)).tolist() == [6.0, 0.0]  # the second row was left out
