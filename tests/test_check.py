"""`prefloop check`: every count worked out by hand, every error with its place, exit 2."""

import json
from pathlib import Path

import pytest
import tiny
from transformers import AutoConfig

from prefloop.cli import main
from prefloop.data import Empty, Overlong
from prefloop.data.verdict import Handling, check

SHARED = Path(__file__).parents[2] / "shared" / "data" / "pandalm"


def ranked(prompt, responses, rank, **more):
    return {"prompt": prompt, "responses": list(responses), "rank": rank, **more}


@pytest.fixture
def data(tmp_path):
    """A function that writes rows and gives back the path of the file."""

    def written(rows):
        path = tmp_path / "data.jsonl"
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("".join(line + "\n" for line in lines))
        return path

    return written


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tokenizer, and with a configuration that says a context of 512."""
    folder = tmp_path_factory.mktemp("model")
    tiny.tokenizer().save_pretrained(folder)
    AutoConfig.for_model("llama", **tiny.WIDTH).save_pretrained(folder)
    return folder


def test_rows_are_counted_by_kind(data):
    path = data(
        [
            ranked("p", ["a", "b", "c"], [1, 2, 2]),  # 2 ordered pairs
            ranked("p", ["a", "b"], [1, 1], finished=[True, False]),  # a tie, one cut
            ranked("q", ["a", "a"], None, scores=[1.0, 0.0]),  # 1 pair, identical
            {"prompt": "q", "completion": "q and so on", "label": True},  # repeats its prompt
            ranked("r", ["a", " "], None),  # not judged, an empty response
        ]
    )
    shape = check(path, handling=Handling(empty=Empty.drop)).shape
    assert shape.prompts == 3
    assert shape.responses == {1: 1, 2: 3, 3: 1}
    assert (shape.ranked, shape.scored, shape.labelled, shape.unjudged) == (2, 1, 1, 1)
    assert (shape.pairs, shape.ties) == (3, 1)
    assert (shape.identical, shape.empty, shape.repeats_prompt, shape.cut) == (1, 1, 1, 1)


def test_votes_on_the_same_pair_are_held_against_each_other(data):
    path = data(
        [
            ranked("p", ["a", "b"], [1, 2], annotator="x"),
            ranked("p", ["b", "a"], [2, 1], annotator="y"),  # the same vote, written backwards
            ranked("p", ["a", "b"], [2, 1], annotator="y"),  # y contradicts y and x
            ranked("p", ["a", "b"], [1, 1], annotator="z"),  # a tie contradicts nobody
            ranked("p", ["c", "b"], [1, 2], annotator="x"),
            ranked("q", ["a", "b"], [2, 1], annotator="x"),  # another prompt
        ]
    )
    found = check(path).agreement
    assert (found.things, found.repeated, found.contradicted) == (3, 1, 1)
    assert (found.self_contradicted, found.minority, found.duplicates) == (1, 1, 0)


def test_a_best_of_n_leaves_its_rest_uncontradicted(data):
    # b and c share rank 2: a tie, not an order that the second row could contradict
    path = data([ranked("p", "abc", [1, 2, 2]), ranked("p", "abc", [2, None, 1])])
    found = check(path).agreement
    assert (found.things, found.repeated, found.contradicted) == (3, 1, 1)  # a against c


def test_labels_of_the_same_response_are_held_against_each_other(data):
    rows = [{"prompt": "p", "completion": "a", "label": good} for good in (True, True, False)]
    found = check(data([*rows, {"prompt": "p", "completion": "b", "label": False}])).agreement
    assert (found.things, found.repeated, found.contradicted, found.minority) == (2, 1, 1, 1)


def test_rows_that_repeat_another_in_every_respect_are_duplicates(data):
    row = ranked("p", ["a", "b"], [1, 2], annotator="x")
    others = [
        row | {"annotator": "y"},
        row | {"rank": [2, 1]},
        row | {"prompt": "q"},
        row | {"responses": ["a", "c"]},
        row | {"weight": 2},
    ]
    path = data([row, *others, row | {"id": "mine", "note": 1}, row])
    assert check(path).agreement.duplicates == 2


def test_the_longer_response_wins_three_times_in_four(data):
    rows = [ranked(f"p{at}", ["aa", "b"], [1, 2]) for at in range(6)]
    rows += [ranked(f"q{at}", ["a", "bb"], [1, 2]) for at in range(2)]
    rows += [ranked("r", ["a", "b"], [1, 2])]
    bias = check(data(rows)).length_bias
    # 6 of 8; squared residuals 6 / 16 + 2 * 9 / 16 = 1.5; variance 8 / 7 * 1.5 / 64 = 0.026786;
    # t(0.975, 7 degrees of freedom) = 2.36462; 0.75 - 2.36462 * 0.163663 = 0.363
    assert (bias.longer_wins, bias.pairs, bias.equal) == (0.75, 8, 1)
    assert bias.low == pytest.approx(0.363, abs=5e-4)
    assert bias.high == 1.0  # 1.137, and a share ends at 1


def test_votes_on_one_prompt_count_as_one_for_the_interval(data):
    rows = [ranked(f"p{at}", ["aa", "b"], [1, 2]) for at in range(6)]
    rows += [ranked(f"q{at}", ["a", "bb"], [1, 2]) for at in range(2)]
    once, thrice = check(data(rows)).length_bias, check(data(3 * rows)).length_bias
    assert thrice.pairs == 3 * once.pairs
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))


def test_a_longer_response_that_always_wins_is_not_called_certain(data):
    bias = check(data([ranked(f"p{at}", ["aa", "b"], [1, 2]) for at in range(4)])).length_bias
    # Wilson: 1 / (1 + 1.96^2 / 4) = 0.51
    assert (bias.longer_wins, bias.high) == (1.0, 1.0)
    assert bias.low == pytest.approx(0.5101, abs=1e-4)


def test_one_prompt_gives_no_interval(data):
    bias = check(data([ranked("p", ["aa", "b", "c"], [1, 2, None]), ranked("p", "ab", [1, 2])]))
    assert bias.length_bias.pairs == 1
    mixed = check(data([ranked("p", ["aa", "b", "c"], [2, 3, 1])])).length_bias
    # aa > b, c > aa, c against b of equal length: 1 of 2
    assert (mixed.longer_wins, mixed.low, mixed.high, mixed.equal) == (0.5, None, None, 1)


def test_annotators_are_counted_with_their_rows(data):
    names = ["x", "x", "x", "y", "z", "z", None]
    rows = [ranked("p", ["a", f"b{at}"], [1, 2], annotator=name) for at, name in enumerate(names)]
    found = check(data(rows)).annotators
    assert (found.annotators, found.unnamed) == (3, 1)
    assert (found.fewest, found.median, found.most) == (1, 2.0, 3)
    assert check(data([ranked("p", ["a", "b"], [1, 2])])).annotators is None


def test_lengths_in_tokens_are_percentiles_of_what_the_model_reads(data):
    rows = [ranked("w1 w2", ["w1", " ".join(["w5"] * at)], [1, 2]) for at in range(1, 101)]
    rows[0]["responses"][0] = "<eos> w1"
    tokens = check(data(rows), None, tiny.tokenizer(chat=False)).tokens
    # prompts: <bos> w1 w2; rows: 3 + at words + <eos>, and of 100 the 51st is the median
    assert tokens.prompt == {50: 3, 90: 3, 99: 3, 100: 3}
    assert (tokens.row[50], tokens.row[100]) == (3 + 52, 3 + 101)
    assert tokens.response[100] == 101
    assert (tokens.limit, tokens.overlong, tokens.spells_special) == (None, 0, 1)


def test_rows_past_the_limit_are_errors_only_where_training_would_refuse_them(data):
    path = data([ranked("w1", ["w1 " * 9, "w2"], [1, 2]), ranked("w1", ["w1", "w2"], [1, 2])])

    def verdict(overlong):
        how = Handling(max_length=6, overlong=overlong, chat=False)
        return check(path, None, tiny.tokenizer(), how)

    refused = verdict(Overlong.refuse)
    assert refused.tokens.overlong == 1
    assert len(refused.errors) == 1
    assert refused.errors[0].startswith(f"{path}:1: 2 tokens of prompt and 10 of the longest")
    assert verdict(Overlong.drop).errors == verdict(Overlong.truncate).errors == ()


def test_a_row_that_cannot_be_encoded_does_not_hide_the_others(data):
    system = [{"role": "system", "content": "w1"}]
    good = ranked("w1", ["w1", "w2"], [1, 2])
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tiny.CHAT_TEMPLATE
    )
    path = data([good, good | {"prompt": system}, good])
    verdict = check(path, None, tokenizer)
    assert len(verdict.errors) == 1
    assert f"{path}:2: " in verdict.errors[0]
    assert verdict.tokens.prompt[50] > 0


def test_every_error_is_collected_and_bad_rows_count_as_rows(data):
    path = data(
        [
            ranked("p", ["a", "b"], [1, 2], id="x"),
            "nonsense",
            ranked("p", ["a", "b"], [1]),
            ranked("p", ["a", ""], [1, 2]),
            ranked("p", ["a", "b"], [2, 1], id="x"),
            ranked("p", ["a", 5], [1, 2]),
        ]
    )
    verdict = check(path)
    assert verdict.rows == 6
    assert sorted(error.split(": ")[0] for error in verdict.errors) == [
        f"{path}:{line}" for line in (2, 3, 4, 5, 6)
    ]
    assert verdict.shape.ranked == 2


NOTHING = [
    ([], "holds no row"),
    ([ranked("p", ["a", "b"], None)], "there is nothing to learn"),
    ([ranked("p", ["a", "b"], [1, 1])], "there is nothing to learn"),
]


@pytest.mark.parametrize(("rows", "message"), NOTHING)
def test_data_that_teaches_nothing_is_an_error(data, rows, message):
    (error,) = check(data(rows)).errors
    assert message in error


def test_the_command_prints_the_verdict_and_writes_it(data, tmp_path, capsys):
    path = data([ranked("p", ["a", "bb"], [1, 2]), ranked("q", ["a", "b"], [1, 1])])
    assert main(["check", str(path), "--json", str(tmp_path / "verdict.json")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "rows 2 prompts 2 responses a row 2: 2" in shown
    assert "ties 1 row (50.0 %)" in shown
    assert "the longer response wins 0.0 % [0.0, 79.3] of 1 ordered pairs" in shown
    assert "annotators not named" in shown
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["errors"] == []
    assert verdict["shape"]["ties"] == 1
    assert verdict["tokens"] is None


def test_the_command_ends_in_2_with_a_line_an_error(data, tmp_path, capsys):
    good = ranked("p", ["a", "b"], [1, 2])
    path = data([good, *["nonsense"] * 23, good])
    assert main(["check", str(path), "--json", str(tmp_path / "verdict.json")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"prefloop: {path} cannot be trained on, 23 errors:"
    assert lines[1].startswith(f"  {path}:2: not JSON")
    assert lines[20].startswith(f"  {path}:21: not JSON")
    assert lines[21:] == ["  and 3 more; --json FILE writes them all"]
    assert len(json.loads((tmp_path / "verdict.json").read_text())["errors"]) == 23


def test_the_command_renames_columns(data, capsys):
    path = data([{"question": "p", "yes": "a", "no": "b"}])
    assert main(["check", str(path)]) == 2
    assert "missing chosen and rejected" not in capsys.readouterr().err
    names = ["--columns", "prompt=question", "chosen=yes", "rejected=no"]
    assert main(["check", str(path), *names]) == 0


def test_the_command_drops_empty_responses_when_told(data, capsys):
    path = data([ranked("p", ["a", ""], [1, 2]), ranked("p", ["a", "b"], [1, 2])])
    assert main(["check", str(path)]) == 2
    assert f"{path}:1: response 2 is empty" in capsys.readouterr().err
    assert main(["check", str(path), "--empty", "drop"]) == 0
    assert "empty responses 1 row" in " ".join(capsys.readouterr().out.split())


def test_the_limit_is_the_models_context_unless_told(data, model, capsys):
    path = data([ranked("w1 " * 600, ["w1", "w2"], [1, 2])])
    assert main(["check", str(path), "--model", str(model)]) == 2
    printed = capsys.readouterr()
    assert (
        f"{path}:1: the prompt alone has 603 tokens" in printed.err
    )  # <user> ... <end> <assistant>
    assert "over 512 tokens 1 row" in " ".join(printed.out.split())
    assert main(["check", str(path), "--model", str(model), "--max-length", "606"]) == 0
    assert main(["check", str(path), "--model", str(model), "--overlong", "drop"]) == 0


def test_the_tokens_of_a_row_are_shown_with_their_mask(data, model, capsys):
    path = data([ranked("w9", ["w1", "w2"], [1, 2]), ranked("w1", ["w3 w4", "w5"], [2, 1])])
    assert main(["check", str(path), "--model", str(model), "--show", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown[shown.index(f"{path}:2") :].splitlines() == [
        f"{path}:2: 4 tokens of prompt, 3 + 2 of responses",
        "prompt, mask 0, read but not scored",
        "  [<user>][w1][<end>][<assistant>]",
        "response 1 (rank 2), mask 1, scored",
        "  [w3][w4][<end>]",
        "response 2 (rank 1), mask 1, scored",
        "  [w5][<end>]",
    ]
    plain = ["--show", "1", "--plain-text"]
    assert main(["check", str(path), "--model", str(model), *plain]) == 0
    assert "  [<bos>][w9]\n" in capsys.readouterr().out


MISTAKES = [
    (["--show", "1"], "--show needs --model"),
    (["--columns", "promt=x"], "perhaps you meant prompt"),
    (["--model", "/nowhere/at/all"], "there is no such folder"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_of_the_user_is_one_line(data, capsys, words, message):
    path = data([ranked("p", ["a", "b"], [1, 2])])
    assert main(["check", str(path), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_row_that_is_not_there_cannot_be_shown(data, model, capsys):
    path = data([ranked("w1", ["w1", "w2"], [1, 2])])
    assert main(["check", str(path), "--model", str(model), "--show", "2"]) == 2
    assert f"{path}: there is no row 2; it has 1" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_one_line(capsys):
    assert main(["check", "gone.jsonl"]) == 2
    assert capsys.readouterr().err == "prefloop: gone.jsonl: there is no such file or folder\n"


@pytest.mark.skipif(not SHARED.exists(), reason="PandaLM is not on this machine")
def test_the_verdict_on_pandalms_human_votes():
    verdict = check(SHARED / "votes.jsonl", handling=Handling(empty=Empty.drop))
    assert verdict.errors == ()
    shape, found = verdict.shape, verdict.agreement
    assert (verdict.rows, shape.prompts, shape.ties, shape.empty) == (2997, 170, 326, 162)
    assert shape.pairs == 2997 - 326
    assert found.repeated == found.things
    assert (verdict.annotators.fewest, verdict.annotators.most) == (999, 999)
    assert verdict.length_bias.low > 0.5
