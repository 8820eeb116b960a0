"""Drawing answers: exact distributions, no dependence on the batch, stops, limits, bookkeeping."""

import math
from dataclasses import replace

import pytest
import tiny
import torch

from prefloop.errors import UserError
from prefloop.policies import Lora, Policy, Sampling
from prefloop.policies.sampling import Place, iter_samples, race, sample, warp
from prefloop.types import Tokenized, score

# Models of every kind of cache: plain, absolute positions, sliding windows, experts, alibi, state.
CACHES = ["llama", "gpt2", "gemma3", "mistral", "mixtral", "bloom", "mamba", "opt"]
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
PROMPTS = [(1, 20, 30), (1, 40), (1, 50, 60, 70, 80, 21, 22, 23, 24, 25, 26, 27, 28), (1, 33, 34)]


def policy_of(name="llama", **changes):
    """A policy that stops at `<eos>` only, so that its answers are long."""
    return Policy(tiny.MODELS[name](**changes), tiny.tokenizer(chat=False), name)


def tokens_of(answers):
    return [[one.tokens for one in row] for row in answers]


def greedy_by_hand(policy, prompt, count):
    """The most likely token again and again, the whole text read anew each time."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            text.append(int(policy.model(torch.tensor([text])).logits[0, -1].argmax()))
            if text[-1] in policy.stop_tokens:
                break
    return tuple(text[len(prompt) :])


@pytest.mark.parametrize("name", CACHES)
def test_a_padded_batch_with_a_cache_says_what_the_model_says_without(name):
    policy = policy_of(name)
    answers = sample(policy, PROMPTS, settings=GREEDY)
    by_hand = [greedy_by_hand(policy, prompt, 12) for prompt in PROMPTS]
    assert [row[0].tokens for row in answers] == by_hand


@pytest.mark.parametrize("name", CACHES)
def test_answers_do_not_depend_on_the_rows_side_by_side(name):
    policy = policy_of(name)
    together = sample(policy, PROMPTS, 3, Sampling(max_new_tokens=10, rows=100))
    apart = sample(policy, PROMPTS, 3, Sampling(max_new_tokens=10, rows=1))
    assert tokens_of(together) == tokens_of(apart)


def test_answers_do_not_depend_on_other_prompts_their_order_or_their_number():
    policy = policy_of()
    settings = Sampling(max_new_tokens=10)
    all_of_them = tokens_of(sample(policy, PROMPTS, 3, settings, seed=5))
    turned = tokens_of(sample(policy, PROMPTS[::-1], 3, settings, seed=5))
    alone = tokens_of(sample(policy, [PROMPTS[2]], 2, settings, seed=5))
    assert turned == all_of_them[::-1]
    assert alone == [all_of_them[2][:2]]


def test_a_longer_limit_goes_on_with_the_same_answers():
    policy = policy_of()
    short, long = (
        sample(policy, PROMPTS[:1], 4, Sampling(max_new_tokens=length))[0] for length in (5, 15)
    )
    assert [one.tokens for one in short] == [one.tokens[:5] for one in long]


def test_seeds_and_answers_differ():
    policy = policy_of()
    settings = Sampling(max_new_tokens=8)
    first, again, other = (
        tokens_of(sample(policy, PROMPTS[:1], 4, settings, seed=seed))[0] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert len(set(first)) == 4


def test_no_global_generator_is_read_or_moved():
    policy = policy_of()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = tokens_of(sample(policy, PROMPTS[:1], 2, Sampling(max_new_tokens=8)))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert tokens_of(sample(policy, PROMPTS[:1], 2, Sampling(max_new_tokens=8))) == first


def test_a_training_model_is_read_without_dropout_and_trains_on():
    policy = policy_of("gpt2")
    policy.model.train()
    training = sample(policy, PROMPTS, settings=GREEDY)
    assert policy.model.training
    policy.model.eval()
    assert tokens_of(training) == tokens_of(sample(policy, PROMPTS, settings=GREEDY))


def test_first_tokens_come_with_the_probabilities_of_the_model():
    # 4000 answers of one token; an expected count e has standard deviation below sqrt(e).
    policy = policy_of()
    prompt = PROMPTS[0]
    with torch.no_grad():
        logits = policy.model(torch.tensor([prompt])).logits[0, -1]
    settings = Sampling(max_new_tokens=1, rows=4000)
    drawn = [one.tokens[0] for one in sample(policy, [prompt], 4000, settings)[0]]
    counts = torch.bincount(torch.tensor(drawn), minlength=tiny.VOCABULARY)
    expected = 4000 * logits.softmax(-1)
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 3).all()


@pytest.mark.parametrize("settings", [Sampling(), Sampling(temperature=0.5, top_p=0.8)])
def test_log_probabilities_are_those_of_the_engine(settings):
    policy = policy_of()
    settings = replace(settings, max_new_tokens=9)
    answers = sample(policy, PROMPTS, 3, settings)
    rows = [
        Tokenized(prompt=prompt, responses=tuple(one.tokens for one in drawn))
        for prompt, drawn in zip(PROMPTS, answers, strict=True)
    ]
    with torch.no_grad():
        table = score(policy.scorer(), rows)
    for row, drawn in enumerate(answers):
        for place, one in enumerate(drawn):
            expected = table.token[row, place, : len(one.tokens)].tolist()
            assert one.policy_logp == pytest.approx(expected, abs=1e-4)
            assert one.logp == one.policy_logp
            if settings.temperature == 1:
                assert one.drawn_logp == one.logp


def test_drawn_log_probabilities_are_those_after_warping():
    policy = policy_of()
    settings = Sampling(temperature=0.5, top_k=3, max_new_tokens=1)
    one = sample(policy, PROMPTS[:1], 1, settings)[0][0]
    with torch.no_grad():
        logits = policy.model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.5
    best = logits.topk(3)
    assert one.tokens[0] in best.indices
    expected = best.values.log_softmax(-1)[best.indices.tolist().index(one.tokens[0])]
    assert one.drawn_logp[0] == pytest.approx(float(expected), abs=1e-5)


def test_a_greedy_answer_is_certain_and_the_same_for_all():
    answers = sample(policy_of(), PROMPTS[:1], 3, GREEDY)[0]
    assert len({one.tokens for one in answers}) == 1
    assert answers[0].drawn_logp == (0.0,) * len(answers[0].tokens)


# Stops and limits


def always_says(token, otherwise=None):
    """A policy whose next token is `token`, whatever was said."""
    policy = policy_of()
    policy.model.lm_head = torch.nn.Linear(32, tiny.VOCABULARY)
    torch.nn.init.zeros_(policy.model.lm_head.weight)
    torch.nn.init.zeros_(policy.model.lm_head.bias)
    policy.model.lm_head.bias.data[token] = 50.0
    return policy


def test_an_answer_that_ends_is_finished_and_shows_no_special_token():
    one = sample(always_says(tiny.EOS), PROMPTS[:1])[0][0]
    assert one.tokens == (tiny.EOS,)
    assert one.finished
    assert one.text == ""


def test_an_answer_that_does_not_end_is_cut_and_not_finished():
    one = sample(always_says(20), PROMPTS[:1], settings=Sampling(max_new_tokens=5))[0][0]
    assert one.tokens == (20,) * 5
    assert not one.finished
    assert one.text == "w12 w12 w12 w12 w12"  # eight special tokens come before w0


def test_the_end_of_a_turn_ends_an_answer_of_a_chat():
    policy = always_says(7)
    chat = Policy(policy.model, tiny.tokenizer(chat=True), "chat")
    assert chat.tokenizer.convert_ids_to_tokens(7) == "<end>"
    assert sample(chat, PROMPTS[:1])[0][0].finished
    assert not sample(policy, PROMPTS[:1], settings=Sampling(max_new_tokens=3))[0][0].finished


def test_answers_that_end_at_different_times_leave_the_others_alone():
    policy = policy_of()
    settings = Sampling(max_new_tokens=25, temperature=1.5)
    answers = sample(policy, PROMPTS, 6, settings)
    lengths = {len(one.tokens) for row in answers for one in row}
    assert len(lengths) > 4  # rows were dropped on the way
    apart = sample(policy, PROMPTS, 6, replace(settings, rows=1))
    assert tokens_of(answers) == tokens_of(apart)
    for row in answers:
        for one in row:
            ends = [token in policy.stop_tokens for token in one.tokens]
            assert ends == [False] * (len(ends) - 1) + [one.finished]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_answer_ends_where_the_context_does(name):
    size = {"n_positions": 16} if name == "gpt2" else {"max_position_embeddings": 16}
    policy = policy_of(name, **size)
    policy.model.generation_config.eos_token_id = None
    answers = sample(policy, [(1,) * 12, (1,) * 3, (1,) * 15], 1, Sampling(max_new_tokens=100))
    for row, length in zip(answers, (4, 13, 1), strict=True):
        assert len(row[0].tokens) == length or row[0].finished
    assert any(not row[0].finished for row in answers)


def test_prompts_without_room_or_tokens_are_refused():
    policy = policy_of(max_position_embeddings=8)
    with pytest.raises(UserError, match="prompt 2: has no token"):
        sample(policy, [(1,), ()])
    with pytest.raises(UserError, match=r"prompt 1: 8 tokens leave no room .* context of 8"):
        sample(policy, [(1,) * 8])
    with pytest.raises(UserError, match="n must be at least 1"):
        sample(policy, [(1,)], 0)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -1.0, "temperature must be 0 .* got -1.0"),
        ("temperature", math.nan, "temperature must be 0 .* got nan"),
        ("top_p", 0.0, r"top_p must be in \(0, 1\], got 0.0"),
        ("top_k", -1, "top_k must be 0 .* got -1"),
        ("max_new_tokens", 0, "max_new_tokens must be at least 1, got 0"),
        ("rows", 0, "rows must be at least 1, got 0"),
    ],
)
def test_senseless_settings_are_refused(field, value, words):
    with pytest.raises(UserError, match=words):
        Sampling(**{field: value})


def test_a_model_whose_logits_are_not_numbers_is_refused():
    policy = always_says(20)
    policy.model.lm_head.bias.data[20] = math.nan
    with pytest.raises(UserError, match=r"prompt 1: .* not finite"):
        sample(policy, PROMPTS[:1])


def test_answers_come_as_they_are_finished():
    policy = policy_of()
    settings = Sampling(max_new_tokens=3, rows=2)
    places = [place for place, _ in iter_samples(policy, PROMPTS, 2, settings)]
    assert places[:2] == [Place(1, 0), Place(1, 1)]  # the shortest prompt first
    assert sorted(places) == [Place(p, a) for p in range(4) for a in range(2)]


def test_a_prompt_is_encoded_once_for_all_its_answers():
    policy = policy_of()
    read = []
    policy.model.register_forward_pre_hook(
        lambda module, args, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    sample(policy, PROMPTS[:1], 6, Sampling(max_new_tokens=2))
    assert read[0] == (1, 3)
    assert read[1][1] == 1


# Warping


def test_temperature_divides_the_logits():
    logits = torch.tensor([[0.0, 1.0, -2.0]])
    assert torch.equal(warp(logits, Sampling(temperature=2.0)), logits / 2)


def test_top_k_keeps_the_likeliest():
    kept = warp(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), Sampling(top_k=2))
    assert kept.tolist() == [[-math.inf, 3.0, -math.inf, 2.0]]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    # Probabilities 0.5, 0.3, 0.15, 0.05; a token is kept while the likelier ones are below top_p.
    [(0.4, [1]), (0.6, [0, 1]), (0.81, [0, 1, 3]), (0.96, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    logits = torch.tensor([[0.3, 0.5, 0.05, 0.15]]).log()
    warped = warp(logits, Sampling(top_p=top_p))
    assert warped.isfinite().nonzero()[:, 1].tolist() == kept


def test_top_p_of_a_flat_distribution_looks_at_the_whole_vocabulary():
    logits = 1e-3 * torch.arange(4000.0).unsqueeze(0) / 4000  # nearly flat: 1024 do not reach 0.9
    kept = warp(logits, Sampling(top_p=0.9)).isfinite().sum()
    assert 3590 < kept < 3610


def test_the_race_draws_what_is_possible_only():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(50, 3)
    rngs = [torch.Generator().manual_seed(seed) for seed in range(50)]
    assert race(logits, rngs).tolist() == [1] * 50


def test_the_race_hardly_notices_rounding():
    # 500 distributions with long flat tails, once with noise as of another matrix product.
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 5000, generator=rng)
    noisy = logits + 1e-5 * torch.randn(500, 5000, generator=rng)

    def drawn(table):
        return race(table, [torch.Generator().manual_seed(seed) for seed in range(500)])

    assert (drawn(logits) != drawn(noisy)).sum() <= 1


def test_an_adapter_policy_draws_from_the_adapted_model():
    policy = policy_of().add_adapter("default", Lora(rank=2))
    plain = tokens_of(sample(policy, PROMPTS, settings=GREEDY))
    rng = torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=rng)
    adapted = sample(policy, PROMPTS, settings=GREEDY)
    assert tokens_of(adapted) != plain
    by_hand = [greedy_by_hand(policy, prompt, 12) for prompt in PROMPTS]
    assert [row[0].tokens for row in adapted] == by_hand
