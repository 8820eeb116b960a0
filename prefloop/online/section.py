"""The report's page of an online run."""

from collections.abc import Mapping, Sequence
from typing import Any


def section(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What `online.section.json` holds: reward against KL, curves over rounds, a table."""
    first = rows[0]
    frontier = [
        {
            "name": "reference",
            "x": 0.0,
            "y": first["reference_reward"],
            "y_error": first["reference_reward_se"],
        },
        *(
            {
                "name": f"round {row['round']}",
                "x": row["kl"],
                "y": row["reward"],
                "x_error": row["kl_se"],
                "y_error": row["reward_se"],
            }
            for row in rows
        ),
    ]
    return {
        "title": "Online rounds",
        "paragraphs": [
            f"{len(rows)} rounds of sample, score, select, train. Rewards, win rates and KL are of "
            "the policy after each round, on held-out prompts; errors are standard errors over "
            "prompts."
        ],
        "scatters": [
            {
                "title": "Reward against KL",
                "x_label": "KL(policy || reference), nats a response",
                "y_label": "mean reward",
                "points": frontier,
            }
        ],
        "lines": [
            _line("Reward after each round", "mean reward", rows, "reward"),
            _line("KL after each round", "nats a response", rows, "kl"),
        ],
        "tables": [_table(rows)],
    }


def _line(title: str, unit: str, rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    values, errors = [row[name] for row in rows], [row[f"{name}_se"] for row in rows]
    bands = list(zip(values, errors, strict=True))
    return {
        "title": title,
        "x_label": "round",
        "y_label": unit,
        "series": [
            {
                "name": f"{name}, one standard error to each side",
                "x": [row["round"] for row in rows],
                "y": values,
                "low": [value - error for value, error in bands],
                "high": [value + error for value, error in bands],
            }
        ],
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
        "rows": [[row.get(key) for key in columns.values()] for row in rows],
    }
