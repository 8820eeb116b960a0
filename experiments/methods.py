"""What the experiments compare: an objective, and how its gradient is computed."""

from dataclasses import dataclass

from prefloop.objectives import Objective
from prefloop.trainer import Gradient, backward


@dataclass(frozen=True)
class Method:
    """What is minimised, and how its gradient is computed."""

    objective: Objective
    gradient: Gradient = backward
