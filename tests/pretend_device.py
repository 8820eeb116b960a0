"""A device that is not there: tensors that lie on the CPU and say that they do not.

For the one kind of mistake that a machine without a GPU hides: a tensor of the model's device that
meets one of the CPU. A `Pretended` tensor has its data on the CPU and the device `DEVICE`. Under
`pretend_device` everything that asks for this device gets it, and an operation whose tensors are
partly there and partly on the CPU raises what CUDA raises, but for what CUDA allows:

- numbers (tensors without an axis) of the CPU as operands of pointwise operations;
- indices on the CPU, into a tensor of the device, but not the values that are put there;
- copies between devices.

So a result is the CPU's, and where it comes about at all nothing was mixed. Under autocast the
operations named below get the types that CUDA's would. It says nothing about kernels, memory, speed
or asynchrony.

The device is called "lazy": autograd runs its operations in the CPU's thread, and nothing else has
that name. What torch refuses to devices it does not know is put in `_stand_ins`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from prefloop.logps import head

DEVICE = torch.device("lazy", 0)

aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_, aten.copy, aten._copy_from}
# The places in the arguments of what has to be where the first argument is; the rest are indices.
INDEXED = {
    aten.index: (),
    aten._unsafe_index: (),
    aten.index_put: (2,),
    aten.index_put_: (2,),
    aten._index_put_impl_: (2,),
    aten._unsafe_index_put: (2,),
}
LOWERED = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "conv1d"}
LOWERED |= {"scaled_dot_product_attention"}  # autocast gives these its own type,
RAISED = {"softmax", "log_softmax", "layer_norm", "exp", "log", "pow", "rsqrt", "sum", "cumsum"}
# and these float32
POINTWISE = {aten.where, aten.masked_fill, aten.masked_fill_}  # beside those that torch marks


class MixedDevicesError(RuntimeError):
    """What CUDA would raise."""


class Pretended(Tensor):
    """A tensor of `DEVICE`; `there` is the same memory as a tensor of the CPU."""

    there: Tensor

    @staticmethod
    def __new__(cls, there: Tensor) -> "Pretended":
        made = Tensor._make_subclass(
            cls, there, False, dispatch_device=True, device_for_backend_keys=DEVICE
        )
        made.there = there
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return DEVICE

    def tolist(self) -> Any:
        return self.there.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.there.numpy()
        raise MixedDevicesError(
            f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy the "
            "tensor to host memory first."
        )

    def __format__(self, spec: str) -> str:
        return self.there.__format__(spec)

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pretended":
        made = Pretended(self.there.clone())
        made.requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            made._is_param = True
        return memo.setdefault(id(self), made)

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, Pretended), "`data` would move this tensor to another device"
        Tensor.data.__set__(self, value)
        self.there = value.there


class _Operations(TorchDispatchMode):
    """Sees what has no `Pretended` among its arguments: what makes tensors, what copies them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Sees what an operation does not: its generator, its lists, what autocast does before it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(kwargs.get("generator"), _Generator):
            _refuse_generator(func, args, kwargs)
        if _types and _types[-1] is not None:
            args, kwargs = _cast(func, args, kwargs, _types[-1])
        if func in (torch.tensor, torch.as_tensor) and isinstance(args[0], list | tuple):
            args = _mapped(lambda one: one.item() if isinstance(one, Tensor) else one, args)
        return func(*args, **kwargs)


_refused: set[torch.dtype] = set()
"""What the device has no numbers of."""
_types: list[torch.dtype | None] = []
"""What products are computed in, of each block of autocast that is open; None: as they are."""


class _Casting(contextlib.ContextDecorator):
    def __init__(self, kind: torch.dtype | None) -> None:
        self.kind = kind

    def __enter__(self) -> None:
        _types.append(self.kind)

    def __exit__(self, *error: object) -> None:
        _types.pop()


def _cast(func: Any, args: Any, kwargs: dict[str, Any], kind: torch.dtype) -> Any:
    name = getattr(func, "__name__", "")
    wanted = kind if name in LOWERED else torch.float32 if name in RAISED else None
    if wanted is None or "out" in kwargs:
        return args, kwargs

    def cast(value: Any) -> Any:
        small = isinstance(value, Pretended) and value.is_floating_point()
        return value.to(wanted) if small and value.dtype != torch.float64 else value

    return _mapped(cast, args), _mapped(cast, kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU's memory, and its results where they belong."""
    if func is torch.ops.prim.device.default:
        return DEVICE
    device = kwargs.get("device")
    _refuse_mixed(func, args, kwargs)
    wrappers: dict[int, Pretended] = {}

    def opened(value: Any) -> Any:
        if isinstance(value, Pretended):
            wrappers[id(value.there)] = value
            return value.there
        return value

    args, kwargs = _mapped(opened, args), _mapped(opened, kwargs)
    here = bool(wrappers)
    if device is not None:
        here = torch.device(device).type == DEVICE.type
        kwargs["device"] = torch.device("cpu") if here else device
    results = _here(func, args, kwargs, list(wrappers.values()))

    def closed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in wrappers:
            return wrappers[id(value)]
        if here and value.dtype in _refused:
            raise TypeError(f"Cannot convert a tensor of {DEVICE} to {value.dtype}: {func}")
        return Pretended(value) if here else value

    return _mapped(closed, results)


def _here(func: Any, args: Any, kwargs: Any, held: list[Pretended]) -> Any:
    """What the operation gives for tensors of the CPU, those that `held` holds among them."""
    before = [one.there.shape for one in held]
    if func is aten.histc.default and not args[0].is_floating_point():
        args = (args[0].float(), *args[1:])  # the CPU's counts no integers, CUDA's does
    results = func(*args, **kwargs)
    assert before == [one.there.shape for one in held], f"{func} changes the shape of an argument"
    return results


def _mapped(work: Callable[[Any], Any], value: Any) -> Any:
    """`value`, a tree of lists, tuples and dictionaries, with `work` done on what it holds."""
    if isinstance(value, list | tuple):
        return type(value)([_mapped(work, one) for one in value])
    if isinstance(value, dict):
        return {key: _mapped(work, one) for key, one in value.items()}
    return work(value)


def _tensors(*values: Any) -> list[Tensor]:
    """All tensors in some trees."""
    found: list[Tensor] = []
    _mapped(lambda one: found.append(one) if isinstance(one, Tensor) else None, list(values))
    return found


def _refuse_mixed(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    packet = func.overloadpacket
    if packet in COPIES:
        return
    if packet in INDEXED:
        _refuse_mixed_index(func, args, INDEXED[packet])
        return
    given = _tensors(args, kwargs)
    there = [value for value in given if isinstance(value, Pretended)]
    if not there or len(there) == len(given):
        return
    written = _written(func, args, kwargs)
    pointwise = torch.Tag.pointwise in func.tags or packet in POINTWISE
    for value in given:
        if not isinstance(value, Pretended):
            number = pointwise and value.ndim == 0 and not any(value is one for one in written)
            if not number:
                raise _mixed(func)


def _refuse_mixed_index(func: Any, args: Any, values: tuple[int, ...]) -> None:
    first = isinstance(args[0], Pretended)
    if not first and any(isinstance(value, Pretended) for value in args[1]):
        raise MixedDevicesError(
            f"indices should be either on cpu or on the same device as the indexed tensor (cpu): "
            f"{func}"
        )
    for place in values:
        value = args[place]
        if isinstance(value, Pretended) != first and (not first or value.ndim > 0):
            raise _mixed(func)


def _refuse_generator(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    tensors = _tensors(args)
    place = kwargs.get("device") or (tensors[0].device if tensors else "cpu")
    kind, found = torch.device(place).type, kwargs["generator"].device.type
    if kind != found:
        raise MixedDevicesError(
            f"Expected a '{kind}' device type for generator but found '{found}': {func}"
        )


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that the operation writes to."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found.extend(_tensors(value))
    return found


def _mixed(func: Any) -> MixedDevicesError:
    return MixedDevicesError(
        f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} "
        f"and cpu! ({func})"
    )


_Generator = torch.Generator


class _AnyGenerator(type(_Generator)):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _Generator)


class Generator(_Generator, metaclass=_AnyGenerator):
    """`torch.Generator` that can also be of `DEVICE`."""

    def __new__(cls, device: torch.device | str = "cpu") -> "Generator":
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


@contextlib.contextmanager
def pretend_device(without: torch.dtype | None = None) -> Iterator[torch.device]:
    """Inside, `DEVICE` can be used like a GPU's, and Accelerate's device is this one.

    A tensor of the type `without` cannot be there: Apple's GPUs have no float64.
    """
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    lifts = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        for target, name, value in _stand_ins():
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        for state in (PartialState, AcceleratorState, GradientState):
            stack.enter_context(mock.patch.dict(state._shared_state, clear=True))
        _refused.update({without} - {None})
        stack.callback(_refused.clear)
        stack.enter_context(mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE=str(DEVICE)))
        torch.__future__.set_swap_module_params_on_conversion(True)  # `.to` keeps parameters
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes its copy in our sight
        try:
            stack.enter_context(_Operations())
            stack.enter_context(_Calls())
            yield DEVICE
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)
            torch.__future__.set_swap_module_params_on_conversion(swaps)


def _stand_ins() -> Iterator[tuple[Any, str, Any]]:
    """What torch refuses to a device that it does not know, and what stands in for it."""
    enabled, named, autocast = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast
    available, swap = torch.amp.is_autocast_available, torch.utils.swap_tensors
    fused = [*_foreach_utils._get_fused_kernels_supported_devices(), DEVICE.type]

    def is_autocast_enabled(kind: str = "cuda") -> bool:
        return bool(_types and _types[-1]) if kind == DEVICE.type else enabled(kind)

    def get_autocast_dtype(kind: str) -> torch.dtype:
        return (_types and _types[-1]) or torch.bfloat16 if kind == DEVICE.type else named(kind)

    def cast(device_type: str, dtype: torch.dtype | None = None, **more: Any) -> Any:
        if device_type != DEVICE.type:
            return autocast(device_type, dtype=dtype, **more)
        return _Casting((dtype or torch.bfloat16) if more.get("enabled", True) else None)

    def swap_tensors(old: Tensor, new: Tensor) -> None:
        """`.to` of what is there already must not ask that nobody else holds it."""
        if isinstance(old, Pretended) and isinstance(new, Pretended):
            old.data = new.detach()
        else:
            swap(old, new)

    def get_rng_state(device: Any = None) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    module = SimpleNamespace(
        device_count=lambda: 1,
        get_rng_state=get_rng_state,
        set_rng_state=lambda state, device=None: None,
    )
    yield torch, "lazy", module
    yield torch, "is_autocast_enabled", is_autocast_enabled
    yield torch, "get_autocast_dtype", get_autocast_dtype
    yield torch, "autocast", cast
    yield torch.amp, "autocast", cast
    yield torch.amp, "is_autocast_available", lambda kind: kind == DEVICE.type or available(kind)
    yield torch.utils, "swap_tensors", swap_tensors
    yield torch, "Generator", Generator
    yield torch.accelerator, "is_available", lambda: True
    yield optimizer, "_get_fused_kernels_supported_devices", lambda: list(fused)
    yield head, "PLAIN", (*head.PLAIN, Pretended)
