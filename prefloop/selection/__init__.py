"""Which prompts deserve a label: a score per prompt first, then one rule that keeps some.

A rule is a frozen dataclass: its fields are its hyper-parameters, `columns` names what it reads of
each response, and a call gives one score a prompt; higher means more worth a label. To add a rule:
write the class, name it in `RULES`, add a row to `CASES` in `tests/test_selection.py`.
"""

from prefloop.selection.keeping import above, bottom, top
from prefloop.selection.rule import Rule, Table
from prefloop.selection.rules import OnlinePVar, PVar, Random, RewardGap
from prefloop.selection.variance import preference_variance, reward_gap

RULES: tuple[type, ...] = (PVar, OnlinePVar, RewardGap, Random)
"""Every rule, for the command line and the test table."""

__all__ = [
    "RULES",
    "OnlinePVar",
    "PVar",
    "Random",
    "RewardGap",
    "Rule",
    "Table",
    "above",
    "bottom",
    "preference_variance",
    "reward_gap",
    "top",
]
