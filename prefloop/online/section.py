"""The report's page of an online run."""

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
SHOWN = 4  # held-out prompts with what the first and the last policy say


def section(rows: Rows, samples: Rows = ()) -> Mapping[str, Any]:
    """What `online.section.json` holds: reward against KL, curves over rounds, a table, answers.

    Args:
        rows: of rounds.jsonl.
        samples: of the last round's samples.jsonl.
    """
    return {
        "title": "Online rounds",
        "paragraphs": [
            f"{len(rows)} rounds of sample, score, select, train. {_minimised(rows)}"
            "Rewards, win rates and KL are of the policy after each round, on held-out prompts; "
            "bands and bars are one standard "
            "error over prompts to each side, those of win rates 95 % intervals. The change of "
            "training responses is the mean over the last epoch of each round, against the "
            "reference of the objective.",
            "Each round's folder has its own page, with the training curves and the evaluation: "
            "prefloop report RUN/round-1 RUN/round-2 ...",
        ],
        "scatters": [_frontier(rows)],
        "lines": [
            _lines("Reward after each round", "mean reward", [_reference(rows), _policy(rows)]),
            _lines("KL after each round", "nats a response", [_banded(rows, "policy", "kl")]),
            _lines("Win rate against the reference", "share of prompts", [_wins(rows)]),
            _lines(
                "Change of training responses",
                "nats a response",
                [
                    _series(rows, "chosen", "displacement/chosen"),
                    _series(rows, "rejected", "displacement/rejected"),
                ],
            ),
        ],
        "tables": [_table(rows)],
        "answers": [_answers(row, len(rows)) for row in samples[:SHOWN]],
    }


def _minimised(rows: Rows) -> str:
    """The objective, of each round where they differ."""
    told = [row["objective"] for row in rows]
    if len(set(told)) > 1:
        told = [f"{one} in round {row['round']}" for one, row in zip(told, rows, strict=True)]
        return f"Minimised: {', '.join(told)}. "
    return f"Minimised: {told[0]}. "


def _frontier(rows: Rows) -> dict[str, Any]:
    """Reward against KL, the reference at KL 0."""
    first = rows[0]
    start = {
        "name": "reference",
        "x": 0.0,
        "y": first["reference_reward"],
        "y_error": first["reference_reward_se"],
        "hollow": True,
    }
    after = [
        {
            "name": f"round {row['round']}",
            "x": row["kl"],
            "y": row["reward"],
            "x_error": row["kl_se"],
            "y_error": row["reward_se"],
        }
        for row in rows
    ]
    return {
        "title": "Reward against KL",
        "x_label": "KL(policy || reference), nats a response",
        "y_label": "mean reward",
        "points": [start, *after],
    }


def _lines(title: str, unit: str, series: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"title": title, "x_label": "round", "y_label": unit, "series": series}


def _series(rows: Rows, name: str, key: str) -> dict[str, Any]:
    numbers = [row["round"] for row in rows]
    return {"name": name, "x": numbers, "y": [row.get(key) for row in rows]}


def _banded(rows: Rows, name: str, key: str) -> dict[str, Any]:
    """A series with a band of one standard error to each side."""
    bands = [(row[key], row[f"{key}_se"]) for row in rows]
    return _series(rows, name, key) | {
        "low": [value - error for value, error in bands],
        "high": [value + error for value, error in bands],
    }


def _policy(rows: Rows) -> dict[str, Any]:
    return _banded(rows, "policy", "reward")


def _reference(rows: Rows) -> dict[str, Any]:
    return _series(rows, "reference", "reference_reward")


def _wins(rows: Rows) -> dict[str, Any]:
    return _series(rows, "policy", "win_rate") | {
        side: [row[f"win_rate_{side}"] for row in rows] for side in ("low", "high")
    }


def _table(rows: Rows) -> dict[str, Any]:
    columns = {
        "round": "round",
        "pairs from": "source",
        "answers": "answers",
        "labels": "labels",
        "reward": "reward",
        "KL": "kl",
        "win rate": "win_rate",
        "chosen fell": "displacement/chosen_fell",
    }
    return {
        "title": "Rounds",
        "columns": list(columns),
        "rows": [[_cell(row, key) for key in columns.values()] for row in rows],
    }


def _cell(row: Mapping[str, Any], key: str) -> Any:
    """Text or a number; a number with its interval where the row has one."""
    value = row.get(key)
    if key == "win_rate":
        ends = {side: row[f"win_rate_{side}"] for side in ("low", "high")}
        return {"value": value, **ends, "unit": "share"}
    if key == "displacement/chosen_fell" and value is not None:
        return {"value": value, "low": None, "high": None, "unit": "share"}
    return value


def _answers(sample: Mapping[str, Any], last: int) -> dict[str, Any]:
    names = {"before": "reference", "after": f"after round {last}"}
    prompt = sample["prompt"]
    return {
        "prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"],
        "texts": [
            {"name": name, "text": sample[side], "reward": sample[f"reward_{side}"]}
            for side, name in names.items()
        ],
    }
