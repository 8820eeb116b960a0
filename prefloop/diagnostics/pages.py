"""Report sections of the findings that need more than the comparisons themselves.

Other responses, CHES, the gradient bound, differential information; `summary` has the rest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from prefloop.diagnostics.verdict import Findings
from prefloop.intervals import Estimate

Section = dict[str, Any]


def further(found: Findings) -> list[Section]:
    """The sections of what was measured."""
    return [
        *_others(found),
        *_alike(found),
        *_bound(found),
        *_teaching(found),
        *_information(found),
    ]


def further_numbers(found: Findings) -> dict[str, float | int | None]:
    """The flat numbers of what was measured."""
    flat: dict[str, float | int | None] = {}
    for name, part in found.others.items():
        flat[f"{name}, mean change, nats"] = part.mean.value
    if found.alike is not None:
        flat["CHES, mean"] = found.alike.score.value
        flat["CHES per token against change of chosen, rank correlation"] = found.alike.follows
    if found.bound is not None:
        flat["gradient norm over its PVar bound, mean"] = _tightness(found.bound)
    if found.chosen is not None:
        flat["log q of the chosen above uniform, nats"] = found.chosen.value
    if found.taught is not None:
        law = found.taught.law
        flat["power law, beta of the data"] = law.beta
        flat["power law, pairs that admit an exponent, share"] = law.matching
        flat["power law, spread of log beta"] = law.spread
        flat["power law, pairs with ordered margins, share"] = found.taught.ordered
    if found.sampler is not None:
        flat["optimal rejected sampler, weight of the rejected"] = found.sampler.rejected.value
        flat["optimal rejected sampler, weight if drawn evenly"] = found.sampler.even
    if found.information is not None:
        for at in found.information.matched:
            flat[f"DID entropy at {at.size:g} nats of update"] = at.entropy.value
            flat[f"DID entropy at {at.size:g} nats, effective samples"] = at.effective_samples.value
    return flat


def cell(estimate: Estimate, unit: str) -> Mapping[str, Any]:
    """An estimate as a cell that a report shows with its interval."""
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "unit": unit}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Mapping[str, Any]:
    """A table as a report reads it."""
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}


def _others(found: Findings) -> list[Section]:
    if not found.others:
        return []
    rows = [
        [name, cell(part.fell, "share"), cell(part.mean, "nats"), part.median, part.responses]
        for name, part in found.others.items()
    ]
    columns = ["responses", "less likely", "mean change", "median, nats", "n"]
    return [
        {
            "title": "Responses that are in no comparison",
            "paragraphs": [
                "Where both chosen and rejected lose probability, it went somewhere else: here are "
                "answers of the reference drawn anew, and answers to other prompts."
            ],
            "tables": [table("", columns, rows)],
        }
    ]


def _alike(found: Findings) -> list[Section]:
    if found.alike is None:
        return []
    values = list(found.alike.values)
    return [
        {
            "title": "How alike the pairs are",
            "paragraphs": [
                "CHES per token under the model before training: the higher, the more alike chosen "
                "and rejected are for it. Its rank correlation with the change of the chosen is "
                f"{found.alike.follows:+.2f}. Most alike: {', '.join(found.alike.highest)}."
            ],
            "histograms": [{"title": "CHES per token", "x_label": "CHES", "values": values}],
        }
    ]


def _bound(found: Findings) -> list[Section]:
    if found.bound is None:
        return []
    points = [
        {"name": f"prompt {at + 1}", "x": bound, "y": norm}
        for at, (norm, bound) in enumerate(zip(found.bound.norm, found.bound.bound, strict=True))
    ]
    return [
        {
            "title": "Gradient and preference variance",
            "paragraphs": [
                "Norm of the expected DPO gradient of each prompt, on the trained parameters, "
                "against beta sqrt(PVar) sqrt(mean |s_i - s_j|^2), which it cannot exceed; on "
                f"average it is {100 * (_tightness(found.bound) or 0):.0f} % of it."
            ],
            "scatters": [
                {
                    "title": "Gradient norm against its bound",
                    "x_label": "bound",
                    "y_label": "norm",
                    "points": points,
                }
            ],
        }
    ]


def _tightness(bound: Any) -> float | None:
    pairs = [norm / most for norm, most in zip(bound.norm, bound.bound, strict=True) if most > 0]
    return sum(pairs) / len(pairs) if pairs else None


def _teaching(found: Findings) -> list[Section]:
    rows: list[list[Any]] = []
    if found.taught is not None:
        law = found.taught.law
        rows += [
            [f"beta of the data, by the {found.taught.source}", law.beta],
            ["beta of training", found.beta],
            ["pairs that admit an exponent", {"value": law.matching, "unit": "share"}],
            ["spread of log beta over them (median absolute deviation)", law.spread],
            ["pairs with m_policy > m_ref > m_rejected", _share(found.taught.ordered)],
        ]
    if found.sampler is not None:
        rows += [
            ["optimal rejected sampler: weight of the rejected", cell(found.sampler.rejected, "")],
            ["the same, drawn evenly", found.sampler.even],
            ["effective share of the responses", cell(found.sampler.effective, "share")],
        ]
    if found.chosen is not None:
        rows.append(["log q of the chosen above uniform", cell(found.chosen, "nats")])
    if not rows:
        return []
    return [
        {
            "title": "What the data teach",
            "paragraphs": [
                "Differential information: one exponent beta for all pairs, where the data follow "
                "a power law, and the weights (reference / policy)^beta that would draw the best "
                "rejected responses out of these. Weights of each comparison are in "
                "rejected_weights.jsonl."
            ],
            "tables": [table("", ["quantity", "value"], rows)],
        }
    ]


def _share(value: float) -> Mapping[str, Any]:
    return {"value": value, "unit": "share"}


def _information(found: Findings) -> list[Section]:
    if found.information is None:
        return []
    rows = [
        [at.size, cell(at.entropy, "nats"), cell(at.effective_samples, ""), at.tilt]
        for at in found.information.matched
    ]
    rows.append(
        [
            "as it is",
            cell(found.information.entropy, "nats"),
            cell(found.information.effective_samples, ""),
            1.0,
        ]
    )
    columns = ["KL(reference || policy), nats", "DID entropy", "effective samples", "tilt"]
    return [
        {
            "title": "DID entropy",
            "paragraphs": [
                f"From {found.information.samples} answers of the reference a prompt. Entropies of "
                "two runs say something at equal size of the update only: the update is shrunk "
                "along (policy / reference)^tilt. With few effective samples an entropy says "
                "nothing."
            ],
            "tables": [table("", columns, rows)],
        }
    ]
