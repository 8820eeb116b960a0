"""What a step keeps in memory: counted by hand on a scorer that keeps known tensors."""

import pytest
import tiny
import torch
from torch import nn

from prefloop.logps import Scorer
from prefloop.trainer import TrainSettings
from prefloop.trainer.memory import Memory, estimate
from prefloop.types import UserError


class Wide(nn.Module):
    """Keeps 1,000 float32 numbers a token: the factor of a product with the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))
        self.frozen = nn.Parameter(torch.zeros(50), requires_grad=False)

    def forward(self, batch):
        shape = (len(batch), 2, max(len(one) for row in batch for one in row.responses))
        count = sum(len(row.prompt) + sum(map(len, row.responses)) for row in batch)
        token = (torch.ones(count, 1000) * self.weight).sum() * torch.ones(shape)
        return token, torch.ones(shape, dtype=torch.bool)


def rows(count: int) -> list:
    return [tiny.row(4, [3, 3], seed=seed, rank=(1, 2)) for seed in range(count)]  # 10 tokens each


def test_bytes_are_what_the_scorer_keeps_times_the_largest_pass():
    found = estimate(Wide(), rows(8), TrainSettings(batch_size=8, token_budget=20))
    assert found.pass_tokens == 20  # two rows of ten tokens
    assert found.weights == 4 * 1050
    assert found.training == 3 * 4 * 1000  # a gradient and two moments; the frozen one has none
    # 4,000 bytes a token; the table of ones, 6 floats a row of 10 tokens, adds 2.4 bytes a token
    assert found.activations == pytest.approx(20 * 4002.4, abs=1)
    assert found.total == found.weights + found.training + found.activations


def test_a_row_longer_than_the_budget_decides():
    long = tiny.row(40, [30, 30], rank=(1, 2))
    found = estimate(Wide(), [*rows(3), long], TrainSettings(batch_size=1, token_budget=20))
    assert found.pass_tokens == 100


def test_sharding_divides_weights_and_moments_but_not_activations():
    alone = estimate(Wide(), rows(8), TrainSettings(batch_size=2, token_budget=10))
    both = estimate(Wide(), rows(8), TrainSettings(batch_size=2, token_budget=10), 2, (2, 2))
    assert both.weights == alone.weights // 2
    assert both.training == alone.training // 2
    assert both.activations == alone.activations


def test_a_real_model_keeps_in_proportion_to_its_tokens():
    scorer = Scorer(tiny.llama(), token_budget=None)
    short = estimate(scorer, rows(8), TrainSettings(batch_size=2, token_budget=10))
    long = estimate(scorer, rows(8), TrainSettings(batch_size=8, token_budget=80))
    assert long.activations == pytest.approx(8 * short.activations, rel=1e-3)
    assert all(value.grad is None for value in scorer.parameters())
    assert "for 10 tokens a pass" in str(short)


def test_it_is_said_in_the_unit_that_suits():
    found = Memory(weights=3 * 2**30, training=2**29, activations=2**20, pass_tokens=1234)
    assert str(found) == (
        "3.5 GiB a process (weights 3.0 GiB, gradients and AdamW 512 MiB, activations 1 MiB for "
        "1,234 tokens a pass)"
    )


def test_nothing_to_train_on_is_said():
    with pytest.raises(UserError, match="nothing to train on"):
        estimate(Wide(), [], TrainSettings())
