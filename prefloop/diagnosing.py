"""What training did to a policy, measured on comparisons it was not trained on.

Scores policy and reference once, asks every instrument, writes `diagnosis.json`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prefloop.comparing import both_logps
from prefloop.diagnostics.displacement import displacement, mass_shift
from prefloop.diagnostics.gradients import first_order
from prefloop.diagnostics.ranking import (
    margin_calibration,
    margins,
    margins_by_annotator,
    margins_by_score,
    ranking,
)
from prefloop.diagnostics.summary import diagnosis
from prefloop.diagnostics.text import text_statistics
from prefloop.diagnostics.verdict import Findings
from prefloop.policies import Policy
from prefloop.policies.policy import evaluating
from prefloop.runs import read_jsonl, write_json
from prefloop.selection import preference_variance
from prefloop.types import Comparison, Tokenized, judgement

GRADIENTS = 32
"""Comparisons whose gradients are taken: two backward passes each."""


def diagnose(
    policy: Policy, comparisons: Sequence[Comparison], beta: float, run: Path, out: Path
) -> dict[str, Any]:
    """What diagnosis.json holds: sentences, numbers, sections.

    Args:
        policy: trained; its reference is what it started from.
        comparisons: judged, and not trained on.
        beta: of the training, for the size of margins.
        run: its samples.jsonl, where there is one, says how the answers changed.
        out: folder for diagnosis.json.
    """
    rows, trained, base, _ = both_logps(policy, comparisons)
    judged = judgement(rows)
    margin, place = margins(trained, base, judged.rank, beta)
    annotators = [row.annotator for row in rows]
    before, after = _texts(run / "samples.jsonl")
    scored = judged.scores.isfinite().sum(-1) > 1
    found = Findings(
        displacement=displacement(trained, base, judged.rank),
        mass=mass_shift(trained, base, judged.rank),
        ranking=ranking(trained, base, judged.rank, beta=beta),
        calibration=margin_calibration(trained, base, judged.rank, beta),
        first_order=_gradients(policy, rows),
        before=before,
        after=after,
        annotators=margins_by_annotator(margin, place, annotators) if any(annotators) else None,
        bins=margins_by_score(margin, place, _pvar(judged.scores)) if scored.all() else (),
        score="preference variance" if scored.all() else "",
    )
    held = diagnosis(found)
    write_json(out / "diagnosis.json", held)
    return held


def _gradients(policy: Policy, rows: Sequence[Tokenized]) -> Any:
    """The first-order test, on the adapter; none where the policy has no adapter."""
    if not policy.adapter:
        return None
    ordered = [row for row in rows if len({rank for rank in row.rank or () if rank}) > 1]
    with evaluating(policy.model):
        return first_order(policy.scorer(), ordered[:GRADIENTS])


def _pvar(scores: torch.Tensor) -> torch.Tensor:
    return preference_variance(scores, scores.isfinite())


def _texts(path: Path) -> tuple[Any, Any]:
    """Text statistics of sampled answers before and after, in words."""
    if not path.exists():
        return None, None
    rows = list(read_jsonl(path))
    before, after = ([row[side].split() for row in rows] for side in ("before", "after"))
    return text_statistics(before), text_statistics(after)
