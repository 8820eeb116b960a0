"""The report's page of a reward model: accuracy, calibration, length bias, doubtful labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefloop.reward_training.measures import Measured
from prefloop.reward_training.members import Doubt
from prefloop.types import Comparison

SHOWN = 5
"""Doubtful labels that the page shows."""


def section(
    measured: Sequence[Measured], doubted: Sequence[tuple[Comparison, Doubt]]
) -> Mapping[str, Any]:
    """What reward.section.json holds; `doubted` are labels, the most doubtful first."""
    members = len(measured[0].members)
    paragraphs = [
        f"{members} reward model{'s' if members > 1 else ''}. Intervals are Wilson's over pairs; "
        "those over prompts are in the results. Expected calibration error (ECE) is the mean "
        "distance between confidence and accuracy."
    ]
    if doubted:
        likely = sum(doubt.flipped > 0.5 for _, doubt in doubted)
        paragraphs.append(
            f"{likely} of {len(doubted)} labels are more likely to be contradicted than repeated, "
            "say the members that did not see them (flips.jsonl)."
        )
    return {
        "title": "Reward model",
        "paragraphs": paragraphs,
        "tables": [_table(measured), _lengths(measured)],
        "lines": [_reliability(measured)],
        "histograms": [_histogram(doubted)] if doubted else [],
        "answers": [_answers(row, doubt) for row, doubt in doubted[:SHOWN]],
    }


def _table(measured: Sequence[Measured]) -> dict[str, Any]:
    rows = [
        [
            one.name,
            _cell(one.accuracy),
            _shares(one.members),
            one.calibration.ece,
            one.calibration.nll,
            one.calibration.overconfidence,
        ]
        for one in measured
    ]
    columns = ["data", "accuracy", "of each member", "ECE", "loss, nats", "overconfidence"]
    return {"title": "Accuracy and calibration", "columns": columns, "rows": rows}


def _lengths(measured: Sequence[Measured]) -> dict[str, Any]:
    rows = [
        [
            one.name,
            one.length.correlation,
            _cell(one.length.people),
            _cell(one.length.model),
            _cell(one.length.longer),
            _cell(one.length.shorter),
        ]
        for one in measured
        if one.length is not None
    ]
    columns = [
        "data",
        "correlation of margin and words",
        "longer chosen by people",
        "by the reward",
        "accuracy, longer chosen",
        "accuracy, shorter chosen",
    ]
    return {"title": "Length bias", "columns": columns, "rows": rows}


def _reliability(measured: Sequence[Measured]) -> dict[str, Any]:
    series = [
        {
            "name": one.name,
            "x": [cell.confidence for cell in one.calibration.bins],
            "y": [cell.accuracy for cell in one.calibration.bins],
        }
        for one in measured
    ]
    series.append({"name": "perfect", "x": [0.5, 1.0], "y": [0.5, 1.0]})
    return {
        "title": "Reliability",
        "x_label": "confidence",
        "y_label": "share of pairs that agree",
        "series": series,
    }


def _histogram(doubted: Sequence[tuple[Comparison, Doubt]]) -> dict[str, Any]:
    return {
        "title": "How doubtful the labels are",
        "x_label": "probability that another judgement would go the other way",
        "values": [doubt.flipped for _, doubt in doubted],
        "cut": 0.5,
    }


def _answers(row: Comparison, doubt: Doubt) -> dict[str, Any]:
    rank = row.rank or (None,) * len(row.responses)
    prompt = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
    texts = [
        {"name": f"labelled rank {place}", "text": text}
        for place, text in zip(rank, row.responses, strict=True)
    ]
    heading = f"{row.id}: probability {doubt.flipped:.2f}"
    return {"heading": heading, "prompt": prompt, "texts": texts}


def _cell(estimate: Any) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "unit": "share",
    }


def _shares(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:.1f} %" for value in values)
