"""The README is true: its Python runs and prints what it says, its commands and pages exist."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from prefloop.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_prints_what_it_says():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(block, "README.md", "exec"), {})
    printed = said.getvalue().splitlines()
    claimed = re.findall(r"print\(.*?\)\s+# (.*?)(?::|$)", block, re.MULTILINE)
    assert len(printed) == len(claimed) == 2
    assert all(line == claim.strip() for line, claim in zip(printed, claimed, strict=True))


def test_every_command_of_the_readme_exists():
    used = set(re.findall(r"prefloop ([a-z]+) ", README))
    assert used & set(COMMANDS)
    assert not {name for name in used if name not in COMMANDS} - {"closes"}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(docs/[a-z_]+\.md)`", README))))
def test_every_page_that_the_readme_names_is_there(path):
    assert (ROOT / path).exists()


def test_the_readme_starts_with_something_to_run_and_stays_short():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("make demo") for line in lines[:30])
