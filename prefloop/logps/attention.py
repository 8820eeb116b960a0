"""Attention over rows that share one line, registered with transformers as "prefix_shared".

For each comparison: the prompt attends to itself, each response to the prompt and to itself. So
nothing is computed that a mask would throw away, no (L, L) mask exists, and there is no padding.

The picture of the line travels where transformers hands a four-dimensional mask through untouched:
as an int64 tensor (1, 1, 1 + S, 2), a type no real mask has: (-1, window) and then (segment,
length) of each piece. Anything else that arrives here goes on to transformers' own SDPA attention,
so a model switched over generates, trains and saves as before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "prefix_shared"
# What a layer may say of its attention: read here, or of no consequence.
KNOWN = {"dropout", "scaling", "sliding_window", "is_causal", "position_ids", "cache_position"}
ROUND = 128  # band masks are made for multiples of this many tokens, so that they are made rarely


def register() -> None:
    """Make "prefix_shared" known to transformers; doing it twice is harmless."""
    AttentionInterface.register(NAME, prefix_shared_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def as_mask(pieces: list[tuple[int, int]], window: int | None) -> Int[Tensor, "1 1 S 2"]:
    """The picture of a line for layers that see `window` positions back, or all (None)."""
    return torch.tensor([(-1, window or 0), *pieces])[None, None]


def prefix_shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,  # transformers' interface: every model passes its own
) -> tuple[Tensor, None]:
    """Attention of a line of rows (see above), or transformers' own for any other mask."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    unknown = {name for name, value in options.items() if value is not None and value is not False}
    if unknown := unknown - KNOWN:
        raise ValueError(f"prefix-shared attention does not know {', '.join(sorted(unknown))}")
    (_, window), *pieces = attention_mask[0, 0].tolist()
    if (options.get("sliding_window") or 0) != window:
        raise ValueError(
            f"the layer's sliding window is {options.get('sliding_window')}, but {window or None} "
            "by the model's configuration"
        )
    with _precise_on_cpus(query.device) as cast:
        output = _by_segment(
            (cast(query), cast(key), cast(value)),
            [(segment, length) for segment, length in pieces],
            window=window or None,
            dropout=options.get("dropout", 0.0),
            scale=options.get("scaling"),
        )
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


@contextmanager
def _precise_on_cpus(device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """What to do with states before attention: on a CPU, float32.

    There the backward pass of attention in bfloat16 takes two to three times as long as in float32.
    """
    if device.type != "cpu":
        yield lambda state: state
        return
    with torch.autocast("cpu", enabled=False):
        yield lambda state: state if state.dtype == torch.float64 else state.float()


@dataclass(frozen=True)
class _Masks:
    """Additive masks of one line: cut from two bands, one for prompts and one for responses."""

    prompts: Float[Tensor, "P P2"]
    responses: Float[Tensor, "T T2"]

    def of(self, segment: int, length: int, seen: int) -> Float[Tensor, "1 1 Q K"]:
        """The mask of `length` queries that are the last of `seen` keys."""
        band = self.prompts if segment == 0 else self.responses
        first = band.shape[1] - band.shape[0] - (seen - length)
        return band[:length, first : first + seen][None, None]


def _by_segment(
    states: tuple[Tensor, Tensor, Tensor],
    pieces: list[tuple[int, int]],
    window: int | None,
    dropout: float,
    scale: float | None,
) -> Float[Tensor, "1 H L F"]:
    masks = _masks(pieces, window, states[0])
    lengths = [length for _, length in pieces]
    outputs = []
    prompt_key = prompt_value = states[1][:, :, :0]
    queries, keys, values = (state.split(lengths, dim=2) for state in states)
    for (segment, length), query, key, value in zip(pieces, queries, keys, values, strict=True):
        if segment == 0:
            prompt_key, prompt_value = key, value
        else:
            key = torch.cat([prompt_key, key], dim=2)
            value = torch.cat([prompt_value, value], dim=2)
        causal = segment == 0 and (window is None or length <= window)
        outputs.append(
            scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if causal else masks.of(segment, length, key.shape[2]),
                dropout_p=dropout,
                is_causal=causal,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, dim=2)


def _masks(pieces: list[tuple[int, int]], window: int | None, query: Tensor) -> _Masks:
    prompt = max(length for segment, length in pieces if segment == 0)
    response = max((length for segment, length in pieces if segment > 0), default=0)
    windowed = window is not None and prompt > window
    return _Masks(
        _band(_rounded(prompt) if windowed else 0, 0, window, query.dtype, query.device),
        _band(_rounded(response), _rounded(prompt), window, query.dtype, query.device),
    )


def _rounded(length: int) -> int:
    return -(-length // ROUND) * ROUND


@lru_cache(maxsize=4)  # the layers of a model ask for the same few, again and again
@torch.inference_mode(False)
def _band(
    length: int, behind: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "Q K"]:
    """0 where query i may see key j, the most negative number elsewhere.

    Query i stands at i + behind, and sees what is at most that far and less than `window` back.
    """
    queries = torch.arange(behind, behind + length, device=device).unsqueeze(1)
    back = queries - torch.arange(behind + length, device=device)
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    band = torch.zeros(length, behind + length, dtype=dtype, device=device)
    return band.masked_fill_(hidden, torch.finfo(dtype).min)
