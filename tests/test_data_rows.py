"""What a row may look like, and what every bad row is told."""

import pytest

from prefloop.data.columns import parse_columns
from prefloop.data.rows import comparison, prompt_only
from prefloop.errors import UserError
from prefloop.types import Comparison

USER = {"role": "user", "content": "Hi?"}
SYSTEM = {"role": "system", "content": "Be kind."}


def says(text):
    return {"role": "assistant", "content": text}


def parse(row, **columns):
    return comparison(row, columns, "f.jsonl:7", "f.jsonl:7")


def test_a_ranked_row_keeps_responses_ranks_and_everything_else():
    row = parse(
        {
            "prompt": "q",
            "responses": ["a", "b", "c"],
            "rank": [2, 1, None],
            "scores": [0.5, 2, -1],
            "annotator": "ann",
            "weight": 0.25,
            "id": "x",
            "models": ["m1", "m2", "m3"],
        }
    )
    assert row.prompt == "q"
    assert row.responses == ("a", "b", "c")
    assert row.rank == (2, 1, None)
    assert row.scores == (0.5, 2.0, -1.0)
    assert (row.annotator, row.weight, row.id, row.place) == ("ann", 0.25, "x", "f.jsonl:7")
    assert row.extra == {"models": ["m1", "m2", "m3"]}


def test_chosen_and_rejected_are_ranks_one_and_two():
    row = parse({"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert row.responses == ("good", "bad")
    assert row.rank == (1, 2)
    assert row.id == "f.jsonl:7"


def test_completion_and_label_are_one_labelled_response():
    row = parse({"prompt": "q", "completion": "good", "label": True})
    assert (row.responses, row.label, row.rank) == (("good",), (True,), None)


def test_labels_may_judge_several_responses():
    assert parse({"prompt": "q", "responses": ["a", "b"], "label": [True, False]}).label == (
        True,
        False,
    )


def test_rows_say_which_responses_finished():
    listed = {"prompt": "q", "responses": ["a", "b", "c"], "finished": [True, False, True]}
    row = parse(listed)
    assert row.finished == row.ends == (True, False, True)
    pair = parse({"prompt": "q", "chosen": "a", "rejected": "b", "finished": [False, True]})
    assert pair.finished == (False, True)
    single = parse({"prompt": "q", "completion": "a", "label": True, "finished": False})
    assert single.finished == (False,)
    unsaid = parse(listed | {"finished": None})
    assert (unsaid.finished, unsaid.ends) == (None, (True, True, True))


def test_picking_responses_takes_along_what_is_known_of_each():
    row = Comparison(
        "q",
        ("a", "b", "c"),
        rank=(1, 2, None),
        scores=(3.0, 2.0, 1.0),
        label=(True, False, True),
        ensemble=((1.0,), (2.0,), (3.0,)),
        finished=(True, False, True),
        extra={"kept": 1},
        id="x",
    )
    assert row.picked((2, 1)) == Comparison(
        "q",
        ("c", "b"),
        rank=(None, 2),
        scores=(1.0, 2.0),
        label=(True, False),
        ensemble=((3.0,), (2.0,)),
        finished=(True, False),
        extra={"kept": 1},
        id="x",
    )
    assert Comparison("q", ("a", "b")).picked((1, 0)) == Comparison("q", ("b", "a"))


def test_a_chat_prompt_stays_messages_and_null_keys_of_a_message_go():
    row = parse(
        {
            "prompt": [SYSTEM, USER | {"name": None}],
            "chosen": [says("yes")],
            "rejected": [says("no")],
        }
    )
    assert row.prompt == (SYSTEM, USER)
    assert row.responses == ("yes", "no")


def test_chats_that_begin_alike_have_their_common_messages_as_prompt():
    row = parse({"chosen": [SYSTEM, USER, says("yes")], "rejected": [SYSTEM, USER, says("no")]})
    assert row.prompt == (SYSTEM, USER)
    assert row.responses == ("yes", "no")


def test_equal_chats_are_a_pair_of_equal_responses():
    row = parse({"chosen": [USER, says("yes")], "rejected": [USER, says("yes")]})
    assert row.prompt == (USER,)
    assert row.responses == ("yes", "yes")


def test_a_text_prompt_may_stand_beside_whole_chats_that_repeat_it():
    chats = {"chosen": [USER, says("yes")], "rejected": [USER, says("no")]}
    assert parse({"prompt": "Hi?"} | chats).prompt == (USER,)
    assert parse({"prompt": [USER]} | chats).prompt == (USER,)
    with pytest.raises(UserError, match="does not begin with what the prompt column says"):
        parse({"prompt": "Something else"} | chats)


def test_a_text_prompt_may_stand_beside_single_messages():
    row = parse({"prompt": "Hi?", "chosen": [says("yes")], "rejected": [says("no")]})
    assert (row.prompt, row.responses) == ("Hi?", ("yes", "no"))


IMPLICIT = [
    # inside a word ("fo|o") would be wrong: back to the space, which goes with the word behind it
    ("Q: a A: foo", "Q: a A: fob", "Q: a A:", " foo", " fob"),
    # one is the beginning of the other: both still keep a word
    ("Q yes", "Q yes please", "Q", " yes", " yes please"),
    # a line break stays with the prompt
    ("Why?\nsun", "Why?\nmoon", "Why?\n", "sun", "moon"),
    # equal texts: the last word is the response
    ("a b c", "a b c", "a b", " c", " c"),
    # HH: behind the last turn of the assistant, even where both answers begin alike
    (
        "\n\nHuman: a?\n\nAssistant: I see.",
        "\n\nHuman: a?\n\nAssistant: I do.",
        "\n\nHuman: a?\n\nAssistant:",
        " I see.",
        " I do.",
    ),
]


@pytest.mark.parametrize(("chosen", "rejected", "prompt", "first", "second"), IMPLICIT)
def test_texts_that_begin_alike_are_cut_between_words(chosen, rejected, prompt, first, second):
    row = parse({"chosen": chosen, "rejected": rejected})
    assert (row.prompt, row.responses) == (prompt, (first, second))


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("abc ", "xyz "), ("foo", "fob"), ("same", "same"), ("", "x y"), (" a", " b")],
)
def test_texts_that_share_no_word_have_no_prompt(chosen, rejected):
    with pytest.raises(UserError, match=r"f.jsonl:7: there is no prompt column.*share no whole"):
        parse({"chosen": chosen, "rejected": rejected})


def test_columns_are_renamed_gathered_and_ignored():
    row = comparison(
        {"instruction": "Add.", "input": "1 2", "a": "3", "b": "4", "sa": 1.0, "sb": 0, "id": "?"},
        parse_columns(["prompt=instruction,input", "responses=a,b", "scores=sa,sb", "id="]),
        "p:1",
        "made",
    )
    assert row.prompt == "Add.\n\n1 2"
    assert row.responses == ("3", "4")
    assert row.scores == (1.0, 0.0)
    assert row.id == "made"
    assert row.extra == {}


def test_an_empty_second_part_of_a_prompt_leaves_no_trace():
    row = comparison(
        {"q": "Add.", "input": "", "responses": ["3", "4"]},
        {"prompt": ("q", "input")},
        "p:1",
        "made",
    )
    assert row.prompt == "Add."


def test_an_empty_response_can_be_read_since_people_judge_that_too():
    assert parse({"prompt": "q", "chosen": "a", "rejected": ""}).responses == ("a", "")


def test_prompts_are_read_from_rows_of_any_form():
    for row in (
        {"prompt": "q"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": "q a", "rejected": "q b"},
        {"prompt": "q", "completion": 3},
    ):
        found = prompt_only(row, {}, "p:1", "made")
        assert (found.prompt, found.responses, found.place) == ("q", (), "p:1")


GOOD = {"prompt": "q", "responses": ["a", "b"], "rank": [1, 2]}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [USER], "chosen": [says("a")], "rejected": [says("b")]}

BAD = [
    ({}, "missing prompt and responses; found no column"),
    ({"prompt": "q"}, "missing responses; found prompt"),
    ({"prompt": "q", "rejected": "b"}, "missing chosen; found prompt, rejected"),
    (PAIR | {"rejected": None}, "missing rejected; found prompt, chosen"),
    ({"prompt": "q", "completion": "a"}, "missing label; found prompt, completion"),
    ({"responses": ["a", "b"]}, "missing prompt; found responses"),
    ({"question": "q", "answer_a": "x", "answer_b": "y"}, "prompt=question responses=answer_a,"),
    ({"promt": "q", "chosen": 1, "reject": "b"}, "missing rejected.*rejected=reject"),
    (GOOD | {"finished": [True]}, "finished has 1 entries for 2 responses"),
    (GOOD | {"finished": [True, 1]}, "finished holds the number 1; it must be true or false"),
    (PAIR | {"finished": True}, "finished is the boolean true; it must be a list"),
    (GOOD | {"ensemble": [1.0, 2.0]}, "ensemble is .*; it must be a list a response"),
    (GOOD | {"ensemble": [[1.0], [1.0, 2.0]]}, "ensemble has 1 and 2 numbers for responses of"),
    (GOOD | {"ensemble": [[1.0]]}, "ensemble has 1 entries for 2 responses"),
    (GOOD | {"ensemble": [[1.0], ["x"]]}, "ensemble holds 'x'; it must be a number"),
    (GOOD | {"chosen": "a"}, "found responses and chosen.*--columns chosen="),
    (GOOD | {"prompt": 3}, "prompt is the number 3, not text"),
    (GOOD | {"prompt": "  "}, "the prompt is empty"),
    (GOOD | {"prompt": []}, "prompt has no message"),
    (
        GOOD | {"prompt": [USER | {"tool_calls": [{"name": "f"}]}]},
        "tool_calls of prompt message 1 is .*; of a message only texts are read, no calls of tools",
    ),
    (GOOD | {"prompt": ["hi"]}, "prompt message 1 is 'hi'; a message is an object with role and"),
    (GOOD | {"prompt": [USER | {"content": None}]}, "content of prompt message 1 is null"),
    (GOOD | {"prompt": [USER | {"image": 3}]}, "image of prompt message 1 is the number 3; of a"),
    (GOOD | {"prompt": [USER, says("a")]}, "prompt ends with an assistant message"),
    (GOOD | {"responses": "ab"}, "responses is 'ab'; it must be a list"),
    (GOOD | {"responses": ["a"]}, "responses has 1 entries; a comparison needs 2"),
    (GOOD | {"responses": ["a", True]}, "response 2 is the boolean true, not text"),
    (GOOD | {"responses": ["a", 1.5]}, "response 2 is the number 1.5, not text"),
    (GOOD | {"responses": [None, "b"]}, "response 1 is null, not text"),
    (GOOD | {"responses": ["a", "\ud83d"]}, "response 2 holds half of a surrogate pair"),
    (GOOD | {"rank": 1}, "rank is the number 1; it must be a list, one entry a response"),
    (GOOD | {"rank": [1]}, "rank has 1 entries for 2 responses"),
    (GOOD | {"rank": [0, 1]}, "rank holds the number 0; a rank is a whole number from 1"),
    (GOOD | {"rank": [1.0, 2]}, "rank holds the number 1.0"),
    (GOOD | {"rank": [True, 2]}, "rank holds the boolean true"),
    (GOOD | {"scores": [1.0]}, "scores has 1 entries for 2 responses"),
    (GOOD | {"scores": [1.0, float("nan")]}, "scores holds nan; it must be finite"),
    (GOOD | {"scores": [1.0, 10**400]}, "scores holds inf; it must be finite"),
    (GOOD | {"scores": [1.0, "2"]}, "scores holds '2'; it must be a number"),
    (GOOD | {"scores": [1.0, False]}, "scores holds the boolean false; it must be a number"),
    (GOOD | {"label": [1, 0]}, "label holds the number 1; it must be true or false"),
    (GOOD | {"weight": -1}, "weight is -1.0; it must be 0 or more"),
    (GOOD | {"weight": "1"}, "weight holds '1'; it must be a number"),
    (GOOD | {"id": 1.5}, "id is the number 1.5; it must be text or a whole number"),
    (GOOD | {"annotator": ""}, "annotator is ''.*--columns annotator="),
    (PAIR | {"chosen": 4}, "chosen is the number 4, not text"),
    (PAIR | {"rank": [1, 2]}, "found rank beside chosen and rejected"),
    (PAIR | {"label": True}, "found label beside chosen and rejected"),
    (CHAT | {"chosen": "a"}, r"rejected is \[\{.*not text"),
    (CHAT | {"chosen": [USER]}, "chosen must be one assistant message.*'user'"),
    (CHAT | {"chosen": [{"role": "assistant"}]}, "chosen message 1 is .*role and content"),
    (
        {"chosen": [USER, says("a"), USER, says("b")], "rejected": [USER, says("c")]},
        "chosen must be one assistant message behind the prompt",
    ),
    ({"chosen": [says("a")], "rejected": [says("b")]}, "share no message"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_bad_row_is_refused_with_its_place_the_value_and_the_rule(row, message):
    with pytest.raises(UserError, match=f"(?s)^f.jsonl:7: .*{message}") as caught:
        parse(row)
    assert "\n" not in str(caught.value)


def test_a_whole_number_may_name_an_annotator_or_a_row():
    row = parse(GOOD | {"annotator": 3, "id": 12})
    assert (row.annotator, row.id) == ("3", "12")


BAD_COLUMNS = [
    (["prompt"], "--columns takes OURS=THEIRS"),
    (["promt=x"], "'promt' is not a column that prefloop reads; perhaps you meant prompt"),
    (["chosen=a,b"], "chosen is one column, got a, b"),
]


@pytest.mark.parametrize(("words", "message"), BAD_COLUMNS)
def test_a_bad_renaming_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse_columns(words)


def test_a_renamed_column_that_is_not_there_is_refused_with_what_is():
    with pytest.raises(UserError, match=r"f.jsonl:7: no column question.*found prompt, x"):
        parse({"prompt": "q", "x": 1}, prompt="question")


def test_only_text_is_joined_to_a_prompt():
    with pytest.raises(UserError, match="several columns make the prompt, and one holds 3"):
        comparison({"a": "x", "b": 3}, {"prompt": ("a", "b")}, "p:1", "made")


def test_control_characters_of_the_data_do_not_reach_the_terminal():
    with pytest.raises(UserError) as caught:
        parse({"\x1b[2J": 1, "prompt": "\x1b[31m", "chosen": "\x1b[0m", "rejected": 3})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("nothing", [None, [], {}])
def test_an_empty_list_of_calls_is_no_call(nothing):
    row = {**GOOD, "prompt": [{**USER, "tool_calls": nothing, "name": "Ada"}]}
    assert parse(row).prompt == ({**USER, "name": "Ada"},)
