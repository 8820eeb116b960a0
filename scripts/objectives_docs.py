"""Write docs/objectives.md from the objects themselves: `python scripts/objectives_docs.py`."""

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import ModuleType

from prefloop import objectives
from prefloop.objectives import acceleration, family, general, references

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"
SECTIONS = ("When", "Attributes", "Args", "Returns", "References")
INTRO = """\
# Objectives

Generated from the objects by `python scripts/objectives_docs.py`; a test fails where it is out of
date. To add an objective, write the class in the file of its theme under `prefloop/objectives/`
(and its name in that file's `__all__`), and a row with hand-computed numbers in `CASES` of
`tests/objective_cases.py`. The laws of the tests, the command line and this page follow.

An objective is written as text the way Python prints it, on the command line and in `config.json`:

    prefloop train --objective "DPO(beta=0.05)"
    prefloop train --objective "Sum(objectives=[DPO(beta=0.1), SFT()], weights=[1, 0.2])"
    prefloop train --objective "LD(objective=WPO(objective=DPO(beta=0.01)), alpha=0.5)"

Signs used throughout: pi is the policy, pi_ref the reference; log-probabilities are natural logs
(nats), summed over the tokens of a response unless divided by its length |y|; h = log pi(y|x) -
log pi_ref(y|x), with h_w of the chosen and h_l of the rejected response; sg[.] passes no gradient.
A loss is one number a comparison. With N responses, a pairwise objective is the mean over all
strictly ordered pairs, so a comparison counts once. Where the literature or the libraries disagree,
the entry says which variant it is and who does what; "remembered" and "as reported" mark what
could not be checked against the paper.

Columns of the data: `rank` (1 = best, equal = not ordered), `scores` (a reward a response), `label`
(good or bad, for single responses; without it, unpaired objectives read the rank), `ensemble`
(scores of several reward models a response).
"""


def page() -> str:
    """The whole document."""
    parts = [INTRO, *_table()]
    for module in objectives.MODULES:
        kinds = [kind for kind in objectives.ALL if kind.__module__ == module.__name__]
        if kinds:
            parts += [_heading(module), *map(_entry, kinds)]
    parts += ["## Divergences, for `FDivergence`\n", *map(_entry, objectives.PARTS)]
    for module in (general, references, acceleration):
        members = {name: vars(module)[name] for name in module.__all__}
        parts += [_heading(module)]
        parts += [
            _entry(value) if isinstance(value, type) else _function(name, value)
            for name, value in members.items()
        ]
    return "\n".join(parts)


def _table() -> list[str]:
    rows = ["## At a glance\n", "| objective | what it is | reads | needs |", "|---|---|---|---|"]
    for kind in objectives.ALL:
        summary = _sections(kind)["Summary"].rstrip(".")
        rows.append(f"| [{kind.__name__}](#{kind.__name__.lower()}) | {summary} | {_needs(kind)} |")
    return [*rows, ""]


def _needs(kind: type) -> str:
    """The cells "reads" and "needs", from what the family and the class say."""
    if issubclass(kind, family.Wrapped | objectives.Sum):
        own = ", collision" if vars(kind).get("weighs_by_collision") else ""
        return f"what the inside reads | what the inside needs{own}"
    reads = " or ".join(f"`{name}`" for name in kind.data)
    wanted = {
        "reference": kind.needs_reference,
        "whole batch": kind.couples_batch,
        "ties": kind.uses_ties,
        "input embeddings": kind is objectives.WassersteinDPO,
    }
    return f"{reads} | {', '.join(name for name, wants in wanted.items() if wants) or 'nothing'}"


def _heading(module: ModuleType) -> str:
    title, _, rest = (inspect.getdoc(module) or "").partition("\n")
    text = f"\n{rest.strip()}\n" if rest.strip() else ""
    return f"## {title.rstrip('.:')}\n{text}"


def _entry(kind: type) -> str:
    """One object: equation and prose, when to use it, its fields, its sources."""
    parts = _sections(kind)
    lines = [f"### {kind.__name__}\n", parts["Summary"], "", parts["Body"]]
    if "When" in parts:
        lines += ["", f"*When:* {_line(parts['When'])}."]
    if kind in objectives.ALL:
        reads, needs = _needs(kind).split(" | ")
        lines += ["", f"*Reads* {reads}; *needs* {needs}."]
    if "Attributes" in parts:
        meanings = _attributes(parts["Attributes"])
        lines += ["", "| field | default | meaning |", "|---|---|---|"]
        lines += [
            f"| `{field.name}` | {_default(field)} | {meanings[field.name]} |"
            for field in fields(kind)
        ]
    if "References" in parts:
        lines += ["", f"*Sources:* {_line(parts['References'])}"]
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*lines, ""]))


def _function(name: str, function: Callable[..., object]) -> str:
    """One function: what it gives, its arguments, its sources."""
    parts = _sections(function)
    given = inspect.signature(function).parameters.values()
    lines = [f"### {name}\n", f"`{name}({', '.join(map(_argument, given))})`", ""]
    lines += [parts["Summary"], "", parts["Body"]]
    if "Args" in parts:
        lines += ["", "| argument | meaning |", "|---|---|"]
        lines += [f"| `{key}` | {text} |" for key, text in _attributes(parts["Args"]).items()]
    if "Returns" in parts:
        lines += ["", f"*Returns* {_line(parts['Returns'])}"]
    if "References" in parts:
        lines += ["", f"*Sources:* {_line(parts['References'])}"]
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*lines, ""]))


def _argument(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return parameter.name
    return f"{parameter.name}={parameter.default!r}"


def _sections(kind: object) -> dict[str, str]:
    """A docstring in its parts: Summary, Body, and those that a line "Name:" opens."""
    text = inspect.getdoc(kind) or ""
    pieces = re.split(rf"^({'|'.join(SECTIONS)}):\n", text, flags=re.M)
    summary, _, body = pieces[0].partition("\n")
    named = dict(zip(pieces[1::2], map(inspect.cleandoc, pieces[2::2]), strict=True))
    return {"Summary": summary.strip(), "Body": body.strip("\n"), **named}


def _attributes(text: str) -> dict[str, str]:
    """Name and meaning of each attribute, continuation lines joined."""
    found = re.split(r"^(\w+(?:, \w+)*): ", text, flags=re.M)[1:]
    return {name: _line(meaning) for name, meaning in zip(found[::2], found[1::2], strict=True)}


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def _default(field: Field) -> str:
    if field.default is not MISSING:
        return f"`{field.default!r}`"
    return "required" if field.default_factory is MISSING else f"`{field.default_factory()!r}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
