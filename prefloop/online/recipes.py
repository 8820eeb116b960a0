"""The methods that papers compare, as objects: where pairs come from, and what is minimised."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefloop.objectives import DPO, Objective, SoftLabelDPO
from prefloop.online.exploration import XPO
from prefloop.online.sources import ThresholdPairs
from prefloop.policies.sampling import FromPolicy
from prefloop.samplers import FromReference, Hybrid, Mixture, Tilted


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One method of online preference optimization.

    Attributes:
        source: an object of `sources.SOURCES`: where pairs come from after the first round.
        objective: what is minimised.
    """

    source: Any
    objective: Objective = field(default_factory=SoftLabelDPO)


RECIPES: Mapping[str, Recipe] = {
    "vanilla": Recipe(source=FromReference()),
    "on_policy": Recipe(source=FromPolicy()),
    "hybrid": Recipe(source=Hybrid()),
    "tilted": Recipe(source=Tilted()),
    "mixture": Recipe(source=Mixture()),
    "xpo": Recipe(source=Hybrid(), objective=XPO(rounds=3)),
    "rs_dpo": Recipe(source=ThresholdPairs(), objective=DPO()),
}
"""The mapping table of "The Crucial Role of Samplers in Online DPO", arXiv:2409.19605 [code]:
`tilted` is the paper's method as it is run on Safe-RLHF, `mixture` as on Iterative-Prompt (with
probability 0.3 an on-policy pair); all with the soft-label loss. The last two are other papers'."""
