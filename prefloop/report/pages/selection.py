"""Which prompts were kept for labelling: the distribution of the score, the cut, what was cut."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefloop.report.run import Run
from prefloop.report.section import Heatmap, Histogram, Interval, Section, Table
from prefloop.report.words import number, shorten
from prefloop.types import UserError

PRICED = {
    "pairs": "one for each pair of answers to a prompt that is kept",
    "responses": "one for each answer to a prompt that is kept",
    "prompt": "one for each prompt that is kept",
}
ENDS = ("best", "worst")
NEEDED = ("rule", "kept", "total", "values", "why", "examples")


def selection(runs: Sequence[Run]) -> list[Section]:
    """One section for each run that selected, since their cuts differ."""
    return [_of_run(run).under(run.name, runs) for run in runs if run.selection]


def _of_run(run: Run) -> Section:
    found = run.selection
    if missing := [key for key in NEEDED if key not in found]:
        raise UserError(
            f"{run.folder / 'selection.json'}: has no {', '.join(missing)}; it is not of this "
            "version of prefloop select. Select again"
        )
    name = str(found["rule"]).split("(")[0]
    below = found.get("keep") == "bottom"
    tables = [_why(found), *_quotas(found)]
    tables += [
        _examples(f"{group.capitalize()} by {name}", rows) for group, rows in _groups(found).items()
    ]
    figures = [
        Histogram(
            title=f"{name} of the prompts",
            x_label=name,
            values=tuple(found["values"]),
            cut=found.get("cut"),
            below=below,
            note=_note(found),
        ),
        *_overlap(found),
    ]
    weighted = "weighted" if found.get("weights") else "kept"
    return Section(
        title="Selection",
        lead=f"{found['kept']} of {found['total']} prompts were {weighted} ({found['rule']}).",
        note=_spent(found),
        tables=tuple(tables),
        figures=tuple(figures),
    )


def _why(found: Mapping[str, Any]) -> Table:
    rows = tuple(
        (why, count, Interval(value=count / found["total"], unit="share"))
        for why, count in found["why"].items()
    )
    return Table(title="Why", columns=("reason", "prompts", "share"), rows=rows)


def _quotas(found: Mapping[str, Any]) -> list[Table]:
    rows = tuple(
        (one["quota"], one["group"], one["rows"], one["kept"], one["labels"])
        for one in found.get("quotas", ())
    )
    columns = ("quota", "group", "prompts", "kept", "labels")
    return [Table(title="Quotas, the largest groups", columns=columns, rows=rows)] if rows else []


def _groups(found: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for example in found["examples"]:
        groups.setdefault(example["group"], []).append(example)
    return groups


def _examples(title: str, examples: Sequence[Mapping[str, Any]]) -> Table:
    known = [end for example in examples for end in ENDS if example.get(end) is not None]
    ends = [end for end in ENDS if end in known]
    rows = tuple(
        (
            shorten(example["prompt"], 160),
            *(shorten(example.get(end) or "(says nothing)", 160) for end in ends),
            ", ".join(number(value, 3) for value in example.get("rewards") or ()),
            example["score"],
            example["reason"],
        )
        for example in examples
    )
    columns = ("prompt", *(f"{end} answer" for end in ends), "rewards", "score", "reason")
    return Table(title=title, columns=columns, rows=rows)


def _overlap(found: Mapping[str, Any]) -> list[Heatmap]:
    rules = tuple(found.get("rules", ()))
    overlap = found.get("overlap", ())
    if len(rules) < 2 or not overlap:
        return []
    chance = found["kept"] / found["total"]
    return [
        Heatmap(
            title="What the rules agree on",
            rows=rules,
            columns=tuple(rule.split("(")[0] for rule in rules),  # no two have one name
            values=tuple(tuple(row) for row in overlap),
            note=(
                "Of the prompts that the rule of the row keeps, the share that the rule of the "
                f"column keeps by the same cut. Rules that know nothing of each other: {chance:.2f}"
            ),
        )
    ]


def _note(found: Mapping[str, Any]) -> str:
    drawn, passed = len(found["values"]), found["total"]
    if drawn == passed:
        return ""
    return f"{drawn} evenly spaced scores stand for those of all prompts that were scored."


def _spent(found: Mapping[str, Any]) -> str:
    if not found.get("budget"):
        return ""
    return f"{found['labels']} of {found['budget']} labels are spent, {PRICED[found['price']]}."
