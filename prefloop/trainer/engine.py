"""Who holds the weights, gradients and moments of a policy in training, and moves them.

The loop says what is differentiated and when a step is taken; an engine knows where the tensors
are: whole on every process, divided over them by FSDP2, or in DeepSpeed's hands.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

FSDP_WRAPPER = "_fsdp_wrapped_module."
CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."


@dataclass(frozen=True)
class State:
    """Whole tensors of everything that training changes, on the CPU.

    Attributes:
        model: trained weights by the name of the parameter in the bare scorer.
        moments: what AdamW keeps, by parameter and key: "name/exp_avg", "name/step", ...
    """

    model: dict[str, Tensor]
    moments: dict[str, Tensor]


@runtime_checkable
class Engine(Protocol):
    """A policy in training, wherever its tensors are. All processes call its methods together.

    Attributes:
        scorer: what forward passes go through.
        bare: the scorer without what the engine wrapped around it: names do not depend on it.
    """

    @property
    def scorer(self) -> nn.Module: ...

    @property
    def bare(self) -> nn.Module: ...

    def begin(self) -> None:
        """Forget the gradient: of the step before, or of one that was refused."""
        ...

    def one_pass(self, last: bool) -> AbstractContextManager[object]:
        """Around a forward pass and its backward pass; the gradient is whole after the last."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, averaged over processes, to that of the step."""
        ...

    def clip(self, most: float) -> float:
        """Norm of the gradient; the step takes one that is longer than `most` at that length."""
        ...

    def move(self, lr: float) -> None:
        """One step of AdamW at this learning rate."""
        ...

    def weights(self, frozen: bool) -> dict[str, Tensor]:
        """Whole weights, trained ones or all, by name; empty but on the first process."""
        ...

    def whole(self) -> State:
        """What a checkpoint keeps; empty but on the first process."""
        ...

    def restore(self, state: State) -> None:
        """Go on from `state`, which every process has whole."""
        ...


@dataclass(frozen=True)
class Accelerated:
    """Tensors as Accelerate's `prepare` leaves them: on one process, under DDP or under FSDP2."""

    scorer: nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator

    @property
    def bare(self) -> nn.Module:
        """The scorer without Accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.scorer)

    def begin(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def one_pass(self, last: bool) -> AbstractContextManager[object]:
        """Processes exchange gradients in the last pass of a step only."""
        return nullcontext() if last else self.accelerator.no_sync(self.scorer)

    def backward(self, loss: Tensor) -> None:
        """Autograd, under Accelerate's loss scaling."""
        self.accelerator.backward(loss)

    def clip(self, most: float) -> float:
        """Norm of the gradient, which is scaled in place."""
        norm: Any = self.accelerator.clip_grad_norm_(self.scorer.parameters(), most)
        if norm is None:
            return 0.0
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def move(self, lr: float) -> None:
        """One step of AdamW."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def weights(self, frozen: bool) -> dict[str, Tensor]:
        """Whole weights, gathered from all processes; tied ones stand under their first name."""
        found: Any = get_model_state_dict(self.bare, options=_options(frozen))
        kept = _first_names(self.bare, frozen)
        return {name: value.detach() for name, value in found.items() if name in kept}

    def whole(self) -> State:
        """Weights and moments, gathered from all processes."""
        # Weights first: that divides them again where an evaluation has left them whole, and only
        # then are they the parameters that the optimizer knows.
        weights = self.weights(frozen=False)
        moments: Any = get_optimizer_state_dict(self.bare, self.optimizer, options=_options())
        return State(
            model={name: value.contiguous().clone() for name, value in weights.items()},
            moments={
                f"{name}/{key}": torch.as_tensor(value).detach().contiguous().clone()
                for name, state in moments.get("state", {}).items()
                for key, value in state.items()
            },
        )

    def restore(self, state: State) -> None:
        """Each process takes its part of the whole tensors."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
        set_model_state_dict(self.bare, dict(state.model), options=options)
        set_optimizer_state_dict(
            self.bare,
            self.optimizer,
            {"state": by_parameter(state.moments), "param_groups": self._groups()},
            options=options,
        )

    def _groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups as they are now, parameters by name."""
        names = {id(value): _plain(name) for name, value in self.bare.named_parameters()}
        return [
            {**group, "params": [names[id(value)] for value in group["params"]]}
            for group in self.optimizer.param_groups
        ]


def _options(frozen: bool = False) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=not frozen)


def _first_names(model: nn.Module, frozen: bool) -> set[str]:
    """Names of what training changes, or of all that the model keeps; each tensor once."""
    if not frozen:
        return trained(model)
    first = {_plain(name) for name, _ in model.named_parameters()}
    again = {_plain(name) for name, _ in model.named_parameters(remove_duplicate=False)} - first
    return {_plain(name) for name in model.state_dict()} - again


def trained(model: nn.Module) -> set[str]:
    """Names of the parameters that training changes, each parameter under its first name."""
    return {_plain(name) for name, value in model.named_parameters() if value.requires_grad}


def _plain(name: str) -> str:
    return name.replace(FSDP_WRAPPER, "").replace(CHECKPOINT_WRAPPER, "")


def by_parameter(moments: Mapping[str, Tensor]) -> dict[str, Any]:
    """{"name/key": tensor} as {name: {key: tensor}}."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, value in moments.items():
        parameter, key = name.rsplit("/", 1)
        state.setdefault(parameter, {})[key] = value
    return state
