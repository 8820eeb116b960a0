"""Ways to get the states that predict response tokens out of a transformers model.

From the fastest to the one that works for everything. All give the same numbers; a model that a way
does not suit is found out by comparing with the last one (see `check.py`). To add a way: a frozen
dataclass with the three things `Way` asks for, and its place in `LADDER`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefloop.logps import attention
from prefloop.logps.head import Head, computing_dtype
from prefloop.logps.layout import Row, Sheet, additive_mask, separate, shared
from prefloop.types import Tokenized, UserError

States: TypeAlias = Float[Tensor, "M D"]


@runtime_checkable
class Way(Protocol):
    """How comparisons become rows, rows become states, and states become logits."""

    padded: ClassVar[bool]

    def rows(self, comparison: int, tokenized: Tokenized) -> list[Row]:
        """The rows of one comparison."""
        ...

    def states(self, model: nn.Module, sheet: Sheet) -> States:
        """What the head turns into the distribution of each response token, in order."""
        ...

    def head(self, model: nn.Module) -> Head:
        """What turns `states` into logits."""
        ...


@dataclass(frozen=True)
class PrefixShared:
    """All rows in one line, the prompt once each, attention piece by piece: no padding, no mask.

    The model's attention implementation is switched from "sdpa" to "prefix_shared" for good; in
    every other use it is the same SDPA.
    """

    padded: ClassVar[bool] = False

    def rows(self, comparison: int, tokenized: Tokenized) -> list[Row]:
        return shared(comparison, tokenized)

    def states(self, model: nn.Module, sheet: Sheet) -> States:
        base = causal_model(model)
        if base.config._attn_implementation == "sdpa":
            attention.register()
            base.set_attn_implementation(attention.NAME)
        if base.config._attn_implementation != attention.NAME:
            raise ValueError(f"attention is {base.config._attn_implementation!r}, not 'sdpa'")
        masks = _by_layer_type(base, lambda window: attention.as_mask(sheet.pieces, window))
        return _masked_states(base, sheet, masks)

    def head(self, model: nn.Module) -> Head:
        return output_head(causal_model(model))


@dataclass(frozen=True)
class Masked:
    """Padded rows with the prompt once each, under an additive four-dimensional mask.

    A comparison whose responses are cheaper apart gets a row a response: attention over a shared
    row grows with the square of the whole row. The cost of a row of L tokens is taken as
    L + L^2 / (3 width): a token's matrix products against its attention, per layer.

    Attributes:
        width: hidden size of the model.
    """

    width: int = 1024
    padded: ClassVar[bool] = True

    def rows(self, comparison: int, tokenized: Tokenized) -> list[Row]:
        together, apart = shared(comparison, tokenized), separate(comparison, tokenized)
        return together if self._cost(together) <= self._cost(apart) else apart

    def _cost(self, rows: list[Row]) -> float:
        return sum(row.length + row.length**2 / (3 * self.width) for row in rows)

    def states(self, model: nn.Module, sheet: Sheet) -> States:
        base = causal_model(model)
        segment, positions = sheet.segment.to(base.device), sheet.positions.to(base.device)
        dtype = computing_dtype(base.device, base.dtype)
        masks = _by_layer_type(
            base, lambda window: additive_mask(segment, positions, dtype, window)
        )
        return _masked_states(base, sheet, masks)

    def head(self, model: nn.Module) -> Head:
        return output_head(causal_model(model))


@dataclass(frozen=True)
class OneARow:
    """One response a row, padded on the right, no mask: right for every causal decoder."""

    padded: ClassVar[bool] = True

    def rows(self, comparison: int, tokenized: Tokenized) -> list[Row]:
        return separate(comparison, tokenized)

    def states(self, model: nn.Module, sheet: Sheet) -> States:
        base = causal_model(model)
        return _states(base, sheet, {})

    def head(self, model: nn.Module) -> Head:
        return output_head(causal_model(model))


@dataclass(frozen=True)
class FullLogits:
    """One response a row, and the model's own logits: what the other ways are compared with."""

    padded: ClassVar[bool] = True

    def rows(self, comparison: int, tokenized: Tokenized) -> list[Row]:
        return separate(comparison, tokenized)

    def states(self, model: nn.Module, sheet: Sheet) -> States:
        device = causal_model(model).device
        logits = model(input_ids=sheet.tokens.to(device), use_cache=False).logits
        return logits.flatten(0, 1).index_select(0, sheet.source.to(device))

    def head(self, model: nn.Module) -> Head:
        return Head(nn.Identity(), _text_config(causal_model(model)).vocab_size)


def ladder(model: nn.Module) -> tuple[Way, ...]:
    """The ways to try, fastest first; the last one always works."""
    width = _text_config(causal_model(model)).hidden_size
    return PrefixShared(), Masked(width), OneARow(), FullLogits()


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `model`: itself, or what an adapter of peft's wraps.

    Raises:
        UserError: something else, or an adapter that adds tokens to the prompt.
    """
    if isinstance(model, PreTrainedModel):
        return model
    from peft import PeftModel  # 2 s to import, and only adapters need it

    if not isinstance(model, PeftModel):
        raise UserError(
            f"a {type(model).__name__} cannot be scored; a causal model of transformers can, or "
            "one with an adapter of peft's around it"
        )
    if model.active_peft_config.is_prompt_learning:
        raise UserError(
            f"adapter of type {model.active_peft_config.peft_type}: adapters that add tokens "
            "to the prompt cannot share it; use one that changes weights, such as LoRA"
        )
    return model.get_base_model()  # pyright: ignore[reportReturnType] - a plain nn.Module to pyright


def output_head(base: PreTrainedModel) -> Head:
    """The output layer of a causal model, with the factors its configuration names."""
    config = _text_config(base)
    module = base.get_output_embeddings()
    assert isinstance(module, nn.Module), f"{type(base).__name__} has no output layer"
    return Head(
        module,
        config.vocab_size,
        scale=getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _text_config(base: PreTrainedModel) -> PreTrainedConfig:
    return base.config.get_text_config(decoder=True)


def _by_layer_type(
    base: PreTrainedModel, mask: Callable[[int | None], Tensor]
) -> Tensor | dict[str, Tensor]:
    """The mask for a window, for models with one kind of layers; a mask for each kind otherwise."""
    config = _text_config(base)
    window: int | None = getattr(config, "sliding_window", None)  # most configurations have none
    types: set[str] = set(getattr(config, "layer_types", None) or [])
    if unknown := types - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of type {', '.join(sorted(unknown))} cannot share a prompt")
    if not types:
        return mask(window)
    return {kind: mask(window if kind == "sliding_attention" else None) for kind in types}


def _masked_states(base: PreTrainedModel, sheet: Sheet, mask: Tensor | dict[str, Tensor]) -> States:
    positions = sheet.positions.to(base.device)
    return _states(base, sheet, {"position_ids": positions, "attention_mask": mask})


def _states(base: PreTrainedModel, sheet: Sheet, inputs: dict[str, Any]) -> States:
    tokens = sheet.tokens.to(base.device)
    hidden = base.base_model(input_ids=tokens, use_cache=False, **inputs).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, sheet.source.to(base.device))
