"""A page of the report: how every form of a mixture serves the worst-off and the average person."""

from collections.abc import Mapping
from typing import Any

KINDS = {
    "accuracy": ("Held-out votes ordered as the person did", "share"),
    "win_rate": ("Answers that beat the reference's, by the types' rewards", "share"),
    "regret": ("What a person loses in the types' rewards against their own policy", "reward"),
}
"""What is measured -> the title of its table, and its unit."""


def annotators_section(found: Mapping[str, Any]) -> dict[str, Any]:
    """What annotators.section.json holds, from what `evaluate --by annotator` found."""
    return {
        "title": "By annotator",
        "paragraphs": [
            f"{found['annotators']} annotators. The worst is the one person whom a form serves "
            "least; Gini is 0 where it serves all alike. Win rates and regrets are in the rewards "
            "of the types that were found; only held-out votes are the people's own."
        ],
        "tables": [
            _table(found["forms"], kind)
            for kind in KINDS
            if any(kind in one for one in found["forms"].values())
        ],
    }


def _table(forms: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, Any]:
    title, unit = KINDS[kind]
    return {
        "title": title,
        "columns": ["form", f"worst ({unit})", "who", f"average ({unit})", "Gini"],
        "rows": [
            [
                name,
                one[kind]["worst"],
                one[kind]["worst_group"],
                one[kind]["average"],
                one[kind]["gini"],
            ]
            for name, one in forms.items()
            if kind in one
        ],
    }
