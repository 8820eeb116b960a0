"""What a reward model is worth: accuracy, calibration, length bias, use of its uncertainty."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefloop.data import ordered, prompt_key
from prefloop.errors import UserError
from prefloop.evaluation import Calibration, calibration
from prefloop.intervals import Estimate, share, wilson
from prefloop.rewards.heads import num_words
from prefloop.types import Comparison


@dataclass(frozen=True, eq=False)
class Pairs:
    """Every strictly ordered pair of some rows, as people judged it and as K members do.

    Attributes:
        margins: reward of the better less that of the worse response, by each member.
        longer: words of the better less words of the worse response.
        row: the row of each pair.
        prompt: a number for each prompt: what is drawn again in an interval.
    """

    margins: Float[Tensor, "K P"]
    longer: Float[Tensor, " P"]
    row: Int[Tensor, " P"]
    prompt: Int[Tensor, " P"]

    @property
    def margin(self) -> Float[Tensor, " P"]:
        """The margin of the ensemble: the mean over its members."""
        return self.margins.mean(0)

    @property
    def spread(self) -> Float[Tensor, " P"]:
        """Standard deviation of the margin over the members, in nats."""
        return self.margins.std(0, correction=0)

    @property
    def credit(self) -> Float[Tensor, " P"]:
        """1 where the ensemble agrees with the label, 1/2 where it has no opinion."""
        return (self.margin > 0).double() + 0.5 * (self.margin == 0).double()

    def only(self, kept: Bool[Tensor, " P"]) -> "Pairs":
        """The pairs where `kept` is True."""
        return Pairs(self.margins[:, kept], self.longer[kept], self.row[kept], self.prompt[kept])


def pairs_of(rows: Sequence[Comparison], members: Sequence[tuple[tuple[float, ...], ...]]) -> Pairs:
    """The pairs of `rows`, given what each member gives each response."""
    prompts: dict[str, int] = {}
    margins, longer, places, clusters = [], [], [], []
    for place, (row, given) in enumerate(zip(rows, members, strict=True)):
        words = [num_words(text) for text in row.responses]
        cluster = prompts.setdefault(prompt_key(row.prompt), len(prompts))
        for better, worse in ordered(row):
            margins.append([a - b for a, b in zip(given[better], given[worse], strict=True)])
            longer.append(float(words[better] - words[worse]))
            places.append(place)
            clusters.append(cluster)
    if not margins:
        raise UserError("no row orders two responses, so there is nothing to measure a reward on")
    return Pairs(
        torch.tensor(margins, dtype=torch.float64).T.contiguous(),
        torch.tensor(longer, dtype=torch.float64),
        torch.tensor(places),
        torch.tensor(clusters),
    )


def accuracy(pairs: Pairs) -> Estimate:
    """Share of pairs on which the reward agrees with the label, with Wilson's interval.

    Equal rewards count half, rounded down. The interval takes pairs for independent trials, which
    votes on one prompt are not: `accuracy_over_prompts` draws whole prompts.
    """
    return wilson(int(pairs.credit.sum()), len(pairs.credit))


def accuracy_over_prompts(pairs: Pairs) -> Estimate:
    """The same share, whole prompts drawn again for its interval."""
    return share(pairs.credit, pairs.prompt)


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """How far a reward goes by length, beside how far people do.

    Attributes:
        correlation: of margin and difference in words over pairs, through the origin, in [-1, 1].
        people: share of pairs whose longer response people chose (of those of unequal length).
        model: share of the same pairs whose longer response the reward prefers.
        longer: accuracy where people chose the longer one.
        shorter: accuracy where people chose the shorter one.
    """

    correlation: float
    people: Estimate
    model: Estimate
    longer: Estimate | None
    shorter: Estimate | None


def length_bias(pairs: Pairs) -> LengthBias | None:
    """The length bias on `pairs`, or None where all responses of a pair are equally long."""
    unequal = pairs.only(pairs.longer != 0)
    if not len(unequal.longer):
        return None
    longer = unequal.longer > 0
    margin = unequal.margin
    scale = float(margin.square().sum().sqrt() * unequal.longer.square().sum().sqrt())
    prefers = (margin * unequal.longer > 0).sum() + 0.5 * (margin == 0).sum()
    return LengthBias(
        correlation=float((margin * unequal.longer).sum()) / scale if scale else 0.0,
        people=wilson(int(longer.sum()), len(longer)),
        model=wilson(int(prefers), len(longer)),
        longer=accuracy(unequal.only(longer)) if longer.any() else None,
        shorter=accuracy(unequal.only(~longer)) if not longer.all() else None,
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a reward model is worth on one part of the data.

    Attributes:
        name: of the part: "held out", "training".
        accuracy, over_prompts: share of pairs it agrees with; see the functions of those names.
        members: accuracy of each member alone.
        calibration: of sigmoid(margin) as a probability.
        length: its length bias, None where lengths never differ.
        sure, unsure: accuracy on the half of the pairs where the margin is largest against its
            spread over the members, and on the other half; None for one member.
    """

    name: str
    accuracy: Estimate
    over_prompts: Estimate
    members: tuple[float, ...]
    calibration: Calibration
    length: LengthBias | None
    sure: Estimate | None
    unsure: Estimate | None

    def rows(self) -> list[Mapping[str, Any]]:
        """Rows of evaluation.json."""
        of = f", {self.name}"
        found = [
            self.accuracy.row(f"accuracy{of}", "share"),
            self.over_prompts.row(f"accuracy{of}, interval over prompts", "share"),
        ]
        if self.length is not None:
            told = {
                "accuracy where the longer was chosen": self.length.longer,
                "accuracy where the shorter was chosen": self.length.shorter,
                "longer chosen by people": self.length.people,
                "longer preferred by the reward": self.length.model,
            }
            found += [value.row(name + of, "share") for name, value in told.items() if value]
        told = {"the members are surest": self.sure, "they are least sure": self.unsure}
        found += [v.row(f"accuracy where {name}{of}", "share") for name, v in told.items() if v]
        return found


def measure(name: str, pairs: Pairs) -> Measured:
    """Every number of a part of the data."""
    sure = unsure = None
    if len(pairs.margins) > 1 and len(pairs.longer) > 1:
        certainty = pairs.margin.abs() / pairs.spread.clamp(min=1e-12)
        order = certainty.argsort(descending=True, stable=True)
        half = torch.zeros(len(order), dtype=torch.bool)
        half[order[: len(order) // 2]] = True
        sure, unsure = accuracy(pairs.only(half)), accuracy(pairs.only(~half))
    return Measured(
        name=name,
        accuracy=accuracy(pairs),
        over_prompts=accuracy_over_prompts(pairs),
        members=tuple(
            float(((one > 0).double() + 0.5 * (one == 0).double()).mean()) for one in pairs.margins
        ),
        calibration=calibration(pairs.margin),
        length=length_bias(pairs),
        sure=sure,
        unsure=unsure,
    )
