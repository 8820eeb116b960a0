"""The verdict says what was planted, no more; and its JSON is what a report can show."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefloop.diagnostics import verdict as thresholds
from prefloop.diagnostics.displacement import displacement, mass_shift
from prefloop.diagnostics.gradients import FirstOrder
from prefloop.diagnostics.information import information_of_samples
from prefloop.diagnostics.ranking import (
    margin_calibration,
    margins,
    margins_by_annotator,
    margins_by_score,
    ranking,
)
from prefloop.diagnostics.summary import diagnosis, numbers
from prefloop.diagnostics.text import text_statistics
from prefloop.diagnostics.verdict import Findings, verdict
from prefloop.intervals import mean, share
from prefloop.report import report
from prefloop.runs import write_json
from prefloop.types import Logps

DOCS = Path(__file__).parents[1] / "docs" / "diagnostics.md"
TOKENS = 10


def of_sums(sums: torch.Tensor) -> Logps:
    token = (sums.unsqueeze(-1) / TOKENS).expand(*sums.shape, TOKENS)
    return Logps(token, torch.ones_like(token, dtype=torch.bool))


def planted(
    chosen: float, rejected: float, other: float | None = None, spread: float = 0.5, rows: int = 40
) -> Findings:
    """Findings on comparisons whose responses change by these numbers of nats, give or take."""
    rng = torch.Generator().manual_seed(0)
    means = [chosen, rejected] if other is None else [chosen, rejected, other]
    before = -40 + 4 * torch.randn(rows, len(means), generator=rng, dtype=torch.float64)
    noise = spread * torch.randn(rows, len(means), generator=rng, dtype=torch.float64)
    after = before + torch.tensor(means, dtype=torch.float64) + noise
    rank = torch.tensor([[1, 2, 0][: len(means)]] * rows)
    policy, reference = of_sums(after), of_sums(before)
    return Findings(
        displacement=displacement(policy, reference, rank),
        mass=mass_shift(policy, reference, rank),
        ranking=ranking(policy, reference, rank),
        calibration=margin_calibration(policy, reference, rank, beta=0.1),
    )


def said(found: Findings) -> str:
    return " ".join(verdict(found))


def test_a_healthy_run_gets_no_warning_and_no_advice():
    text = said(planted(chosen=3, rejected=-3))
    assert text.startswith("No displacement: the chosen response became less likely in 0 %")
    assert "The implicit reward orders 100 % of the pairs as labelled" in text
    assert "Try" not in text


def test_displacement_names_its_numbers_and_where_the_mass_went():
    text = said(planted(chosen=-3, rejected=-9))
    assert "In 100 % of the comparisons the chosen response became less likely (median -3." in text
    assert "mean -0.3" in text  # -3 nats over 10 tokens
    assert "The margin grew all the same, since the rejected responses fell further" in text
    assert "chosen and rejected both fell: what they lost went to answers" in text
    assert "Which answers is not known: no unjudged response was scored." in text
    assert 'Try --stable "Hinge()"' in text
    assert "collapse" not in text
    assert "No displacement" not in text


def test_other_responses_that_gained_are_named():
    text = said(planted(chosen=-3, rejected=-9, other=5))
    assert re.search(r"Responses that nobody chose became likelier: \+5\.\d nats \[\+4", text)
    assert "not known" not in text


def test_other_responses_within_noise_are_not_named():
    assert "nobody chose" not in said(planted(chosen=3, rejected=-3, other=0))


def test_a_collapse_is_called_one():
    assert "That is a collapse: 0.7" in said(planted(chosen=-7, rejected=-9))


def test_a_chosen_that_falls_further_than_the_rejected_has_no_grown_margin():
    text = said(planted(chosen=-5, rejected=-2))
    assert "margin grew" not in text
    assert "worse than chance" in text


def test_chance_is_called_chance_with_its_interval():
    text = said(planted(chosen=0, rejected=0, spread=3))
    assert re.search(r"no better than chance: \d+ % \[\d+ %, \d+ %\]", text)


@pytest.mark.parametrize(
    ("change", "displaced"), [(-0.01, True), (0.01, False)], ids=["just below", "just above"]
)
def test_the_sign_of_the_change_decides_not_its_size(change, displaced):
    text = said(planted(chosen=change, rejected=-1, spread=0))
    assert ("became less likely (median" in text) == displaced


def test_text_that_loops_repeats_or_grows_is_said():
    calm = text_statistics(
        [f"{n} the sea is wide and the wind was cold".split() for n in range(20)]
    )
    loop = text_statistics([["no"] * 30 for _ in range(20)])
    found = replace(planted(3, -3), before=calm, after=loop)
    text = said(found)
    assert "100 % of the sampled answers end in a loop." in text
    assert "96 % of their 4-grams were said before, against 0 % of the reference's" in text
    assert "Answers are 3.00 times as long as the reference's (30 against 10 units)" in text
    assert "Try fewer steps" in text
    assert "No displacement" not in text  # the first sentence is the worst news
    assert said(replace(found, before=calm, after=calm)) == said(planted(3, -3))


def test_a_length_change_inside_the_intervals_is_not_said():
    short = text_statistics([["a"] * n for n in (1, 30)])
    long = text_statistics([["a"] * n for n in (1, 60)])
    text = said(replace(planted(3, -3), before=short, after=long))
    assert "times as long" not in text


def test_gradients_calibration_and_annotators_are_said_past_their_thresholds():
    found = planted(3, -3)
    half = torch.tensor([1.0, 0.0])
    gradients = FirstOrder(
        falls=share(half),
        cosine=mean(half),
        overlap=(1.5, 0.2),
        chosen_norm=(1.0, 1.0),
        rejected_norm=(2.0, 1.0),
    )
    annotators = margins_by_annotator(
        torch.tensor([1.0, 1.0, 0.2, 0.2]), torch.arange(4), ["ann", "ann", "bob", "bob"]
    )
    loud = replace(found.calibration, overconfidence=0.12)
    text = said(replace(found, first_order=gradients, annotators=annotators, calibration=loud))
    assert "For 50 % of the pairs a gradient step" in text
    assert "too sure of themselves, by 12 points" in text
    assert "the mean margin is +0.20 for bob and +1.00 for the best served" in text


def whole() -> Findings:
    """Everything measured."""
    found = planted(chosen=-3, rejected=-9, other=2)
    rng = torch.Generator().manual_seed(1)
    sums = -40 + torch.randn(40, 3, generator=rng, dtype=torch.float64)
    rank = torch.tensor([[1, 2, 0]] * 40)
    margin, row = margins(of_sums(sums + 1), of_sums(sums), rank, beta=0.1)
    margin = margin + torch.randn(40, generator=rng)
    half = torch.tensor([1.0, 0.0])
    return replace(
        found,
        first_order=FirstOrder(
            falls=share(half),
            cosine=mean(half),
            overlap=(1.5, 0.2),
            chosen_norm=(1.0, 1.0),
            rejected_norm=(2.0, 1.0),
        ),
        before=text_statistics([list("abcdefg")] * 3, limit=7),
        after=text_statistics([list("aaaaaaa")] * 3),
        information=information_of_samples(of_sums(sums + margin[:, None]), of_sums(sums), sums),
        annotators=margins_by_annotator(margin, row, ["<b>ann", "bob"] * 20),
        bins=margins_by_score(margin, row, torch.arange(40.0)),
        score="preference variance",
    )


def test_the_diagnosis_is_plain_json_that_a_report_shows(tmp_path):
    found = whole()
    value = diagnosis(found)
    assert json.loads(json.dumps(value)) == value
    write_json(tmp_path / "diagnosis.json", value)
    page = report([tmp_path])
    for title in (
        "Displacement",
        "Where probability went",
        "Ranking and calibration",
        "Margins by annotator",
        "Margins by preference variance",
        "First step of each pair",
        "Sampled text",
    ):
        assert f">{title}</h2>" in page, title
    assert page.count("<figure>") == 5  # three histograms, reliability, overlap
    assert "&lt;b&gt;ann" in page
    for sentence in value["verdict"]:
        assert sentence.replace("'", "&#39;").replace('"', "&#34;") in page


def test_the_smallest_diagnosis_has_no_empty_pages():
    value = diagnosis(planted(3, -3))
    titles = [part["title"] for part in value["sections"]]
    assert titles == ["Displacement", "Where probability went", "Ranking and calibration"]


def test_the_numbers_are_those_of_the_findings():
    found = whole()
    flat = numbers(found)
    assert flat["chosen fell, share"] == found.displacement.chosen.fell.value
    assert flat["DID entropy, effective samples"] == found.information.effective_samples.value
    assert "DID entropy, nats" not in numbers(planted(3, -3))
    assert diagnosis(found)["numbers"] == flat


def test_every_threshold_is_documented_with_its_value():
    text = DOCS.read_text()
    constants = {
        name: value
        for name, value in vars(thresholds).items()
        if name.isupper() and isinstance(value, float)
    }
    assert len(constants) == 12
    for name, value in constants.items():
        assert re.search(rf"^\| `{name}` \| {re.escape(f'{value:g}')} ", text, re.MULTILINE), name
