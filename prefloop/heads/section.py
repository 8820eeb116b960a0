"""The report's page of a comparison of heads."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from prefloop.heads.comparing import Compared, Told


def heads_section(compared: Mapping[str, Compared], types: Mapping[str, Told]) -> dict[str, Any]:
    """Held-out likelihood of each head, and what its types differ in; see report/section_json."""
    rows = [
        [
            name,
            _cell(asdict(one.loglik), "nats"),
            _cell(asdict(one.gain), "nats"),
            _cell(asdict(one.accuracy), "share"),
            one.parameters,
            one.bic,
        ]
        for name, one in compared.items()
    ]
    columns = ["head", "held-out vote", "gain", "accuracy", "parameters", "BIC"]
    return {
        "title": "Which model of disagreement predicts votes",
        "paragraphs": [
            "Log-likelihood of held-out votes, each by a head that was fitted without them; a coin "
            "is -0.693 nats. Intervals are over annotators. The gain is over the first head."
        ],
        "tables": [
            {"title": "Heads", "columns": columns, "rows": rows},
            *(_types(name, one) for name, one in types.items()),
        ],
    }


def _types(name: str, one: Told) -> dict[str, Any]:
    columns = ["type", "share", "votes", "longer answer won", "weight of length", "sharpness"]
    given = (one.shares, one.votes, one.longer_won, one.length_weight, one.sharpness)
    rows = [[str(number), *values] for number, values in enumerate(zip(*given, strict=True), 1)]
    alike = "" if one.stability is None else f"; between seeds {one.stability:.2f} (Rand index)"
    title = f"What the types of {name} differ in{alike}"
    return {"title": title, "columns": columns, "rows": rows}


def _cell(estimate: Mapping[str, Any], unit: str) -> dict[str, Any]:
    return {name: estimate[name] for name in ("value", "low", "high")} | {"unit": unit}
