"""Stable Preference Optimization: a preference loss kept inside the region that SFT allows.

    min over theta of  L_pref(theta)      such that   L_SFT(theta) <= v* + eps,
    L_SFT = -E log pi(y_w|x),   v* = min L_SFT, estimated by the SFT checkpoint (the reference)

Two ways to use it. `Stable` is an objective around another one. A solver (`Hinge`, `OneStep`, ...)
inside `StableGradient` is the trainer's way to fill gradients, for what an objective cannot see:
the gradients themselves, or the whole batch when it goes through the model in parts. Solvers know
two losses of a dictionary of parameters: the same code runs on a table and on a language model.

References:
    "Stable Preference Optimization", arXiv 2507.07723. Its equations were not available to us: the
    form above agrees with its abstracts; which solver is whose is said at each one.
"""

from prefloop.stable.bilevel import Bilevel, Losses, Params, sft_optimum
from prefloop.stable.levels import (
    LEVELS,
    FixedLevel,
    InnerLevel,
    Level,
    Memory,
    ReferenceLevel,
    RunningLevel,
)
from prefloop.stable.objective import ConstantPull, SafeRegion, SafeRegionEach, Stable
from prefloop.stable.solvers import (
    Adaptive,
    Alternating,
    DifferenceProduct,
    ExactProduct,
    Hinge,
    OneStep,
    OneStepFirstOrder,
    Penalty,
    Solver,
    Step,
)
from prefloop.stable.training import Demonstrations, StableGradient

OBJECTIVES: tuple[type, ...] = (Stable, SafeRegion, SafeRegionEach, ConstantPull)
"""What an objective may be written with on the command line, besides the objectives."""

SOLVERS: tuple[type, ...] = (
    Hinge,
    Penalty,
    OneStep,
    OneStepFirstOrder,
    Alternating,
    Adaptive,
    ExactProduct,
    DifferenceProduct,
)
"""Every solver, and the Hessian products of `OneStep`, for the command line."""

__all__ = [
    "LEVELS",
    "OBJECTIVES",
    "SOLVERS",
    "Adaptive",
    "Alternating",
    "Bilevel",
    "ConstantPull",
    "Demonstrations",
    "DifferenceProduct",
    "ExactProduct",
    "FixedLevel",
    "Hinge",
    "InnerLevel",
    "Level",
    "Losses",
    "Memory",
    "OneStep",
    "OneStepFirstOrder",
    "Params",
    "Penalty",
    "ReferenceLevel",
    "RunningLevel",
    "SafeRegion",
    "SafeRegionEach",
    "Solver",
    "Stable",
    "StableGradient",
    "Step",
    "sft_optimum",
]
