"""The loop: one update for any cut of the batch; nothing is lost, nothing moves on a bad number."""

import math
import weakref
from dataclasses import replace

import pytest
import tiny
import torch
from accelerate import Accelerator, DistributedType

from prefloop.logps import Scorer
from prefloop.objectives import AOT, DPO, SFT, PlackettLuce
from prefloop.runs import read_jsonl
from prefloop.tabular import TabularPolicy, comparison_rows
from prefloop.trainer import NonFiniteError, TrainSettings, build, build_trainer, finish, fit
from prefloop.trainer.build import refuse_unsharded
from prefloop.trainer.loop import global_batch, rows_seen, total_steps
from prefloop.trainer.plan import batch_indices, derived_seed, forward_passes, shares
from prefloop.trainer.zero import zero_config
from prefloop.types import Logps, Tokenized, UserError, score

PROMPTS, ANSWERS = 5, 4


def rows(count: int = 13, responses: int = 3, seed: int = 0) -> list[Tokenized]:
    rng = torch.Generator().manual_seed(seed)
    prompt = torch.randint(PROMPTS, (count, 1), generator=rng)
    drawn = torch.stack([torch.randperm(ANSWERS, generator=rng) for _ in range(count)])
    answers = drawn[:, :responses]
    return comparison_rows(prompt, answers, 1 + answers.argsort(-1).argsort(-1))


def policy(seed: int = 1) -> TabularPolicy:
    rng = torch.Generator().manual_seed(seed)
    return TabularPolicy(torch.randn(PROMPTS, ANSWERS, generator=rng))


class Frozen:
    """The reference: what a policy said before training."""

    def __init__(self, scorer: TabularPolicy) -> None:
        self.scorer = scorer

    @torch.no_grad()
    def __call__(self, batch) -> Logps:
        return score(self.scorer, batch)


def trainer(scorer=None, objective=None, **settings):
    objective = objective or DPO(beta=0.5)
    values = {"lr": 0.05, "batch_size": 4, "epochs": 2, "warmup": 0.0} | settings
    return build_trainer(
        scorer or policy(),
        objective,
        Frozen(policy()) if objective.needs_reference else None,
        TrainSettings(**values),
        Accelerator(cpu=True),
    )


def weights_after(tmp_path, **settings) -> torch.Tensor:
    scorer = policy()
    fit(trainer(scorer, **settings), rows(), [], tmp_path)
    return scorer.logits.detach().clone()


def test_learning_starts_at_log_2_and_ranks_everything_in_the_end(tmp_path):
    scorer = policy()
    last = fit(trainer(scorer, epochs=60), rows(), [], tmp_path)
    logged = list(read_jsonl(tmp_path / "metrics.jsonl"))
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["rewards/accuracies"] == 1.0
    assert last["loss"] < 0.3


def test_the_update_does_not_depend_on_how_the_batch_is_cut(tmp_path):
    whole = weights_after(tmp_path / "whole", token_budget=10_000)
    cut = weights_after(tmp_path / "cut", token_budget=4)
    assert len(forward_passes(rows()[:4], 1, 4)[0]) > 1  # it really was cut
    torch.testing.assert_close(whole, cut, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("objective", "passes"), [(DPO(beta=0.5), 4), (AOT(beta=0.5), 1)])
def test_a_batch_is_cut_to_the_budget_unless_the_objective_couples_it(objective, passes):
    sizes = []

    class Counted(TabularPolicy):
        def forward(self, batch):
            sizes.append(len(batch))
            return super().forward(batch)

    def logits(budget: int) -> torch.Tensor:
        sizes.clear()
        scorer = Counted(
            torch.randn((PROMPTS, ANSWERS), generator=torch.Generator().manual_seed(1))
        )
        made = trainer(scorer, objective, token_budget=budget)
        for number in range(3):
            made.step(rows(4, responses=2), number, 0.05)
        return scorer.logits.detach()

    whole = logits(10_000)
    cut = logits(3)  # a comparison here has three tokens
    assert sizes == [4 // passes] * passes * 3
    torch.testing.assert_close(whole, cut, rtol=0, atol=1e-6)


def test_a_weight_scales_its_comparison_and_not_the_others(tmp_path):
    one, two = rows(2)
    scorer = policy()

    def gradient(first: float, second: float) -> torch.Tensor:
        weighted = [
            Tokenized(**(vars(row) | {"weight": weight}))
            for row, weight in ((one, first), (two, second))
        ]
        made = trainer(scorer, lr=1e-12, max_grad_norm=1e9)
        made.step(weighted, 0, 1e-12)
        return scorer.logits.grad.clone()

    combined = 3 * gradient(1.0, 0.0) + 0.5 * gradient(0.0, 1.0)
    torch.testing.assert_close(gradient(3.0, 0.5), combined, rtol=0, atol=1e-6)


@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_a_killed_and_resumed_run_ends_in_the_same_bits(tmp_path, killed_after):
    class Killed(Exception):
        pass

    def kill(progress) -> None:
        if progress.step == killed_after:
            raise Killed

    settings = {"epochs": 2, "save_every": 2, "schedule": "cosine", "warmup": 0.3}
    whole = weights_after(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        fit(trainer(**settings), rows(), rows(4), tmp_path / "killed", kill)
    scorer = policy(seed=99)  # whatever the weights are at the start, the checkpoint decides
    if killed_after == 1:
        scorer = policy()
    fit(trainer(scorer, **settings), rows(), rows(4), tmp_path / "killed")
    assert torch.equal(scorer.logits, whole)


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
def test_a_model_with_tied_embeddings_is_resumed_in_the_same_bits(tmp_path, adapted):
    class Killed(Exception):
        pass

    def kill(progress) -> None:
        if progress.step == 2:
            raise Killed

    def made():
        base = tiny.llama(tie_word_embeddings=True)
        model = tiny.lora(base) if adapted else base
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return trainer(Scorer(model), SFT(), lr=1e-3, epochs=1, save_every=1)

    data = [tiny.row(3, [2, 4], seed=seed, rank=(1, 2)) for seed in range(12)]
    whole = made()
    fit(whole, data, [], tmp_path / "whole")
    with pytest.raises(Killed):
        fit(made(), data, [], tmp_path / "killed", kill)
    resumed = made()
    fit(resumed, data, [], tmp_path / "killed")
    for expected, found in zip(whole.scorer.parameters(), resumed.scorer.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_a_resumed_run_logs_every_step_once(tmp_path):
    class Killed(Exception):
        pass

    def kill(progress) -> None:
        if progress.step == 3:
            raise Killed

    with pytest.raises(Killed):
        fit(trainer(save_every=2), rows(), [], tmp_path, kill)
    fit(trainer(save_every=2), rows(), [], tmp_path)
    steps = [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, 9))


def test_a_loss_that_is_no_number_stops_before_the_weights_move_and_names_the_row(tmp_path):
    scorer = policy()
    with torch.no_grad():
        scorer.logits[2] = torch.tensor([math.inf, 0.0, 0.0, 0.0])
    before = scorer.logits.detach().clone()
    with pytest.raises(NonFiniteError, match="have not moved") as caught:
        fit(trainer(scorer), rows(), [], tmp_path)
    bad = next(row.place for row in rows() if row.prompt == (2,))
    assert bad.split()[0] in str(caught.value)
    torch.testing.assert_close(scorer.logits, before, equal_nan=True)


def test_every_comparison_is_seen_once_an_epoch_in_an_order_that_follows_from_the_seed():
    seen = [batch_indices(13, 4, step, seed=7) for step in range(4)]
    assert sorted(index for batch in seen for index in batch) == list(range(13))
    assert [len(batch) for batch in seen] == [4, 4, 4, 1]
    assert seen == [batch_indices(13, 4, step, seed=7) for step in range(4)]
    assert seen != [batch_indices(13, 4, step, seed=8) for step in range(4)]
    assert seen != [batch_indices(13, 4, step + 4, seed=7) for step in range(4)]


def test_rows_may_be_seen_in_the_order_of_the_data_epoch_by_epoch():
    settings = TrainSettings(batch_size=4, order="AsGiven()", seed=7)
    data = rows(10)
    seen = [[row.id for row in global_batch(data, settings, step)] for step in range(6)]
    ids = [row.id for row in data]
    assert seen == 2 * [ids[:4], ids[4:8], ids[8:]]
    assert rows_seen(10, replace(settings, max_steps=2)) == list(range(8))
    with pytest.raises(UserError, match="there is no 'Sorted'"):
        TrainSettings(order="Sorted()")


def test_all_processes_get_equally_many_passes_and_no_row_is_lost():
    batch = rows(7)
    assert sorted(row.id for share in shares(batch, 3) for row in share) == sorted(
        row.id for row in batch
    )
    passes = forward_passes(batch, 3, token_budget=8)
    assert len({len(part) for part in passes}) == 1
    assert sum(len(part) for process in passes for part in process) == 7
    assert any(part == [] for part in forward_passes(batch[:2], 3, 8)[2])


def test_neighbouring_seeds_are_unrelated():
    drawn = {derived_seed(seed, epoch) for seed in range(30) for epoch in range(30)}
    assert len(drawn) == 900
    assert all(0 <= value < 2**63 for value in drawn)


def test_the_learning_rate_warms_up_linearly_and_follows_a_half_cosine():
    settings = TrainSettings(lr=1.0, warmup=0.2, schedule="cosine")
    rates = [settings.learning_rate(step, 10) for step in range(10)]
    assert rates[:2] == [0.5, 1.0]  # two warm-up steps of ten
    assert rates[2] == 1.0  # the top: (1 + cos 0) / 2
    assert rates[4] == pytest.approx(0.85355, abs=1e-5)  # a quarter: (1 + cos(pi/4)) / 2
    assert rates[6] == pytest.approx(0.5)  # half of the eight that are left: (1 + cos(pi/2)) / 2
    assert TrainSettings(lr=1.0, warmup=0.0, schedule="linear").learning_rate(3, 4) == 0.25
    assert TrainSettings(lr=1.0, warmup=0.0, schedule="constant").learning_rate(3, 4) == 1.0


def test_held_out_metrics_are_means_over_the_held_out_rows(tmp_path):
    made = trainer(batch_size=4)
    together = made.evaluate(rows(6))
    singly = [made.evaluate([row]) for row in rows(6)]
    assert together["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("eval_logps/chosen", "eval_rewards/accuracies"):
        assert together[name] == pytest.approx(sum(m[name] for m in singly) / 6, abs=1e-5)


def test_displacement_is_logged(tmp_path):
    last = fit(trainer(), rows(responses=2), [], tmp_path)
    change = last["displacement/chosen"] - last["displacement/rejected"]
    assert change == pytest.approx(last["rewards/margins"] / 0.5, abs=1e-5)
    assert 0 <= last["displacement/chosen_fell"] <= 1


@pytest.mark.parametrize("objective", [PlackettLuce(), SFT()])
def test_objectives_of_other_families_train_in_the_same_loop(tmp_path, objective):
    last = fit(trainer(objective=objective, epochs=30), rows(), [], tmp_path)
    first = next(read_jsonl(tmp_path / "metrics.jsonl"))
    assert last["loss"] < first["loss"]


def test_an_objective_without_its_reference_is_refused():
    with pytest.raises(UserError, match="needs a reference"):
        build_trainer(policy(), DPO(), None, TrainSettings(), Accelerator(cpu=True))


def test_what_wraps_a_policy_goes_before_its_process_group(monkeypatch):
    accelerator = Accelerator(cpu=True)
    wrapper = torch.nn.Sequential(policy())
    wrapper.itself = [wrapper]  # a circle, as in DistributedDataParallel
    accelerator._models.append(wrapper)
    gone, left = weakref.ref(wrapper), []
    monkeypatch.setattr(accelerator, "end_training", lambda: left.append(gone()))
    del wrapper
    finish(accelerator)
    assert left == [None]


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to train on"):
        fit(trainer(), [], [], tmp_path)


def test_a_frozen_policy_is_refused():
    scorer = policy()
    scorer.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        trainer(scorer)


def test_a_checkpoint_of_another_policy_is_refused(tmp_path):
    fit(trainer(max_steps=2), rows(), [], tmp_path)

    class Two(TabularPolicy):
        def __init__(self) -> None:
            super().__init__(torch.zeros(PROMPTS, ANSWERS))
            self.extra = torch.nn.Parameter(torch.zeros(1))

    with pytest.raises(UserError, match="another model"):
        fit(trainer(Two()), rows(), [], tmp_path)


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 9])
def test_the_rows_a_run_sees_are_those_of_its_steps(steps):
    settings = TrainSettings(batch_size=4, max_steps=steps, epochs=3)
    data = rows(13)
    places = {id(row): place for place, row in enumerate(data)}
    stepped = {
        places[id(row)]
        for number in range(total_steps(13, settings))
        for row in global_batch(data, settings, number)
    }
    assert rows_seen(13, settings) == sorted(stepped)


ZERO = {"train_batch_size": "auto", "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}


def test_a_deepspeed_config_is_filled_from_the_settings():
    settings = TrainSettings(batch_size=32, max_grad_norm=0.5)
    config = zero_config(
        ZERO | {"gradient_clipping": 0.5, "bf16": {"enabled": "auto"}}, settings, 8
    )
    assert config["zero_optimization"] == {"stage": 2}  # what nobody says is DeepSpeed's default
    assert config["bf16"] == {}
    assert config["gradient_clipping"] == 0.5
    # A pass is a "sample" to it: the loss of a pass is a share of the global batch already.
    assert config["train_batch_size"] == 8
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == 1
    assert zero_config(ZERO | {"train_batch_size": 32}, settings, 8)["train_batch_size"] == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_batch_size": 64}, "train_batch_size is 64, but --batch-size is 32"),
        ({"gradient_clipping": 2.0}, "gradient_clipping is 2.0, but --max-grad-norm is 1.0"),
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps is 4, but --token-budget",
        ),
        ({"train_micro_batch_size_per_gpu": 4}, "size_per_gpu is 4, but .* by --token-budget"),
        ({"optimizer": {"type": "Adam"}}, "the optimizer is AdamW with --lr"),
        ({"scheduler": {"type": "WarmupLR"}}, "follows --lr, --schedule and --warmup"),
        ({"zero_optimization": {"stage": 0}}, "ZeRO stage is 0, allowed are"),
        ({"fp16": {"enabled": True}}, "fp16 is on: .* skips steps.*--precision bf16"),
        ({"bf16": {"enabled": True}}, "bf16 is on: .*--precision bf16"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            'offload_param to "nvme" is not supported',
        ),
    ],
)
def test_a_deepspeed_config_that_contradicts_is_refused_by_name(given, message):
    with pytest.raises(UserError, match=message):
        zero_config(ZERO | given, TrainSettings(), 8)


def test_deepspeed_that_is_asked_for_and_not_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(build, "is_deepspeed_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'prefloop\[deepspeed\]'"):
        build.accelerator_for((), tmp_path, "no")


def test_a_launcher_that_asks_for_sharding_where_there_is_none_is_refused():
    with pytest.raises(UserError, match="every process would hold the whole model"):
        refuse_unsharded(DistributedType.MULTI_CPU, {"ACCELERATE_USE_FSDP": "true"})
    refuse_unsharded(DistributedType.MULTI_CPU, {"ACCELERATE_USE_FSDP": "false"})
    refuse_unsharded(DistributedType.FSDP, {"ACCELERATE_USE_FSDP": "true"})


@pytest.mark.parametrize(
    ("field", "value"), [("lr", 0.0), ("batch_size", 0), ("warmup", 1.0), ("max_steps", -1)]
)
def test_a_setting_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        TrainSettings(**{field: value})
