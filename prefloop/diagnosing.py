"""What training did to a policy, measured on comparisons it was not trained on.

Scores policy and reference once, asks every instrument, writes `diagnosis.json` and
`rejected_weights.jsonl`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prefloop.comparing import both_logps, same_prompt
from prefloop.data import with_ranks
from prefloop.diagnostics.alike import Alikeness, alikeness, lengths
from prefloop.diagnostics.displacement import Change, change_of, displacement, mass_shift
from prefloop.diagnostics.gradients import (
    FirstOrder,
    GradientBound,
    first_order,
    gradient_bound,
    inner_products,
)
from prefloop.diagnostics.information import (
    InformationOfSamples,
    information_of_chosen,
    information_of_samples,
)
from prefloop.diagnostics.ranking import (
    margin_calibration,
    margins,
    margins_by_annotator,
    margins_by_score,
    ranking,
)
from prefloop.diagnostics.roles import change
from prefloop.diagnostics.summary import diagnosis
from prefloop.diagnostics.teaching import (
    Taught,
    rejected_sampler,
    taught_by_policies,
    taught_by_scores,
)
from prefloop.diagnostics.text import TextStatistics, text_statistics
from prefloop.diagnostics.verdict import Findings
from prefloop.logps import Scorer, hidden_sums
from prefloop.pairing import with_mismatched
from prefloop.policies import Policy, Sampling
from prefloop.policies.policy import evaluating
from prefloop.policies.sampling import sample
from prefloop.runs import read_jsonl, write_json, write_jsonl
from prefloop.samplers import FromReference
from prefloop.selection import preference_variance
from prefloop.shares import ALONE, Worker
from prefloop.types import Comparison, Judgement, Logps, Tokenized, judgement

GRADIENTS = 32
"""Comparisons whose gradients are taken: a backward pass a response each."""
SAMPLED, FOREIGN = "sampled answers of the reference", "answers to other prompts"
"""Kinds of responses that are in no comparison."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is measured besides the comparisons, and by whom.

    Attributes:
        samples: answers of the reference drawn for each prompt, for DID entropy and for where
            probability went; 0 draws none, 1 is too few for an entropy.
        max_new_tokens: longest of them.
        seed: of the answers.
        rejected: the policy that wrote the rejected responses, or was fitted to them.
        worker: this process among those that share the scoring and the sampling.
    """

    samples: int = 0
    max_new_tokens: int = 64
    seed: int = 0
    rejected: Policy | None = None
    worker: Worker = ALONE


@dataclass(frozen=True)
class _Scored:
    """Held-out rows with what policy and reference say of them."""

    rows: list[Tokenized]
    policy: Logps
    reference: Logps
    judged: Judgement
    prompt: torch.Tensor

    @property
    def known(self) -> bool:
        """Whether every response has a score, and none is alone."""
        there, scored = self.policy.exists, self.judged.scores.isfinite()
        return bool((scored | ~there).all() and (there.sum(-1) > 1).all())


def diagnose(
    policy: Policy,
    comparisons: Sequence[Comparison],
    beta: float,
    run: Path,
    out: Path,
    probe: Probe | None = None,
) -> dict[str, Any]:
    """What diagnosis.json holds: sentences, numbers, sections.

    Args:
        policy: trained; its reference is what it started from.
        comparisons: judged, and not trained on; scores rank where there are no ranks.
        beta: of the training, for the size of margins.
        run: its samples.jsonl, where there is one, says how the answers changed.
        out: folder for diagnosis.json.
        probe: what is measured besides; no samples when None.
    """
    probe = probe or Probe()
    rows, trained, base, _ = both_logps(policy, with_ranks(comparisons), probe.worker)
    held = _Scored(rows, trained, base, judgement(rows), same_prompt(rows))
    found = _with_judgements(_of_comparisons(policy, held, beta, run), held, beta)
    found = _with_probe(found, policy, held, probe)
    told = diagnosis(found)
    if probe.worker.leads:
        write_json(out / "diagnosis.json", told)
        _write_weights(out, rows, found)
    probe.worker.wait()
    return told


def _write_weights(out: Path, rows: Sequence[Tokenized], found: Findings) -> None:
    if found.sampler is None:
        return
    write_jsonl(
        out / "rejected_weights.jsonl",
        (
            {"id": row.id, "weights": list(weights)}
            for row, weights in zip(rows, found.sampler.weights, strict=True)
        ),
    )


def _of_comparisons(policy: Policy, held: _Scored, beta: float, run: Path) -> Findings:
    """What log-probabilities, gradients and hidden states of the comparisons say."""
    rank = held.judged.rank
    pair = held.policy, held.reference
    rewards = held.judged.scores.nan_to_num() if held.known else None
    before, after = _texts(run / "samples.jsonl")
    step, bound = _gradients(policy, held, beta)
    return Findings(
        displacement=displacement(*pair, rank, held.prompt),
        mass=mass_shift(*pair, rank),
        ranking=ranking(*pair, rank, rewards, beta, held.prompt),
        calibration=margin_calibration(*pair, rank, beta),
        first_order=step,
        bound=bound,
        before=before,
        after=after,
        alike=_alike(policy, held),
        chosen=information_of_chosen(*pair, rank),
        sampler=rejected_sampler(*pair, rank, beta),
        beta=beta,
    )


def _with_judgements(found: Findings, held: _Scored, beta: float) -> Findings:
    """Margins by who judged and by preference variance, where the data say so."""
    annotators = [row.annotator for row in held.rows]
    margin, place = margins(held.policy, held.reference, held.judged.rank, beta)
    if any(annotators):
        found = replace(found, annotators=margins_by_annotator(margin, place, annotators))
    if not held.known:
        return found
    scores = held.judged.scores
    variance = preference_variance(scores, scores.isfinite())
    return replace(
        found,
        bins=margins_by_score(margin, place, variance),
        score="preference variance",
        taught=taught_by_scores(held.policy, held.reference, held.judged.rank, scores),
    )


def _with_probe(found: Findings, policy: Policy, held: _Scored, probe: Probe) -> Findings:
    """Responses that are in no comparison, and other policies."""
    others: dict[str, Change] = {}
    if len(set(held.prompt.tolist())) > 1:
        strangers = [
            replace(row, responses=row.responses[-1:], rank=None, scores=None, label=None)
            for row in with_mismatched(held.rows)
        ]
        others[FOREIGN] = _described(held.prompt, *_both(policy, strangers, probe.worker))
    entropy: InformationOfSamples | None = None
    if probe.samples:
        drawn = _drawn(policy, held.rows, probe)
        both = _both(policy, drawn, probe.worker)
        others[SAMPLED] = _described(torch.arange(len(drawn)), *both)
        entropy = information_of_samples(*both, both[1].sum) if probe.samples > 1 else None
    taught = found.taught
    if probe.rejected is not None:
        taught = _by_policy(probe.rejected, held, probe.worker)
    return replace(found, others=others, information=entropy, taught=taught)


def _by_policy(rejected: Policy, held: _Scored, worker: Worker) -> Taught | None:
    theirs = rejected.logps(held.rows, worker=worker)
    return taught_by_policies(held.policy, held.reference, theirs, held.judged.rank)


def _drawn(policy: Policy, rows: Sequence[Tokenized], probe: Probe) -> list[Tokenized]:
    """Answers of the reference to each prompt, once a prompt."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    settings = Sampling(max_new_tokens=probe.max_new_tokens)
    answers = probe.worker.mapped(
        lambda asked: sample(policy, asked, probe.samples, settings, probe.seed, FromReference()),
        prompts,
    )
    return [
        Tokenized(prompt=prompt, responses=tuple(one.tokens for one in drawn), id=str(number))
        for number, (prompt, drawn) in enumerate(zip(prompts, answers, strict=True))
    ]


def _both(policy: Policy, rows: Sequence[Tokenized], worker: Worker) -> tuple[Logps, Logps]:
    trained = policy.logps(rows, worker=worker)
    return trained, policy.reference_logps(rows, worker=worker)


def _described(prompt: torch.Tensor, policy: Logps, reference: Logps) -> Change:
    there = policy.exists
    place = there.nonzero()[:, 0]
    return change_of(change(policy, reference)[there], policy.length[there], prompt[place])


def _gradients(
    policy: Policy, held: _Scored, beta: float
) -> tuple[FirstOrder | None, GradientBound | None]:
    """The first-order test and the bound, on the adapter; none where the policy has no adapter."""
    if not policy.adapter:
        return None, None
    ordered = [
        place
        for place, row in enumerate(held.rows)
        if len({rank for rank in row.rank or () if rank}) > 1
    ][:GRADIENTS]
    rows = [held.rows[place] for place in ordered]
    rewards = beta * change(held.policy, held.reference)[ordered]
    with evaluating(policy.model):
        inner = inner_products(policy.scorer(), rows)
    return first_order(inner, rows), gradient_bound(inner, rewards.cpu(), beta)


def _alike(policy: Policy, held: _Scored) -> Alikeness:
    with torch.no_grad(), policy.reference() as model, evaluating(model):
        sums = hidden_sums(Scorer(model), held.rows).cpu()
    moved = change(held.policy, held.reference).cpu()
    return alikeness(sums, lengths(held.rows), moved, held.judged.rank, held.rows)


def _texts(path: Path) -> tuple[TextStatistics | None, TextStatistics | None]:
    """Text statistics of sampled answers before and after, in words."""
    if not path.exists():
        return None, None
    rows: list[Mapping[str, Any]] = list(read_jsonl(path))
    before, after = ([row[side].split() for row in rows] for side in ("before", "after"))
    return text_statistics(before), text_statistics(after)
