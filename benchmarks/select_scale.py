"""How long `prefloop select` takes over many scored rows in columns, and how much memory.

    OMP_NUM_THREADS=1 python benchmarks/select_scale.py --rows 10000000
    OMP_NUM_THREADS=1 python benchmarks/select_scale.py --processes 2

Writes rows of an id, a topic and eight scores in a temporary folder, then runs the command in a
process of its own, and prints seconds from its start to its end and its peak memory.
"""

import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import tyro
from pyarrow import parquet

BATCH = 250_000


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Select from many rows of scores."""

    rows: int = 10_000_000
    """Rows."""
    responses: int = 8
    """Scores of a row."""
    format: str = "parquet"
    """parquet or arrow."""
    rule: str = "PVar()"
    """The rule."""
    more: str = ""
    """More options of prefloop select: --more="--budget 1000000 --quota topic=100000"."""
    processes: int = 1
    """Above 1: started by torchrun."""

    def __call__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / f"scored.{self.format}"
            started = time.perf_counter()
            self.write(source)
            made = time.perf_counter() - started
            size = source.stat().st_size / 2**30
            print(f"{self.rows:,} rows, {size:.2f} GiB of {self.format}, made in {made:.0f} s")
            command = [*self.launcher(), "select", "--data", str(source)]
            command += ["--out", f"{folder}/out", "--rule", self.rule]
            command += shlex.split(self.more)
            started = time.perf_counter()
            subprocess.run(command, check=True)
            seconds = time.perf_counter() - started
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            out = Path(folder, "out", "selected.arrow").stat().st_size / 2**30
            print(
                f"prefloop select: {seconds:.1f} s ({used.ru_utime + used.ru_stime:.1f} s of CPU), "
                f"{self.rows / seconds:,.0f} rows a second, peak memory of a process "
                f"{used.ru_maxrss / 2**20:.2f} GiB, wrote {out:.2f} GiB; "
                f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads a process"
            )

    def launcher(self) -> list[str]:
        """The words in front of the command's name."""
        if self.processes == 1:
            return [sys.executable, "-m", "prefloop.cli"]
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*run, f"--nproc-per-node={self.processes}", "-m", "prefloop.cli"]

    def write(self, path: Path) -> None:
        """Rows in batches, so that they need no memory."""
        rng = np.random.default_rng(0)
        topics = pyarrow.array([f"topic {number}" for number in range(20)])
        columns = {"id": pyarrow.string(), "topic": pyarrow.string()}
        schema = pyarrow.schema([*columns.items(), ("scores", pyarrow.list_(pyarrow.float64()))])
        with pyarrow.OSFile(str(path), "wb") as sink, self.writer(sink, schema) as writer:
            for start in range(0, self.rows, BATCH):
                count = min(BATCH, self.rows - start)
                ids = pyarrow.array(np.arange(start, start + count)).cast(pyarrow.string())
                topic = topics.take(pyarrow.array(rng.integers(0, 20, count)))
                ends = np.arange(count + 1, dtype=np.int32) * self.responses
                scores = rng.standard_normal(count * self.responses)
                lists = pyarrow.ListArray.from_arrays(ends, scores)
                writer.write_table(pyarrow.table([ids, topic, lists], schema=schema))

    def writer(self, sink: pyarrow.NativeFile, schema: pyarrow.Schema):
        if self.format == "parquet":
            return parquet.ParquetWriter(sink, schema)
        return pyarrow.ipc.new_stream(sink, schema)


if __name__ == "__main__":
    tyro.cli(Scale)()
