"""Input embeddings as scorers give them: WassersteinDPO on a language model, against plain code."""

import pytest
import tiny
import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel

from prefloop.logps import EmbeddedScorer, Scorer
from prefloop.objectives import DPO, SFT, Sum, WassersteinDPO, needs_embeddings
from prefloop.policies import Lora, Policy
from prefloop.settings import TrainSettings
from prefloop.training import Training
from prefloop.types import judgement, score

RHO = 0.3


def plain_loss(model, row, reference) -> torch.Tensor:
    """DPO's loss and its penalty, by the model's own logits one response at a time."""
    embedded, logps = [], []
    for response in row.responses:
        tokens = torch.tensor([row.prompt + response])
        embedded.append(model.get_input_embeddings()(tokens))
        logits = model(inputs_embeds=embedded[-1]).logits[:, len(row.prompt) - 1 : -1]
        said = logits.log_softmax(-1).gather(-1, torch.tensor([response]).unsqueeze(-1))
        logps.append(said.sum())
    margin = 0.1 * (logps[0] - logps[1] - reference[0] + reference[1])
    loss = -torch.nn.functional.logsigmoid(margin)
    gradients = torch.autograd.grad(loss, embedded, create_graph=True)
    return loss + RHO * sum(gradient.square().sum() for gradient in gradients)


def test_the_penalty_and_its_gradient_are_those_of_plain_code():
    rows = tiny.batch(3, responses=(2,), longest=6)
    model = tiny.llama()
    objective = WassersteinDPO(rho=RHO)
    with torch.no_grad():
        reference = score(Scorer(tiny.llama()), rows)
        for value in model.parameters():
            value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
    ours = objective.per_comparison(score(EmbeddedScorer(model), rows), reference, judgement(rows))
    with sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
        plain = [
            plain_loss(model, row, sums) for row, sums in zip(rows, reference.sum, strict=True)
        ]
    torch.testing.assert_close(ours, torch.stack(plain))
    assert (
        ours > DPO().per_comparison(score(Scorer(model), rows), reference, judgement(rows))
    ).all()
    found = torch.autograd.grad(ours.sum(), list(model.parameters()))
    expected = torch.autograd.grad(sum(plain), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_without_a_gradient_there_are_no_embeddings():
    rows = tiny.batch(2, responses=(1, 2), longest=6)
    with torch.no_grad():
        assert score(EmbeddedScorer(tiny.llama()), rows).embeddings is None
    ragged = score(EmbeddedScorer(tiny.llama()), rows).embeddings
    assert ragged is not None
    assert ragged[0, 1].abs().sum() == 0  # a response that does not exist


@pytest.mark.parametrize("adapter", [None, Lora(rank=2)], ids=["whole", "adapter"])
def test_a_run_trains_with_it(tmp_path, monkeypatch, adapter):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    objective = Sum(objectives=(WassersteinDPO(beta=0.5, rho=RHO), SFT()))
    assert needs_embeddings(objective)
    policy = Policy(tiny.llama(), tiny.tokenizer(), "tiny")
    training = Training(
        policy=policy if adapter is None else policy.add_adapter("default", adapter),
        objective=objective,
        settings=TrainSettings(lr=0.01, batch_size=4, max_steps=4, schedule="constant", epochs=4),
        accelerator=Accelerator(cpu=True),
        out=tmp_path / "run",
    )
    rows = tiny.batch(4, responses=(2,), longest=6)
    last = training(rows, rows)
    assert last["rewards/margins"] > 0
