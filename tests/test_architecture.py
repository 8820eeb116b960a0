"""The layering, the size of things and the public names, as executable text."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import prefloop
from prefloop.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prefloop"
LAYERS = [
    re.search(r"^    (.*)$", line).group(1).split()[0].rstrip("/,")
    for line in (ROOT / "docs" / "design.md")
    .read_text()
    .split("## 5. Modules")[1]
    .split("EM, bilevel")[0]
    .splitlines()
    if line.startswith("    ")
]
"""The modules in the order of docs/design.md, section 5: one list, in the document."""

FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted([*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_module_has_a_place_in_the_design():
    missing = {module_of(path) for path in FILES} - set(LAYERS) - {"__init__"}
    assert not missing, f"add {sorted(missing)} to the list in docs/design.md, section 5"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_earlier_ones(path):
    module = module_of(path)
    if module == "__init__":
        return
    imported = {
        node.module.split(".")[1]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prefloop.")
    }
    later = {n for n in imported - {module} if LAYERS.index(n) >= LAYERS.index(module)}
    assert not later, f"{module} imports {sorted(later)}, which come later in docs/design.md"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small_and_are_named_for_what_they_hold(path):
    assert len(path.read_text().splitlines()) <= 500
    assert path.stem not in {"utils", "common", "helpers", "misc", "base"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_fit_a_screen(path):
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > 70
    ]
    assert not long


def test_there_is_one_log_softmax_of_token_logits():
    allowed = {"logps", "tabular", "samplers", "policies", "reproduce", "did"}
    users = {module_of(path) for path in FILES if "log_softmax" in path.read_text()}
    assert users <= allowed, users


def test_public_names_are_sorted_and_exist():
    assert prefloop.__all__ == sorted(prefloop.__all__)
    for name in prefloop.__all__:
        assert getattr(prefloop, name) is not None


def test_importing_the_package_imports_no_torch():
    code = "import prefloop, prefloop.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_answers_in_half_a_second():
    def seconds() -> float:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "prefloop.cli", "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0
        assert all(name in done.stdout for name in COMMANDS)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_unfinished_work_is_left_in_the_source(path):
    if path.name == "test_architecture.py":
        return
    found = re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b|raise NotImplementedError", path.read_text())
    assert not found
