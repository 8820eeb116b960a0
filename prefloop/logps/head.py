"""Log-probabilities of chosen tokens from hidden states, a chunk of tokens at a time.

The table of logits (M, V) is the largest thing a language model makes. Here it lives a chunk at a
time: forward, a chunk is kept for the backward pass only while all that is kept fits in
`KEPT_BYTES`, and made again there otherwise. Log-softmax is in float32 whatever the model computes
in. To add a way to compute: write a function of type `LogpsOf`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 * 2**20  # one chunk of float32 logits: large enough for a full-speed product
KEPT_BYTES = 256 * 2**20  # chunks kept from forward to backward, all together
PLAIN = (nn.Parameter, Tensor)  # the weight of a fused head; a sharded one is a DTensor


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
    sharded weight, a softcap) is called as the module it is, under activation checkpointing, and
    has derivatives of any order. A second derivative through a fused head raises RuntimeError: use
    `exact`.
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
    whole = _as_it_is_now(head)
    parts = [
        checkpoint(whole, hidden[some], target[some], with_collision, use_reentrant=False)
        for some in _chunks(len(target), head.vocabulary)
    ]
    token = torch.cat([part for part, _ in parts])
    return token, torch.cat([part for _, part in parts]) if with_collision else None


def _as_it_is_now(head: Head) -> Callable[[Tensor, Tensor, bool], Scored]:
    """`exact` of the head with the weights of this moment, whenever it is called.

    Backward computes it again. `torch.func.functional_call` has put the module's own weights back
    by then: the derivatives would be taken at those, and silently of them. Sharded weights are
    gathered by the module itself.
    """
    held: dict[str, Tensor] = dict(head.module.named_parameters())

    def again(hidden: Tensor, target: Tensor, with_collision: bool) -> Scored:
        now = dict(head.module.named_parameters())
        gathered = any(isinstance(weight, DTensor) for weight in held.values())
        if gathered or all(now[name] is weight for name, weight in held.items()):
            return exact(head, hidden, target, with_collision)
        module = _Holding(head.module, held)
        return exact(replace(head, module=module), hidden, target, with_collision)

    return again


class _Holding(nn.Module):
    """A module called with other weights than its own."""

    def __init__(self, module: nn.Module, held: dict[str, Tensor]):
        super().__init__()
        self.inner = (module,)  # in a tuple: not a submodule, its weights are not ours
        self.held = held

    def forward(self, hidden: Tensor) -> Tensor:
        return functional_call(self.inner[0], self.held, (hidden,))


def _is_plain_linear(head: Head) -> bool:
    module = head.module
    return (
        type(module) is nn.Linear
        and type(module.weight) in PLAIN
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

    A table holds p. Where the weight is frozen (an adapter is trained) the derivative above is
    taken in forward, so that no table is kept nor made twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, extra: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.train_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        token = hidden.new_empty(len(target), dtype=torch.float32)
        collision = torch.empty_like(token) if extra else None
        slope = torch.empty_like(hidden if ctx.needs_input_grad[0] else hidden[:0])
        tables = _Tables(len(target), len(weight), keep=ctx.train_head, device=hidden.device)
        for some in tables.chunks:
            logits = tables.logits(some, hidden, weight, bias)
            chosen = logits.gather(-1, target[some].unsqueeze(-1)).squeeze(-1)
            table, log_total = _softmax_(logits)
            torch.sub(chosen, log_total, out=token[some])
            if collision is not None:
                collision[some] = 2 * torch.linalg.vector_norm(table, dim=-1).log()
            if len(slope) and not ctx.train_head:
                slope[some] = weight[target[some]] - table.to(weight.dtype) @ weight
        ctx.tables = tables if ctx.train_head else tables.done()
        work = target if ctx.train_head else slope
        ctx.save_for_backward(hidden, weight, bias, work)
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
        hidden, weight, bias, work = ctx.saved_tensors
        if not ctx.train_head:
            return work * grad.unsqueeze(-1).to(work.dtype), None, None
        target, tables = work, ctx.tables
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for some in tables.chunks:
            table = tables.kept(some)
            if table is None:
                table, _ = _softmax_(tables.logits(some, hidden, weight, bias))
            if grad_bias is not None:
                grad_bias -= table.T @ grad[some]
            by, table = grad[some].unsqueeze(-1), table.to(weight.dtype)
            grad_hidden[some] = by * (weight[target[some]] - table @ weight)
            grad_weight = _minus_product(grad_weight, table, hidden[some] * by)
        ctx.tables = tables.done()
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


@dataclass
class _Tables:
    """Where the tables of one pass are: the first chunks in places of their own, as far as
    `KEPT_BYTES` go, all others one after the other in the place behind."""

    tokens: int
    vocabulary: int
    keep: bool
    device: torch.device
    memory: Float[Tensor, " X"] | None = None

    def __post_init__(self) -> None:
        self.chunks = list(_chunks(self.tokens, self.vocabulary))
        self.size = self.chunks[0].stop if self.chunks else 0
        room = KEPT_BYTES // (4 * self.vocabulary * max(1, self.size)) if self.keep else 0
        self.places = min(room, len(self.chunks))

    def logits(self, some: slice, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A chunk of logits in float32, at its place."""
        table = self._place(some)
        if weight.dtype != torch.float32:
            return table.copy_(nn.functional.linear(hidden[some], weight, bias))
        if bias is None:
            return torch.mm(hidden[some], weight.T, out=table)
        return torch.addmm(bias, hidden[some], weight.T, out=table)

    def kept(self, some: slice) -> Tensor | None:
        """The chunk's table if it is still there."""
        there = self.memory is not None and some.start < self.places * self.size
        return self._place(some) if there else None

    def done(self) -> "_Tables":
        """Give the memory back; what was kept has to be made again."""
        if self.memory is not None:
            _give(self.memory)
        self.memory, self.places = None, 0
        return self

    def _place(self, some: slice) -> Tensor:
        if self.memory is None:
            places = self.places + (self.places < len(self.chunks))
            tokens = min(places * self.size, self.tokens)
            self.memory = _take(tokens * self.vocabulary, self.device)
        first = min(some.start, self.places * self.size) * self.vocabulary
        count = (some.stop - some.start) * self.vocabulary
        return self.memory[first : first + count].view(-1, self.vocabulary)


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """The chunks whose float32 logits fill `CHUNK_BYTES`; the last may be smaller."""
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


# On a CPU the memory of the last pass waits here for the next one: fresh memory of this size costs
# a quarter of the pass in page faults. Accelerators have allocators that do this themselves.
_spare: list[Tensor] = []


def _take(elements: int, device: torch.device) -> Tensor:
    if device.type == "cpu" and _spare and _spare[-1].numel() >= elements:
        return _spare.pop()
    _spare.clear()
    with torch.inference_mode(False):  # what is made in that mode could not be written to later
        return torch.empty(elements, dtype=torch.float32, device=device)


def _give(memory: Tensor) -> None:
    if memory.device.type == "cpu" and not _spare:
        _spare.append(memory)


def _softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, in the memory of the logits, and log sum exp of each row.

    The largest probability is exp(largest logit - log sum exp): so one pass makes both.
    """
    largest = logits.amax(-1)
    table = torch.softmax(logits, -1, out=logits)
    return table, largest - table.amax(-1).log()


def _minus_product(into: Tensor, table: Tensor, hidden: Tensor) -> Tensor:
    """into - table^T hidden, summed in float32 over chunks."""
    hidden = hidden.to(table.dtype)
    if into.dtype == table.dtype:
        return into.addmm_(table.T, hidden, alpha=-1)
    return into.sub_(table.T @ hidden)
