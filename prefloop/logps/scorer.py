"""Model and rows to log-probabilities: the module that trainers and scores call."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefloop.logps.head import Head, LogpsOf, chunked
from prefloop.logps.layout import Layout, Padded, additive_mask, buckets, pad, shared
from prefloop.types import Tokenized


class Scorer(nn.Module):
    def __init__(
        self,
        model: nn.Module,
        *,
        layout: Layout = shared,
        token_budget: int | None = 8192,
        head: LogpsOf = chunked,
        with_collision: bool = False,
    ):
        super().__init__()
        self.model = model
        self.layout = layout
        self.token_budget = token_budget
        self.head = head
        self.with_collision = with_collision

    def forward(self, batch: Sequence[Tokenized]) -> tuple[Tensor, ...]:
        shape = table_shape(batch)
        base = causal_model(self.model)
        device = base.device
        hidden, target, place = [], [], []
        for group in self.groups(batch):
            rows = [row for index in group for row in self.layout(index, batch[index])]
            padded = pad(batch, rows, shape)
            hidden.append(predicting_states(base, padded))
            target.append(padded.target)
            place.append(padded.place)
        token, collision = self.head(
            model_head(base), torch.cat(hidden), torch.cat(target).to(device), self.with_collision
        )
        where = torch.cat(place).to(device)
        tables = [spread(token, where, shape), response_mask(batch, shape, device)]
        if collision is not None:
            tables.append(spread(collision, where, shape))
        return tuple(tables)

    def groups(self, batch: Sequence[Tokenized]) -> list[list[int]]:
        if self.token_budget is None:
            return [list(range(len(batch)))]
        return buckets(batch, self.token_budget, self.layout)


def table_shape(batch: Sequence[Tokenized]) -> tuple[int, int, int]:
    """(B, N, T) of the table that `batch` is scored into."""
    count = max(len(row.responses) for row in batch)
    longest = max(len(response) for row in batch for response in row.responses)
    return len(batch), count, longest


def response_mask(
    batch: Sequence[Tokenized], shape: tuple[int, int, int], device: torch.device
) -> Bool[Tensor, "B N T"]:
    """Where a response has a token."""
    lengths = torch.zeros(shape[:2], dtype=torch.long)
    for index, row in enumerate(batch):
        lengths[index, : len(row.responses)] = torch.tensor([len(r) for r in row.responses])
    return (torch.arange(shape[2]) < lengths.unsqueeze(-1)).to(device)


def spread(
    flat: Float[Tensor, " M"], place: Tensor, shape: tuple[int, int, int]
) -> Float[Tensor, "B N T"]:
    """The flat numbers at their places of a (B, N, T) table of zeros."""
    size = shape[0] * shape[1] * shape[2]
    return flat.new_zeros(size).index_copy(0, place, flat).reshape(shape)


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `model`: itself, or what an adapter wraps."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def model_head(base: PreTrainedModel) -> Head:
    module = base.get_output_embeddings()
    config = base.config.get_text_config()
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    return Head(module, config.vocab_size, scale, getattr(config, "final_logit_softcapping", None))


def predicting_states(base: PreTrainedModel, padded: Padded) -> Float[Tensor, "M D"]:
    """Last hidden states of the tokens that predict a response token, in the rows' order."""
    device = base.device
    if padded.plain:
        seen = {}
    else:
        positions = padded.positions.to(device)
        seen = {"position_ids": positions, "attention_mask": masks(base, padded, positions)}
    hidden = base.base_model(
        input_ids=padded.tokens.to(device), use_cache=False, **seen
    ).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, padded.source.to(device))


def masks(base: PreTrainedModel, padded: Padded, positions: Tensor) -> Tensor | dict[str, Tensor]:
    config = base.config.get_text_config()
    block = padded.block.to(positions.device)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return additive_mask(block, positions, base.dtype, window)
    made = {}
    if "full_attention" in layer_types:
        made["full_attention"] = additive_mask(block, positions, base.dtype)
    if "sliding_attention" in layer_types:
        made["sliding_attention"] = additive_mask(block, positions, base.dtype, window)
    return made
