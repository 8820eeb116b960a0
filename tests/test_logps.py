"""The engine gives the numbers of one response a row, whatever shares a line or a forward pass."""

from dataclasses import replace

import pytest
import tiny
import torch

from prefloop.logps import (
    FullLogits,
    Masked,
    OneARow,
    PrefixShared,
    Scorer,
    attention,
    hidden_sums,
    layout,
    verify,
    ways,
)
from prefloop.types import UserError, score

ATOL = 2e-5  # nats a token, float32; seen: 5e-6
ALWAYS_SHARED = Masked(width=10**9)
BATCH = [
    tiny.row(5, [9, 4], seed=1),  # longer together than the window of 8
    tiny.row(11, [1, 6, 3], seed=2),
    tiny.row(2, [3], seed=3),
    tiny.row(4, [2, 1, 5, 3, 4], seed=4),
]
PREFIX_SHARED = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma3",
    "phi3",
    "olmo2",
    "smollm3",
    "granite",
    "cohere",
    "gpt2",
    "opt",
    "gpt_neox",
    "phi",
    "mixtral",
    "qwen3_moe",
]


def one_at_a_time(model, batch):
    """log p of every response token, in order: a forward pass a response, nothing padded."""
    parts = []
    for row in batch:
        for response in row.responses:
            tokens = torch.tensor([[*row.prompt, *response]])
            logp = model(input_ids=tokens).logits[0].float().log_softmax(-1)
            predicting = logp[len(row.prompt) - 1 : -1]
            parts.append(predicting.gather(-1, torch.tensor(response).unsqueeze(-1)).squeeze(-1))
    return torch.cat(parts)


def flat(logps):
    return logps.token[logps.mask]


def apart(model, batch, **options) -> float:
    with torch.no_grad():
        gap = flat(score(Scorer(model, **options), batch)) - one_at_a_time(model, batch)
    return gap.abs().max().item()


@pytest.mark.parametrize("way", [OneARow(), FullLogits()], ids=repr)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_rows_of_one_response_give_the_numbers_of_one_response_at_a_time(name, way):
    assert apart(tiny.MODELS[name](), BATCH, way=way) < ATOL


def test_eager_attention_with_a_softcap_takes_masked_rows():
    assert apart(tiny.gemma2(), BATCH, way=ALWAYS_SHARED) < ATOL


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "opt", "qwen3_moe"])
def test_the_fastest_way_is_found_suitable_without_a_warning(name):
    scorer = Scorer(tiny.MODELS[name]())
    assert verify(scorer, BATCH) < ATOL
    assert scorer.way == PrefixShared()


@pytest.mark.parametrize("budget", [1, 40, 100, None])
def test_results_come_back_in_order_however_the_batch_is_split(budget):
    model, batch = tiny.llama(), tiny.batch(7)
    assert apart(model, batch, token_budget=budget) < ATOL
    assert apart(model, batch, token_budget=budget, way=Masked(32)) < ATOL


def test_what_does_not_exist_is_zero_and_outside_the_mask():
    batch = [tiny.row(3, [2, 4]), tiny.row(4, [1], seed=1)]
    logps = score(Scorer(tiny.llama()), batch)
    assert logps.mask.sum(-1).tolist() == [[2, 4], [1, 0]]
    assert logps.exists.tolist() == [[True, True], [True, False]]
    assert logps.token[~logps.mask].eq(0).all()


def gradients(model, total):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    made = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, made, strict=True) if g is not None}


def assert_equal(model, batch, scorer):
    """Log-probabilities and the gradients of all weights that are trained."""
    tokens, scored = one_at_a_time(model, batch), flat(score(scorer, batch))
    torch.testing.assert_close(scored, tokens, rtol=0, atol=ATOL)
    weight = torch.randn(len(tokens), generator=torch.Generator().manual_seed(0))
    expected, found = gradients(model, tokens @ weight), gradients(model, scored @ weight)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e-5 * max(1.0, scale), msg=name
        )


@pytest.mark.parametrize("way", [PrefixShared(), ALWAYS_SHARED], ids=repr)
@pytest.mark.parametrize("name", PREFIX_SHARED)
def test_numbers_and_gradients_are_those_of_one_response_at_a_time(name, way):
    model = tiny.MODELS[name]()
    assert_equal(model, BATCH, Scorer(model, way=way))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["k_proj", "lm_head"]])
def test_an_adapter_is_scored_and_trained_as_one_response_at_a_time(targets):
    model = tiny.lora(tiny.llama(), targets=targets)
    assert_equal(model, BATCH, Scorer(model))


def test_with_the_adapter_off_the_numbers_are_the_bases():
    base, model, batch = tiny.llama(), tiny.lora(tiny.llama()), tiny.batch(3)
    with model.disable_adapter(), torch.no_grad():
        off = score(Scorer(model), batch)
    assert torch.equal(off.token, score(Scorer(base), batch).token.detach())


def test_a_head_that_is_trained_whole_beside_an_adapter_is_scored_right():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny.llama(), config).eval()
    assert_equal(model, BATCH, Scorer(model))


def test_activation_checkpointing_changes_nothing():
    model, batch = tiny.qwen3(), tiny.batch(3)
    expected = gradients(model, score(Scorer(model), batch).token.sum())
    model.activation_checkpointing_enable()
    model.train()
    found = gradients(model, score(Scorer(model), batch).token.sum())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_bfloat16_is_scored_in_float32_and_close_to_the_float32_model():
    batch = tiny.batch(4)
    exact = score(Scorer(tiny.llama()), batch)
    half = tiny.llama().to(torch.bfloat16)
    rough = score(Scorer(half), batch)
    assert rough.token.dtype == torch.float32
    # 8 bits of mantissa on logits of a few units: a few hundredths of a nat, as plain rows have.
    plain = one_at_a_time(half, batch)
    assert (flat(rough) - plain).square().mean().sqrt() < 0.03
    assert (flat(rough) - flat(exact)).square().mean().sqrt() < 0.05


def test_under_autocast_products_are_rounded_and_numbers_stay_float32():
    model, batch = tiny.llama(), tiny.batch(4)
    exact = score(Scorer(model), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = score(Scorer(model), batch)
    assert rough.token.dtype == torch.float32
    gap = (flat(rough) - flat(exact)).abs().max().item()
    assert 0 < gap < 0.2
    rough.token.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_the_collision_is_log_sum_p_squared_of_each_position():
    model, batch = tiny.llama(), [tiny.row(4, [3, 2])]
    found = score(Scorer(model, with_collision=True), batch).collision
    row = batch[0]
    for place, response in enumerate(row.responses):
        logits = model(torch.tensor([[*row.prompt, *response]])).logits[0, len(row.prompt) - 1 : -1]
        expected = logits.softmax(-1).square().sum(-1).log()
        torch.testing.assert_close(found[0, place, : len(response)], expected)
    assert not found.requires_grad
    assert found[0, 1, 2] == 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "mamba"])
def test_hidden_sums_add_the_states_that_predict_a_response(name):
    model, batch = tiny.MODELS[name](), [tiny.row(4, [3, 2]), tiny.row(2, [5], seed=1)]
    scorer = Scorer(model, way=OneARow() if name == "mamba" else None)
    with torch.no_grad():
        found = hidden_sums(scorer, batch)
    assert found.shape == (2, 2, 32)
    for index, row in enumerate(batch):
        for place, response in enumerate(row.responses):
            tokens = torch.tensor([[*row.prompt, *response]])
            states = model.base_model(tokens).last_hidden_state[0, len(row.prompt) - 1 : -1]
            torch.testing.assert_close(found[index, place], states.sum(0), atol=1e-4, rtol=1e-5)
    assert found[1, 1].eq(0).all()


def test_weights_handed_in_from_outside_are_used():
    model, batch = tiny.llama(), tiny.batch(2)
    scorer = Scorer(model)
    halved = {name: p.detach() / 2 for name, p in scorer.named_parameters()}
    token, _ = torch.func.functional_call(scorer, halved, (batch,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(2)
    torch.testing.assert_close(token, score(scorer, batch).token)


def seeing_each_other(pieces, window, right=attention.as_mask):
    """Both responses as one: the second sees the first."""
    return right([pieces[0], (1, sum(length for _, length in pieces[1:]))], window)


TWO = [tiny.row(6, [5, 7])]


def test_planted_responses_that_see_each_other_are_caught(monkeypatch):
    monkeypatch.setattr(attention, "as_mask", seeing_each_other)
    assert apart(tiny.llama(), TWO, way=PrefixShared()) > 0.1


def test_planted_masks_that_let_responses_see_each_other_are_caught(monkeypatch):
    right = ways.additive_mask
    together = lambda segment, *rest: right(segment.clamp(max=1), *rest)  # noqa: E731
    monkeypatch.setattr(ways, "additive_mask", together)
    assert apart(tiny.llama(), TWO, way=ALWAYS_SHARED) > 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("way", [PrefixShared(), ALWAYS_SHARED], ids=repr)
def test_planted_positions_that_do_not_start_again_are_caught(monkeypatch, name, way):
    plant(monkeypatch, positions=lambda sheet: torch.arange(sheet.tokens.numel())[None])
    assert apart(tiny.MODELS[name](), TWO, way=way) > 0.1


@pytest.mark.parametrize("way", [PrefixShared(), ALWAYS_SHARED, OneARow()], ids=repr)
def test_planted_predictions_from_the_token_itself_are_caught(monkeypatch, way):
    plant(monkeypatch, source=lambda sheet: (sheet.source + 1).clamp(max=sheet.tokens.numel() - 1))
    assert apart(tiny.llama(), TWO, way=way) > 0.1


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_planted_windows_of_row_places_are_caught(monkeypatch, name):
    right = ways.additive_mask

    def by_place(segment, positions, dtype, window):
        places = torch.arange(positions.shape[1]).expand_as(positions)
        return right(segment, places, dtype, window)

    monkeypatch.setattr(ways, "additive_mask", by_place)
    assert apart(tiny.MODELS[name](), TWO, way=ALWAYS_SHARED) > 0.05


def test_a_planted_window_that_is_ignored_is_caught(monkeypatch):
    right = attention._masks
    monkeypatch.setattr(attention, "_masks", lambda pieces, _, query: right(pieces, None, query))
    assert apart(tiny.mistral(), TWO, way=PrefixShared()) > 0.05


def plant(monkeypatch, **wrong):
    """Make sheets with a field computed wrongly."""
    right = layout.lay

    def lay(*args, **options):
        sheet = right(*args, **options)
        return replace(sheet, **{name: make(sheet) for name, make in wrong.items()})

    monkeypatch.setattr("prefloop.logps.scorer.lay", lay)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt2", "opt", "mixtral"])
def test_the_model_generates_the_same_text_after_it_was_scored(name):
    model, prompt = tiny.MODELS[name](), torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tiny.PAD}
    before = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    score(Scorer(model), tiny.batch(2))
    assert model.config._attn_implementation == attention.NAME
    after = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(before, after)


def test_a_scored_model_is_saved_as_if_it_had_not_been(tmp_path):
    model = tiny.llama()
    score(Scorer(model), tiny.batch(2))
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (replace(tiny.row(2, [2]), prompt=(), place="a.jsonl:3"), "a.jsonl:3: the prompt has no"),
        (replace(tiny.row(2, [2]), responses=((4,), ()), place="a:4"), "a:4: a response has no"),
    ],
)
def test_a_row_without_tokens_is_refused_with_its_place(row, message):
    with pytest.raises(UserError, match=message):
        score(Scorer(tiny.llama()), [row])
