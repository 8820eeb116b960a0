"""`prefloop label`: what is asked, what is kept, who may ask."""

import http.client
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prefloop.cli import main
from prefloop.data import read
from prefloop.errors import UserError
from prefloop.labelling import Labeller, Store, serve, tasks_of
from prefloop.labelling.store import Count
from prefloop.runs import write_jsonl
from prefloop.types import Comparison


def row(name: str, *responses: str, scores: tuple[float, ...] | None = None) -> Comparison:
    return Comparison(prompt=f"prompt {name}", responses=responses, id=name, scores=scores)


ROWS = (
    row("plain", "a", "b"),
    row("close", "a", "b", scores=(0.0, 0.1)),
    row("wide", "a", "b", "c", scores=(0.0, 5.0, 2.0)),
)


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "labels.sqlite")
    yield made
    made.close()


@pytest.fixture
def labeller(store) -> Labeller:
    return Labeller(store=store, tasks=tasks_of(ROWS), annotator="ann")


@pytest.fixture
def server(labeller):
    made = serve(labeller, token="secret")
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def ask(server, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
    """Status and JSON of one request; a body makes it a POST."""
    link = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    text = body if body is None or isinstance(body, str) else json.dumps(body)
    sent = {"Content-Type": "application/json"} | {k.replace("_", "-"): headers[k] for k in headers}
    link.request("GET" if text is None else "POST", path, text, sent)
    reply = link.getresponse()
    found = reply.read()
    link.close()
    return reply.status, json.loads(found) if found.startswith(b"{") else {"text": found.decode()}


def test_the_most_disputed_prompt_comes_first_and_unscored_ones_last():
    assert [task.row.id for task in tasks_of(ROWS)] == ["wide", "close", "plain"]


def test_of_many_answers_the_best_the_worst_and_the_middle_are_shown():
    many = row("many", "a", "b", "c", "d", "e", scores=(3.0, 1.0, 5.0, 2.0, 4.0))
    assert tasks_of([many], 3)[0].shown == (0, 1, 2)  # by score b d a e c: b, a, c
    assert tasks_of([many], 2)[0].shown == (1, 2)
    assert tasks_of([row("unscored", "a", "b", "c", "d")], 3)[0].shown == (0, 1, 2)


def test_equal_answers_are_shown_once():
    assert tasks_of([row("twice", "a", "a", "b")])[0].shown == (0, 2)


def test_the_order_on_the_screen_differs_from_person_to_person_and_ranks_find_their_way_back():
    task = tasks_of([row("r", "a", "b", "c")])[0]
    orders = {task.order(f"person {n}") for n in range(60)}
    assert len(orders) == 6  # all orders of three; one misses with probability 6 (5/6)^60 = 1e-4
    for name in ("ann", "bob"):
        ranks = task.ranks(name, (1, 2, 2))
        assert ranks[task.order(name)[0]] == 1
        assert sorted(ranks) == [1, 2, 2]
    assert tasks_of([row("x", "a", "b", "c", "d")], 2)[0].ranks("ann", (1, 1))[2:] == (None, None)


def test_a_judgement_is_exported_with_its_annotator_and_reads_back(labeller, store, tmp_path):
    labeller.act("judge", {"id": "wide", "ranks": [2, 1, 3], "seconds": 1.5})
    labeller.act("skip", {"id": "close"})
    labeller.act("judge", {"id": "plain", "ranks": [1, 1]})
    out = tmp_path / "out.jsonl"
    assert main(["label", "--out", str(store.path), "--export", str(out)]) == 0
    wide, plain = read(out)
    order = tasks_of(ROWS)[0].order("ann")
    assert [wide.rank[place] for place in order] == [2, 1, 3]
    assert (wide.annotator, wide.id, wide.scores) == ("ann", "wide@ann", (0.0, 5.0, 2.0))
    assert wide.extra["seconds"] == 1.5
    assert plain.rank == (1, 1)


def test_undo_takes_back_the_last_judgement_and_keeps_it_in_the_history(labeller, store):
    labeller.act("judge", {"id": "wide", "ranks": [1, 2, 3]})
    labeller.act("skip", {"id": "close"})
    assert store.count("ann") == Count(judged=1, skipped=1)
    assert labeller.act("undo", {})["task"]["id"] == "close"
    assert labeller.act("undo", {})["task"]["id"] == "wide"
    assert labeller.act("undo", {})["judged"] == 0  # nothing left to take back
    labeller.act("judge", {"id": "wide", "ranks": [3, 2, 1]})
    assert len(list(store.comparisons())) == 1
    with sqlite3.connect(store.path) as base:
        assert base.execute("SELECT count(*) FROM judgement").fetchone() == (3,)
    base.close()


def test_two_people_share_a_database_and_each_is_asked_everything(labeller, store):
    labeller.act("judge", {"id": "wide", "ranks": [1, 2, 3]})
    other = Labeller(store=store, tasks=tasks_of(ROWS), annotator="bob")
    assert other.state()["task"]["id"] == "wide"
    other.act("judge", {"id": "wide", "ranks": [1, 2, 3]})
    assert {found.id for found in store.comparisons()} == {"wide@ann", "wide@bob"}


def test_the_same_task_twice_in_two_windows_is_refused(labeller, store):
    labeller.act("judge", {"id": "wide", "ranks": [1, 2, 3]})
    with pytest.raises(UserError, match="judged by ann already"):
        labeller.act("judge", {"id": "wide", "ranks": [3, 2, 1]})
    assert store.count("ann") == Count(judged=1, skipped=0)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"id": "nobody", "ranks": [1, 2]}, "no such task"),
        ([], "no such task"),
        ({"id": ["wide"], "ranks": [1, 2, 3]}, "no such task"),
        ({"id": "wide", "ranks": [1, 2]}, "for 3 answers"),
        ({"id": "wide", "ranks": [1, 3, 3]}, "without a gap"),
        ({"id": "wide", "ranks": [2, 3, 4]}, "without a gap"),
        ({"id": "wide", "ranks": []}, "whole numbers from 1"),
        ({"id": "wide", "ranks": "123"}, "whole numbers from 1"),
        ({"id": "wide", "ranks": [True, 2, 3]}, "whole numbers from 1"),
        ({"id": "wide", "ranks": [0, 1, 2]}, "whole numbers from 1"),
        ({"id": "wide"}, "whole numbers from 1"),
    ],
)
def test_what_means_nothing_is_refused_and_stores_nothing(said, why, labeller, store):
    with pytest.raises(UserError, match=why):
        labeller.act("judge", said)
    assert store.count("ann") == Count(judged=0, skipped=0)


def test_hidden_characters_of_a_model_are_shown(store):
    tasks = tasks_of([row("r", "a\u202eb\x00", "c")])
    state = Labeller(store=store, tasks=tasks, annotator="ann").state()
    assert "a[U+202E]b\u2400" in state["task"]["answers"]


def test_the_page_is_served_to_who_has_the_token(server):
    status, page = ask(server, "/secret/")
    assert status == 200
    assert "Which answer is better?" in page["text"]
    assert ask(server, "/secret/page.js")[0] == ask(server, "/secret/page.css")[0] == 200
    assert ask(server, "/secret/state")[1]["task"]["id"] == "wide"
    assert server.url == f"http://127.0.0.1:{server.server_port}/secret/"


@pytest.mark.parametrize("path", ["/", "/state", "/wrong/state", "/secret2/state", "/secr/", "/é/"])
def test_without_the_token_there_is_nothing(path, server):
    quoted = path.replace("é", "%C3%A9")
    assert ask(server, quoted) == (404, {"error": "there is nothing here"})


def test_files_beside_the_page_are_not_served(server):
    for path in ("/secret/server.py", "/secret/../server.py", "/secret/%2e%2e/store.py"):
        assert ask(server, path)[0] == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil:80", ""]
)
def test_another_name_in_the_host_header_is_refused(host, server, store):
    for path, body in (("/secret/state", None), ("/secret/skip", {"id": "wide"})):
        status, said = ask(server, path, body, Host=host)
        assert (status, said["error"]) == (403, "this page is for this machine only")
    assert store.count("ann") == Count(judged=0, skipped=0)


def test_localhost_is_this_machine(server):
    assert ask(server, "/secret/state", Host=f"localhost:{server.server_port}")[0] == 200


def test_it_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ({"id": "wide"}, {"Origin": "http://evil.example"}, 403),
        ({"id": "wide"}, {"Origin": "null"}, 403),
        ({"id": "wide"}, {"Content_Type": "text/plain"}, 415),
        ("{", {}, 400),
        ('"' + "x" * 70_000 + '"', {}, 413),
        ({"id": "nobody"}, {}, 409),
    ],
)
def test_requests_of_other_pages_and_broken_ones_are_refused(body, headers, status, server, store):
    assert ask(server, "/secret/skip", body, **headers)[0] == status
    assert store.count("ann") == Count(judged=0, skipped=0)


def test_an_unknown_action_is_refused(server):
    assert ask(server, "/secret/delete", {})[0] == 404


def data_file(folder: Path) -> Path:
    path = folder / "responses.jsonl"
    write_jsonl(
        path, ({"id": f"r{n}", "prompt": f"p{n}", "responses": ["a", "b"]} for n in range(20))
    )
    return path


def test_kill_9_loses_no_judgement(tmp_path):
    out = tmp_path / "labels.sqlite"
    line = ["label", "--data", data_file(tmp_path), "--annotator", "ann", "--out", out]
    words = [sys.executable, "-m", "prefloop.cli", *map(str, line)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    url = process.stdout.readline().split()[1]
    link = http.client.HTTPConnection(url.split("/")[2], timeout=20)
    for number in range(7):
        body = json.dumps({"id": f"r{number}", "ranks": [1, 2]})
        path = "/" + url.split("/")[3] + "/judge"
        link.request("POST", path, body, {"Content-Type": "application/json"})
        assert link.getresponse().read()
        link.close()
    process.send_signal(signal.SIGKILL)  # at once after the seventh reply
    process.communicate()
    again = Store(out)
    assert again.count("ann") == Count(judged=7, skipped=0)
    again.close()


def test_stopping_says_what_was_judged_and_starting_again_goes_on(tmp_path, monkeypatch, capsys):
    def stopped(server, poll_interval: float = 0.5) -> None:
        server.labeller.act("skip", {"id": server.labeller.state()["task"]["id"]})
        raise KeyboardInterrupt

    monkeypatch.setattr("prefloop.labelling.server.Server.serve_forever", stopped)
    out = tmp_path / "labels.sqlite"
    words = ["label", "--data", str(data_file(tmp_path)), "--annotator", "ann", "--out", str(out)]
    for count in (1, 2):
        assert main(words) == 0
        assert f"ann judged 0, skipped {count}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([{"prompt": "p", "responses": ["a", "a"]}], "--annotator ann", "1 of them different"),
        ([{"prompt": "p", "responses": ["a", "b"]}], "", "--annotator NAME"),
        ([{"prompt": "p", "responses": ["a", "b"]}], "--annotator=\\ ", "needs a name"),
        ([{"prompt": "p", "responses": ["a", "b"]}], "--annotator a --port 99999", "port"),
    ],
)
def test_mistakes_are_one_line(rows, more, said, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    write_jsonl(data, rows)
    words = ["label", "--data", str(data), "--out", str(tmp_path / "labels.sqlite")]
    assert main([*words, *(word.replace("\\", " ") for word in more.split())]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_taken_port_is_a_mistake_of_the_user(server, labeller):
    with pytest.raises(UserError, match="--port 0 finds one"):
        serve(labeller, port=server.server_port)


def test_another_files_texts_under_the_same_ids_are_refused(labeller, store):
    with pytest.raises(UserError, match="'plain' has other text here"):
        store.add(tasks_of([row("plain", "a", "other")]))


def test_a_file_that_is_no_database_of_ours_is_refused(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a database, and long enough to be read as one" * 100)
    with pytest.raises(UserError, match="not a database of labels"):
        Store(text)
    other = tmp_path / "other.sqlite"
    base = sqlite3.connect(other)
    base.execute("CREATE TABLE task (id)")
    base.commit()
    base.close()
    with pytest.raises(UserError, match="of another program"):
        Store(other)
    with pytest.raises(UserError, match="not a file that can be made"):
        Store(tmp_path)


def test_exports_that_cannot_be_are_refused(store, tmp_path, capsys):
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    for out, export, said in (
        (tmp_path / "none.sqlite", tmp_path / "a", "no such database"),
        (store.path, tmp_path / "a", "no judgement yet"),
        (store.path, there, "not overwritten"),
    ):
        assert main(["label", "--out", str(out), "--export", str(export)]) == 2
        assert said in capsys.readouterr().err
    assert there.read_text() == "mine"


def test_four_answers_at_once_are_refused():
    with pytest.raises(UserError, match="2 or 3"):
        tasks_of(ROWS, 4)
