"""Is a way right for this model? Found out by comparing it with the model's own logits."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefloop.logps import attention
from prefloop.logps.head import LogpsOf, computing_dtype, exact
from prefloop.logps.layout import lay, table_shape
from prefloop.logps.ways import FullLogits, PrefixShared, Way, causal_model
from prefloop.types import Tokenized, UserError

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
CHECKED = (48, 24, 3)  # most tokens of a prompt and of a response, most responses, in the check
REFUSALS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def difference(
    model: nn.Module, way: Way, head: LogpsOf, batch: Sequence[Tokenized]
) -> Float[Tensor, " M"]:
    """How far `way` is from the model's own logits, in nats, for each response token looked at.

    Looks at the beginnings of two comparisons of `batch`; leaves training mode and random state as
    they were.
    """
    rows = _sample(batch)
    with undisturbed(model):
        return flat_logps(model, way, head, rows) - flat_logps(model, FullLogits(), exact, rows)


def suitable(
    model: nn.Module, ways: Sequence[Way], head: LogpsOf, batch: Sequence[Tokenized]
) -> Way:
    """The first of `ways` that gives the model's own numbers; the last is not asked.

    One warning, naming the model and what was found, if it is not the first.
    """
    device = causal_model(model).device
    tolerance = TOLERANCE[computing_dtype(device, causal_model(model).dtype)]
    found: list[str] = []
    for way in ways[:-1]:
        try:
            gap = float(difference(model, way, head, batch).square().mean().sqrt())
        except (UserError, torch.OutOfMemoryError):
            raise
        except REFUSALS as error:
            reason = (str(error).splitlines() or [""])[0]
            found.append(f"{type(way).__name__} failed ({type(error).__name__}: {reason})")
            continue
        if gap <= tolerance:
            return _settled(way, model, found)
        found.append(f"{type(way).__name__} is off by {gap:.2g} nats a token")
    return _settled(ways[-1], model, found)


def _settled(way: Way, model: nn.Module, found: list[str]) -> Way:
    base = causal_model(model)
    if not isinstance(way, PrefixShared) and base.config._attn_implementation == attention.NAME:
        base.set_attn_implementation("sdpa")  # as it was
    if found:
        warnings.warn(
            f"{type(base).__name__} is scored the {type(way).__name__} way: "
            f"{'; '.join(found)}. The numbers are right; it is slower.",
            stacklevel=2,
        )
    return way


def flat_logps(
    model: nn.Module, way: Way, head: LogpsOf, batch: Sequence[Tokenized]
) -> Float[Tensor, " M"]:
    """Log-probabilities of all response tokens of `batch`, in order, in one forward pass."""
    shape = table_shape(batch)
    rows = [row for index, tokenized in enumerate(batch) for row in way.rows(index, tokenized)]
    sheet = lay(batch, rows, shape, padded=way.padded)
    states = way.states(model, sheet)
    token, _ = head(way.head(model), states, sheet.target.to(states.device), False)
    return token


def _sample(batch: Sequence[Tokenized]) -> list[Tokenized]:
    """The beginnings of two comparisons; no response alone in a row.

    A lone response is doubled: a model that ignores what a row shares must not pass.
    """
    prompt, response, count = CHECKED
    picked = [max(batch, key=lambda row: len(row.responses)), batch[-1]]
    return [
        replace(
            row,
            prompt=row.prompt[:prompt],
            responses=tuple(tokens[:response] for tokens in (row.responses * 2)[:count]),
        )
        for row in picked
    ]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, each module's own mode and the random state put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), random_state_kept(causal_model(model).device):
            yield
    finally:
        for module, training in modes:
            module.training = training


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """Random numbers drawn inside, on the CPU or on `device`, change none drawn afterwards."""
    if device.type == "cpu":
        return torch.random.fork_rng([])  # it always keeps the CPU's
    return torch.random.fork_rng([device], device_type=device.type)
