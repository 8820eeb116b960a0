"""Experiments that compare stages of the loop with each other, arm by arm, at equal cost.

arms      what is compared        pools    answers, labels and rewards that the arms of a seed share
learners  what a label is spent on running  arms in processes, resumable
table     intervals, paired tests, figures
"""

from prefloop.experiment.arms import Arm, Grid, plan
from prefloop.experiment.learners import HeadLearner, PolicyLearner
from prefloop.experiment.running import SelectionExperiment
from prefloop.experiment.table import Row, summarise

__all__ = [
    "Arm",
    "Grid",
    "HeadLearner",
    "PolicyLearner",
    "Row",
    "SelectionExperiment",
    "plan",
    "summarise",
]
