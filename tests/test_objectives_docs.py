"""docs/objectives.md says what the objects say."""

import importlib.util
from dataclasses import fields
from pathlib import Path

from prefloop import objectives

ROOT = Path(__file__).parents[1]


def generator():
    spec = importlib.util.spec_from_file_location(
        "objectives_docs", ROOT / "scripts" / "objectives_docs.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_objects_say():
    assert (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8") == generator().page(), (
        "docs/objectives.md is out of date: run `python scripts/objectives_docs.py`"
    )


def test_every_objective_says_its_equation_when_to_use_it_and_where_it_is_from():
    docs = generator()
    for kind in objectives.ALL:
        parts = docs._sections(kind)
        assert {"When", "References"} <= set(parts), kind.__name__
        assert "\n    " in f"\n{parts['Body']}", f"{kind.__name__} has no equation"
        described = docs._attributes(parts.get("Attributes", ""))
        assert set(described) == {field.name for field in fields(kind)}, kind.__name__
