"""Real OpenAI-compatible servers, started here: llama.cpp's, and `transformers serve`."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import tiny
from loopback import free_port, wait_for

from prefloop.errors import UserError
from prefloop.policies import Sampling
from prefloop.servers import Abilities, Server, connect

SHORT = Sampling(max_new_tokens=8)
LLAMA_CPP = """
import sys
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.n_ctx = 2048
settings.n_parallel = 4
settings.cpuparams.n_threads = 1
settings.port = 0
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


# llama.cpp's own server, on the demo's model


@pytest.fixture(scope="module")
def llama_cpp():
    pytest.importorskip("xllamacpp", reason="the test extra is not installed")
    from prefloop.smollm2 import gguf_file

    with subprocess.Popen(
        [sys.executable, "-c", LLAMA_CPP, str(gguf_file())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield process.stdout.readline().strip()
        process.kill()


@pytest.mark.parametrize("chat", [True, False])
def test_llama_cpp_is_seen_to_honour_everything(llama_cpp, chat):
    prompts = ["Once upon a time, a dog", "The sea is"]
    settings = Sampling(max_new_tokens=5)
    with connect(Server(url=llama_cpp, chat=chat)) as connection:
        assert connection.abilities == Abilities(many=True, logps=True, samples=True, repeats=True)
        first = connection.sample(prompts, 3, settings, seed=1, needs_logps=True)
        assert connection.sample(prompts[1:], 3, settings, seed=1) == first[1:]
    assert [len(row) for row in first] == [3, 3]
    assert len({one.text for row in first for one in row}) > 3
    for row in first:
        for one in row:
            assert all(logp <= 0 for logp in one.logp)
            assert one.finished or len(one.logp) == 5


def test_llama_cpp_gives_more_answers_than_it_has_room_for(llama_cpp):
    # It refuses n = 6 with its four slots (status 400), so the six are asked for one by one.
    with connect(Server(url=llama_cpp)) as connection:
        answers = connection.sample(["Name a colour."], 6, Sampling(max_new_tokens=3), seed=1)
    assert len(answers[0]) == 6


def test_llama_cpp_answers_a_chat_and_stops_by_itself(llama_cpp):
    chat = (
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What is the capital of France?"},
    )
    with connect(Server(url=llama_cpp)) as connection:
        greedy = Sampling(temperature=0.0, max_new_tokens=24)
        answer = connection.sample([chat], 1, greedy, seed=0)[0][0]
    assert "Paris" in answer.text
    assert answer.finished


# transformers serve: drops n and logprobs without a word


@contextmanager
def transformers_serve(folder, port, tmp_path):
    (tmp_path / "cache").mkdir()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    command = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    program = str(os.path.join(os.path.dirname(sys.executable), "transformers"))
    with subprocess.Popen(
        [program, *command], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/health")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("do_sample", [True, False])
def test_transformers_serve_is_noticed_to_ignore_n_and_log_probabilities(tmp_path, do_sample):
    pytest.importorskip("uvicorn", reason="the test extra is not installed")
    folder = tmp_path / "model"
    model = tiny.llama()
    model.generation_config.do_sample = do_sample
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    with (
        transformers_serve(folder, free_port(), tmp_path) as url,
        connect(Server(url=url, model=str(folder))) as connection,
    ):
        seen = connection.abilities
        assert (seen.many, seen.logps, seen.samples) == (False, False, do_sample)
        with pytest.raises(UserError, match="sends no log-probabilities"):
            connection.sample(["w1 w2"], 1, SHORT, seed=1, needs_logps=True)
        if not do_sample:
            with pytest.raises(UserError, match="3 answers would be 3 copies"):
                connection.sample(["w1 w2"], 3, SHORT, seed=1)
            return
        answers = connection.sample(["w1 w2", "w3"], 3, SHORT, seed=1)
        assert [len(row) for row in answers] == [3, 3]
        assert len({one.text for row in answers for one in row}) > 3
        assert all(one.logp is None for row in answers for one in row)
