"""The boundary in token space, BOS and EOS in one place, and rows that are too long."""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefloop.data import Empty, Overlong, Report, encoder, tokenize
from prefloop.data.show import escaped, show_tokens
from prefloop.errors import UserError
from prefloop.types import Comparison, Tokenized

SPECIAL = ["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]
BOS, EOS, END = 0, 1, 2

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'critic' %}"
    "{{ raise_exception('no critics here') }}{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN_TURNS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_level(*, adds_bos=False, adds_eos=False, template=None, eos="</s>"):
    """A tokenizer with a token a byte, so that lengths are counted by eye."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: at for at, piece in enumerate([*SPECIAL, *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    single = f"{'<s> ' if adds_bos else ''}$A{' </s>' if adds_eos else ''}"
    inner.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=eos, extra_special_tokens=SPECIAL[2:]
    )
    made.chat_template = template
    return made


def sentence_piece(*, legacy):
    """Puts a space before every text by itself, as Llama 2's tokenizer does."""
    words = ["<unk>", "</s>", *SPECIAL[2:], "▁", "▁a", "▁foo", "▁▁", "a", "foo", ":"]
    inner = Tokenizer(models.Unigram([(word, -float(len(words))) for word in words], 0))
    if legacy:
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


def row(prompt="ab", responses=("c", "de"), **judgement):
    return Comparison(prompt, responses, place="f.jsonl:3", **judgement)


def texts(tokenizer, made):
    return tokenizer.decode(made.prompt), [tokenizer.decode(ids) for ids in made.responses]


def test_plain_text_is_prompt_then_responses_each_with_eos():
    tokenizer = byte_level()
    rows, report = tokenize([row()], tokenizer)
    assert texts(tokenizer, rows[0]) == ("ab", ["c</s>", "de</s>"])
    assert [len(ids) for ids in rows[0].responses] == [2, 3]
    assert report == Report(rows=1)


def test_a_response_that_was_cut_is_followed_by_nothing():
    tokenizer = byte_level()
    made = row(responses=("c", "de", "f"), finished=(False, True, False))
    (tokens,), _ = tokenize([made], tokenizer)
    assert texts(tokenizer, tokens) == ("ab", ["c", "de</s>", "f"])
    (chat,), _ = tokenize([made], byte_level(template=CHAT))
    assert [ids[-1] == END for ids in chat.responses] == [False, True, False]


def test_everything_else_of_a_row_is_carried_and_null_ranks_become_zero():
    made = row(
        responses=("c", "d", "e"),
        rank=(2, None, 1),
        scores=(0.5, 1.0, 2.0),
        label=(True, False, True),
        annotator="ann",
        weight=0.5,
        id="x",
    )
    (tokens,), _ = tokenize([made], byte_level())
    assert tokens == Tokenized(
        prompt=tokens.prompt,
        responses=tokens.responses,
        rank=(2, 0, 1),
        scores=(0.5, 1.0, 2.0),
        label=(True, False, True),
        annotator="ann",
        weight=0.5,
        id="x",
        place="f.jsonl:3",
    )


def test_a_tokenizer_that_adds_bos_does_so_once_and_for_prompts_only():
    tokenizer = byte_level(adds_bos=True)
    (tokens,), _ = tokenize([row()], tokenizer)
    assert texts(tokenizer, tokens) == ("<s>ab", ["c</s>", "de</s>"])


def test_a_plain_prompt_that_spells_bos_is_not_given_another():
    tokenizer = byte_level(adds_bos=True)
    (tokens,), _ = tokenize([row("<s>ab")], tokenizer)
    assert tokens.prompt.count(BOS) == 1


def test_a_tokenizer_that_adds_eos_by_itself_does_not_end_the_prompt():
    tokenizer = byte_level(adds_bos=True, adds_eos=True)
    (tokens,), _ = tokenize([row()], tokenizer)
    assert texts(tokenizer, tokens) == ("<s>ab", ["c</s>", "de</s>"])


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_template_writes_its_own_bos_and_its_turn_ends_the_response(adds_bos):
    tokenizer = byte_level(adds_bos=adds_bos, template=CHAT)
    (tokens,), _ = tokenize([row()], tokenizer)
    prompt = "<s><|user|>ab<|end|>\n<|assistant|>"
    assert texts(tokenizer, tokens) == (prompt, ["c<|end|>", "de<|end|>"])
    assert tokens.prompt.count(BOS) == 1
    assert encoder(tokenizer).end == END


def test_messages_and_the_same_words_as_text_give_the_same_tokens():
    tokenizer = byte_level(template=CHAT)
    chat = ({"role": "user", "content": "ab"},)
    (first, second), _ = tokenize([row(chat), row("ab")], tokenizer)
    assert first == second


def test_a_template_can_be_left_aside():
    tokenizer = byte_level(template=CHAT)
    (tokens,), _ = tokenize([row()], tokenizer, chat=False)
    assert texts(tokenizer, tokens) == ("ab", ["c</s>", "de</s>"])


def test_a_template_without_special_tokens_ends_its_turns_with_eos():
    tokenizer = byte_level(template=PLAIN_TURNS)
    (tokens,), _ = tokenize([row()], tokenizer)
    assert texts(tokenizer, tokens) == ("user: ab\nassistant: ", ["c</s>", "de</s>"])


def test_a_special_token_spelled_in_a_response_stays_text():
    tokenizer = byte_level(template=CHAT)
    spelled = "c</s><|end|><|user|>x"
    (tokens,), _ = tokenize([row(responses=(spelled, "d"))], tokenizer)
    assert len(tokens.responses[0]) == len(spelled) + 1
    assert [id for id in tokens.responses[0] if id < len(SPECIAL)] == [END]


def test_tokenising_responses_literally_leaves_the_tokenizer_as_it_was():
    tokenizer = byte_level()
    tokenize([row()], tokenizer)
    assert tokenizer("</s>", add_special_tokens=False).input_ids == [EOS]


def test_a_prompt_has_the_same_tokens_alone_and_before_every_response():
    tokenizer = byte_level(template=CHAT)
    (tokens,), _ = tokenize([row()], tokenizer)
    assert encoder(tokenizer).prompts([row()]) == [tokens.prompt]


@pytest.mark.parametrize("legacy", [True, False])
def test_the_space_that_a_tokenizer_adds_by_itself_is_not_doubled(legacy):
    tokenizer = sentence_piece(legacy=legacy)
    (tokens,), _ = tokenize([row("a:", (" foo", "foo"))], tokenizer)
    for response in tokens.responses:
        assert tokenizer.convert_ids_to_tokens(response) == ["▁foo", "</s>"]


def test_rows_past_one_call_of_the_tokenizer_keep_their_order():
    rows, report = tokenize([row(f"p{at}", ("a", str(at))) for at in range(600)], byte_level())
    assert report.rows == len(rows) == 600
    assert [len(made.responses[1]) for made in rows] == [len(str(at)) + 1 for at in range(600)]


# prompt "ab" = 2 tokens; "c" + EOS = 2, "defg" + EOS = 5: together 7
LONG = row(responses=("c", "defg"), rank=(1, 2))


def test_a_row_of_exactly_the_limit_fits():
    (tokens,), report = tokenize([LONG], byte_level(), max_length=7)
    assert [len(response) for response in tokens.responses] == [2, 5]
    assert report == Report(rows=1)


def test_an_overlong_row_is_refused_with_its_place_lengths_and_the_limit():
    with pytest.raises(UserError, match=r"f.jsonl:3: 2 tokens of prompt and 5 .* limit of 6"):
        tokenize([LONG], byte_level(), max_length=6)


def test_an_overlong_row_is_dropped_and_counted():
    rows, report = tokenize([LONG, row()], byte_level(), 6, Overlong.drop)
    assert len(rows) == 1
    assert report == Report(rows=2, dropped=("f.jsonl:3",))
    assert str(report) == "2 rows, 1 over-long dropped"


def test_a_truncated_response_loses_its_end_and_gets_no_eos():
    tokenizer = byte_level()
    (tokens,), report = tokenize([LONG], tokenizer, 4, Overlong.truncate)
    assert texts(tokenizer, tokens) == ("ab", ["c</s>", "de"])
    assert report == Report(rows=1, truncated=("f.jsonl:3",))


def test_a_response_that_loses_only_its_eos_counts_as_truncated():
    tokenizer = byte_level()
    (tokens,), report = tokenize([LONG], tokenizer, 6, Overlong.truncate)
    assert texts(tokenizer, tokens)[1] == ["c</s>", "defg"]
    assert len(report.truncated) == 1


@pytest.mark.parametrize("overlong", [Overlong.refuse, Overlong.truncate])
def test_a_prompt_that_fills_the_context_is_never_cut(overlong):
    with pytest.raises(UserError, match=r"f.jsonl:3: the prompt alone has 4 tokens.* is 4"):
        tokenize([row("abcd")], byte_level(), 4, overlong)
    (tokens,), _ = tokenize([row("abc")], byte_level(), 4, Overlong.truncate)
    assert [len(response) for response in tokens.responses] == [1, 1]


def test_a_prompt_that_fills_the_context_can_be_dropped():
    assert tokenize([row("abcd")], byte_level(), 4, Overlong.drop)[1].dropped == ("f.jsonl:3",)


@pytest.mark.parametrize("blank", ["", " \n"])
def test_an_empty_response_is_refused_or_dropped_with_a_count(blank):
    with pytest.raises(UserError, match=r"f.jsonl:3: response 2 is empty"):
        tokenize([row(responses=("c", blank))], byte_level())
    rows, report = tokenize([row(responses=("c", blank)), row()], byte_level(), empty=Empty.drop)
    assert len(rows) == 1
    assert report == Report(rows=2, empty=("f.jsonl:3",))
    assert str(report) == "2 rows, 1 with an empty response dropped"


def test_a_response_of_no_token_is_refused():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(UserError, match=r"f.jsonl:3: response 1 is empty"):
        tokenize([row(responses=("x", "c"))], tokenizer)
    with pytest.raises(UserError, match=r"f.jsonl:3: the prompt has no token"):
        tokenize([row("x")], tokenizer)


def test_a_row_without_responses_is_refused():
    with pytest.raises(UserError, match=r"f.jsonl:3: the row has no responses"):
        tokenize([row(responses=())], byte_level())


def test_messages_need_a_template():
    chat = row(({"role": "user", "content": "ab"},))
    for tokenizer, chosen in ((byte_level(), None), (byte_level(template=CHAT), False)):
        with pytest.raises(UserError, match=r"f.jsonl:3: the prompt is chat messages, but no chat"):
            tokenize([chat], tokenizer, chat=chosen)
    with pytest.raises(UserError, match="this tokenizer has no chat template"):
        tokenize([row()], byte_level(), chat=True)


def test_messages_that_the_template_refuses_are_named():
    chat = row(({"role": "critic", "content": "ab"},))
    with pytest.raises(UserError, match=r"f.jsonl:3: .*template refuses .*'critic': no critics"):
        tokenize([chat], byte_level(template=CHAT))


def test_a_template_that_cannot_render_an_answer_is_refused():
    broken = "{{ raise_exception('never') }}"
    with pytest.raises(UserError, match="cannot render a question and its answer: never"):
        encoder(byte_level(template=broken))


def test_a_template_cannot_reach_out_of_its_sandbox():
    escape = "{{ ''.__class__.__mro__ }}"
    with pytest.raises(UserError, match=r"cannot render.*unsafe"):
        encoder(byte_level(template=escape))


def test_a_tokenizer_that_cannot_end_a_response_is_refused():
    with pytest.raises(UserError, match="no token that ends a response: eos_token is not set"):
        encoder(byte_level(eos=None))


def test_a_limit_without_room_for_two_tokens_is_refused():
    with pytest.raises(UserError, match=r"max_length must be at least 2.*got 1"):
        tokenize([row()], byte_level(), 1)


def test_a_comparison_that_was_never_read_is_named_by_its_id():
    with pytest.raises(UserError, match="comparison 'mine': response 1 is empty"):
        tokenize([replace(row(responses=("", "a")), place="", id="mine")], byte_level())


def test_shown_tokens_mark_prompt_and_responses_without_colours():
    tokenizer = byte_level(template=CHAT)
    made = row("a", ("b", "\x1b["), rank=(1, None), scores=(0.5, 2.0), label=(True, False))
    (tokens,), _ = tokenize([made], tokenizer)
    shown = show_tokens(tokens, tokenizer, colours=False)
    assert shown.plain.splitlines() == [
        "f.jsonl:3: 6 tokens of prompt, 2 + 3 of responses",
        "prompt, mask 0, read but not scored",
        r"  [<s>][<|user|>][a][<|end|>][\n][<|assistant|>]",
        "response 1 (rank 1, score 0.5, good), mask 1, scored",
        "  [b][<|end|>]",
        "response 2 (not judged, score 2, bad), mask 1, scored",
        r"  [\x1b][[][<|end|>]",
    ]
    assert not shown.spans


def test_shown_tokens_differ_in_colour_where_they_meet():
    tokenizer = byte_level()
    (tokens,), _ = tokenize([row("ab", ("cd", "e"))], tokenizer)
    shown = show_tokens(tokens, tokenizer, colours=True)
    assert "  cd</s>" in shown.plain.splitlines()
    a, b, c, d, end, e, last = [span.style for span in shown.spans]
    assert len({a, b, c, d}) == 4
    assert (end, e, last) == (c, c, d)


def test_shown_tokens_of_sentence_piece_keep_their_space():
    tokenizer = sentence_piece(legacy=False)
    (tokens,), _ = tokenize([row("a", ("foo", "a"))], tokenizer)
    assert "  [ foo][</s>]" in show_tokens(tokens, tokenizer, colours=False).plain


def test_what_does_not_print_is_escaped():
    assert escaped("a\n\x1b\u202eü") == r"a\n\x1b\u202eü"
