"""A scorer that also gives the input embeddings, for objectives that differentiate by them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prefloop.logps.head import exact
from prefloop.logps.layout import table_shape
from prefloop.logps.scorer import Scorer
from prefloop.logps.ways import OneARow, causal_model
from prefloop.types import Tokenized


class EmbeddedScorer(Scorer):
    """log p of response tokens, and the embeddings (B, N, S, D) they were computed from.

    A response has a row of its own, so that its prompt's embeddings are its own too: S counts
    prompt and response. Attention and head can be differentiated twice. Without a gradient there
    are no embeddings.

    Args:
        model: a causal model of transformers, or one with an adapter of peft's.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model, token_budget=None, head=exact, way=OneARow())

    def forward(self, batch: Sequence[Tokenized]) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - one may be absent
        """token (B, N, T), mask (B, N, T), no collision, embeddings (B, N, S, D)."""
        if not torch.is_grad_enabled():
            return super().forward(batch)
        count, responses, _ = table_shape(batch)
        rows = [
            index * responses + place
            for index, row in enumerate(batch)
            for place in range(len(row.responses))
        ]
        kept: list[Tensor] = []

        def keep(module: nn.Module, given: object, found: Tensor) -> Tensor:
            at = torch.tensor(rows, device=found.device)
            whole = found.new_zeros(count * responses, *found.shape[1:]).index_copy(0, at, found)
            if not whole.requires_grad:  # an adapter leaves embeddings as they are
                whole.requires_grad_()
            kept.append(whole.unflatten(0, (count, responses)))
            return kept[-1].flatten(0, 1)[at]

        embedding = causal_model(self.model).get_input_embeddings()
        assert isinstance(embedding, nn.Module)
        handle = embedding.register_forward_hook(keep)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                token, mask = super().forward(batch)
        finally:
            handle.remove()
        return token, mask, None, kept[0]
