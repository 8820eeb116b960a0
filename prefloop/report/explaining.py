"""What a selection did, as plain text: overlaps, quotas, examples from both ends and the cut."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefloop.report.words import shorten, visible

WIDTH = 300
"""Most characters of a prompt."""


def explain(selection: Mapping[str, Any]) -> str:
    """What other rules say, and the examples of selection.json, for a terminal.

    Texts of models are on one line, and whatever would steer a terminal is made visible.
    """
    lines = _overlaps(selection["rules"], selection["overlap"])
    lines += _quotas(selection["quotas"])
    group = None
    for example in selection["examples"]:
        if example["group"] != group:
            group = example["group"]
            lines += ["", f"{group}:"]
        lines += _example(example)
    return "\n".join(lines)


def _overlaps(rules: Sequence[str], overlap: Sequence[Sequence[float]]) -> list[str]:
    if len(rules) < 2 or not overlap:
        return []
    own, *others = rules
    lines = ["", f"of what {own} keeps, others would keep by the same cut:"]
    return lines + [
        f"  {share:>12.1%}  {rule}" for rule, share in zip(others, overlap[0][1:], strict=True)
    ]


def _quotas(quotas: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["", "quotas, the largest groups:"] if quotas else []
    return lines + [
        f"  {visible(one['quota'])}: {_line(one['group'])}: {one['kept']:,} of {one['rows']:,} "
        f"rows kept, {one['labels']:,} labels"
        for one in quotas
    ]


def _example(example: Mapping[str, Any]) -> list[str]:
    rewards = ", ".join(f"{value:.4g}" for value in example["rewards"] or ())
    measures = ", ".join(
        f"{name} {'unknown' if value is None else format(value, '.4g')}"
        for name, value in example["measures"].items()
    )
    lines = [f"  row {example['row']}: {_line(example['prompt'])}"]
    lines += [
        f"    {end:<8}{_line(example[end]) or '(says nothing)'}"
        for end in ("best", "worst")
        if example.get(end) is not None
    ]
    lines += [f"    rewards {rewards}"] if rewards else []
    lines += [f"    {measures}"] if measures else []
    return [*lines, f"    {visible(example['reason'])}"]


def _line(text: str) -> str:
    return visible(shorten(text, WIDTH)).replace("\t", " ")
