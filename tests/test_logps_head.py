"""The chunked head: numbers by hand, the gradients of the plain way, and how much it holds."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from prefloop.logps import chunked, exact, head
from prefloop.logps.head import Head

TOKENS, WIDTH, VOCABULARY = 23, 5, 37


def linear(bias=False, seed=0, trained=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    return made.requires_grad_(trained)


def inputs(seed=0):
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=rng).mul_(3).requires_grad_()
    return hidden, torch.randint(VOCABULARY, (TOKENS,), generator=rng)


class Wrapped(nn.Module):
    """A head with something around it, as adapters have."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden) + 0.5 * hidden.sum(-1, keepdim=True).cos()


@pytest.fixture(params=[1, 4, 10**6])
def chunk(request, monkeypatch):
    """Tokens in a chunk: one, a few (with a remainder), all."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * VOCABULARY * request.param)


def test_log_probabilities_by_hand():
    module = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    hidden = torch.tensor([[math.log(2), math.log(5)], [0.0, 0.0]])
    # logits (log 2, log 5, 0): p = 2/8, 5/8, 1/8; then all equal: p = 1/3
    token, collision = chunked(Head(module, 3), hidden, torch.tensor([1, 2]), True)
    torch.testing.assert_close(token, torch.tensor([math.log(5 / 8), math.log(1 / 3)]))
    squares = torch.tensor([(4 + 25 + 1) / 64, 3 / 9])  # sum of p^2
    torch.testing.assert_close(collision, squares.log())


HEADS = {
    "linear": lambda: Head(linear(), VOCABULARY),
    "bias": lambda: Head(linear(bias=True), VOCABULARY),
    "scale": lambda: Head(linear(), VOCABULARY, scale=0.25),
    "scale and bias": lambda: Head(linear(bias=True), VOCABULARY, scale=0.25),
    "softcap": lambda: Head(linear(), VOCABULARY, softcap=2.0),
    "frozen": lambda: Head(linear(trained=False), VOCABULARY),
    "frozen, bias": lambda: Head(linear(bias=True, trained=False), VOCABULARY),
    "wrapped": lambda: Head(Wrapped(linear()), VOCABULARY),
    "logits": lambda: Head(nn.Identity(), WIDTH),
}


@pytest.mark.parametrize("kept", [0, 4 * VOCABULARY * 9, 10**9])
@pytest.mark.parametrize("name", HEADS)
def test_chunks_give_the_numbers_and_gradients_of_the_whole_table(name, kept, chunk, monkeypatch):
    monkeypatch.setattr(head, "KEPT_BYTES", kept)
    made = HEADS[name]()
    hidden, target = inputs()
    target = target % WIDTH if name == "logits" else target
    weight = torch.linspace(-1, 2, TOKENS)
    trained = [hidden, *(p for p in made.module.parameters() if p.requires_grad)]
    expected, expected_collision = exact(made, hidden, target, True)
    found, collision = chunked(made, hidden, target, True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(collision, expected_collision)
    for one, other in zip(
        torch.autograd.grad(found @ weight, trained),
        torch.autograd.grad(expected @ weight, trained),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


def test_gradients_can_be_taken_twice_when_the_graph_is_kept(chunk):
    hidden, target = inputs()
    made = Head(linear(), VOCABULARY)
    token, _ = chunked(made, hidden, target, False)
    (first,) = torch.autograd.grad(token.sum(), made.module.weight, retain_graph=True)
    head._spare[0].fill_(torch.nan)  # what was kept is not there any more
    (second,) = torch.autograd.grad(token.sum(), made.module.weight)
    torch.testing.assert_close(first, second)


def test_large_logits_neither_overflow_nor_lose_the_total(chunk):
    made = Head(linear(), VOCABULARY)
    hidden, target = inputs()
    huge = (hidden.detach() * 1000).requires_grad_()
    token, _ = chunked(made, huge, target, False)
    expected, _ = exact(made, huge, target, False)
    torch.testing.assert_close(token, expected)
    assert token.isfinite().all()


@pytest.mark.parametrize("trained", [True, False])
def test_a_second_derivative_is_refused_where_the_graph_would_call_it_zero(trained):
    hidden, target = inputs()
    token, _ = chunked(Head(linear(trained=trained), VOCABULARY), hidden, target, False)
    (first,) = torch.autograd.grad(token.sum(), hidden, create_graph=True)  # linear in the output
    with pytest.raises(RuntimeError, match="no second derivative; `exact` has"):
        torch.autograd.grad(first.sum(), hidden)


@pytest.mark.parametrize("name", ["softcap", "wrapped"])
def test_derivatives_at_other_weights_are_those_of_the_whole_table(name, chunk):
    """`functional_call` takes the weights away again before backward makes the chunks anew."""
    made, (hidden, target) = HEADS[name](), inputs()
    at = {key: weight.detach() * 2 for key, weight in made.module.named_parameters()}

    def derivatives(logps_of) -> list[torch.Tensor]:
        leaves = {key: weight.clone().requires_grad_() for key, weight in at.items()}
        called = Called(made, logps_of)
        token = functional_call(
            called, {f"module.{k}": v for k, v in leaves.items()}, (hidden, target)
        )
        over = [hidden, *leaves.values()]
        first = torch.autograd.grad(token.square().sum(), over, create_graph=True)
        return [*first, *torch.autograd.grad(first, over, [torch.ones_like(one) for one in first])]

    for found, expected in zip(derivatives(chunked), derivatives(exact), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Called(torch.nn.Module):
    """Log-probabilities by a head, as a module whose weights can be exchanged."""

    def __init__(self, made: Head, logps_of):
        super().__init__()
        self.module, self.made, self.logps_of = made.module, made, logps_of

    def forward(self, hidden, target):
        return self.logps_of(self.made, hidden, target, False)[0]


def test_the_exact_head_has_a_second_derivative():
    made, (hidden, target) = Head(linear(), VOCABULARY), inputs()

    def slope(at):
        token, _ = exact(made, at, target, False)
        return torch.autograd.grad(token.sum(), at, create_graph=True)[0]

    along = torch.ones_like(hidden)
    (found,) = torch.autograd.grad(slope(hidden), hidden, along)
    step = 1e-2
    around = [slope((hidden + sign * step * along).detach().requires_grad_()) for sign in (1, -1)]
    torch.testing.assert_close(found, (around[0] - around[1]) / (2 * step), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype, chunk):
    module = linear().to(dtype)
    hidden, target = inputs()
    low = hidden.detach().to(dtype).requires_grad_()
    token, _ = chunked(Head(module, VOCABULARY), low, target, False)
    expected, _ = exact(Head(module, VOCABULARY), low, target, False)
    assert token.dtype == torch.float32
    torch.testing.assert_close(token, expected)
    (grad,) = torch.autograd.grad(token.sum(), module.weight)
    (whole,) = torch.autograd.grad(expected.sum(), module.weight)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, whole, rtol=0.02, atol=0.05)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("name", ["linear", "frozen", "softcap", "wrapped"])
def test_no_table_is_larger_than_a_chunk_forward_or_backward(name, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * VOCABULARY * 6)
    made, (hidden, target) = HEADS[name](), inputs()
    with Largest() as largest:
        token, _ = chunked(made, hidden, target, True)
        token.sum().backward()
    assert largest.elements <= 6 * VOCABULARY
    with Largest() as whole:
        exact(made, hidden, target, True)
    assert whole.elements == TOKENS * VOCABULARY


@pytest.mark.parametrize(("room", "chunks"), [(0, 0), (12, 2), (13, 2), (100, 4)])
def test_tables_are_kept_for_backward_while_there_is_room(room, chunks, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * VOCABULARY * 6)  # 23 tokens: 6, 6, 6, 5
    monkeypatch.setattr(head, "KEPT_BYTES", 4 * VOCABULARY * room)
    hidden, target = inputs()
    token, _ = chunked(Head(linear(), VOCABULARY), hidden, target, False)
    tables = token.grad_fn.tables
    assert sum(tables.kept(some) is not None for some in tables.chunks) == chunks
    # one place more, for all the others in turn
    assert tables.memory.numel() >= min(6 * (chunks + 1), TOKENS) * VOCABULARY
    token.sum().backward()
    assert tables.memory is None


def test_the_memory_of_a_pass_serves_the_next_and_two_at_a_time_have_their_own(chunk):
    made, (hidden, target) = Head(linear(), VOCABULARY), inputs()
    expected, _ = exact(made, hidden, target, False)
    (slope,) = torch.autograd.grad(expected.sum(), made.module.weight)
    first, _ = chunked(made, hidden, target, False)
    second, _ = chunked(made, hidden * 2, target, False)
    assert first.grad_fn.tables.memory.data_ptr() != second.grad_fn.tables.memory.data_ptr()
    (found,) = torch.autograd.grad(first.sum(), made.module.weight)
    torch.testing.assert_close(found, slope)


def test_without_gradients_nothing_is_kept():
    hidden, target = inputs()
    with torch.no_grad():
        token, _ = chunked(Head(linear(), VOCABULARY), hidden, target, False)
    assert token.grad_fn is None
