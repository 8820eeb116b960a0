"""Loading, adapters, references and saving of policies; every refusal in one line."""

import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefloop.data import encoder
from prefloop.errors import UserError
from prefloop.policies import Lora, Policy, load_policy, loading
from prefloop.policies.policy import evaluating
from prefloop.runs import read_json
from prefloop.trainer import TrainSettings
from prefloop.training import reference_of
from prefloop.types import score

LORA = Lora(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny chat model saved as transformers saves it."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.llama().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def randomise(policy, seed=0):
    """A trained adapter: fresh ones change nothing, since B starts at zero."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=rng)
    return policy


def total(policy, batch):
    with torch.no_grad():
        return score(policy.scorer(), batch).sum


def pickled(folder, name):
    """The weights of a folder in pickle instead of safetensors."""
    for file in folder.glob("*.safetensors"):
        torch.save(load_file(file), folder / name)
        file.unlink()
    return folder


def test_a_model_is_loaded_in_float32_on_a_cpu_with_what_it_needs(folder):
    policy = load_policy(folder, device="cpu")
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert policy.context == tiny.CONTEXT
    assert policy.adapter is None
    assert not policy.model.training
    assert policy.device == torch.device("cpu")


def test_bfloat16_is_loaded_when_asked_for(folder):
    policy = load_policy(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}


def test_a_response_stops_at_eos_and_at_the_end_of_a_turn(folder):
    policy = load_policy(folder)
    end_of_turn = policy.tokenizer.convert_tokens_to_ids("<end>")
    assert encoder(policy.tokenizer).end == end_of_turn
    assert policy.stop_tokens == {tiny.EOS, end_of_turn}


def test_gpt2_gives_its_context_by_its_own_name():
    assert Policy(tiny.gpt2(), tiny.tokenizer(), "gpt2").context == tiny.CONTEXT


def test_a_model_without_positions_has_no_context_limit():
    assert Policy(tiny.mamba(), tiny.tokenizer(), "mamba").context is None


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(folder):
    batch = tiny.batch(2)
    plain = total(load_policy(folder), batch)
    policy = load_policy(folder, adapter=LORA)
    torch.testing.assert_close(total(policy, batch), plain)
    assert (total(randomise(policy), batch) - plain).abs().max() > 0.1


def test_only_the_adapter_is_trained(folder):
    policy = load_policy(folder, adapter=LORA)
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_the_seed_gives_the_adapter_and_leaves_the_global_generator_alone(folder):
    before = torch.random.get_rng_state()
    first, again, other = (
        load_policy(folder, adapter=LORA, seed=seed).model.state_dict() for seed in (1, 1, 2)
    )
    key = next(key for key in first if "lora_A" in key)
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], other[key])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_reference_of_an_adapter_is_its_base_bit_for_bit(folder):
    batch = tiny.batch(3)
    plain = total(load_policy(folder), batch)
    policy = randomise(load_policy(folder, adapter=LORA))
    assert torch.equal(policy.reference_logps(batch).sum, plain)
    assert not torch.equal(total(policy, batch), plain)  # on again afterwards


def test_the_reference_sees_no_dropout_even_in_training(folder):
    batch = tiny.batch(3)
    policy = randomise(load_policy(folder, adapter=Lora(rank=2, dropout=0.5)))
    policy.model.train()
    assert torch.equal(policy.reference_logps(batch).sum, policy.reference_logps(batch).sum)
    assert policy.model.training


def test_a_frozen_copy_stays_while_the_policy_moves(folder):
    batch = tiny.batch(2)
    policy = load_policy(folder).with_frozen_copy()
    before = total(policy, batch)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)
    assert torch.equal(policy.reference_logps(batch).sum, before)
    assert not torch.equal(total(policy, batch), before)


def test_training_takes_the_frozen_copy_as_reference(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path))
    batch = tiny.batch(2)
    policy = load_policy(folder).with_frozen_copy()
    before = total(policy, batch)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)
    found = reference_of(policy, batch, TrainSettings())(batch)
    torch.testing.assert_close(found.sum, before, rtol=0, atol=1e-4)


def test_a_whole_model_without_a_copy_has_no_reference(folder):
    with pytest.raises(UserError, match="no adapter and no frozen copy"):
        load_policy(folder).reference_logps(tiny.batch(1))


def test_a_copy_of_an_adapter_model_is_refused(folder):
    with pytest.raises(UserError, match="would only cost memory"):
        load_policy(folder, adapter=LORA).with_frozen_copy()


def test_several_adapters_share_one_base(folder):
    batch = tiny.batch(2)
    policy = load_policy(folder, adapter=LORA, seed=1)
    policy.add_adapter("second", LORA, seed=2)
    randomise(policy)
    assert policy.adapter == "default"
    first = total(policy, batch)
    policy.use_adapter("second")
    assert policy.adapter == "second"
    assert (total(policy, batch) - first).abs().max() > 0.1
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert all(".second." in name for name in trained)
    policy.use_adapter("default")
    assert torch.equal(total(policy, batch), first)


def test_adapters_are_named_once_and_must_exist(folder):
    policy = load_policy(folder, adapter=LORA)
    with pytest.raises(UserError, match="an adapter named 'default' already"):
        policy.add_adapter("default", LORA)
    with pytest.raises(UserError, match="no adapter 'other'; it has: default"):
        policy.use_adapter("other")
    with pytest.raises(UserError, match="it has: none"):
        load_policy(folder).use_adapter("other")


def test_layers_that_do_not_exist_cannot_be_adapted(folder):
    with pytest.raises(UserError, match=r"cannot be put on this model: .*no_such_layer"):
        load_policy(folder, adapter=Lora(targets=("no_such_layer",)))


def test_an_adapter_can_be_limited_to_some_layers(folder):
    policy = load_policy(folder, adapter=Lora(rank=2, targets=("q_proj",)))
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("q_proj" in name for name in trained)


def test_gpt2_whose_linear_layers_lie_transposed_is_adapted_without_a_warning():
    policy = Policy(tiny.gpt2(), tiny.tokenizer(), "gpt2").add_adapter("default", LORA)
    assert policy.adapter == "default"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("rank", 0, "at least 1, got 0"),
        ("dropout", 1.0, r"in \[0, 1\), got 1.0"),
        ("alpha", 0.0, "positive, got 0.0"),
    ],
)
def test_a_senseless_adapter_is_refused(field, value, words):
    with pytest.raises(UserError, match=words):
        Lora(**{field: value})


# Saving


def test_a_saved_model_is_loaded_by_plain_transformers(folder, tmp_path):
    policy = load_policy(folder)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1.5)
    policy.save(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not list((tmp_path / "out").glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", use_safetensors=True)
    tokens = torch.tensor([[1, 20, 30]])
    assert torch.equal(loaded(tokens).logits, policy.model(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert set(loaded.generation_config.eos_token_id) == policy.stop_tokens


def test_the_layers_of_a_saved_adapter_stand_in_order(folder, tmp_path):
    load_policy(folder, adapter=LORA).save(tmp_path / "out")
    layers = read_json(tmp_path / "out" / "adapter_config.json")["target_modules"]
    assert len(layers) > 2
    assert layers == sorted(layers)


def test_a_saved_adapter_is_loaded_by_plain_peft(folder, tmp_path):
    policy = randomise(load_policy(folder, adapter=LORA))
    policy.save(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    tokens = torch.tensor([[1, 20, 30]])
    assert torch.equal(loaded(tokens).logits, policy.model(tokens).logits)
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_a_saved_adapter_brings_its_base_along_and_is_trained_on(folder, tmp_path, monkeypatch):
    batch = tiny.batch(2)
    monkeypatch.chdir(folder.parent)
    policy = randomise(load_policy(folder.name, adapter=LORA))  # a relative name
    policy.save(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    for loaded in (load_policy("out"), load_policy(folder, adapter=tmp_path / "out")):
        assert torch.equal(total(loaded, batch), total(policy, batch))
        assert any(p.requires_grad for p in loaded.model.parameters())


def test_the_adapter_in_use_is_the_one_that_is_saved(folder, tmp_path):
    batch = tiny.batch(2)
    policy = load_policy(folder, adapter=LORA)
    policy.add_adapter("second", LORA, seed=2)
    randomise(policy)
    policy.use_adapter("second")
    policy.save(tmp_path / "out")
    assert torch.equal(total(load_policy(tmp_path / "out"), batch), total(policy, batch))


def test_a_policy_saved_over_an_earlier_one_replaces_it_whole(folder, tmp_path):
    load_policy(folder).save(tmp_path / "out")
    load_policy(folder, adapter=LORA).save(tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing half-written is left


# Refusals


def test_pickled_weights_are_refused(copied):
    with pytest.raises(UserError, match=r"pickled weights \(pytorch_model.bin\) can run code"):
        load_policy(pickled(copied, "pytorch_model.bin"))


def test_pickled_adapters_are_refused(folder, tmp_path):
    load_policy(folder, adapter=LORA).save(tmp_path / "out")
    pickled(tmp_path / "out", "adapter_model.bin")
    with pytest.raises(UserError, match=r"pickled weights \(adapter_model.bin\) can run code"):
        load_policy(tmp_path / "out")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load_policy(folder, adapter=tmp_path / "out")


def test_pickled_weights_beside_safe_ones_are_not_read(copied):
    before = total(load_policy(copied), tiny.batch(2))
    (copied / "pytorch_model.bin").write_bytes(b"not weights at all")
    assert torch.equal(total(load_policy(copied), tiny.batch(2)), before)


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"not a model folder: it has no config.json$"):
        load_policy(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(UserError, match="there is no such folder"):
        load_policy("./nowhere")


def test_a_file_is_no_model(copied):
    with pytest.raises(UserError, match="a file; give the folder"):
        load_policy(copied / "config.json")


def test_a_name_that_the_hub_cannot_give_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing: neither a folder here nor a model") as say:
        load_policy("nobody/nothing")
    assert "\n" not in str(say.value)


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(monkeypatch):
    def unreachable(name, timeout):
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(loading, "model_info", unreachable)
    with pytest.raises(UserError, match="the hub gives: Name or service not known"):
        load_policy("nobody/nothing")


def test_a_configuration_that_is_not_json_is_one_line(copied):
    (copied / "config.json").write_text("{")
    with pytest.raises(UserError, match="this folder gives no model: "):
        load_policy(copied)


def test_cut_off_weights_are_one_line(copied):
    whole = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="this folder gives no model: "):
        load_policy(copied)


def test_weights_of_another_kind_of_model_are_not_filled_up_at_random(copied):
    tiny.reward_model().save_pretrained(copied)  # no output layer
    with pytest.raises(UserError, match=r"lm_head.weight.*they would be random"):
        load_policy(copied)


def test_weights_of_another_shape_are_one_line(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(UserError, match="this folder gives no model: "):
        load_policy(copied)


def test_a_folder_without_a_tokenizer_is_one_line(copied):
    for file in copied.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="this folder gives no tokenizer: "):
        load_policy(copied)


def test_a_tokenizer_of_another_model_is_refused(copied):
    tiny.llama(vocab_size=50).save_pretrained(copied)
    with pytest.raises(UserError, match="the tokenizer has 99 tokens and the model 50"):
        load_policy(copied)


def test_a_tokenizer_without_a_pad_token_gets_one(copied):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copied)
    assert load_policy(copied).tokenizer.pad_token_id == tiny.EOS


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(copied):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token = None
    tokenizer.save_pretrained(copied)
    with pytest.raises(UserError, match="no pad, end or unknown token"):
        load_policy(copied)


def test_an_adapter_on_a_saved_adapter_is_refused(folder, tmp_path):
    load_policy(folder, adapter=LORA).save(tmp_path / "out")
    with pytest.raises(UserError, match="is an adapter already"):
        load_policy(tmp_path / "out", adapter=LORA)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not readable as JSON"), ("[]", "not a JSON object"), ("{}", "is not set")],
)
def test_a_broken_adapter_configuration_names_its_file(tmp_path, text, words):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=rf"adapter_config.json: .*{words}"):
        load_policy(tmp_path)


def test_an_adapter_folder_without_an_adapter_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"it has no adapter_config.json"):
        load_policy(folder, adapter=tmp_path)


def test_an_adapter_of_another_model_is_one_line(folder, tmp_path):
    other = get_peft_model(tiny.llama(hidden_size=64), LoraConfig(target_modules=["q_proj"]))
    other.save_pretrained(str(tmp_path / "out"), save_embedding_layers=False)
    with pytest.raises(UserError, match="this folder gives no adapter: "):
        load_policy(folder, adapter=tmp_path / "out")


def test_evaluating_puts_the_mode_back_even_when_it_fails():
    model = tiny.llama().train()

    def fail():
        with evaluating(model):
            assert not model.training
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert model.training
