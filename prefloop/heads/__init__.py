"""Reward heads on frozen features that know who voted: which model of disagreement predicts votes?

Minutes where EM over policies takes hours, so it comes first: what no head can tell apart, no
mixture of policies will. Every head is a frozen dataclass; called with votes and a seed it fits
itself and returns a `Predictor`. To add one: the class, and its name in `HEADS`.
"""

from prefloop.heads.comparing import Compared, Folds, Told, compare, line_up, told
from prefloop.heads.descent import Descent, GeneralPreference, PrototypeMixture
from prefloop.heads.features import answer_features
from prefloop.heads.linear import FittedTypes, LinearTypes
from prefloop.heads.section import heads_section
from prefloop.heads.votes import PairVotes, Predictor, pair_votes

HEADS = (LinearTypes, PrototypeMixture, GeneralPreference)
"""Heads by name: LinearTypes(types=3), PrototypeMixture(types=2), GeneralPreference()."""

__all__ = [
    "HEADS",
    "Compared",
    "Descent",
    "FittedTypes",
    "Folds",
    "GeneralPreference",
    "LinearTypes",
    "PairVotes",
    "Predictor",
    "PrototypeMixture",
    "Told",
    "answer_features",
    "compare",
    "heads_section",
    "line_up",
    "pair_votes",
    "told",
]
