"""The findings as `diagnosis.json`: the verdict, the numbers behind it, and pages for a report.

The sections have the form that `prefloop.report.section_json` reads.
"""

from collections.abc import Mapping
from typing import Any

from prefloop.diagnostics.displacement import Change, Mass
from prefloop.diagnostics.pages import Section, cell, further, further_numbers, table
from prefloop.diagnostics.verdict import Findings, verdict
from prefloop.evaluation import Calibration


def diagnosis(found: Findings) -> dict[str, Any]:
    """What diagnosis.json holds: {"verdict", "numbers", "sections"}; plain JSON."""
    sections = [
        _displacement(found),
        _mass(found),
        _ranking(found),
        *_people(found),
        *_bins(found),
        *_gradients(found),
        *further(found),
        *_text(found),
    ]
    return {"verdict": list(verdict(found)), "numbers": numbers(found), "sections": sections}


def numbers(found: Findings) -> dict[str, float | int | None]:
    """The numbers that a script would want, flat; units in the names."""
    chosen, rejected = found.displacement.chosen, found.displacement.rejected
    flat: dict[str, float | int | None] = {
        "chosen fell, share": chosen.fell.value,
        "chosen change, mean nats": chosen.mean.value,
        "chosen change, median nats": chosen.median,
        "chosen change, nats a token": chosen.token.value,
        "rejected fell, share": rejected.fell.value,
        "rejected change, mean nats": rejected.mean.value,
        "both fell, share": found.displacement.both_fell.value,
        "accuracy of the implicit reward, share": found.ranking.implicit.accuracy.value,
        "accuracy of the policy, share": found.ranking.policy.accuracy.value,
        "accuracy of the reference, share": found.ranking.reference.accuracy.value,
        "expected calibration error": found.calibration.ece,
        "overconfidence": found.calibration.overconfidence,
        "Brier score": found.calibration.brier,
        "negative log-likelihood, nats": found.calibration.nll,
        "comparisons without an order": found.displacement.tied,
    }
    if found.mass.other is not None:
        flat["other responses, change of log mass, nats"] = found.mass.other.log_change.value
    if found.first_order is not None:
        flat["pairs whose own step lowers the chosen, share"] = found.first_order.falls.value
    if found.information is not None:
        flat["DID entropy, nats"] = found.information.entropy.value
        flat["DID entropy, effective samples"] = found.information.effective_samples.value
        flat["DID entropy, log policy / reference of its samples, nats"] = (
            found.information.divergence.value
        )
    return flat | further_numbers(found)


def _displacement(found: Findings) -> Section:
    parts: dict[str, Change] = {
        "chosen": found.displacement.chosen,
        "rejected": found.displacement.rejected,
    }
    if found.displacement.other is not None:
        parts["other"] = found.displacement.other
    rows = [
        [
            name,
            cell(part.fell, "share"),
            cell(part.mean, "nats"),
            part.median,
            cell(part.token, "nats"),
            part.responses,
        ]
        for name, part in parts.items()
    ]
    columns = ["responses", "less likely", "mean change", "median, nats", "a token", "n"]
    return {
        "title": "Displacement",
        "paragraphs": [
            "Change of log-probability from the reference to the policy, on the comparisons that "
            "were diagnosed. Training on margins alone does not keep the chosen responses likely."
        ],
        "tables": [table("Changes", columns, rows)],
        "histograms": [
            {
                "title": f"Change of the {name} responses",
                "x_label": "log policy / reference, nats",
                "values": list(part.values),
                "cut": 0.0,
            }
            for name, part in parts.items()
        ],
    }


def _mass(found: Findings) -> Section:
    groups: dict[str, Mass | None] = {
        "chosen": found.mass.chosen,
        "rejected": found.mass.rejected,
        "other": found.mass.other,
    }
    rows = [
        [
            name,
            cell(part.before, "share"),
            cell(part.after, "share"),
            cell(part.log_change, "nats"),
        ]
        for name, part in groups.items()
        if part is not None
    ]
    columns = ["responses", "share before", "share after", "change of log probability"]
    return {
        "title": "Where probability went",
        "paragraphs": [
            "Shares are of the scored responses of a comparison; the change is absolute. Other: "
            "responses that were scored and that nobody judged."
        ],
        "tables": [table("", columns, rows)],
    }


def _ranking(found: Findings) -> Section:
    who = {
        "implicit reward": found.ranking.implicit,
        "policy": found.ranking.policy,
        "policy, per token": found.ranking.policy_token,
        "reference": found.ranking.reference,
        "reference, per token": found.ranking.reference_token,
        "DPO's optimum for the true reward": found.ranking.idealized,
    }
    rows = [
        [name, cell(part.accuracy, "share"), part.correct, part.tied, part.wrong]
        for name, part in who.items()
        if part is not None
    ]
    columns = ["ordered by", "as labelled", "right", "tied", "wrong"]
    return {
        "title": "Ranking and calibration",
        "tables": [table("Pairs ordered as labelled", columns, rows)],
        "lines": [_reliability(found.calibration)],
    }


def _reliability(found: Calibration) -> Mapping[str, Any]:
    x = [part.confidence for part in found.bins]
    return {
        "title": "Reliability of the Bradley-Terry probabilities",
        "x_label": "confidence",
        "y_label": "share right",
        "series": [
            {"name": "measured", "x": x, "y": [part.accuracy for part in found.bins]},
            {"name": "calibrated", "x": [0.5, 1.0], "y": [0.5, 1.0]},
        ],
        "note": f"Expected calibration error {found.ece:.3f}, Brier score {found.brier:.3f}.",
    }


def _people(found: Findings) -> list[Section]:
    if found.annotators is None:
        return []
    rows = [
        [name, cell(part, "nats"), part.values] for name, part in found.annotators.groups.items()
    ]
    return [
        {
            "title": "Margins by annotator",
            "tables": [table("", ["annotator", "mean margin", "pairs"], rows)],
        }
    ]


def _bins(found: Findings) -> list[Section]:
    if not found.bins:
        return []
    rows = [
        [
            f"{part.low:.4g} to {part.high:.4g}",
            cell(part.margin, "nats"),
            cell(part.accuracy.accuracy, "share"),
            part.margin.values,
        ]
        for part in found.bins
    ]
    columns = [found.score, "mean margin", "as labelled", "pairs"]
    return [{"title": f"Margins by {found.score}", "tables": [table("", columns, rows)]}]


def _gradients(found: Findings) -> list[Section]:
    if found.first_order is None:
        return []
    return [
        {
            "title": "First step of each pair",
            "paragraphs": [
                "Overlap <g_w, g_l> / |g_w|^2 of the gradients of chosen and rejected: above 1, a "
                "step on the pair alone lowers its chosen response."
            ],
            "histograms": [
                {
                    "title": "Overlap of gradients",
                    "x_label": "<g_w, g_l> / |g_w|^2",
                    "values": list(found.first_order.overlap),
                    "cut": 1.0,
                }
            ],
        }
    ]


def _text(found: Findings) -> list[Section]:
    sides = {"reference": found.before, "policy": found.after}
    shown = {name: part for name, part in sides.items() if part is not None}
    if not shown:
        return []
    rows = [
        [
            name,
            cell(part.length, "units"),
            cell(part.repeated, "share"),
            cell(part.looping, "share"),
            part.distinct,
            None if part.unfinished is None else cell(part.unfinished, "share"),
        ]
        for name, part in shown.items()
    ]
    n = next(iter(shown.values())).n
    columns = [
        "answers of",
        "length",
        f"repeated {n}-grams",
        "in a loop",
        f"distinct {n}-grams, share",
        "cut at the limit",
    ]
    return [{"title": "Sampled text", "tables": [table("", columns, rows)]}]
