"""Which prompts deserve a label: a score per prompt first, then one cut that keeps some.

A rule is a frozen dataclass and a `Rule`: its fields are its hyper-parameters, `columns` names what
it reads of each row, and a call gives one score a prompt; higher means more worth a label. To add a
rule: write the class, name it in `RULES`, add a row to `CASES` in `tests/test_selection_rules.py`.
"""

from prefloop.selection.calibration import Scale, calibrated_scale
from prefloop.selection.diversity import k_centres
from prefloop.selection.filters import (
    FILTERS,
    Different,
    Filter,
    FirstOfPrompt,
    Length,
    Ordered,
    Responses,
)
from prefloop.selection.keeping import (
    Kept,
    Purse,
    Quota,
    above,
    affordable,
    bottom,
    overlap,
    rank_weights,
    ranking,
    top,
    within_quotas,
)
from prefloop.selection.policy_rules import (
    CHES,
    AlignmentPotential,
    DIDEntropy,
    LargestImplicitGap,
    LearningOrder,
    OnlinePVar,
    PredictiveEntropy,
    PreferenceCertainty,
    ReferenceFreePotential,
    SmallestImplicitGap,
    validation_loss,
)
from prefloop.selection.rule import Rule, Table, best_worst
from prefloop.selection.rules import PVar, Random, RewardGap
from prefloop.selection.variance import preference_variance, reward_gap, variance_and_error

RULES: tuple[type[Rule], ...] = (
    PVar,
    OnlinePVar,
    RewardGap,
    LargestImplicitGap,
    SmallestImplicitGap,
    AlignmentPotential,
    ReferenceFreePotential,
    PredictiveEntropy,
    PreferenceCertainty,
    LearningOrder,
    CHES,
    DIDEntropy,
    Random,
)
"""Every rule, for the command line and the test table."""

__all__ = [
    "CHES",
    "FILTERS",
    "RULES",
    "AlignmentPotential",
    "DIDEntropy",
    "Different",
    "Filter",
    "FirstOfPrompt",
    "Kept",
    "LargestImplicitGap",
    "LearningOrder",
    "Length",
    "OnlinePVar",
    "Ordered",
    "PVar",
    "PredictiveEntropy",
    "PreferenceCertainty",
    "Purse",
    "Quota",
    "Random",
    "ReferenceFreePotential",
    "Responses",
    "RewardGap",
    "Rule",
    "Scale",
    "SmallestImplicitGap",
    "Table",
    "above",
    "affordable",
    "best_worst",
    "bottom",
    "calibrated_scale",
    "k_centres",
    "overlap",
    "preference_variance",
    "rank_weights",
    "ranking",
    "reward_gap",
    "top",
    "validation_loss",
    "variance_and_error",
    "within_quotas",
]
