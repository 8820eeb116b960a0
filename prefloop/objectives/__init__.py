"""Objectives: what a policy is trained to minimise. Every name of the package's files is here.

To add one: write the class in the file of its theme, name it in that file's `__all__`, and add a
row to `CASES` in `tests/objective_cases.py`. The exports, the command line and docs/objectives.md
(`python scripts/objectives_docs.py`) follow from `__all__`.
"""

from dataclasses import is_dataclass

from prefloop.objectives import (
    acceleration,
    anchored,
    batchwise,
    distillation,
    divergence,
    family,
    general,
    groups,
    listwise,
    pairwise,
    reference_free,
    references,
    regularizers,
    robust,
    scored,
    ties,
    unpaired,
    wrapped,
)
from prefloop.objectives.acceleration import *  # noqa: F403
from prefloop.objectives.anchored import *  # noqa: F403
from prefloop.objectives.batchwise import *  # noqa: F403
from prefloop.objectives.distillation import *  # noqa: F403
from prefloop.objectives.divergence import *  # noqa: F403
from prefloop.objectives.family import *  # noqa: F403
from prefloop.objectives.general import *  # noqa: F403
from prefloop.objectives.groups import *  # noqa: F403
from prefloop.objectives.listwise import *  # noqa: F403
from prefloop.objectives.pairwise import *  # noqa: F403
from prefloop.objectives.reference_free import *  # noqa: F403
from prefloop.objectives.references import *  # noqa: F403
from prefloop.objectives.regularizers import *  # noqa: F403
from prefloop.objectives.robust import *  # noqa: F403
from prefloop.objectives.scored import *  # noqa: F403
from prefloop.objectives.ties import *  # noqa: F403
from prefloop.objectives.unpaired import *  # noqa: F403
from prefloop.objectives.wrapped import *  # noqa: F403

MODULES = (
    pairwise,
    reference_free,
    anchored,
    robust,
    batchwise,
    ties,
    listwise,
    groups,
    scored,
    distillation,
    unpaired,
    regularizers,
    wrapped,
    divergence,
    general,
    references,
    acceleration,
    family,
)
"""The files of the package, in reading order."""

ALL: tuple[type, ...] = tuple(
    value
    for module in MODULES
    for value in vars(module).values()
    if isinstance(value, type)
    and value.__module__ == module.__name__
    and is_dataclass(value)
    and issubclass(value, (*family.FAMILIES, wrapped.Sum))
)
"""Every objective, in reading order, for the command line, the documentation and the tests."""

PARTS: tuple[type, ...] = divergence.DIVERGENCES
"""What an objective may hold in a field and is not one itself."""

__all__ = ["ALL", "PARTS"]
__all__ += acceleration.__all__
__all__ += anchored.__all__
__all__ += batchwise.__all__
__all__ += distillation.__all__
__all__ += divergence.__all__
__all__ += family.__all__
__all__ += general.__all__
__all__ += groups.__all__
__all__ += listwise.__all__
__all__ += pairwise.__all__
__all__ += reference_free.__all__
__all__ += references.__all__
__all__ += regularizers.__all__
__all__ += robust.__all__
__all__ += scored.__all__
__all__ += ties.__all__
__all__ += unpaired.__all__
__all__ += wrapped.__all__
