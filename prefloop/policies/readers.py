"""Models that read token by token: a cache that grows in place, and two models in one batch.

A `Reader` takes the next tokens of R rows and gives the next-token logits of S sources. With S = 2
the sources are the reference and the policy: one model run once on 2 R rows, its adapter off in
the first half. Two models are two readers, whose logits the caller stacks.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from prefloop.policies.policy import Policy, active_adapter

GROWTH = 64  # tokens by which a full buffer grows

Switch = Callable[[int], AbstractContextManager[None]]


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in a buffer that is written in place.

    The layer of `transformers` copies everything it holds for each new token; on a CPU that is up
    to half the time of a decoding step.
    """

    buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the states of new tokens; all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self.buffers is None or new > self.buffers[0].shape[-2]:
            room = new + GROWTH
            self.buffers = (
                _grown(self.keys, key_states, room),
                _grown(self.values, value_states, room),
            )
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., old:new, :] = states
        self.keys, self.values = (buffer[..., :new, :] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, in that order; a row may be taken more than once."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[beam_idx], self.values[beam_idx]
            self.buffers = None


def _grown(held: Tensor | None, states: Tensor, room: int) -> Tensor:
    *lead, _, width = states.shape
    buffer = states.new_empty(*lead, room, width)
    if held is not None and held.numel():
        buffer[..., : held.shape[-2], :] = held
    return buffer


def growing_cache(model: PreTrainedModel) -> Cache:
    """The cache that `model` wants, with plain layers replaced by growing ones."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


@dataclass(eq=False)
class Reader:
    """Reads rows of tokens with `model`, keeping its own cache.

    Attributes:
        model: what is called.
        base: the model of `transformers` inside it.
        sources: how many sources it gives logits for; the rows are repeated as often.
        switch: entered around every call with the number of rows; sets adapters.
        padded: some row has padding, so a mask is needed.
    """

    model: nn.Module
    base: PreTrainedModel
    sources: int = 1
    switch: Switch = lambda rows: nullcontext()
    padded: bool = True
    cache: Cache = field(init=False)
    accepts: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.cache = growing_cache(self.base)
        self.accepts = frozenset(inspect.signature(self.base.forward).parameters)

    def read(self, tokens: Int[Tensor, "R L"], mask: Bool[Tensor, "R M"]) -> Float[Tensor, "S R V"]:
        """Logits of the token after each row's last, in float32; `mask` covers all read so far."""
        rows, length = tokens.shape
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        given: dict[str, Any] = {"use_cache": True}
        recurrent = "cache_params" in self.accepts  # Mamba and its kin: a state, not a past
        given["cache_params" if recurrent else "past_key_values"] = self.cache
        if self.padded:
            seen = mask[:, -length:] if recurrent else mask
            given["attention_mask"] = seen.long().repeat(self.sources, 1)
        if "position_ids" in self.accepts:
            given["position_ids"] = positions.repeat(self.sources, 1)
        if "logits_to_keep" in self.accepts:
            given["logits_to_keep"] = 1
        with self.switch(self.sources * rows):
            out = self.model(input_ids=tokens.repeat(self.sources, 1), **given)
        return out.logits[:, -1].float().unflatten(0, (self.sources, rows))

    def select(self, rows: Int[Tensor, " R"], of: int) -> None:
        """Go on with `rows` of the `of` rows that were read; a row may be taken more than once."""
        parts = [rows + source * of for source in range(self.sources)]
        self.cache.reorder_cache(torch.cat(parts))  # pyright: ignore[reportArgumentType] - it asks for a LongTensor


@dataclass(frozen=True)
class Needs:
    """Which of the two models a distribution is made of."""

    reference: bool
    policy: bool


@contextmanager
def readers(policy: Policy, needs: Needs, padded: bool) -> Iterator[list[Reader]]:
    """Readers whose logits, stacked, are those of the needed sources: reference first, then policy.

    The model is in eval mode inside the block.
    """
    with ExitStack() as stack:
        was_training = policy.model.training
        stack.callback(policy.model.train, was_training)
        policy.model.eval()
        if needs.reference and needs.policy:
            yield _both(policy, padded)
        elif needs.policy:
            yield [Reader(policy.model, policy.base, padded=padded)]
        else:
            model = stack.enter_context(policy.reference())
            base = policy.base if policy.frozen is None else policy.frozen
            yield [Reader(model, base, padded=padded)]


def _both(policy: Policy, padded: bool) -> list[Reader]:
    model, base = policy.model, policy.base
    if policy.frozen is not None:
        return [
            Reader(policy.frozen, policy.frozen, padded=padded),
            Reader(model, base, padded=padded),
        ]
    if isinstance(model, PeftModel) and _mixes(model):

        def mixed(rows: int) -> AbstractContextManager[None]:
            names = ["__base__"] * (rows // 2) + [active_adapter(model)] * (rows // 2)
            return adapters_by_row(model, names)

        return [Reader(model, base, sources=2, switch=mixed, padded=padded)]

    def adapter_off(rows: int) -> AbstractContextManager[Any]:
        return policy.reference()

    off = Reader(model, base, switch=adapter_off, padded=padded)
    return [off, Reader(model, base, padded=padded)]


def _mixes(model: PeftModel) -> bool:
    """Whether peft can run rows with and without this adapter as one batch."""
    config = model.active_peft_config
    return isinstance(config, LoraConfig) and not config.use_dora and not config.modules_to_save


@contextmanager
def adapters_by_row(model: PeftModel, names: Sequence[str]) -> Iterator[None]:
    """Inside the block row i of every forward uses the adapter `names[i]`; "__base__" is none.

    The layers of peft take the names as an argument. `model(adapter_names=...)` passes it with the
    help of hooks that it leaves behind when the forward raises, and the next plain forward then
    uses stale names without a word. Here the hooks go whatever happens.
    """
    assert not model.training, "adapters by row are for eval mode"

    def with_names(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"adapter_names": list(names)}

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                hook = module.register_forward_pre_hook(with_names, with_kwargs=True)
                stack.callback(hook.remove)
        yield
