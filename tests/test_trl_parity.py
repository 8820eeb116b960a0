"""The same random log-probabilities through TRL's own loss code and through ours.

TRL's loss methods are called as they are, on a stand-in for the trainer that holds its settings and
on a "model" that returns given log-probabilities; nothing of TRL's is copied or rewritten here.
"""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from prefloop import objectives as o
from prefloop.types import Judgement, Logps

pytest.importorskip("trl", reason="trl is not installed: pip install --no-deps trl==1.16.0")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its experimental part says so, its dependencies deprecate
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

PAIRS, PROMPT, TOKENS = 5, 3, 8
RNG = torch.Generator().manual_seed(11)
LENGTHS = torch.randint(2, TOKENS + 1, (2, PAIRS), generator=RNG)
MASK = torch.arange(TOKENS) < LENGTHS.unsqueeze(-1)  # (chosen or rejected, pair, token)


def random_logps() -> torch.Tensor:
    token = -2 * torch.rand(2, PAIRS, TOKENS, generator=RNG, dtype=torch.float64) - 0.01
    return torch.where(MASK, token, 0.0)


POLICY, REFERENCE, COLLISION = random_logps(), random_logps(), random_logps()
JUDGED = Judgement(
    rank=torch.tensor([[1, 2]] * PAIRS),
    scores=torch.full((PAIRS, 2), math.nan),
    label=torch.full((PAIRS, 2), -1),
    weight=torch.ones(PAIRS),
)


def ours(objective: o.Objective, dtype: torch.dtype = torch.float64) -> float:
    policy, reference = (
        Logps(
            t.transpose(0, 1).to(dtype), MASK.transpose(0, 1), COLLISION.transpose(0, 1).to(dtype)
        )
        for t in (POLICY, REFERENCE)
    )
    return objective.per_comparison(policy, reference, JUDGED).mean().item()


def with_prompt(token: torch.Tensor) -> torch.Tensor:
    """(2 x pairs, positions): chosen rows first, the prompt's positions in front."""
    return torch.nn.functional.pad(token.flatten(0, 1), (PROMPT, 0))


class Model(torch.nn.Module):
    """Returns the log-probabilities it was given, in the form of TRL's fused head."""

    is_gradient_checkpointing = False

    def __init__(self, token: torch.Tensor, collision: torch.Tensor) -> None:
        super().__init__()
        log_probs = with_prompt(token)
        self.outputs = SimpleNamespace(
            log_probs=log_probs,
            log_sum_sq_probs=with_prompt(collision),
            entropy=torch.zeros_like(log_probs),
            mean_logits=torch.zeros_like(log_probs),
            is_top1=torch.zeros_like(log_probs, dtype=torch.bool),
        )

    def forward(self, **_inputs) -> SimpleNamespace:
        return self.outputs


def accelerator() -> SimpleNamespace:
    def itself(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    return SimpleNamespace(
        device=torch.device("cpu"), gather=itself, gather_for_metrics=itself, num_processes=1
    )


class Metrics(dict):
    def __missing__(self, name: str) -> list:
        self[name] = []
        return self[name]


def theirs(loss_types: list[str], dtype: torch.dtype = torch.float64, **settings) -> float:
    """TRL's loss of the batch, reference live."""
    model = Model(POLICY.to(dtype), COLLISION.to(dtype))
    trainer = SimpleNamespace(
        model=model,
        ref_model=Model(REFERENCE.to(dtype), COLLISION.to(dtype)),
        accelerator=accelerator(),
        args=SimpleNamespace(
            discopop_tau=settings.get("discopop_tau", 0.05),
            gradient_checkpointing_kwargs=None,
        ),
        aux_loss_enabled=False,
        ld_alpha=settings.get("ld_alpha"),
        precompute_ref_logps=False,
        f_divergence_type=settings.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=settings.get("f_alpha_divergence_coef", 0.5),
        loss_types=loss_types,
        loss_weights=settings.get("loss_weights", [1.0] * len(loss_types)),
        beta=settings.get("beta", 0.1),
        label_smoothing=settings.get("label_smoothing", 0.0),
        use_weighting=settings.get("use_weighting", False),
        _metrics={"train": Metrics()},
        _total_train_tokens=0,
        _tp_size=1,
    )
    mask = with_prompt(MASK).bool()
    mask = torch.nn.functional.pad(mask, (1, 0)).long()  # TRL shifts: position t predicts t + 1
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }
    return DPOTrainer._compute_loss(trainer, model, inputs, False).item()


@pytest.mark.parametrize(
    ("loss_types", "settings", "objective"),
    [
        (["sigmoid"], {}, o.DPO(beta=0.1)),
        (["sigmoid"], {"beta": 0.7}, o.DPO(beta=0.7)),
        (["hinge"], {"beta": 0.3}, o.Hinge(beta=0.3)),
        (["ipo"], {}, o.IPO(beta=0.1)),
        (["exo_pair"], {"label_smoothing": 1e-3}, o.EXOPair(beta=0.1, label_smoothing=1e-3)),
        (["nca_pair"], {}, o.NCAPair(beta=0.1)),
        (["robust"], {"label_smoothing": 0.2}, o.RobustDPO(beta=0.1, label_smoothing=0.2)),
        (["bco_pair"], {}, o.BCOPair(beta=0.1)),
        (["sppo_hard"], {}, o.SPPOHard(beta=0.1)),
        (["aot"], {"label_smoothing": 0.1}, o.AOT(beta=0.1, label_smoothing=0.1)),
        (["aot_unpaired"], {"label_smoothing": 0.1}, o.AOTUnpaired(beta=0.1, label_smoothing=0.1)),
        (["apo_zero"], {}, o.APOZero(beta=0.1)),
        (["apo_down"], {}, o.APODown(beta=0.1)),
        (["discopop"], {}, o.DiscoPOP(beta=0.1)),
        (["discopop"], {"discopop_tau": 0.4}, o.DiscoPOP(beta=0.1, tau=0.4)),
        (["sft"], {}, o.PooledSFT()),
        (["sigmoid_norm"], {"beta": 3.0}, o.LengthNormalizedDPO(beta=3.0)),
        (
            ["sigmoid", "sft", "hinge"],
            {"loss_weights": [0.8, 1.0, 0.25]},
            o.Sum(
                objectives=(o.DPO(beta=0.1), o.PooledSFT(), o.Hinge(beta=0.1)),
                weights=(0.8, 1.0, 0.25),
            ),
        ),
        (["sigmoid"], {"use_weighting": True}, o.WPO(objective=o.DPO(beta=0.1))),
        (["ipo"], {"use_weighting": True}, o.WPO(objective=o.IPO(beta=0.1))),
        (["sigmoid"], {"ld_alpha": 0.4}, o.LD(objective=o.DPO(beta=0.1), alpha=0.4)),
        (["nca_pair"], {"ld_alpha": 0.0}, o.LD(objective=o.NCAPair(beta=0.1), alpha=0.0)),
    ],
    ids=repr,
)
def test_the_loss_is_trls(loss_types, settings, objective):
    assert ours(objective) == pytest.approx(theirs(loss_types, **settings), rel=1e-6)


DIVERGENCES = {
    "reverse_kl": o.ReverseKL(),
    "forward_kl": o.ForwardKL(),
    "js_divergence": o.JensenShannon(),
    "alpha_divergence": o.AlphaDivergence(alpha=0.3),
}
GENERALIZED = {
    "sigmoid": (o.DPO(beta=0.1), 0.0),
    "hinge": (o.Hinge(beta=0.1), 0.0),
    "ipo": (o.IPO(beta=0.1), 0.0),
    "exo_pair": (o.EXOPair(beta=0.1, label_smoothing=0.05), 0.05),
    "robust": (o.RobustDPO(beta=0.1, label_smoothing=0.05), 0.05),
    "discopop": (o.DiscoPOP(beta=0.1), 0.0),
    "sigmoid_norm": (o.LengthNormalizedDPO(beta=0.1), 0.0),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_type", GENERALIZED)
def test_every_f_divergence_is_trls(loss_type, divergence):
    objective, smoothing = GENERALIZED[loss_type]
    # TRL's alpha-divergence knows no float64
    dtype = torch.float32 if divergence == "alpha_divergence" else torch.float64
    found = theirs(
        [loss_type],
        dtype,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=0.3,
        label_smoothing=smoothing,
    )
    wrapped = o.FDivergence(objective=objective, divergence=DIVERGENCES[divergence])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6
    assert ours(wrapped, dtype) == pytest.approx(found, rel=tolerance)


def test_label_smoothing_of_dpo_is_the_smoothed_loss_of_trls_older_releases():
    # 1.16 has no smoothing under `sigmoid`; CPO's, with a uniform reference, still is that loss
    settings = SimpleNamespace(
        alpha=0.0, beta=0.1, label_smoothing=0.15, loss_type="sigmoid", accelerator=accelerator()
    )
    losses, *_ = CPOTrainer.cpo_loss(settings, *POLICY.sum(-1))
    policy = Logps(POLICY.transpose(0, 1), MASK.transpose(0, 1))
    uniform = Logps(torch.zeros_like(policy.token), policy.mask)
    dpo = o.DPO(beta=0.1, label_smoothing=0.15).per_comparison(policy, uniform, JUDGED)
    torch.testing.assert_close(dpo, losses)


def test_cpo_and_simpo_are_trls():
    settings = SimpleNamespace(
        alpha=0.0,
        beta=0.1,
        label_smoothing=0.1,
        loss_type="sigmoid",
        simpo_gamma=0.5,
        accelerator=accelerator(),
    )
    losses, *_ = CPOTrainer.cpo_loss(settings, *POLICY.sum(-1))
    cpo = o.CPO(beta=0.1, alpha=0.0, label_smoothing=0.1)
    assert ours(cpo) == pytest.approx(losses.mean().item(), rel=1e-6)

    settings.loss_type, settings.beta, settings.label_smoothing = "simpo", 2.0, 0.0
    losses, *_ = CPOTrainer.cpo_loss(settings, *(POLICY.sum(-1) / LENGTHS))
    assert ours(o.SimPO(beta=2.0, gamma=0.5)) == pytest.approx(losses.mean().item(), rel=1e-6)


def test_orpo_is_trls_but_for_the_tokens_of_its_likelihood_term():
    settings = SimpleNamespace(beta=0.2, accelerator=accelerator())
    means = POLICY.sum(-1) / LENGTHS
    odds, *_ = ORPOTrainer.odds_ratio_loss(settings, *means)
    # TRL: nll of prompt and response, pooled, minus odds; the method gives beta log sigmoid
    assert ours(o.ORPO(beta=0.2)) == pytest.approx((-means[0] - odds).mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "objective"),
    [
        ("kto", o.KTO(beta=0.1, desirable=1.2, undesirable=0.8)),
        ("apo_zero_unpaired", o.KTO(beta=0.1, desirable=1.2, undesirable=0.8, baseline="zero")),
    ],
)
@pytest.mark.parametrize("raise_policy", [0.0, 3.0])
def test_kto_is_trls(loss_type, objective, raise_policy):
    """The first row of `POLICY` are the responses, the second the mismatched ones."""
    label = torch.tensor([True, False, False, True, True])
    policy = torch.where(MASK, POLICY + raise_policy / TOKENS, 0.0)  # baselines at and above 0
    mismatched = iter([policy[1].sum(-1), REFERENCE[1].sum(-1)])
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        _compute_kl_logps=lambda model, batch: next(mismatched),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        beta=0.1,
        desirable_weight=1.2,
        undesirable_weight=0.8,
        _metrics={"train": Metrics()},
        _total_train_tokens=0,
        _tp_size=1,
    )
    mask = torch.nn.functional.pad(MASK[0], (PROMPT + 1, 0)).long()
    batch = {
        "label": label,
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_logps": REFERENCE[0].sum(-1),
        "ref_KL_logps": REFERENCE[1].sum(-1),
    }
    model = Model(policy[:1], COLLISION[:1])
    found = KTOTrainer._compute_loss(trainer, model, batch, False).item()
    judged = Judgement(
        rank=torch.zeros(PAIRS, 2, dtype=torch.long),
        scores=torch.full((PAIRS, 2), math.nan),
        label=torch.stack([label.long(), torch.full((PAIRS,), -1)], -1),
        weight=torch.ones(PAIRS),
    )
    ours_, theirs_ = (
        Logps(token.transpose(0, 1), MASK.transpose(0, 1)) for token in (policy, REFERENCE)
    )
    losses = objective.per_comparison(ours_, theirs_, judged)
    assert losses.mean().item() == pytest.approx(found, rel=1e-6)
