"""Log-probabilities of chosen tokens from hidden states, a chunk of tokens at a time.

The table of logits (M, V) is the largest thing a language model makes. Here it lives a chunk at a
time: forward, a chunk is kept for the backward pass only while all that is kept fits in
`KEPT_BYTES`, and made again there otherwise. Log-softmax is in float32 whatever the model computes
in. To add a way to compute: write a function of type `LogpsOf`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
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
    A second derivative through a fused head raises RuntimeError: use `exact`.
    """
    if _is_plain_linear(head):
        assert isinstance(head.module, nn.Linear)
        weight, bias = head.module.weight, head.module.bias
        dtype = computing_dtype(hidden.device, weight.dtype)
        hidden, weight = (hidden * head.scale).to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if not torch.is_grad_enabled():  # then nothing is kept for a backward pass
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            return _Fused.apply(hidden, weight, bias, target, with_collision)
    parts = [
        checkpoint(exact, head, hidden[some], target[some], with_collision, use_reentrant=False)
        for _, some in _chunks(len(target), head.vocabulary)
    ]
    token = torch.cat([part for part, _ in parts])
    return token, torch.cat([part for _, part in parts]) if with_collision else None


def _is_plain_linear(head: Head) -> bool:
    module = head.module
    return (
        type(module) is nn.Linear
        and type(module.weight) in (nn.Parameter, Tensor)  # a sharded weight is a DTensor
        and head.softcap is None
        and (module.bias is None or head.scale == 1.0)
    )


def computing_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """The type matrix products are computed in: autocast's where it is on."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else otherwise


class _Fused(torch.autograd.Function):
    """log p(target) of a linear head.

        d logp_t / d hidden_t = W[target_t] - sum_v p_tv W_v

    A table of exponentials is e = exp(logit - largest), so that p = e / total; dividing waits
    until after the products with it. Where the weight is frozen (an adapter is trained) the
    derivative above is taken in forward, so that no table is kept nor made twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, extra: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.train_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        token = hidden.new_empty(len(target), dtype=torch.float32)
        largest, total = torch.empty_like(token), torch.empty_like(token)
        collision = torch.empty_like(token) if extra else None
        slope = torch.empty_like(hidden if ctx.needs_input_grad[0] else hidden[:0])
        ctx.kept = {}
        room = KEPT_BYTES // (4 * len(weight)) if ctx.train_head else 0
        for start, some in _chunks(len(target), len(weight)):
            table = _logits(hidden[some], weight, bias)
            token[some] = table.gather(-1, target[some].unsqueeze(-1)).squeeze(-1)
            torch.amax(table, -1, out=largest[some])
            table.sub_(largest[some].unsqueeze(-1)).exp_()
            torch.sum(table, -1, out=total[some])
            if collision is not None:
                norm = torch.linalg.vector_norm(table, dim=-1)
                collision[some] = 2 * (norm / total[some]).log()
            if len(slope) and not ctx.train_head:
                mean = (table.to(weight.dtype) @ weight) / total[some].unsqueeze(-1)
                slope[some] = weight[target[some]] - mean
            if some.stop <= room:
                ctx.kept[start] = table
        token -= largest + total.log()
        work = (target, largest, total) if ctx.train_head else (slope,)
        ctx.save_for_backward(hidden, weight, bias, *work)
        if collision is not None:
            ctx.mark_non_differentiable(collision)
        return token, collision

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's own stub is looser
        ctx: Any, grad: Tensor, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        second = torch.is_grad_enabled()  # create_graph=True
        with torch.no_grad():
            grads = _Fused.gradients(ctx, grad)
        if second:  # autograd would take the gradients for constants, and say nothing
            inputs = ctx.saved_tensors[:3]
            grads = tuple(g if g is None else _Once.apply(g, *inputs) for g in grads)
        return (*grads, None, None)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden, weight and bias."""
        hidden, weight, bias, *work = ctx.saved_tensors
        if not ctx.train_head:
            (slope,) = work
            return slope * grad.unsqueeze(-1).to(slope.dtype), None, None
        target, largest, total = work
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for start, some in _chunks(len(target), len(weight)):
            table = ctx.kept.pop(start, None)
            if table is None:
                table = _logits(hidden[some], weight, bias)
                table.sub_(largest[some].unsqueeze(-1)).exp_()
            table = table.to(weight.dtype)
            by, each = grad[some].unsqueeze(-1), total[some].unsqueeze(-1)
            grad_hidden[some] = by * (weight[target[some]] - (table @ weight) / each)
            grad_weight = _minus_product(grad_weight, table, hidden[some] * (by / each))
            if grad_bias is not None:
                grad_bias -= table.float().T @ (by / each).squeeze(-1)
        grad_weight.index_add_(0, target, hidden.float() * grad.unsqueeze(-1))
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.index_add_(0, target, grad).to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias


class _Once(torch.autograd.Function):
    """A value made from `inputs` that may be used but not differentiated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs: Tensor | None) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("the chunked head has no second derivative; `exact` has")


def _chunks(tokens: int, vocabulary: int) -> Iterator[tuple[int, slice]]:
    """Start and place of each chunk whose float32 logits fill `CHUNK_BYTES`."""
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    for start in range(0, tokens, size):
        yield start, slice(start, min(start + size, tokens))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A fresh float32 table of logits."""
    return nn.functional.linear(hidden, weight, bias).float()


def _minus_product(into: Tensor, table: Tensor, hidden: Tensor) -> Tensor:
    """into - table^T hidden, summed in float32 over chunks."""
    hidden = hidden.to(table.dtype)
    if into.dtype == table.dtype:
        return into.addmm_(table.T, hidden, alpha=-1)
    return into.sub_(table.T @ hidden)
