"""DeepSpeed as an engine: ZeRO 1, 2 and 3 under the one loop.

DeepSpeed's own loop steps, clips, skips and saves by itself. Here it is driven pass by pass, so
that nothing of the run depends on it: the gradient's norm is known before a weight moves, the
learning rate and the norm are the settings', and a checkpoint holds whole tensors that any engine
resumes. It is an optional dependency (`prefloop[deepspeed]`), imported when a run asks for it.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from prefloop.settings import TrainSettings
from prefloop.trainer.engine import State, by_parameter
from prefloop.types import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
STAGES = (1, 2, 3)
NOT_OURS = {
    "optimizer": "the optimizer is AdamW with --lr, --beta1, --beta2 and --weight-decay",
    "scheduler": "the learning rate follows --lr, --schedule and --warmup",
    "train_micro_batch_size_per_gpu": "forward passes are cut by --token-budget",
    "tensor_parallel": "processes divide the batch, not the layers",
    "sequence_parallel_size": "processes divide the batch, not the rows",
    "managed_gradient_accumulation": "the loop says where a step ends",
}


def zero_config(given: Mapping[str, Any], settings: TrainSettings, processes: int) -> Any:
    """DeepSpeed's configuration for a run, from the one that was passed through.

    "auto" leaves a value to prefloop where a setting says it, else to DeepSpeed.

    Raises:
        UserError: it contradicts the settings, or asks for what is not supported.
    """
    config = _without_auto(given)
    for name, why in NOT_OURS.items():
        if name in config:
            raise UserError(
                f'DeepSpeed\'s {name} is {config[name]!r}, but {why}; leave it out or write "auto"'
            )
    _refuse_other("train_batch_size", config, settings.batch_size, "--batch-size")
    _refuse_other("gradient_clipping", config, settings.max_grad_norm, "--max-grad-norm")
    _refuse_other("gradient_accumulation_steps", config, 1, "--token-budget cuts a batch, and it")
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in STAGES:
        raise UserError(
            f"DeepSpeed's ZeRO stage is {zero.get('stage', 0)}, allowed are {STAGES}; stage 0 "
            "divides nothing, which torchrun does without DeepSpeed"
        )
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device") == "nvme":
            raise UserError(f'DeepSpeed\'s {part} to "nvme" is not supported; use "cpu" or "none"')
    for name in ("fp16", "bf16"):
        if config.get(name, {}).get("enabled"):
            raise UserError(
                f"DeepSpeed's {name} is on: it trains rounded copies of the weights"
                f"{' and skips steps' if name == 'fp16' else ''}. Take it out and give --precision "
                "bf16: weights stay float32, forward passes are bfloat16"
            )
    return config | {
        "train_batch_size": processes,  # its bookkeeping only: a pass is one "sample"
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _without_auto(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_auto(value) if isinstance(value, Mapping) else value
        for name, value in given.items()
        if value != "auto" and value is not None
    }


def _refuse_other(name: str, config: Mapping[str, Any], ours: float | int, where: str) -> None:
    if name in config and config[name] != ours:
        raise UserError(
            f"DeepSpeed's {name} is {config[name]}, but {where} is {ours}; make them equal or "
            'write "auto"'
        )


def start_zero(scorer: nn.Module, optimizer: torch.optim.Optimizer, config: Any) -> "Zero":
    """Hand a scorer and its optimizer to DeepSpeed; processes have found each other already."""
    deepspeed = import_module("deepspeed")
    engine, *_ = deepspeed.initialize(model=scorer, optimizer=optimizer, config=config)
    return Zero(engine, import_module("deepspeed.utils"))


@dataclass(frozen=True)
class Zero:
    """A policy in DeepSpeed's hands.

    Attributes:
        engine: DeepSpeed's, whose configuration is `zero_config`'s.
        reading: the module of DeepSpeed that reads and writes whole tensors of divided ones.
    """

    engine: Any
    reading: Any

    @property
    def scorer(self) -> nn.Module:
        """DeepSpeed's engine: calling it gathers weights where they are divided."""
        return self.engine

    @property
    def bare(self) -> nn.Module:
        """The scorer itself; under ZeRO 3 its weights are there during a pass only."""
        return self.engine.module

    def begin(self) -> None:
        """Forget the gradient."""
        self.engine.optimizer.zero_grad()

    def one_pass(self, last: bool) -> AbstractContextManager[object]:
        """ZeRO 1 exchanges gradients in the last pass of a step, 2 and 3 in every one."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed's backward pass, which moves no weight."""
        self.engine.backward(loss)

    def clip(self, most: float) -> float:
        """Norm of the gradient; DeepSpeed scales it in the step, to the same `most`."""
        if self._stage < 3:
            norm = float(self.engine.optimizer.scaled_global_norm())
            return norm if norm >= 0 else torch.nan  # it says -1 of one that is no number
        square = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for value in self._trained().values():
            square += self.reading.safe_get_local_grad(value).double().square().sum()
        torch.distributed.all_reduce(square)
        return float(square.sqrt())

    def move(self, lr: float) -> None:
        """One step of AdamW, of the part of the weights that this process moves."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()

    def weights(self, frozen: bool) -> dict[str, Tensor]:
        """Whole weights; empty but on the first process."""
        found = {
            name: self._kept(self.reading.safe_get_full_fp32_param(value))
            for name, value in self._trained().items()
        }
        for name, value in self._frozen().items() if frozen else ():
            with self._gathered([value]):
                found[name] = self._kept(value.data)
        return found if self._first else {}

    def whole(self) -> State:
        """Weights and moments, gathered from all processes."""
        moments = {}
        steps = [state["step"] for state in self._states() if "step" in state]
        for name, value in self._trained().items() if steps else ():
            for key in MOMENTS:
                read = self.reading.safe_get_full_optimizer_state(value, key)
                moments[f"{name}/{key}"] = self._kept(read)
            moments[f"{name}/step"] = torch.as_tensor(steps[0], dtype=torch.float32).cpu().clone()
        return State(self.weights(frozen=False), moments if self._first else {})

    def restore(self, state: State) -> None:
        """Each process takes its part of the whole tensors."""
        moments = by_parameter(state.moments)
        self._make_moments(moments)
        for name, value in self._trained().items():
            whole = state.model[name].to(self.engine.device)
            with self._gathered([value], modifier_rank=0):
                value.data.copy_(whole)
            self.reading.safe_set_full_fp32_param(value, whole)
            for key in MOMENTS if moments else ():
                moment = moments[name][key].to(self.engine.device)
                self.reading.safe_set_full_optimizer_state(value, moment, key)

    def _make_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """AdamW makes its moments in the first step; to be written they must be there before."""
        for flat in self._flat() if moments else ():
            state = self.engine.optimizer.optimizer.state[flat]
            step = next(iter(moments.values()))["step"]
            state["step"] = step.to(flat.device, torch.float32).clone()
            for key in MOMENTS:
                state[key] = torch.zeros_like(flat)
        if self._stage < 3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat(self) -> list[Tensor]:
        """The tensors that AdamW sees: this process's part of all weights, flat."""
        zero = self.engine.optimizer
        return (
            zero.single_partition_of_fp32_groups
            if self._stage < 3
            else zero.fp32_partitioned_groups_flat
        )

    def _states(self) -> list[dict[str, Any]]:
        state = self.engine.optimizer.optimizer.state
        return [state[flat] for flat in self._flat() if flat in state]

    def _trained(self) -> dict[str, nn.Parameter]:
        named = self.bare.named_parameters()
        return {name: value for name, value in named if value.requires_grad}

    def _frozen(self) -> dict[str, Tensor]:
        named = [*self.bare.named_parameters()]
        kept = {name: value for name, value in named if not value.requires_grad}
        state = self.bare.state_dict(keep_vars=True)
        buffers = {name: value for name, value in self.bare.named_buffers() if name in state}
        return kept | buffers

    def _gathered(self, values: list[Any], modifier_rank: int | None = None) -> Any:
        """Around a reading or writing of weights that are divided, which they may not be."""
        divided = [value for value in values if hasattr(value, "ds_id")]
        zero = import_module("deepspeed").zero
        return zero.GatheredParameters(divided, modifier_rank=modifier_rank)

    def _kept(self, value: Tensor) -> Tensor:
        """A copy on the CPU, where this process is the one that writes."""
        return value.detach().cpu().contiguous().clone() if self._first else torch.empty(0)

    @property
    def _first(self) -> bool:
        return torch.distributed.get_rank() == 0

    @property
    def _stage(self) -> int:
        return int(self.engine.zero_optimization_stage())
