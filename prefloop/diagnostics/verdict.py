"""What training did, in sentences, with the thresholds that decide which.

Every threshold is a constant here and a row of `docs/diagnostics.md`. A sentence names the number
that made it. What was not measured is said, never guessed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prefloop.diagnostics.alike import Alikeness
from prefloop.diagnostics.displacement import Change, Displacement, MassShift
from prefloop.diagnostics.gradients import FirstOrder, GradientBound
from prefloop.diagnostics.information import InformationOfSamples
from prefloop.diagnostics.ranking import Bin, Ranking
from prefloop.diagnostics.teaching import RejectedSampler, Taught
from prefloop.diagnostics.text import TextStatistics
from prefloop.evaluation import Calibration, Groups
from prefloop.intervals import Estimate

DISPLACED = 0.5
"""Share of the chosen responses that became less likely, from which on that is a warning."""
COLLAPSED = -0.5
"""Mean change of the chosen, nats per token, from which on the model has forgotten them."""
BOTH_FELL = 0.5
"""Share of the comparisons in which chosen and rejected fell, from which on mass went elsewhere."""
STEP_LOWERS = 0.25
"""Share of the pairs whose own first step lowers the chosen, from which on pairs are too alike."""
REPEATING = 0.05
"""Rise of the share of repeated n-grams, clear of the interval, from which on answers repeat."""
LOOPING = 0.1
"""Share of the answers that end in a loop, from which on that is a warning."""
LONGER, SHORTER = 1.25, 0.8
"""Length after over length before, outside of which, clear of the intervals, length changed."""
OVERCONFIDENT = 0.1
"""Confidence less accuracy of the Bradley-Terry probabilities, from which on they mislead."""
UNEQUAL = 0.25
"""Difference of the best and the worst annotator's mean margin over the larger of the two."""
FOLLOWS = -0.3
"""Spearman's correlation of CHES with the chosen's change, from which on alike pairs lost most."""
OTHER_BETA = 2.0
"""Factor between the data's exponent and training's, from which on they do not fit."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that was measured; None where it was not.

    Attributes:
        displacement, mass, ranking: on held-out comparisons.
        calibration: of sigmoid(margin) on the same pairs.
        first_order: gradients of some pairs.
        before, after: text of sampled answers, of the reference and of the policy.
        information: DID entropy of sampled answers.
        annotators: margins by annotator.
        bins: margins by a score of the prompt, named `score`.
        others: changes of responses that are in no comparison, by where they are from.
        alike: CHES of the pairs.
        bound: gradients of some prompts against what preference variance allows.
        chosen: log q of the chosen above uniform, nats.
        taught, sampler: the power law of the data, and the optimal rejected responses.
        beta: of the training.
    """

    displacement: Displacement
    mass: MassShift
    ranking: Ranking
    calibration: Calibration
    first_order: FirstOrder | None = None
    before: TextStatistics | None = None
    after: TextStatistics | None = None
    information: InformationOfSamples | None = None
    annotators: Groups | None = None
    bins: tuple[Bin, ...] = ()
    score: str = ""
    others: Mapping[str, Change] = field(default_factory=dict)
    alike: Alikeness | None = None
    bound: GradientBound | None = None
    chosen: Estimate | None = None
    taught: Taught | None = None
    sampler: RejectedSampler | None = None
    beta: float = 0.1


def verdict(found: Findings) -> tuple[str, ...]:
    """The sentences, worst news first where there is any, advice last."""
    warnings = [
        *_displacement(found.displacement),
        *_elsewhere(found),
        *_gradients(found.first_order),
        *_alike(found.alike),
        *_text(found.before, found.after),
    ]
    quality = [
        *_ranking(found.ranking),
        *_calibration(found.calibration),
        *_groups(found.annotators),
        *_taught(found.taught, found.beta),
    ]
    good = [] if warnings else [_undisplaced(found.displacement)]
    return (*warnings, *good, *quality, *_advice(found))


def displaced(found: Displacement) -> bool:
    """Whether the chosen responses, on the whole, became less likely."""
    return found.chosen.fell.value >= DISPLACED


def _displacement(found: Displacement) -> Iterator[str]:
    chosen = found.chosen
    if not displaced(found):
        return
    yield (
        f"In {_percent(chosen.fell)} of the comparisons the chosen response became less likely "
        f"(median {chosen.median:+.1f} nats, mean {chosen.token.value:+.3f} a token)."
    )
    if chosen.token.value <= COLLAPSED:
        yield (
            f"That is a collapse: {-chosen.token.value:.2f} nats a token means that each token of "
            "a chosen response has lost much of its probability."
        )
    if found.rejected.mean.value < chosen.mean.value:
        yield (
            "The margin grew all the same, since the rejected responses fell further "
            f"(median {found.rejected.median:+.1f} nats)."
        )


def _elsewhere(found: Findings) -> Iterator[str]:
    both, other = found.displacement.both_fell, found.mass.other
    if both.value >= BOTH_FELL:
        yield (
            f"In {_percent(both)} of the comparisons chosen and rejected both fell: "
            "what they lost went to answers that the data do not name."
        )
        if other is None and not found.others:
            yield (
                "Which answers is not known: no unjudged response was scored. Add some, with rank "
                "null, or --samples 4, to see."
            )
    gains = {} if other is None else {"Responses that nobody chose": other.log_change}
    gains |= {name.capitalize(): part.mean for name, part in found.others.items()}
    for name, gain in gains.items():
        if gain.low > 0:
            yield (
                f"{name} became likelier: {gain.value:+.1f} nats "
                f"[{gain.low:+.1f}, {gain.high:+.1f}]."
            )


def _alike(found: Alikeness | None) -> Iterator[str]:
    if found is not None and found.follows <= FOLLOWS:
        yield (
            "The more alike chosen and rejected were for the model before training (CHES), the "
            f"more the chosen lost: rank correlation {found.follows:+.2f}."
        )


def _taught(found: Taught | None, beta: float) -> Iterator[str]:
    if found is None or found.law.beta <= 0:
        return
    factor = max(found.law.beta / beta, beta / found.law.beta)
    if factor >= OTHER_BETA:
        yield (
            f"By the {found.source}, the data are built for beta {found.law.beta:.3g} and not for "
            f"{beta:.3g}: {100 * found.law.matching:.0f} % of the pairs admit an exponent, with a "
            f"spread of {found.law.spread:.2f} in its logarithm."
        )


def _undisplaced(found: Displacement) -> str:
    return (
        f"No displacement: the chosen response became less likely in {_percent(found.chosen.fell)} "
        f"of the comparisons only (median change {found.chosen.median:+.1f} nats)."
    )


def _gradients(found: FirstOrder | None) -> Iterator[str]:
    if found is not None and found.falls.value >= STEP_LOWERS:
        yield (
            f"For {_percent(found.falls)} of the pairs a gradient step on the pair alone would "
            "lower its chosen response: chosen and rejected are too alike for this model."
        )


def _text(before: TextStatistics | None, after: TextStatistics | None) -> Iterator[str]:
    if after is None:
        return
    if after.looping.value >= LOOPING:
        yield f"{_percent(after.looping)} of the sampled answers end in a loop."
    if before is None:
        return
    rise = after.repeated.value - before.repeated.value
    if rise >= REPEATING and after.repeated.low > before.repeated.value:
        yield (
            f"Answers repeat themselves more: {_percent(after.repeated)} of their {after.n}-grams "
            f"were said before, against {_percent(before.repeated)} of the reference's."
        )
    if (factor := _length_factor(before.length, after.length)) is not None:
        yield (
            f"Answers are {factor:.2f} times as long as the reference's ({after.length.value:.0f} "
            f"against {before.length.value:.0f} units): look at the win rate at equal length."
        )


def _length_factor(before: Estimate, after: Estimate) -> float | None:
    """Length after over before where it changed clearly, else None."""
    if before.value <= 0:
        return None
    factor = after.value / before.value
    longer = factor >= LONGER and after.low > before.high
    shorter = factor <= SHORTER and after.high < before.low
    return factor if longer or shorter else None


def _ranking(found: Ranking) -> Iterator[str]:
    implicit = found.implicit.accuracy
    if implicit.low <= 0.5 <= implicit.high:
        yield (
            "On these comparisons the implicit reward orders responses no better than chance: "
            f"{_percent(implicit)} [{_percent(implicit, 'low')}, {_percent(implicit, 'high')}]."
        )
    elif implicit.value < 0.5:
        yield (
            f"The implicit reward orders only {_percent(implicit)} of the pairs as labelled, worse "
            "than chance: are the labels turned round?"
        )
    else:
        yield (
            f"The implicit reward orders {_percent(implicit)} of the pairs as labelled; the "
            f"policy's own log-probabilities {_percent(found.policy.accuracy)}, the reference's "
            f"{_percent(found.reference.accuracy)}."
        )


def _calibration(found: Calibration) -> Iterator[str]:
    if found.overconfidence >= OVERCONFIDENT:
        yield (
            "The Bradley-Terry probabilities are too sure of themselves, by "
            f"{100 * found.overconfidence:.0f} points on average."
        )


def _groups(found: Groups | None) -> Iterator[str]:
    if found is None or len(found.groups) < 2:
        return
    values = [estimate.value for estimate in found.groups.values()]
    best, worst = max(values), min(values)
    if best - worst > UNEQUAL * max(abs(best), abs(worst)):
        yield (
            f"Annotators are not served alike: the mean margin is {worst:+.2f} for {found.worst} "
            f"and {best:+.2f} for the best served."
        )


def _advice(found: Findings) -> Iterator[str]:
    loops = found.after is not None and found.after.looping.value >= LOOPING
    if displaced(found.displacement):
        yield (
            'Try --stable "Hinge()", an SFT term, a larger beta, or fewer steps; and look at the '
            "pairs of the highest CHES score."
        )
    elif loops:
        yield 'Try fewer steps or a smaller learning rate, and --stable "Hinge()".'


def _percent(estimate: Estimate, which: str = "value") -> str:
    number = {"value": estimate.value, "low": estimate.low, "high": estimate.high}[which]
    return f"{100 * number:.0f} %"
