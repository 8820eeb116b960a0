"""The very trainer, on an exact policy: what it learns from pairs is what theory says."""

import torch
from accelerate import Accelerator

from prefloop.objectives import DPO
from prefloop.reproduce import did_theory
from prefloop.tabular import TabularPolicy, comparison_rows, jensen_shannon
from prefloop.trainer import TrainSettings, build_trainer, fit
from prefloop.types import score


def test_the_trainer_learns_the_target_from_sampled_pairs(tmp_path):  # B3
    rng = torch.Generator().manual_seed(0)
    taught = did_theory.lesson(rng, 1, 5, beta=1.0)
    drawn = torch.multinomial(taught.weight.flatten(), 4000, replacement=True, generator=rng)
    answers = torch.stack([drawn // 5, drawn % 5], -1)
    answers = answers[answers[:, 0] != answers[:, 1]]
    rank = torch.tensor([1, 2]).expand(len(answers), -1)
    rows = comparison_rows(torch.zeros((len(answers), 1), dtype=torch.long), answers, rank)
    frozen, policy = TabularPolicy(taught.reference), TabularPolicy(taught.reference)
    trainer = build_trainer(
        policy,
        DPO(beta=1.0),
        lambda batch: score(frozen, batch).detach(),
        TrainSettings(lr=0.05, batch_size=128, epochs=4, max_grad_norm=1e9),
        Accelerator(cpu=True),
    )
    fit(trainer, rows, [], tmp_path)
    reached = jensen_shannon(policy.logp().detach(), taught.target)
    start = jensen_shannon(taught.reference, taught.target)
    assert reached < 0.05 * start
