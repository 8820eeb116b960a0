"""Nothing of a model's device meets a tensor of the CPU: every path on a device that is not there.

What `pretend_device` is and cannot say stands in that file. Whatever is compared must be what it is
on the CPU.
"""

import gc
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from objective_cases import CASES
from objective_world import World
from pretend_device import DEVICE, MixedDevicesError, pretend_device
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel

from prefloop.cli import main
from prefloop.diagnostics.gradients import first_order, gradient_bound, inner_products
from prefloop.logps import (
    EmbeddedScorer,
    FullLogits,
    Masked,
    OneARow,
    PrefixShared,
    Scorer,
    exact,
    hidden_sums,
    logps_and_hidden_sums,
    verify,
)
from prefloop.objectives import DPO
from prefloop.objectives.references import combine_references
from prefloop.policies import Lora, Policy, Sampling, load_policy, loading
from prefloop.policies.sampling import Blend, FromPolicy, sample
from prefloop.rewards import Implicit
from prefloop.runs import read_json, write_jsonl
from prefloop.samplers import FromReference, Hybrid, MixedLogits, Mixture, Tilted
from prefloop.settings import TrainSettings
from prefloop.stable import OneStep, StableGradient
from prefloop.trainer import build_trainer, loop
from prefloop.types import Logps, judgement, score


@pytest.fixture
def there(monkeypatch) -> Iterator[torch.device]:
    """The device, with the type that a frozen base has on a GPU: bfloat16."""
    with_gpus_types(monkeypatch)
    with pretend_device() as device:
        yield device


@pytest.fixture
def narrow(monkeypatch) -> Iterator[torch.device]:
    """The device without float64, which Apple's GPUs do not have."""
    with_gpus_types(monkeypatch)
    with pretend_device(without=torch.float64) as device:
        yield device


def with_gpus_types(monkeypatch) -> None:
    kinds = {True: torch.bfloat16, False: torch.float32}
    monkeypatch.setattr(loading, "_dtype_for", lambda device, adapted: kinds[adapted])


def fast(names: Iterable[str], *kept: str) -> list[Any]:
    """The names for `parametrize`: those of `kept` in every run of the tests, the others slow."""
    slow = pytest.mark.slow
    return [name if name in kept else pytest.param(name, marks=slow) for name in names]


# The engine


WAYS = [PrefixShared(), Masked(10**9), OneARow(), FullLogits()]
MODELS = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "gemma2": tiny.gemma2,
    "qwen3_moe": tiny.qwen3_moe,
    "mamba": tiny.mamba,
    "adapter": lambda: tiny.lora(tiny.llama()),
    "bfloat16": lambda: tiny.llama().bfloat16(),
}


def scored(scorer: Scorer) -> tuple[Logps, list[Tensor]]:
    """Log-probabilities and gradients of their sum."""
    scorer.zero_grad()
    logps = score(scorer, tiny.batch(4))
    logps.sum.sum().backward()
    grads = [part.grad for part in scorer.parameters() if part.grad is not None]
    return logps, grads


def near(away: Tensor | None, here: Tensor | None, **tolerance: float) -> None:
    if here is None or away is None:
        assert here is away
        return
    assert away.device == DEVICE
    torch.testing.assert_close(away.detach().cpu(), here.detach(), **tolerance)


@pytest.mark.filterwarnings("ignore:.*is scored the ")
@pytest.mark.parametrize("name", fast(MODELS, "llama", "gpt2", "adapter"))
def test_a_model_is_scored_and_differentiated(name, there):
    loose = {"rtol": 0.05, "atol": 0.2} if name == "bfloat16" else {"rtol": 1e-3, "atol": 1e-3}
    here, away = (Scorer(MODELS[name](), token_budget=60) for _ in range(2))
    away.model.to(there)
    (one, grads), (other, moved) = scored(here), scored(away)
    assert type(away.way) is type(here.way)  # no way was given up for a mixed device
    near(other.token, one.token, **loose)
    near(other.mask, one.mask)
    for grad, expected in zip(moved, grads, strict=True):
        near(grad, expected, **loose)


@pytest.mark.parametrize("name", ["llama", "gemma3", "adapter"])
def test_under_autocast_the_way_is_kept_and_numbers_are_rounded(name, there):
    model = tiny.lora(tiny.llama()) if name == "adapter" else tiny.MODELS[name]()
    with torch.no_grad():
        exactly = score(Scorer(model), tiny.batch(4)).token
    scorer = Scorer(model.to(there))
    with torch.autocast(there.type, dtype=torch.bfloat16):
        rounded = score(scorer, tiny.batch(4))
    rounded.sum.sum().backward()
    assert isinstance(scorer.way, PrefixShared)
    assert rounded.token.dtype == torch.float32
    assert 1e-3 < float((rounded.token.cpu() - exactly).detach().abs().max()) < 0.5


@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_every_way_and_every_head_on_the_device(way, there):
    here, away = tiny.llama(), tiny.llama().to(there)
    for head in ({}, {"head": exact}):
        more: dict[str, Any] = {"way": way, "with_collision": True, **head}
        one, other = (score(Scorer(model, **more), tiny.batch(4)) for model in (here, away))
        near(other.token, one.token, rtol=0, atol=1e-4)
        near(other.collision, one.collision, rtol=0, atol=1e-4)
    assert verify(Scorer(away, way=way), tiny.batch(2)) < 1e-3
    both = [
        logps_and_hidden_sums(Scorer(model, way=way), tiny.batch(4))[1] for model in (here, away)
    ]
    near(both[1], both[0], rtol=1e-3, atol=1e-3)
    near(hidden_sums(Scorer(away, way=way), tiny.batch(4)), both[0], rtol=1e-3, atol=1e-3)


def test_embeddings_come_with_their_graph_on_the_device(there):
    found = EmbeddedScorer(tiny.llama().to(there)).eval()
    logps = score(found, tiny.batch(3, responses=(2,)))
    assert logps.embeddings is not None
    (grad,) = torch.autograd.grad(logps.sum.sum(), logps.embeddings)
    assert grad.device == DEVICE


# Answers


@pytest.mark.parametrize("kept", ["adapter", "copy"])
def test_every_sampler_answers_as_on_the_cpu(kept, model):
    samplers = [FromPolicy(), FromReference(), Hybrid(), Tilted(k=0.5), Mixture(on_policy=0.5)]

    def answers(device: torch.device | str) -> list[Any]:
        policy = load_policy(model, device=device)
        policy = (
            policy.add_adapter("default", Lora(rank=2)) if kept == "adapter" else copied(policy)
        )
        drawn = Sampling(max_new_tokens=5, top_p=0.95, top_k=30)
        found = [sample(policy, [(5, 6), (7,)], 2, drawn, 0, sampler) for sampler in samplers]
        mixed = MixedLogits(policy, Blend(1.5, -0.5))
        plain = policy.model.generate(
            input_ids=torch.tensor([[5, 6]], device=device),
            attention_mask=torch.ones(1, 2, dtype=torch.long, device=device),
            logits_processor=[mixed],
            do_sample=False,
            max_new_tokens=4,
        )
        rewards = Implicit(policy)(["w1 w2"], [["w3", "w4 w5"]])
        tokens = [[[one.tokens for one in prompt] for prompt in of] for of in found]
        return [*tokens, plain.tolist(), rewards[0]]

    def copied(policy: Policy) -> Policy:
        policy = policy.with_frozen_copy()
        with torch.no_grad():
            for part in policy.model.parameters():
                part.mul_(0.9)
        return policy

    here = answers("cpu")
    with pretend_device(without=torch.float64) as device:
        there = answers(device)
    assert there[:-1] == here[:-1]
    assert there[-1] == pytest.approx(here[-1], abs=1e-4)


# Gradients


def test_gradients_of_responses_meet_rewards_on_the_cpu(there):
    rows = tiny.batch(3, responses=(2, 3))
    inner = inner_products(Scorer(tiny.llama().to(there)), rows)
    bound = gradient_bound(inner, torch.zeros(3, 3), beta=0.1)
    assert all(one.device.type == "cpu" for one in inner)
    assert len(bound.norm) == len(first_order(inner, rows).chosen_norm[:3]) == 3


# Objectives


def moved(world: World, device: torch.device) -> World:
    return World(world.policy.to(device), world.reference.to(device), world.judged.to(device))


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.objective))
def test_an_objective_and_its_log_stay_on_the_device(case, there, monkeypatch):
    world = moved(case.world, there)
    monkeypatch.setattr("objective_world.U", torch.tensor([1.0, -1.0]).double().to(there))
    policy = scored_there(world)
    losses = case.objective.per_comparison(policy, world.reference, world.judged)
    assert losses.device == DEVICE
    expected = torch.tensor(case.losses).double()
    torch.testing.assert_close(losses.detach().cpu(), expected, rtol=0, atol=2e-6)
    losses.sum().backward()
    loop.batch_totals(case.objective, policy, world.reference, world.judged, losses)


def test_several_references_are_one_whatever_holds_their_weights(there):
    world = moved(CASES[0].world, there)
    pair = [world.reference, world.policy]
    both = combine_references(pair, torch.tensor([0.5, 0.5]).double())
    assert both.token.device == DEVICE


def test_a_solver_with_second_derivatives_takes_its_step_on_the_device(there):
    model = tiny.llama().to(there)
    frozen = tiny.llama(seed=1).to(there)
    made = build_trainer(
        Scorer(model, head=exact),
        DPO(),
        lambda rows: score(Scorer(frozen), rows).detach().to("cpu"),
        TrainSettings(batch_size=2),
        Accelerator(),
        StableGradient(solver=OneStep()),
    )
    assert made.step(tiny.batch(2, responses=(2,)), 0, 0.01)["grad_norm"] > 0


def scored_there(world: World) -> Logps:
    leaf = world.policy.token.clone().requires_grad_()
    embeddings = torch.zeros(*leaf.shape, 2, dtype=leaf.dtype, device=DEVICE).requires_grad_()
    direction = torch.tensor([1.0, -1.0], dtype=leaf.dtype, device=DEVICE)
    token = torch.where(world.policy.mask, leaf + embeddings @ direction, 0.0)
    return Logps(token, world.policy.mask, world.policy.collision, embeddings)


# Commands


LOOP = "--lora-rank 2 --batch-size 4 --epochs 1 --lr 0.01 --save-every 1"
WORDS = [f"w{number}" for number in range(60)]


def even_words(prompt: object, response: str) -> float:
    """The share of even words."""
    words = [word for word in response.split() if word.startswith("w")]
    return sum(int(word[1:]) % 2 == 0 for word in words) / max(1, len(words))


def run(line: str) -> None:
    assert main(line.split()) == 0, line


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, prompts, comparisons and a sentence encoder, tiny."""
    made = tmp_path_factory.mktemp("device")
    tiny.reward_model().save_pretrained(made / "judge")
    tiny.tokenizer().save_pretrained(made / "judge")
    write_jsonl(made / "pairs.jsonl", map(pair, range(12)))
    write_jsonl(made / "held.jsonl", map(pair, range(20, 28)))
    write_jsonl(made / "shown.jsonl", map(shown, range(3)))
    for name, count in (("prompts", 4), ("many", 8)):
        write_jsonl(made / f"{name}.jsonl", ({"prompt": words(n, 3)} for n in range(count)))
    return made


def words(start: int, length: int) -> str:
    return " ".join(WORDS[(start * 7 + place * 3) % 60] for place in range(length))


def shown(n: int) -> dict[str, Any]:
    return {"prompt": words(n, 2), "completion": words(n, 1), "label": True}


def pair(n: int) -> dict[str, Any]:
    return {
        "id": f"row-{n}",
        "prompt": words(n, 3),
        "responses": [words(n + 1, 4), words(n + 2, 6)],
        "rank": [1, 2] if n % 2 else [2, 1],
        "annotator": f"person-{n % 3}",
    }


@pytest.fixture(scope="module")
def model(folder) -> str:
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def encoder(folder) -> str:
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=tiny.VOCABULARY, num_attention_heads=4, **size)
        BertModel(config).save_pretrained(folder / "encoder")
    tiny.tokenizer(chat=False).save_pretrained(folder / "encoder")
    return str(folder / "encoder")


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)  # half of the time of a tiny run
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def both(work: Callable[[Path], None], folder: Path) -> tuple[Path, Path]:
    """Folders of what `work` left on the CPU and on the device."""
    work(folder / "here")
    with pretend_device(without=torch.float64):
        work(folder / "there")
    return folder / "here", folder / "there"


def test_training_gives_what_it_gives_on_the_cpu(model, folder, tmp_path):
    """Reference cache, steps, held-out metrics, checkpoints, the saved policy, resuming."""

    def train(out: Path) -> None:
        line = f"train --model {model} --data {folder}/pairs.jsonl --out {out} --eval-every 2"
        run(f"{line} {LOOP}")
        shutil.rmtree(out / "policy")
        (out / "metrics.jsonl").unlink()
        run(f"{line} {LOOP} --resume")

    here, there = both(train, tmp_path)
    one, other = (load_file(out / "policy/adapter_model.safetensors") for out in (here, there))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_evaluating_and_diagnosing_give_what_they_give_on_the_cpu(model, folder, tmp_path):
    def measure(out: Path) -> None:
        run(f"train --model {model} --data {folder}/pairs.jsonl --out {out} {LOOP}")
        answers = f"--data {folder}/prompts.jsonl --reward test_device:even_words --n 2"
        run(f"evaluate {out} {answers} --max-new-tokens 4")
        run(f"evaluate {out} --data {folder}/held.jsonl --out {out}/held")
        more = f"--samples 2 --max-new-tokens 4 --rejected-policy {model}"
        run(f"diagnose {out} --data {folder}/held.jsonl {more}")

    here, there = both(measure, tmp_path)
    for name in ("evaluation.json", "held/evaluation.json"):
        assert numbers(there / name) == close(numbers(here / name)), name
    one, other = (read_json(out / "diagnosis.json")["numbers"] for out in (here, there))
    assert other == close(one)


def close(expected: dict[str, float]) -> Any:
    return pytest.approx(expected, rel=1e-2, abs=1e-3, nan_ok=True)


def numbers(file: Path) -> dict[str, float]:
    return {row["name"]: row["value"] for row in read_json(file)["result"]}


def test_a_planted_tensor_of_the_cpu_is_caught(there, model, folder, monkeypatch):
    monkeypatch.setattr(loop, "judgement", lambda rows, device: judgement(rows))
    with pytest.raises(MixedDevicesError):
        run(f"train --model {model} --data {folder}/pairs.jsonl --out {folder}/bug {LOOP}")


TRAINED = {
    "the whole model": "--lora-rank 0",
    "labels of a coupled batch": "--objective KTO()",
    "input embeddings": "--objective WassersteinDPO()",
    "autocast": "--precision bf16",
    "collisions": "--objective WPO(objective=DPO())",
    "a hinge": "--stable Hinge()",
    "a hinge on a running level": "--stable Hinge() --stable-level RunningLevel(decay=0.9)",
    "products by differences": "--stable OneStep(product=DifferenceProduct())",
    "demonstrations": "--stable Hinge() --demonstrations {folder}/shown.jsonl "
    "--stable-level RunningLevel(decay=0.9) --objective SimPO() --no-log-displacement",
    "a look ahead": "--stable OneStepFirstOrder() --stable-level InnerLevel(steps=1)",
    "a step each in turn": "--stable Alternating()",
    "an adaptive pull": "--stable Adaptive()",
    "a penalty": "--stable Penalty(lam=0.5)",
    "a region in the objective": "--objective Stable(objective=DPO(),pull=SafeRegionEach())",
    "dropout and accumulation": "--lora-dropout 0.1 --token-budget 40",
}


KEPT = ("the whole model", "autocast", "labels of a coupled batch", "input embeddings", "a hinge")


@pytest.mark.parametrize("name", fast(TRAINED, *KEPT))
def test_every_kind_of_step_is_taken_on_the_device(name, model, folder, tmp_path, narrow):
    data = f"--data {folder}/pairs.jsonl --held-out-share 0 --max-steps 1"
    more = TRAINED[name].format(folder=folder)
    run(f"train --model {model} {data} --out {tmp_path}/run {LOOP} {more}")


ROUNDS = f"--rounds 2 {LOOP} --max-new-tokens 4 --held-out-n 1 --reward test_device:even_words"
COMMANDS = {
    "answers of a sampler": [
        "sample --model {1} --data {0}/prompts.jsonl --out {2}/a --n 2 --max-new-tokens 4 "
        "--temperature 0.7 --top-p 0.9 --top-k 20"
    ],
    "columns of a policy": [
        "score --data {0}/pairs.jsonl --policy {1} --reference {1} --hidden --out {2}/a",
        "score --data {0}/pairs.jsonl --encoder {3} --out {2}/b",
        "select --data {2}/a/scored.jsonl --rule CHES() --out {2}/c",
    ],
    "learning order": [
        "score --data {0}/pairs.jsonl --learning-order {1} --fits 1 --out {2}/a " + LOOP
    ],
    "rewards on a causal model": [
        "reward --data {0}/pairs.jsonl --model {1} --members 2 --out {2}/r " + LOOP,
        "score --data {0}/pairs.jsonl --reward {2}/r --out {2}/s",
    ],
    "rewards of a classifier": ["score --data {0}/pairs.jsonl --reward {0}/judge --out {2}/c"],
    "rewards in half precision": [
        "reward --data {0}/pairs.jsonl --model {1} --precision bf16 --out {2}/r " + LOOP,
        "score --data {0}/pairs.jsonl --reward {2}/r --precision bf16 --out {2}/s",
    ],
    "heads for disagreement": [
        "heads --data {0}/pairs.jsonl --encoder {3} --out {2}/h --folds 2 --seeds 1"
    ],
    "rewards on an encoder": [
        "reward --data {0}/pairs.jsonl --encoder {3} --members 2 --hidden 2 --l2 0.1 --out {2}/r",
        "score --data {0}/pairs.jsonl --reward {2}/r --out {2}/s",
    ],
    "rounds of tilted samplers": [
        "online --model {1} --data {0}/prompts.jsonl --out {2}/o --recipe tilted --budget 2 "
        + ROUNDS
    ],
    "rounds of a model trained whole": [
        "online --model {1} --data {0}/prompts.jsonl --out {2}/o --reference moving "
        "--sampler Mixture() --rule OnlinePVar(beta=0.1) --budget 3 --lora-rank 0 " + ROUNDS
    ],
    "starts": [
        "train --model {1} --data {0}/pairs.jsonl --held-out-share 0 --out {2}/run " + LOOP,
        "diagnose {2}/run --data {0}/held.jsonl --out {2}/s --init-sweep 0 1 --sft-lr 0.01",
    ],
    "types and one policy for all": [
        "mixture --model {1} --data {0}/pairs.jsonl --out {2}/m --rounds 2 "
        "--objective PlackettLuce(beta=1.0) " + LOOP,
        "aggregate {2}/m --data {0}/prompts.jsonl --out {2}/a --held-out {0}/held.jsonl "
        "--new {0}/held.jsonl --max-new-tokens 3 --distil 1 --form geometric " + LOOP,
        "aggregate {2}/m --data {0}/prompts.jsonl --out {2}/k --max-new-tokens 3 --distil 1 "
        "--by kl " + LOOP,
        "evaluate {2}/k --data {0}/held.jsonl --by annotator --max-new-tokens 3",
    ],
    "types by held-out votes, trained whole": [
        "mixture --model {1} --data {0}/pairs.jsonl --out {2}/m --rounds 1 --types auto "
        "--most-types 2 --objective PlackettLuce(beta=1.0) --start Dirichlet() "
        + LOOP
        + " --lora-rank 0"
    ],
    "an experiment": [
        "experiment selection --data {0}/many.jsonl --model {1} --out {2}/e "
        "--reward test_device:even_words --rewards label --pool 4 --warm 2 --held-out 2 "
        "--answers 2 --measured 1 --max-new-tokens 3 --seeds 1 --shares 0.5 --rules PVar() "
        "--objectives DPO() --equals steps --batch-size 2 --lr 0.01 --lora-rank 2"
    ],
}


SHORT = ("answers of a sampler", "rewards of a classifier", "rewards on an encoder")


@pytest.mark.parametrize("name", fast(COMMANDS, *SHORT))
def test_every_command_runs_on_the_device(name, model, encoder, folder, tmp_path, narrow):
    for line in COMMANDS[name]:
        run(line.format(folder, model, tmp_path, encoder))
