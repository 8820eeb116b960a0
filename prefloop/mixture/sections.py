"""Pages of the report: who is of which type, and how EM got there."""

from typing import Any

from prefloop import em
from prefloop.mixture.rounds import Fitted
from prefloop.mixture.votes import Votes

SHOWN = 60  # annotators of the heat map


def mixture_section(fitted: Fitted, votes: Votes) -> dict[str, Any]:
    """Responsibilities, shares over rounds, likelihood over rounds; see report/section_json."""
    types = [f"type {number}" for number in range(1, fitted.gamma.shape[-1] + 1)]
    rounds = [done.number + 1 for done in fitted.history]
    loglik = [float(done.belief.evidence.sum()) for done in fitted.history]
    after = [em.type_shares(done.belief.responsibilities).tolist() for done in fitted.history]
    shares = [
        {"name": name, "x": rounds, "y": [share[index] for share in after]}
        for index, name in enumerate(types)
    ]
    lines = [
        {
            "title": "Share of each type",
            "x_label": "round",
            "y_label": "share of annotators",
            "series": shares,
        },
        {
            "title": "Log-likelihood of the judgements",
            "x_label": "round",
            "y_label": "nats",
            "series": [{"name": "all annotators", "x": rounds, "y": loglik}],
        },
    ]
    return {
        "title": "Annotator types",
        "paragraphs": [_lead(fitted, votes)],
        "tables": [_table(fitted, types)],
        "lines": lines if len(rounds) > 1 else [],
        "heatmaps": [_heatmap(fitted, votes, types)],
    }


def _lead(fitted: Fitted, votes: Votes) -> str:
    died = "".join(f" Type {number} died: nobody is left in it." for number in fitted.dead)
    count = len(fitted.history)
    rounds = "one round of EM" if count == 1 else f"{count} rounds of EM"
    return (
        f"{len(votes.names)} annotators gave {len(votes.rows)} judgements; {rounds} put each into "
        "types by how likely their judgements are under each type's policy. Log-likelihood of the "
        f"{fitted.scored} judgements that the last round scored: {fitted.loglik:.1f} nats, "
        f"{fitted.loglik / max(1, fitted.scored):.3f} each.{died}"
    )


def _table(fitted: Fitted, types: list[str]) -> dict[str, Any]:
    likeliest = fitted.gamma.argmax(-1)
    certain = fitted.gamma.max(-1).values > 0.9
    rows = [
        [
            name,
            float(fitted.shares[index]),
            int((likeliest == index).sum()),
            int(((likeliest == index) & certain).sum()),
        ]
        for index, name in enumerate(types)
    ]
    columns = ["type", "share", "annotators", "of them with probability above 0.9"]
    return {"title": "Types", "columns": columns, "rows": rows}


def _heatmap(fitted: Fitted, votes: Votes, types: list[str]) -> dict[str, Any]:
    """Annotators in order of their likeliest type; at most `SHOWN`, evenly spaced."""
    gamma = fitted.gamma
    likeliest = gamma.argmax(-1).tolist()
    order = sorted(
        range(len(votes.names)),
        key=lambda index: (likeliest[index], -float(gamma[index].max()), index),
    )
    step = max(1, -(-len(order) // SHOWN))
    shown = order[::step]
    note = "" if step == 1 else f"Every {step}th of {len(order)} annotators."
    return {
        "title": "Probability of each type, by annotator",
        "rows": [votes.names[index] for index in shown],
        "columns": types,
        "values": [[round(value, 3) for value in gamma[index].tolist()] for index in shown],
        "note": note,
    }
