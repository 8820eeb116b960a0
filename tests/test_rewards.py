"""Who scores: rules by hand, reward models against plain transformers, bad numbers refused."""

import math
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from prefloop.errors import UserError
from prefloop.policies import Lora, Policy
from prefloop.rewards import (
    Brevity,
    Function,
    Implicit,
    Questions,
    Reward,
    Vader,
    load_reward,
    load_reward_model,
    score,
)
from prefloop.types import Comparison

ROWS = [
    Comparison(prompt="w1 w2", responses=("w3 w4 w5", "w6"), id="a", place="f.jsonl:1"),
    Comparison(prompt="w7", responses=("w8 w9", "w3", "w4 w4 w4 w4"), id="b", place="f.jsonl:2"),
]


def numbers(*values):
    """A reward that gives these, a tuple a prompt."""
    return lambda prompts, responses: list(values)


def scores(reward, rows=ROWS):
    return [row.scores for row in score(rows, reward)]


# Scores of comparisons


def test_scores_are_set_and_nothing_else():
    scored = score(ROWS, Brevity())
    assert [row.scores for row in scored] == [(-3.0, -1.0), (-2.0, -1.0, -4.0)]
    assert [row.responses for row in scored] == [row.responses for row in ROWS]
    assert scores(Questions(), scored) == [(0.0, 0.0), (0.0, 0.0, 0.0)]  # earlier ones go


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_names_the_row_and_the_response(bad):
    with pytest.raises(UserError, match=rf"f\.jsonl:2: the reward of response 3 is {bad}"):
        score(ROWS, numbers((1.0, 2.0), (1.0, 2.0, bad)))


def test_a_reward_that_counts_wrongly_names_the_row():
    with pytest.raises(UserError, match=r"f\.jsonl:1: the reward gave 3 numbers for 2 responses"):
        score(ROWS, numbers((1.0, 2.0, 3.0), (1.0, 2.0, 3.0)))
    with pytest.raises(UserError, match="scored 1 of 2 prompts"):
        score(ROWS, numbers((1.0, 2.0)))


# Rules


def test_vader_prefers_the_warm_answer():
    row = Comparison(
        prompt="How was it?", responses=("I loved it!", "It was there.", "I hated it."), id="r"
    )
    warm, neutral, cold = scores(Vader(), [row])[0]
    # The lexicon has "loved" at 2.9 and "!" at 0.292: 3.192 / sqrt(3.192^2 + 15) = 0.6360.
    assert warm == pytest.approx(0.6360, abs=1e-4)
    assert neutral == 0.0
    # "hated" is -3.2: -3.2 / sqrt(3.2^2 + 15) = -0.6369.
    assert cold == pytest.approx(-0.6369, abs=1e-4)


def test_vader_says_how_to_install_it(monkeypatch):
    from prefloop.rewards import rules

    rules._vader.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UserError, match=r"pip install 'prefloop\[demo\]'"):
        score(ROWS, Vader())
    rules._vader.cache_clear()


def test_questions_are_counted():
    row = Comparison(prompt="x", responses=("Why? How?", "So."), id="r")
    assert scores(Questions(), [row]) == [(2.0, 0.0)]


def length_of_both(prompt, response):
    return len(prompt) + len(response)


def says_nothing(prompt, response):
    return None


def test_a_function_is_a_reward():
    assert scores(Function(length_of_both), ROWS[:1]) == [(13.0, 7.0)]


def test_a_function_that_gives_no_number_is_refused():
    with pytest.raises(UserError, match="gave None for 'w3 w4 w5'; it must give a number"):
        score(ROWS, Function(says_nothing))


@pytest.mark.parametrize("reward", [Vader(), Brevity(), Questions(), Function(length_of_both)])
def test_rules_are_rewards(reward):
    assert isinstance(reward, Reward)
    assert all(isinstance(value, float) for row in scores(reward) for value in row)


# By name


def test_rules_have_names():
    assert [load_reward(name) for name in ("vader", "Brevity", "questions")] == [
        Vader(),
        Brevity(),
        Questions(),
    ]


def test_functions_are_named_by_module():
    assert load_reward("test_rewards:length_of_both") == Function(
        sys.modules["test_rewards"].length_of_both
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", "cannot import this reward function"),
        ("test_rewards:no_such_function", "cannot import this reward function"),
        ("test_rewards:ROWS", "a list, not a function"),
        ("./nowhere", "there is no such folder"),
    ],
)
def test_a_name_that_is_no_reward_is_refused(name, words):
    with pytest.raises(UserError, match=words):
        load_reward(name)


# Reward models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "tiny"
    tiny.reward_model().save_pretrained(path)
    tiny.tokenizer(chat=False).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "chat"
    tiny.reward_model().save_pretrained(path)
    tiny.tokenizer(chat=True).save_pretrained(path)
    return path


def plain(folder, texts, special):
    """What transformers says of one text after the other."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = tiny.tokenizer()
    with torch.no_grad():
        return [
            float(model(**tokenizer(text, return_tensors="pt", add_special_tokens=special)).logits)
            for text in texts
        ]


def flat(rows):
    return [value for row in rows for value in row]


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_reward_model_says_what_transformers_says(folder, rows):
    reward = load_reward_model(folder)
    reward = type(reward)(reward.model, reward.tokenizer, rows)
    texts = ["w1 w2w3 w4 w5", "w1 w2w6", "w7w8 w9", "w7w3", "w7w4 w4 w4 w4"]
    assert flat(scores(reward)) == pytest.approx(plain(folder, texts, True), abs=1e-5)


def test_a_reward_model_with_a_chat_template_reads_the_chat(chat_folder):
    texts = [
        f"<user> {row.prompt} <end> <assistant> {text} <end> "
        for row in ROWS
        for text in row.responses
    ]
    expected = plain(chat_folder, texts, False)
    assert flat(scores(load_reward(str(chat_folder)))) == pytest.approx(expected, abs=1e-5)
    chats = [
        Comparison(prompt=({"role": "user", "content": row.prompt},), responses=row.responses)
        for row in ROWS
    ]
    found = scores(load_reward(str(chat_folder)), chats)
    assert flat(found) == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_without_a_pad_token_reads_the_end_token(folder):
    # Filled up with the end token, a usual stand-in, the last token of a text that ends would be
    # taken for padding, and the reward would be read one token early.
    reward = load_reward_model(folder)
    reward.model.config.pad_token_id = None
    rows = [
        Comparison(prompt="w1", responses=("w2 <eos>", "w3 w4 w5 <eos>", "w6 w6")),
    ]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = None
    tokenizer = tiny.tokenizer()
    with torch.no_grad():
        expected = [
            float(model(**tokenizer("w1" + text, return_tensors="pt")).logits)
            for text in rows[0].responses
        ]
    assert flat(scores(reward, rows)) == pytest.approx(expected, abs=1e-5)
    assert reward.model.config.pad_token_id is None


def test_a_chat_needs_a_reward_model_for_chats(folder):
    row = Comparison(prompt=({"role": "user", "content": "w1"},), responses=("w2", "w3"))
    with pytest.raises(UserError, match="tokenizer has no chat template"):
        score([row], load_reward_model(folder))


def test_a_text_past_the_context_is_refused(folder):
    row = Comparison(prompt="w1", responses=("w2 " * 600, "w3"))
    with pytest.raises(UserError, match=r"reads at most 512 tokens; .* has 601"):
        score([row], load_reward_model(folder))


def test_an_encoder_reads_prompt_and_response_as_a_pair(tmp_path):
    config = BertConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=1,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer(chat=False)
    tokenizer.sep_token = "<end>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <end>",
        pair="<bos> $A <end> $B:1 <end>:1",
        special_tokens=[("<bos>", tiny.BOS), ("<end>", tokenizer.sep_token_id)],
    )
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = [
            float(model(**tokenizer(row.prompt, text, return_tensors="pt")).logits)
            for row in ROWS
            for text in row.responses
        ]
    assert flat(scores(load_reward_model(tmp_path))) == pytest.approx(expected, abs=1e-5)


def test_a_classifier_of_several_classes_is_refused(tmp_path):
    model = tiny.reward_model()
    model.config.num_labels = 3
    model.score = torch.nn.Linear(32, 3, bias=False)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a classifier of 3 classes; a reward model has one"):
        load_reward_model(tmp_path)


def test_a_language_model_is_no_reward_model(tmp_path):
    tiny.llama(num_labels=1).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"score\.weight.*they would be random"):
        load_reward_model(tmp_path)


def test_pickled_reward_models_are_refused(tmp_path):
    tiny.reward_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights"):
        load_reward_model(tmp_path)


# Implicit reward


def adapter_policy():
    policy = Policy(tiny.llama(), tiny.tokenizer(chat=False), "tiny")
    policy = policy.add_adapter("default", Lora(rank=2))
    rng = torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=rng)
    return policy


def log_probability(model, prompt, response):
    """log p(response <eos> | prompt) of word-level texts, the plain way."""
    tokenizer = tiny.tokenizer()
    head = tokenizer(prompt)["input_ids"]
    tail = [*tokenizer(response, add_special_tokens=False)["input_ids"], tiny.EOS]
    with torch.no_grad():
        logps = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    return sum(float(logps[len(head) + index - 1, token]) for index, token in enumerate(tail))


def test_the_implicit_reward_is_beta_times_the_log_ratio():
    policy = adapter_policy()
    expected = []
    for row in ROWS:
        for text in row.responses:
            above = log_probability(policy.model, row.prompt, text)
            with policy.reference() as reference:
                below = log_probability(reference, row.prompt, text)
            expected.append(0.5 * (above - below))
    found = scores(Implicit(policy, 0.5))
    assert [len(row) for row in found] == [2, 3]
    assert flat(found) == pytest.approx(expected, abs=1e-4)
    one_by_one = scores(Implicit(policy, 0.5, rows=1))
    assert flat(one_by_one) == pytest.approx(flat(found), abs=1e-5)


def test_the_implicit_reward_of_a_cut_response_has_no_end():
    policy = adapter_policy()
    (row,) = ROWS[:1]
    whole, cut = (
        score([replace(row, finished=ends)], Implicit(policy, 1.0))[0].scores
        for ends in (None, (False, True))
    )
    tokens = tiny.tokenizer()("w1 w2 w3 w4 w5", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        above = policy.model(tokens).logits[0, -1].log_softmax(-1)[tiny.EOS]
        with policy.reference() as reference:
            below = reference(tokens).logits[0, -1].log_softmax(-1)[tiny.EOS]
    assert whole[0] - cut[0] == pytest.approx(float(above - below), abs=1e-4)
    assert whole[1] == pytest.approx(cut[1], abs=1e-5)
    assert abs(whole[0] - cut[0]) > 0.01


def test_the_reference_of_an_implicit_reward_can_be_another_policy():
    policy, other = (
        adapter_policy(),
        Policy(tiny.llama(seed=5), tiny.tokenizer(chat=False), "other"),
    )
    found = scores(Implicit(policy, 1.0, other), ROWS[:1])
    expected = [
        log_probability(policy.model, "w1 w2", text) - log_probability(other.model, "w1 w2", text)
        for text in ROWS[0].responses
    ]
    assert flat(found) == pytest.approx(expected, abs=1e-4)


def test_a_policy_is_indifferent_to_itself():
    policy = adapter_policy()
    assert flat(scores(Implicit(policy, 1.0, policy))) == pytest.approx([0.0] * 5, abs=1e-5)
