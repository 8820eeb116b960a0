"""Log-probabilities of chosen tokens from hidden states, a chunk of tokens at a time.

The table of logits (M, V) is the largest thing a language model makes. Here it lives a chunk at a
time: forward, a chunk is kept for the backward pass only while all that is kept fits in
`KEPT_BYTES`, and made again there otherwise. Log-softmax is in float32 whatever the model computes
in. To add a way to compute: write a function of type `LogpsOf`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 * 2**20  # one chunk of float32 logits: large enough for a full-speed product
KEPT_BYTES = 256 * 2**20  # chunks kept from forward to backward, all together


@dataclass(frozen=True)
class Head:
    """The output layer of a model and what its configuration does to the logits.

        logits = softcap * tanh(scale * module(hidden) / softcap)      (no tanh without a softcap)

    Attributes:
        module: hidden states to raw logits.
        vocabulary: V.
        scale: factor on the raw logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: Gemma's final_logit_softcapping, or None.
    """

    module: nn.Module
    vocabulary: int
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
        """Logits in float32."""
        logits = self.module(hidden).float() * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


Scored: TypeAlias = tuple[Float[Tensor, " M"], Float[Tensor, " M"] | None]
LogpsOf: TypeAlias = Callable[[Head, Float[Tensor, "M D"], Int[Tensor, " M"], bool], Scored]


def exact(
    head: Head, hidden: Float[Tensor, "M D"], target: Int[Tensor, " M"], with_collision: bool
) -> Scored:
    """log p of each target, and log sum_v p^2 if asked: the whole table, ordinary autograd.

    Derivatives of any order; memory M V. The collision carries no gradient here or in `chunked`.
    """
    logits = head.logits(hidden)
    logp = logits.log_softmax(-1)
    collision = (2 * logp.detach()).logsumexp(-1) if with_collision else None
    return logp.gather(-1, target.unsqueeze(-1)).squeeze(-1), collision


def chunked(
    head: Head, hidden: Float[Tensor, "M D"], target: Int[Tensor, " M"], with_collision: bool
) -> Scored:
    """The same numbers and first derivatives as `exact`, with a chunk of logits in memory.

    A plain linear head is fused. A head with something around it (an adapter, a saved copy, a
    sharded weight, a softcap) is called as the module it is, under activation checkpointing.
    A second derivative through the fused head raises: use `exact`.
    """
    if _is_plain_linear(head):
        assert isinstance(head.module, nn.Linear)
        weight, bias = head.module.weight, head.module.bias
        dtype = computing_dtype(hidden.device, weight.dtype)
        hidden, weight = (hidden * head.scale).to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return _Fused.apply(hidden, weight, bias, target, with_collision)
    size = _chunk_size(head.vocabulary)
    token, collision = [hidden.new_zeros(0, dtype=torch.float32)], []
    for start in range(0, len(target), size):
        some, theirs = slice(start, start + size), None
        part, theirs = checkpoint(
            exact, head, hidden[some], target[some], with_collision, use_reentrant=False
        )
        token.append(part)
        collision.append(theirs)
    return torch.cat(token), torch.cat(collision) if with_collision and collision else None


def _is_plain_linear(head: Head) -> bool:
    module = head.module
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter  # a sharded weight is a DTensor
        and head.softcap is None
        and (module.bias is None or head.scale == 1.0)
    )


def computing_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """The type matrix products are computed in: autocast's where it is on."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else otherwise


def _chunk_size(vocabulary: int) -> int:
    return max(1, CHUNK_BYTES // (4 * vocabulary))


class _Fused(torch.autograd.Function):
    """log p(target) of a linear head.

        d logp_t / d hidden_t = W[target_t] - sum_v p_tv W_v

    What is kept or made again is p, a chunk at a time. Where the weight is frozen (an adapter is
    trained) the derivative above is taken in forward, so that p is never kept nor made twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, extra: bool
    ) -> tuple[Tensor, Tensor | None]:
        train_head = weight.requires_grad or (bias is not None and bias.requires_grad)
        size = _chunk_size(len(weight))
        token = hidden.new_empty(len(target), dtype=torch.float32)
        collision = torch.empty_like(token) if extra else None
        log_total = torch.empty_like(token)
        slope = torch.empty_like(hidden) if hidden.requires_grad and not train_head else None
        kept: list[Tensor] = []
        room = KEPT_BYTES // (4 * len(weight)) if train_head else 0
        for start in range(0, len(target), size):
            some = slice(start, min(start + size, len(target)))
            table = _logits(hidden[some], weight, bias)
            token[some] = table.gather(-1, target[some].unsqueeze(-1)).squeeze(-1)
            log_total[some] = _softmax_(table)
            if collision is not None:
                collision[some] = 2 * torch.linalg.vector_norm(table, dim=-1).log()
            if slope is not None:
                slope[some] = weight[target[some]] - table.to(weight.dtype) @ weight
            if some.stop <= room:
                kept.append(table)
        token -= log_total
        saved = (hidden, weight, bias, target, log_total) if train_head else (slope,)
        ctx.save_for_backward(*saved)
        ctx.kept, ctx.train_head = kept, train_head
        if collision is not None:
            ctx.mark_non_differentiable(collision)
        return token, collision

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's own stub is looser
        ctx: Any, grad: Tensor, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if not ctx.train_head:
            (slope,) = ctx.saved_tensors
            return (slope * grad.unsqueeze(-1).to(slope.dtype), None, None, None, None)
        hidden, weight, bias, target, log_total = ctx.saved_tensors
        size = _chunk_size(len(weight))
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for index, start in enumerate(range(0, len(target), size)):
            some = slice(start, start + size)
            if index < len(ctx.kept):
                table = ctx.kept[index]
                ctx.kept[index] = None
            else:
                table = _logits(hidden[some], weight, bias)
                table.sub_(log_total[some].unsqueeze(-1)).exp_()
            table = table.to(weight.dtype)
            by = grad[some].unsqueeze(-1).to(hidden.dtype)
            torch.mul(weight[target[some]] - table @ weight, by, out=grad_hidden[some])
            grad_weight = _minus_product(grad_weight, table, hidden[some] * by)
            if grad_bias is not None:
                grad_bias -= table.float().T @ grad[some]
        grad_weight.index_add_(0, target, hidden.float() * grad.unsqueeze(-1))
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.index_add_(0, target, grad).to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A fresh float32 table of logits."""
    return nn.functional.linear(hidden, weight, bias).float()


def _softmax_(table: Tensor) -> Tensor:
    """Turn logits into probabilities in place; returns the log of the sum of exponentials."""
    largest = table.amax(-1, keepdim=True)
    total = table.sub_(largest).exp_().sum(-1, keepdim=True)
    table.div_(total)
    return (largest + total.log()).squeeze(-1)


def _minus_product(into: Tensor, table: Tensor, hidden: Tensor) -> Tensor:
    """into - table^T hidden, summed in float32 over chunks."""
    if into.dtype == table.dtype:
        return into.addmm_(table.T, hidden, alpha=-1)
    return into.sub_(table.T @ hidden)
