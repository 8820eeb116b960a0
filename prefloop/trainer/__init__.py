"""The one training loop, its plan, its checkpoints and its run on disk."""

from prefloop.settings import TrainSettings
from prefloop.trainer.build import build_trainer, finish
from prefloop.trainer.loop import Gradient, NonFiniteError, Passes, Trainer, backward
from prefloop.trainer.run import Interrupted, Progress, fit

__all__ = [
    "Gradient",
    "Interrupted",
    "NonFiniteError",
    "Passes",
    "Progress",
    "TrainSettings",
    "Trainer",
    "backward",
    "build_trainer",
    "finish",
    "fit",
]
