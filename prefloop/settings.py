"""How a policy is trained: every number of the loop, checked where it is given."""

import math
from dataclasses import dataclass
from typing import Literal

from prefloop.errors import UserError
from prefloop.expression import parse
from prefloop.orders import ORDERS, Order

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Hyper-parameters of the training loop.

    Attributes:
        lr: peak learning rate.
        batch_size: comparisons an optimizer step, over all processes.
        epochs: passes over the data.
        max_steps: stop after this many optimizer steps; 0 means after `epochs`.
        schedule: learning rate after the warm-up: cosine or linear to zero, or constant.
        warmup: share of all steps in which the learning rate rises linearly, in [0, 1).
        weight_decay: AdamW's decoupled weight decay.
        beta1: AdamW's first moment decay.
        beta2: AdamW's second moment decay.
        max_grad_norm: the gradient is scaled down to this norm when it is longer.
        token_budget: tokens (padding included) of one forward pass; more needs more memory.
        log_every: optimizer steps between lines of metrics.jsonl.
        eval_every: optimizer steps between evaluations; 0 means at the start and the end.
        save_every: optimizer steps between checkpoints; 0 means ten a run.
        log_displacement: score the reference even for an objective that needs none, so that the
            log says whether training displaces probability.
        order: of the rows in an epoch, as text: Shuffled(), or AsGiven() for data that were sorted
            on purpose.
        seed: order of the data, dropout.
    """

    lr: float = 1e-5
    batch_size: int = 32
    epochs: int = 1
    max_steps: int = 0
    schedule: Schedule = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    token_budget: int = 4096
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 0
    log_displacement: bool = True
    order: str = "Shuffled()"
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("lr", "batch_size", "epochs", "max_grad_norm", "token_budget", "log_every")
        for name in positive:
            _refuse(name, getattr(self, name), getattr(self, name) > 0, "must be positive")
        for name in ("max_steps", "eval_every", "save_every", "weight_decay"):
            _refuse(name, getattr(self, name), getattr(self, name) >= 0, "must not be negative")
        for name in ("warmup", "beta1", "beta2"):
            _refuse(name, getattr(self, name), 0 <= getattr(self, name) < 1, "must be in [0, 1)")
        parse(self.order, ORDERS)

    @property
    def ordering(self) -> Order:
        """The object that `order` names."""
        return parse(self.order, ORDERS)

    def learning_rate(self, step: int, total: int) -> float:
        """Learning rate of optimizer step `step` (the first is 0) of `total`."""
        warm = math.ceil(self.warmup * total)
        if step < warm:
            return self.lr * (step + 1) / warm
        progress = (step - warm) / max(1, total - warm)
        return self.lr * DECAY[self.schedule](progress)


DECAY = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def _refuse(name: str, value: int | float, allowed: bool, rule: str) -> None:
    if not (allowed and math.isfinite(value)):
        raise UserError(f"{name} {rule}, got {value}")
