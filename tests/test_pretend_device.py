"""The instrument: what CUDA refuses raises, what it allows does not, numbers are the CPU's."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from pretend_device import DEVICE, MixedDevicesError, Pretended, pretend_device
from torch import Tensor


@pytest.fixture
def there() -> Iterator[torch.device]:
    with pretend_device() as device:
        yield device


def three(device: torch.device | str = "cpu") -> Tensor:
    return torch.arange(3.0, device=device)


def put(into: Tensor, index: Any, value: Any) -> Tensor:
    into[index] = value
    return into


REFUSED: dict[str, Callable[[torch.device], Any]] = {
    "sum": lambda d: three(d) + three(),
    "sum in place": lambda d: three(d).add_(three()),
    "sum into a number of the CPU": lambda d: torch.tensor(1.0).add_(three(d)[0]),
    "number of the device": lambda d: three() * three(d)[1],
    "concatenation": lambda d: torch.cat([three(d), three()]),
    "numbers side by side": lambda d: torch.stack([three(d)[0], three()[0]]),
    "choice": lambda d: torch.where(three() > 1, three(d), 0.0),
    "product": lambda d: three(d) @ three(),
    "embedding": lambda d: torch.nn.functional.embedding(torch.tensor([1]), torch.eye(3).to(d)),
    "gather": lambda d: three(d).gather(0, torch.tensor([1])),
    "index of the device": lambda d: three()[torch.tensor([1], device=d)],
    "value of the device": lambda d: put(three(), [0, 2], three(d)[:2]),
    "values of the CPU": lambda d: put(three(d), torch.tensor([0, 1]), three()[:2]),
    "comparison of all": lambda d: torch.equal(three(d), three()),
    "numpy": lambda d: three(d).numpy(),
    "generator of the CPU": lambda d: three(d).multinomial(1, generator=torch.Generator()),
    "generator of the device": lambda d: torch.rand(2, generator=torch.Generator(d)),
}

ALLOWED: dict[str, tuple[Callable[[torch.device], Any], Any]] = {
    "number of the CPU": (lambda d: three(d) * torch.tensor(2.0), [0, 2, 4]),
    "chosen number": (lambda d: torch.where(three(d) > 1, three(d), torch.tensor(9.0)), [9, 9, 2]),
    "index of the CPU": (lambda d: three(d)[torch.tensor([2, 0])], [2, 0]),
    "mask of the CPU": (lambda d: three(d)[three() > 0], [1, 2]),
    "number put": (lambda d: put(three(d), torch.tensor([1]), torch.tensor(7.0)), [0, 7, 2]),
    "copied part": (lambda d: put(three(), slice(0, 2), three(d)[1:]), [1, 2, 2]),
    "there and back": (lambda d: three().to(d).cpu().numpy(), [0, 1, 2]),
    "list of numbers": (lambda d: torch.tensor([three(d)[1], three(d)[2]]), [1, 2]),
    "view": (lambda d: (held := three(d), held[1:].fill_(5.0))[0], [0, 5, 5]),
    "single number": (lambda d: float(three(d)[2]), 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(name, there):
    with pytest.raises(MixedDevicesError):
        REFUSED[name](there)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_is_allowed(name, there):
    work, expected = ALLOWED[name]
    found = work(there)
    assert (found if isinstance(found, float) else found.tolist()) == expected


def test_draws_follow_from_the_seed_of_a_generator_of_the_device(there):
    first, second = (
        torch.rand(4, device=there, generator=torch.Generator(there).manual_seed(3))
        for _ in range(2)
    )
    assert first.device == DEVICE
    assert first.tolist() == second.tolist()


def test_afterwards_the_device_is_gone_and_nothing_else_has_changed():
    before = torch.Generator, torch.autocast, torch.accelerator.is_available()
    with pretend_device() as device:
        model = tiny.llama().to(device)
    assert before == (torch.Generator, torch.autocast, torch.accelerator.is_available())
    assert model.device == DEVICE
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.zeros(2, device=DEVICE)


def test_a_model_moves_as_it_does_on_the_cpu(there):
    def trained(device: torch.device | str) -> torch.nn.Module:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        held = list(model.parameters())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model.to(device)
        assert all(one is other for one, other in zip(held, model.parameters(), strict=True))
        for _ in range(3):
            optimizer.zero_grad()
            model(three(device)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return model

    here, away = trained("cpu"), trained(there)
    for one, other in zip(here.parameters(), away.parameters(), strict=True):
        assert isinstance(other, Pretended)
        torch.testing.assert_close(other.cpu(), one, rtol=0, atol=1e-6)
    again = copy.deepcopy(away)
    again[0].weight.data.zero_()
    assert away[0].weight.abs().sum() > 0


def test_a_device_may_lack_a_type():
    with pretend_device(without=torch.float64) as device:
        assert three().double().sum() == three(device).sum().item() == 3
        with pytest.raises(TypeError, match="float64"):
            three(device).double()
    with pretend_device() as device:
        assert three(device).double().dtype == torch.float64


def test_autocast_lowers_products_and_raises_sums(there):
    half = {"device_type": there.type, "dtype": torch.bfloat16}
    eye = torch.eye(3, device=there)
    with torch.autocast(**half):
        assert (eye @ three(there)).dtype == torch.bfloat16
        assert (three(there) + 1).dtype == torch.float32
        assert torch.softmax(eye.bfloat16(), -1).dtype == torch.float32
        with torch.autocast(there.type, enabled=False):
            assert not torch.is_autocast_enabled(there.type)
            assert (eye @ three(there)).dtype == torch.float32
        assert torch.get_autocast_dtype(there.type) == torch.bfloat16
    assert not torch.is_autocast_enabled(there.type)
