"""Reports from run folders: what is there is shown, what is absent is said, text stays text."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_run import HOSTILE, document, evaluation, fake_run, lines, metrics, selection

from prefloop.cli import main
from prefloop.report import report, write_report
from prefloop.report.words import number, percent, shorten, visible
from prefloop.types import UserError

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """The elements, ids and plain text of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        self.targets += [value for key, value in attrs if key in {"href", "src"}]
        assert not [key for key, _ in attrs if key.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs") / "warm")


@pytest.fixture(scope="module")
def text(run) -> str:
    return report([run])


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def only(folder: Path, **documents) -> Path:
    """A run folder with nothing but these JSON documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in documents.items():
        document(folder, name.replace("__", "."), value)
    return folder


# What is shown ------------------------------------------------------------------------------------


def test_every_kind_of_file_gets_its_section(page):
    for title in (
        "Results",
        "Verdict",
        "Reward against KL",
        "Training",
        "Selection",
        "Annotator types",
        "Answers before and after",
        "Settings",
        "Not in this report",
    ):
        assert title in page.text, title
    assert page.tags.count("svg") >= 8 + 1 + 1 + 4  # curves, histogram, scatter, written


def test_results_show_values_intervals_units_and_counts(page):
    assert "70.0 % [55.0 %, 82.0 %]" in page.text
    assert "4.25 nats" in page.text
    assert "n = 24" in page.text


def test_the_share_bar_is_where_the_numbers_are(text):
    assert 'style="left:55.00%;right:18.00%"' in text


def test_selection_counts_and_shows_both_ends(page):
    assert "4 of 8 prompts were kept (PVar(scale=1.0))." in page.text
    assert "left out: beyond the cut 3 37.5 %" in page.text
    highest, lowest = (page.text.index(f"{end} wanted by PVar") for end in ("Most", "Least"))
    assert "sea. 7" in page.text[highest:lowest]
    assert "sea. 0" in page.text[lowest : lowest + 200]


def test_selection_shows_what_was_spent_the_quotas_and_what_rules_agree_on(page):
    assert (
        "4 of 5 labels are spent, one for each pair of answers to a prompt that is kept."
        in page.text
    )
    assert "topic=3" in page.text
    assert "What the rules agree on" in page.text


def test_a_written_section_may_hold_numbers_with_intervals(tmp_path):
    cell = {"value": 0.5, "low": 0.25, "high": 0.75, "unit": "share"}
    tables = [{"columns": ["who", "rate"], "rows": [["ann", cell], ["bob", None]]}]
    page = Page(report([only(tmp_path, rates__section={"title": "Rates", "tables": tables})]))
    assert "ann 50.0 % [25.0 %, 75.0 %] bob \u2013" in page.text


def test_selection_from_below_draws_its_cut_the_other_way_round(tmp_path):
    whole = selection("The sea?")
    below = {"rule": "RewardGap()", "keep": "bottom", "cut": 0.05, "kept": 3}
    page = Page(report([only(tmp_path, selection=whole | below)]))
    assert "3 of 8 prompts were kept (RewardGap())." in page.text
    assert "at or below 0.05 above" in page.text


def test_a_selection_of_an_earlier_version_is_refused(tmp_path):
    run = only(tmp_path, selection={"rule": "RewardGap()", "keep": "bottom", "cut": 0.3})
    with pytest.raises(UserError, match=r"has no kept, total, values.*Select again"):
        report([run])


def test_gaps_are_counted_in_words(page):
    assert "1 of 20 values of grad_norm are NaN or infinite: gaps." in page.text


def test_a_metric_that_nobody_foresaw_is_drawn_under_its_name(page):
    assert "pairs_per_second" in page.text


def test_rewards_stand_beside_both_answers(page):
    assert "before reward 0.1" in page.text
    assert "after reward 0.9" in page.text
    assert "user: Tell me of the sea." in page.text


def test_the_subtitle_names_a_model_without_the_folders_of_this_machine(tmp_path):
    settings = {"model": "/home/me/models/small", "data": "votes.jsonl", "objective": "DPO()"}
    run = only(tmp_path / "run", config={"command": "train", "settings": settings})
    assert "prefloop train \u00b7 small \u00b7 votes.jsonl \u00b7 DPO()" in Page(report([run])).text


def test_settings_are_flat_and_versions_folded(page):
    assert "lora.rank 16" in page.text
    assert "versions.torch 2.13.0" in page.text


def test_what_is_absent_is_said_with_what_writes_it(tmp_path):
    run = only(tmp_path / "bare", evaluation=evaluation("KL"))
    page = Page(report([run]))
    for words in ("metrics.jsonl training curves prefloop train", "prefloop diagnose"):
        assert words in page.text
    assert "evaluation.json" not in page.text
    assert "Selection" not in page.text


def test_a_complete_run_has_only_the_reproduction_absent(page):
    assert "reproduction.json" in page.text
    assert "diagnosis.json" not in page.text


def test_a_reproduction_shows_claims_figures_and_what_fails(tmp_path):
    claim = {"source": "Thm 1", "provenance": "derived", "expected": 1, "note": "once"}
    good = {**claim, "name": "two is two", "measured": 1, "holds": True, "must_hold": True}
    bad = {**claim, "name": "two is three", "measured": 2, "holds": False, "must_hold": True}
    open_ = {**claim, "name": "it may", "measured": 3, "holds": False, "must_hold": False}
    run = only(
        tmp_path / "pvar",
        reproduction={
            "name": "pvar",
            "claims": [good, bad, open_],
            "figures": ["curve.svg"],
            "tables": [{"title": "Cells", "columns": ["a"], "rows": [[0.5]]}],
        },
    )
    (run / "curve.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    text = report([run])
    page = Page(text)
    assert "1 of 2 claims that must hold do, of 3 in all." in page.text
    assert "Thm 1 [derived]" in page.text
    assert "does not hold here" in page.text
    assert text.count('class="emphasis"') == 1
    assert "data:image/svg+xml;base64," in text
    assert "Cells" in page.text


def test_a_kill_and_a_resume_leave_no_trace_in_the_page(text, tmp_path):
    run = fake_run(tmp_path / "warm")
    rows = metrics(20)
    twice = [{**row, "loss": 9.0} for row in rows if row["step"] > 10 and "loss" in row]
    lines(run, "metrics", [*twice, *rows])  # the later line of a step wins
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    assert report([run]) == text


def test_many_answers_are_cut_to_gains_losses_and_the_middle(tmp_path):
    run = tmp_path / "many"
    run.mkdir()
    lines(
        run,
        "samples",
        (
            {
                "prompt": f"prompt-{place:02d}",
                "before": "b",
                "after": "a",
                "reward_before": 0.0,
                "reward_after": (place * 7 % 40) / 40,
            }
            for place in range(40)
        ),
    )
    page = Page(report([run]))
    assert "12 of 40 prompts are shown." in page.text
    assert [page.text.count(tag) for tag in ("largest gain", "typical", "largest loss")] == [4] * 3
    assert "prompt-00" in page.text  # reward 0: the smallest gain
    assert "prompt-17" in page.text  # 17 * 7 % 40 = 39: the largest


def test_long_training_is_thinned_and_says_so(tmp_path):
    run = tmp_path / "long"
    run.mkdir()
    lines(run, "metrics", metrics(3000))
    text = report([run])
    assert "Thin: means of neighbouring steps. Thick: running mean over 5 % of the steps." in text
    assert len(text) < 900_000


# Several runs -------------------------------------------------------------------------------------


def test_runs_stand_side_by_side_with_what_differs(run, tmp_path):
    other = fake_run(tmp_path / "cold", steps=10)
    config = json.loads((other / "config.json").read_text())
    config["settings"]["seed"] = 7
    document(other, "config", config)
    page = Page(report([run, other]))
    assert "warm and cold" in page.text
    assert "measure warm cold" in page.text
    assert "1 of 7 settings differ. setting warm cold seed 0 7" in page.text
    assert "Annotator types: cold" in page.text
    assert len(page.ids) == len(set(page.ids))


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    folders = [only(tmp_path / place / "run", evaluation=evaluation("KL")) for place in "ab"]
    assert "a/run and b/run" in Page(report(folders)).text


def test_a_measure_that_one_run_lacks_is_a_dash(tmp_path):
    first = only(tmp_path / "a", evaluation=evaluation("KL"))
    second = only(tmp_path / "b", evaluation={"result": evaluation("KL")["result"][:1]})
    assert "KL 4.25 nats \u2013" in Page(report([first, second])).text


# Text stays text ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> str:
    return report([fake_run(tmp_path_factory.mktemp("hostile") / "<b>run", text=HOSTILE)])


def test_hostile_text_adds_no_element_and_no_link(hostile, page):
    attacked = Page(hostile)
    assert "script" not in attacked.tags
    assert {tag for tag in attacked.tags if tag not in page.tags} == set()
    assert [target for target in attacked.targets if not target.startswith(("#", "data:,"))] == []
    assert len(attacked.ids) == len(set(attacked.ids))


def test_hostile_text_is_shown_as_it_was_written(hostile):
    text = Page(hostile).text
    for words in ("<script>window.pwned = 1</script>", "{{ 7 * 7 }}", "$\\frac{a}{b}$", "日本語"):
        assert words in text


def test_what_hides_in_text_is_made_visible(hostile):
    for hidden in ("\x1b", "\x00", "\u202e", "\ud800"):
        assert hidden not in hostile
    assert "\u241b[31mred\u2400" in hostile
    assert "[U+202E]gnp.exe" in hostile


def test_the_page_forbids_scripts_and_the_network(hostile):
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in hostile
    style = hostile[hostile.index("<style>") : hostile.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    for scheme in ("http://", "https://"):
        assert hostile.replace("http://www.w3.org/2000/svg", "").count(scheme) == 0


def test_huge_text_is_folded_and_cut(tmp_path):
    run = tmp_path / "huge"
    run.mkdir()
    huge = "word " * 100_000
    lines(run, "samples", [{"prompt": "p", "before": huge, "after": "short"}])
    text = report([run])
    assert len(text) < 60_000
    page = Page(text)
    assert "show the rest" in page.text
    assert "480 000 more characters are in the file" in page.text


def test_text_a_little_over_the_fold_is_not_folded(tmp_path):
    run = tmp_path / "fold"
    run.mkdir()
    lines(run, "samples", [{"prompt": "p", "before": "x" * 490, "after": "x" * 500}])
    assert report([run]).count('class="long"') == 1


def test_numbers_are_short_and_honest():
    assert [number(value) for value in (0.123456, 12, 1234567, -0.5, 3.0)] == [
        "0.1235",
        "12",
        "1\u202f234\u202f567",
        "\u22120.5",
        "3",
    ]
    assert [number(value) for value in (float("nan"), float("-inf"), 1e-9)] == [
        "NaN",
        "\u2212\u221e",
        "1e\u221209",
    ]
    assert percent(0.12345) == "12.3\u202f%"
    assert shorten("a  b\nc", 10) == "a b c"
    assert shorten("abcdefgh", 5) == "abcd\u2026"
    assert visible("a\tb\nc\x7f\x85") == "a\tb\nc\u2421[U+0085]"
    assert visible("a\u200bb\u2060c\U000e0041") == "a[U+200B]b[U+2060]c[U+E0041]"


# Writing, and what is refused ---------------------------------------------------------------------


def test_the_page_is_written_into_the_first_run_and_replaced(tmp_path):
    run = only(tmp_path / "run", evaluation=evaluation("KL"))
    assert write_report([run]) == run / "report.html"
    first = (run / "report.html").read_text(encoding="utf-8")
    assert write_report([run]).read_text(encoding="utf-8") == first
    assert write_report([run], tmp_path / "new" / "page.html").exists()


def test_the_command_writes_and_says_where(tmp_path, capsys):
    run = only(tmp_path / "run", evaluation=evaluation("KL"))
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert f"report: {tmp_path / 'page.html'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run to report on"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["file.txt"], "file.txt: is not a folder"),
        (["empty"], "empty: this is not a run folder; it has none of config.json"),
        (["good", "good"], "given twice"),
    ],
)
def test_the_command_refuses_what_is_no_run(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("x")
    Path("empty").mkdir()
    only(Path("good"), evaluation=evaluation("KL"))
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.html"))


def test_the_section_in_the_docs_is_one_that_can_be_shown(tmp_path):
    docs = (Path(__file__).parents[1] / "docs" / "report.md").read_text()
    section = json.loads(docs.split("```json")[1].split("```")[0])
    page = Page(report([only(tmp_path, types__section=section)]))
    assert "Annotator types" in page.text
    assert "warm 41.0 % [33.0 %, 49.0 %]" in page.text
    assert page.tags.count("figure") == 4


SERIES = {"name": "s", "x": [1, 2], "y": [1, 2]}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"paragraphs": []}, "title must be text; found None"),
        ({"title": "t", "figs": []}, "nobody reads figs; the keys are title"),
        ({"title": "t", "paragraphs": [1]}, "paragraphs: expected a list of texts"),
        (
            {"title": "t", "tables": [{"columns": ["a", "b"], "rows": [[1]]}]},
            r"tables\[0\]: row 0 has 1 cells for 2 columns",
        ),
        (
            {"title": "t", "tables": [{"columns": ["a"], "rows": [[[1]]]}]},
            r"row 0: a cell is text, a number, null or an interval; found \[1\]",
        ),
        (
            {"title": "t", "tables": [{"columns": ["a"], "rows": [[{"mean": 1}]]}]},
            "row 0: nobody reads mean; the keys are value, low, high, unit",
        ),
        (
            {"title": "t", "lines": [{"title": "l", "series": [SERIES, {**SERIES, "y": [1]}]}]},
            r"lines\[0\]: series\[1\]: x, y, low and high must be equally long; found \[1, 2\]",
        ),
        (
            {"title": "t", "lines": [{"title": "l", "series": [{**SERIES, "low": [0, 1]}]}]},
            "low and high both or neither",
        ),
        (
            {"title": "t", "lines": [{"title": "l", "series": [{**SERIES, "y": [1, "2"]}]}]},
            "y: expected a number or null; found '2'",
        ),
        (
            {
                "title": "t",
                "heatmaps": [{"title": "h", "rows": ["a"], "columns": ["b"], "values": []}],
            },
            r"heatmaps\[0\]: values must be 1 rows of 1 numbers",
        ),
        ({"title": "t", "histograms": {}}, "histograms: expected a list"),
        ([], r"expected an object with title"),
    ],
)
def test_a_section_that_does_not_fit_is_refused_by_place(section, message, tmp_path):
    run = only(tmp_path, bad__section=section)
    with pytest.raises(UserError, match=message) as error:
        report([run])
    assert str(run / "bad.section.json") in str(error.value)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", r"config.json:1: not JSON"),
        ("evaluation.json", "[]", "evaluation.json: expected a JSON object"),
        ("evaluation.json", '{"result": {}}', "result must be a list of objects"),
        (
            "evaluation.json",
            '{"result": [{"name": "w", "value": "x"}]}',
            "value of 'w' must be a n",
        ),
        ("metrics.jsonl", '{"step": 1}\n{"loss": 1}\n', "metrics.jsonl:2: a row needs a step"),
        ("metrics.jsonl", '{"step": 1}\nnonsense\n{}\n', "metrics.jsonl:2: not JSON"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl:1: a row must be an object"),
        ("diagnosis.json", '{"verdict": "x"}', "verdict must be a list"),
        ("diagnosis.json", '{"numbers": [1]}', "numbers must be an object"),
        ("diagnosis.json", '{"sections": {"a": 1}}', "sections must be a list"),
        ("reproduction.json", '{"claims": 3}', "claims must be a list of objects"),
        (
            "reproduction.json",
            '{"figures": ["../x.svg"]}',
            "files of that folder; found '../x.svg'",
        ),
        ("reproduction.json", '{"figures": ["a.html"]}', "must be .svg or .png"),
        ("reproduction.json", '{"figures": ["a.svg"]}', "a.svg: there is no such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(file, text, message, tmp_path):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        report([tmp_path])
