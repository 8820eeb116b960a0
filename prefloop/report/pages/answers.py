"""Sample answers before and after training, side by side."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prefloop.report.run import Run
from prefloop.report.section import Answers, Section, Text

SHOWN = 12
EACH = 4


def answers(runs: Sequence[Run]) -> list[Section]:
    """A few prompts of each run: what rose most, what fell most, and the middle."""
    found = []
    for run in runs:
        rows = list(run.rows("samples.jsonl"))
        if not rows:
            continue
        chosen = _chosen(rows)
        lead = (
            "" if len(chosen) == len(rows) else f"{len(chosen)} of {len(rows)} prompts are shown."
        )
        part = Section(
            title="Answers before and after",
            lead=lead,
            answers=tuple(_side_by_side(rows[place], why) for place, why in chosen),
        )
        found.append(part.under(run.name, runs))
    return found


def prompt_text(prompt: Any) -> str:
    """A prompt as text: plain, or the chat messages with their roles."""
    if isinstance(prompt, list):
        return "\n".join(
            f"{message.get('role', '?')}: {message.get('content', '')}"
            for message in prompt
            if isinstance(message, Mapping)
        )
    return "" if prompt is None else str(prompt)


def _chosen(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Indices of the rows to show, with why; all of few rows, in the order of the file."""
    if len(rows) <= SHOWN:
        return [(place, "") for place in range(len(rows))]
    gains = [_gain(row) for row in rows]
    known = sorted(
        (place for place in range(len(rows)) if math.isfinite(gains[place])),
        key=lambda place: (-gains[place], place),
    )
    if len(known) < SHOWN:
        return [(place, "") for place in range(SHOWN)]
    middle = (len(known) - EACH) // 2
    return [
        *((place, "largest gain") for place in known[:EACH]),
        *((place, "typical") for place in known[middle : middle + EACH]),
        *((place, "largest loss") for place in reversed(known[-EACH:])),
    ]


def _gain(row: Mapping[str, Any]) -> float:
    before, after = _reward(row, "reward_before"), _reward(row, "reward_after")
    return math.nan if before is None or after is None else after - before


def _reward(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else None


def _side_by_side(row: Mapping[str, Any], why: str) -> Answers:
    return Answers(
        prompt=prompt_text(row.get("prompt")),
        heading=why,
        texts=tuple(
            Text(name=side, text=prompt_text(row.get(side)), reward=_reward(row, f"reward_{side}"))
            for side in ("before", "after")
        ),
    )
