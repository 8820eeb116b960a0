"""Models that cannot share prompts are found out, said once, and served with right numbers."""

import copy
import random
import warnings

import pytest
import tiny
import torch
from torch import nn
from transformers import LlamaForCausalLM

from prefloop.logps import FullLogits, Masked, OneARow, PrefixShared, Scorer, attention, verify
from prefloop.logps.check import undisturbed
from prefloop.types import UserError, score

BATCH = [tiny.row(6, [5, 7, 2]), tiny.row(3, [4], seed=1), tiny.row(4, [2, 9], seed=2)]


class DoublesItsLogits(LlamaForCausalLM):
    """A head that no configuration tells of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class IgnoresItsMask(LlamaForCausalLM):
    """What looks like a model that can share prompts, and silently does not."""

    def __init__(self, config):
        super().__init__(config)
        inner = self.model.forward
        self.model.forward = lambda attention_mask=None, **rest: inner(**rest)


def made(kind):
    plain = tiny.llama()
    model = kind(copy.deepcopy(plain.config))
    model.load_state_dict(plain.state_dict())
    return model.eval()


CASES = {
    "mamba": (tiny.mamba, OneARow(), "MambaForCausalLM is scored the OneARow way"),
    "bloom": (tiny.bloom, OneARow(), "BloomForCausalLM is scored the OneARow way"),
    "gemma2": (tiny.gemma2, Masked(32), "PrefixShared failed .*'eager', not 'sdpa'"),
    "head": (lambda: made(DoublesItsLogits), FullLogits(), r"OneARow is off by [0-9.]+ nats"),
    "mask": (lambda: made(IgnoresItsMask), OneARow(), r"PrefixShared is off by [0-9.]+ nats"),
}


def one_at_a_time(model, row, response):
    logits = model(torch.tensor([[*row.prompt, *response]])).logits[0, len(row.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_cannot_share_is_served_another_way_with_one_warning(name):
    make, way, message = CASES[name]
    model = make()
    scorer = Scorer(model)
    with pytest.warns(UserWarning, match=message) as said:
        found = score(scorer, BATCH)
    assert len(said) == 1
    assert type(model).__name__ in str(said[0].message)
    assert scorer.way == way
    again = score(Scorer(model), BATCH)  # another scorer of the same model: known, not said
    assert torch.equal(found.token, again.token)
    assert verify(scorer, BATCH) < 1e-4
    for index, row in enumerate(BATCH):
        for place, response in enumerate(row.responses):
            token = found.token[index, place, : len(response)]
            expected = one_at_a_time(model, row, response)
            torch.testing.assert_close(token, expected, rtol=0, atol=2e-5)


def test_a_model_is_found_out_even_if_no_response_has_company():
    scorer = Scorer(made(IgnoresItsMask))
    with pytest.warns(UserWarning, match="PrefixShared is off"):
        score(scorer, [tiny.row(4, [6])])
    assert scorer.way == OneARow()


def test_a_model_that_is_served_another_way_keeps_its_attention():
    model = made(IgnoresItsMask)
    with pytest.warns(UserWarning, match="OneARow way"):
        score(Scorer(model), BATCH)
    assert model.config._attn_implementation == "sdpa"


def test_a_suitable_model_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer = Scorer(tiny.llama())
        score(scorer, BATCH)
    assert scorer.way == PrefixShared()


def test_bfloat16_is_within_its_own_tolerance():
    scorer = Scorer(tiny.llama().to(torch.bfloat16))
    score(scorer, BATCH)
    assert scorer.way == PrefixShared()


def test_the_comparison_leaves_modes_gradients_and_random_numbers_as_they_were():
    model = tiny.llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    torch.manual_seed(3)
    random.seed(3)
    with undisturbed(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(2)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert model.training
    assert model.model.layers[1].training
    assert not model.model.layers[0].training


def test_dropout_of_the_first_batch_is_that_of_a_scorer_that_did_not_compare():
    torch.manual_seed(1)
    compared = score(Scorer(tiny.llama(attention_dropout=0.5).train()), BATCH).token
    torch.manual_seed(1)
    forced = score(Scorer(tiny.llama(attention_dropout=0.5).train(), way=PrefixShared()), BATCH)
    assert torch.equal(compared, forced.token)
    calm = score(Scorer(tiny.llama(attention_dropout=0.5)), BATCH)
    assert not torch.equal(calm.token, forced.token)


STATES = [torch.zeros(1, 1, 3, 2)] * 3
PIECES = [(0, 1), (1, 2)]


@pytest.mark.parametrize("option", ["softcap", "s_aux", "indices", "anything_new"])
def test_attention_options_that_would_be_lost_are_refused(option):
    picture = attention.as_mask(PIECES, None)
    attention.prefix_shared_attention(nn.Identity(), *STATES, picture, **{option: None})
    with pytest.raises(ValueError, match=f"does not know {option}"):
        attention.prefix_shared_attention(nn.Identity(), *STATES, picture, **{option: 5.0})


@pytest.mark.parametrize(("layer", "configuration"), [(None, 4), (4, None), (4, 5)])
def test_a_layer_with_another_window_than_the_configuration_names_is_refused(layer, configuration):
    picture = attention.as_mask(PIECES, configuration)
    with pytest.raises(ValueError, match=f"window is {layer}, but {configuration} by"):
        attention.prefix_shared_attention(nn.Identity(), *STATES, picture, sliding_window=layer)


def test_a_module_that_is_no_causal_model_is_refused():
    with pytest.raises(UserError, match="a Linear cannot be scored; a causal model"):
        score(Scorer(nn.Linear(2, 2)), BATCH)


def test_an_adapter_that_adds_tokens_to_the_prompt_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match="PROMPT_TUNING: adapters that add tokens"):
        score(Scorer(get_peft_model(tiny.llama(), config)), BATCH)
