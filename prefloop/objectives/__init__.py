"""Objectives: what a policy is trained to minimise. Every name of the package's files is here.

To add one: write the class in the file of its theme, name it in that file's `__all__`, and add a
row to `CASES` in `tests/test_objectives.py`. The exports, the command line and the documentation
follow from `__all__`.
"""

from dataclasses import is_dataclass

from prefloop.objectives import family, listwise, pairwise, reference_free, regularizers
from prefloop.objectives.family import *  # noqa: F403
from prefloop.objectives.listwise import *  # noqa: F403
from prefloop.objectives.pairwise import *  # noqa: F403
from prefloop.objectives.reference_free import *  # noqa: F403
from prefloop.objectives.regularizers import *  # noqa: F403

_MODULES = (family, listwise, pairwise, reference_free, regularizers)

ALL: tuple[type, ...] = tuple(
    value
    for module in _MODULES
    for value in vars(module).values()
    if isinstance(value, type)
    and value.__module__ == module.__name__
    and is_dataclass(value)
    and issubclass(value, family.FAMILIES)
)
"""Every objective, for the command line, the documentation and the tests."""

__all__ = ["ALL"]
__all__ += family.__all__
__all__ += listwise.__all__
__all__ += pairwise.__all__
__all__ += reference_free.__all__
__all__ += regularizers.__all__
