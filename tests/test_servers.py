"""What servers do on a bad day, scripted on loopback: noticed, worked around, or refused."""

import json
import os
import re
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from loopback import completion, free_port, scripted

from prefloop import servers
from prefloop.errors import UserError
from prefloop.policies import Sampling
from prefloop.samplers import Tilted
from prefloop.servers import Abilities, Server, connect

SHORT = Sampling(max_new_tokens=8)
KEY = "sk-secret-123"


def refusal(server):
    """The message with which a connection is refused."""
    with pytest.raises(UserError) as caught, connect(server):
        pytest.fail("connected")
    return str(caught.value)


def well(body, headers, calls):
    return 200, {}, completion(body)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(servers, "FIRST_PAUSE", 0.01)


def test_a_server_is_asked_for_its_only_model():
    with scripted(well) as (url, calls), connect(Server(url=url)) as connection:
        assert connection.server.model == "the-model"
        connection.sample(["x"], 1, SHORT, 0)
        assert {call["model"] for call in calls} == {"the-model"}


def test_a_server_that_honours_n_is_asked_once_a_prompt():
    with scripted(well) as (url, calls), connect(Server(url=url)) as connection:
        before = len(calls)
        answers = connection.sample(["x", "y"], 3, Sampling(temperature=0.7, top_p=0.9), 0)
        asked = calls[before:]
    assert [call["n"] for call in asked] == [3, 3]
    assert {call["temperature"] for call in asked} == {0.7}
    assert {call["top_p"] for call in asked} == {0.9}
    assert {call["max_tokens"] for call in asked} == {128}
    assert answers[0][1].logp == (-0.5, -1.5)
    assert len({call["seed"] for call in asked}) == 2


def test_a_server_that_ignores_n_is_asked_n_times_with_other_seeds():
    def one_only(body, headers, calls):
        return 200, {}, completion(body, count=1)

    with scripted(one_only) as (url, calls), connect(Server(url=url)) as connection:
        assert not connection.abilities.many
        before = len(calls)
        answers = connection.sample(["x"], 4, SHORT, 0)[0]
        assert len(calls) - before == 4
    assert len({one.text for one in answers}) == 4


def test_a_server_that_copies_one_answer_n_times_is_not_trusted_with_n():
    def copies(body, headers, calls):
        reply = completion(body, count=1)
        return 200, {}, {"choices": reply["choices"] * body.get("n", 1)}

    with scripted(copies) as (url, _), connect(Server(url=url)) as connection:
        assert not connection.abilities.many
        assert len({one.text for one in connection.sample(["x"], 3, SHORT, 0)[0]}) == 3


def test_answers_that_a_server_had_no_room_for_are_asked_for_again():
    def at_most_three(body, headers, calls):
        return 200, {}, completion(body, count=min(3, body.get("n", 1)))

    with scripted(at_most_three) as (url, _), connect(Server(url=url)) as connection:
        answers = connection.sample(["x"], 5, SHORT, 0)[0]
    assert len({one.text for one in answers}) == 5


def test_a_server_that_refuses_n_and_log_probabilities_is_asked_without():
    def strict(body, headers, calls):
        if "logprobs" in body or "n" in body:
            return 400, {}, "unknown field"
        return 200, {}, completion(body, logprobs=False)

    with scripted(strict) as (url, _), connect(Server(url=url)) as connection:
        assert connection.abilities == Abilities(
            many=False, logps=False, samples=True, repeats=True
        )
        assert len(connection.sample(["x"], 2, SHORT, 0)[0]) == 2


def test_more_answers_than_asked_for_are_refused():
    def two(body, headers, calls):
        return 200, {}, completion(body, count=2 if calls > 5 else None)

    with (
        scripted(two) as (url, _),
        connect(Server(url=url)) as connection,
        pytest.raises(UserError, match="asked for 1 answers, got 2"),
    ):
        connection.sample(["x"], 1, SHORT, 0)


def test_a_server_without_log_probabilities_gives_none_or_is_refused():
    def without(body, headers, calls):
        return 200, {}, completion(body, logprobs=False)

    with scripted(without) as (url, _), connect(Server(url=url)) as connection:
        assert connection.sample(["x"], 1, SHORT, 0)[0][0].logp is None
        with pytest.raises(UserError, match="importance weights need them"):
            connection.sample(["x"], 1, SHORT, 0, needs_logps=True)


def test_a_server_that_does_not_sample_is_refused_for_several_answers():
    def same(body, headers, calls):
        return 200, {}, completion(body, text="always this", count=1)

    with scripted(same) as (url, _), connect(Server(url=url)) as connection:
        with pytest.raises(UserError, match="does not sample, so 2 answers would be 2 copies"):
            connection.sample(["x"], 2, SHORT, 0)
        assert connection.sample(["x"], 1, SHORT, 0)[0][0].text == "always this"


def test_what_a_server_cannot_do_is_refused_with_the_reason():
    with scripted(well) as (url, _), connect(Server(url=url)) as connection:
        with pytest.raises(UserError, match=r"Tilted\(k=0.5\) cannot answer .* two models"):
            connection.sample(["x"], 2, SHORT, 0, Tilted())
        with pytest.raises(UserError, match="top_k 5 is no field of the OpenAI interface"):
            connection.sample(["x"], 1, Sampling(top_k=5), 0)
        with pytest.raises(UserError, match="n must be at least 1"):
            connection.sample(["x"], 0, SHORT, 0)


def test_answers_stay_in_order_however_long_each_takes():
    def slow_first(body, headers, calls):
        content = body["messages"][0]["content"]
        if content.startswith("p"):
            time.sleep(0.02 * (5 - int(content[1])))
        return 200, {}, completion(body, text=f"{content} {body['seed']}")

    with (
        scripted(slow_first) as (url, _),
        connect(Server(url=url, concurrency=5)) as connection,
    ):
        answers = connection.sample([f"p{i}" for i in range(5)], 1, SHORT, 0)
    assert [row[0].text[:2] for row in answers] == ["p0", "p1", "p2", "p3", "p4"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(quick, status):
    def sometimes(body, headers, calls):
        return well(body, headers, calls) if calls % 2 == 0 else (status, {}, "busy")

    with scripted(sometimes) as (url, calls), connect(Server(url=url)) as connection:
        assert len(connection.sample(["x"], 1, SHORT, 0)) == 1
        assert len(calls) == 12  # five probes and one answer, each asked for twice


def test_a_server_says_how_long_to_wait(quick):
    times = []

    def once(body, headers, calls):
        times.append(time.monotonic())
        return (429, {"retry-after": "0.3"}, "") if calls == 1 else well(body, headers, calls)

    with scripted(once) as (url, _), connect(Server(url=url)):
        assert times[1] - times[0] >= 0.3


def test_a_server_that_stays_busy_ends_in_one_line(quick):
    def never(body, headers, calls):
        return 503, {}, "come\nback later"

    with scripted(never) as (url, calls):
        said = refusal(Server(url=url, patience=0.2))
        assert re.search(r"status 503: come back later.*tried for 0.2 s", said)
        assert "\n" not in said
        assert 3 < len(calls) < 20  # pauses of 0.01, 0.02, 0.04, 0.08 s


def test_a_server_that_is_not_there_ends_in_one_line(quick):
    said = refusal(Server(url=f"http://127.0.0.1:{free_port()}", patience=0.1))
    assert re.search(r"does not answer \(ConnectError.*run the command again", said)


def test_a_server_that_hangs_ends_in_one_line(quick):
    def hangs(body, headers, calls):
        time.sleep(0.5)
        return well(body, headers, calls)

    with scripted(hangs) as (url, _):
        said = refusal(Server(url=url, timeout=0.1, patience=0.2, model="m"))
    assert "does not answer (ReadTimeout" in said


def test_a_server_that_comes_back_is_gone_on_with(quick):
    port = free_port()

    def come_back():
        time.sleep(0.3)
        handler = type("Handler", (BaseHTTPRequestHandler,), {"log_message": lambda *_: None})

        def do_post(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            data = json.dumps(completion(body)).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        handler.do_POST = do_post
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        started.append(server)
        server.serve_forever(0.01)

    started = []
    thread = threading.Thread(target=come_back, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    with connect(Server(url=url, model="m", patience=20.0)) as connection:
        assert connection.sample(["x"], 1, SHORT, 0)[0][0].finished
    started[0].shutdown()
    started[0].server_close()
    thread.join()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("<html>hello</html>", "no JSON in the reply.*hello"),
        ({"error": "?"}, "no list of choices in the reply"),
        ([1, 2], "no list of choices in the reply"),
        ({"choices": []}, "no list of choices in the reply"),
        ({"choices": [{"message": {"content": 3}}]}, "an answer without text"),
        ({"choices": ["hm"]}, "an answer without text"),
        (
            {
                "choices": [
                    {"message": {"content": "a"}, "logprobs": {"content": [{"logprob": "x"}]}}
                ]
            },
            "log-probabilities that are no numbers",
        ),
    ],
)
def test_garbage_is_one_line(reply, words):
    def garbage(body, headers, calls):
        return 200, {}, reply

    with scripted(garbage) as (url, _):
        said = refusal(Server(url=url))
    assert re.search(words, said)
    assert "\n" not in said


def test_a_refusal_shows_the_servers_reason():
    def refuses(body, headers, calls):
        return 400, {}, {"error": {"message": "context too long"}}

    with scripted(refuses) as (url, _):
        assert re.search(r"status 400.*context too long", refusal(Server(url=url)))


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    seen = []

    def echoes(body, headers, calls):
        seen.append(headers["authorization"])
        return 401, {}, f"bad key {headers['authorization']}"

    with scripted(echoes) as (url, _):
        server = Server(url=url, model="m", key_variable="MY_KEY")
        said = refusal(server)
    assert set(seen) == {f"Bearer {KEY}"}
    assert "status 401): bad key Bearer [key]" in said
    assert KEY not in repr(server)


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.delenv("PREFLOOP_API_KEY", raising=False)
    seen = []

    def looks(body, headers, calls):
        seen.append(headers["authorization"])
        return well(body, headers, calls)

    with scripted(looks) as (url, _), connect(Server(url=url)):
        assert set(seen) == {None}


def test_a_redirect_is_not_followed_with_the_key(monkeypatch):
    monkeypatch.setenv("PREFLOOP_API_KEY", KEY)

    def elsewhere(body, headers, calls):
        return 307, {"location": "http://127.0.0.1:1/v1/chat/completions"}, ""

    with scripted(elsewhere) as (url, _):
        assert "status 307" in refusal(Server(url=url))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "localhost:8000"}, "give its address as http"),
        ({"url": "ftp://h"}, "give its address as http"),
        ({"url": "http://me:secret@h"}, "no name, password or query"),
        ({"url": "http://h?key=secret"}, "no name, password or query"),
        ({"url": "http://h", "concurrency": 0}, "concurrency must be at least 1"),
        ({"url": "http://h", "timeout": 0.0}, "timeout must be positive"),
        ({"url": "http://h", "patience": -1.0}, "patience must be positive"),
    ],
)
def test_senseless_settings_are_refused(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        Server(**settings)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h/v1/", "http://h/v1"),
        ("http://h/api/openai", "http://h/api/openai"),
    ],
)
def test_the_address_may_leave_the_path_out(url, root):
    assert Server(url=url).root == root


def test_a_chat_does_not_fit_the_completion_endpoint():
    def plain(body, headers, calls):
        text = f"says {body['seed']}"
        return 200, {}, {"choices": [{"text": text, "finish_reason": "length"}]}

    with scripted(plain) as (url, _), connect(Server(url=url, chat=False)) as connection:
        assert not connection.sample(["x"], 1, SHORT, 0)[0][0].finished
        with pytest.raises(UserError, match="the completion endpoint takes plain text"):
            connection.sample([({"role": "user", "content": "x"},)], 1, SHORT, 0)


def test_log_probabilities_of_the_older_completion_form_are_read():
    def older(body, headers, calls):
        given = {"tokens": ["a"], "token_logprobs": [-0.25]}
        return 200, {}, {"choices": [{"text": f"{body['seed']}", "logprobs": given}]}

    with scripted(older) as (url, _), connect(Server(url=url, chat=False)) as connection:
        assert connection.abilities.logps
        assert connection.sample(["x"], 1, SHORT, 0)[0][0].logp == (-0.25,)


def test_a_server_that_goes_away_is_said_once_and_so_is_its_coming_back(quick):
    def pauses(body, headers, calls):
        away = 7 < calls < 20 and body["messages"][0]["content"].startswith("p")
        return (503, {}, "loading") if away else well(body, headers, calls)

    said = []
    with scripted(pauses) as (url, _), connect(Server(url=url), said.append) as connection:
        answers = connection.sample([f"p{n}" for n in range(6)], 1, SHORT, 0)
    assert len(answers) == 6
    assert len(said) == 2
    assert re.search(r"does not answer \(status 503: loading\); .*Ctrl-C stops", said[0])
    assert "answers again" in said[1]


@pytest.fixture
def heeded():
    """Ctrl-C as at a terminal: a shell starts what it puts into the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_does_not_wait_for_replies_under_way():
    def sleeps(body, headers, calls):
        if body["messages"][0]["content"] == "slow":
            time.sleep(3.0)
        return well(body, headers, calls)

    with scripted(sleeps) as (url, _), connect(Server(url=url)) as connection:
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            connection.sample(["slow"], 1, SHORT, 0)
        assert time.monotonic() - started < 2.0


@pytest.mark.parametrize("key", ["sk-1\nsk-2", "sk-é"])
def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch, key):
    monkeypatch.setenv("PREFLOOP_API_KEY", key)
    with scripted(well) as (url, _):
        said = refusal(Server(url=url))
    assert "PREFLOOP_API_KEY holds characters that no key has" in said
    assert "sk-" not in said


def test_the_line_break_behind_a_key_is_left_out(monkeypatch):
    monkeypatch.setenv("PREFLOOP_API_KEY", f"{KEY}\n")
    seen = []

    def looks(body, headers, calls):
        seen.append(headers["authorization"])
        return well(body, headers, calls)

    with scripted(looks) as (url, _), connect(Server(url=url)):
        assert set(seen) == {f"Bearer {KEY}"}


def test_a_reply_without_text_is_no_answer_but_an_empty_reply():
    def thinks(body, headers, calls):
        found = completion(body)
        if body["messages"][0]["content"] != "easy":
            found["choices"][0]["message"]["content"] = None
        return 200, {}, found

    with scripted(thinks) as (url, _), connect(Server(url=url)) as connection:
        assert connection.abilities.samples  # nothing was seen to the contrary
        replies = connection.replies(["hard", "easy"], SHORT, 0)
        assert replies[0] == ""
        assert replies[1].startswith("says")
        with pytest.raises(UserError, match="an answer without text"):
            connection.sample(["hard"], 1, SHORT, 0)
