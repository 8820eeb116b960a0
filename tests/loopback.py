"""Servers on loopback for tests: scripted ones, free ports, waiting for real ones."""

import json
import socket
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url):
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"{url} did not come up")


def completion(body, text=None, count=None, logprobs=True):
    """A well-formed reply, whose text depends on the seed."""
    content = f"says {body.get('seed')}" if text is None else text

    def choice(index):
        said = content if index == 0 else f"{content} {index}"
        one = {"message": {"content": said}, "finish_reason": "stop"}
        if logprobs:
            one["logprobs"] = {"content": [{"logprob": -0.5}, {"logprob": -1.5}]}
        return one

    return {"choices": [choice(index) for index in range(count or body.get("n", 1))]}


@contextmanager
def scripted(reply):
    """A server on loopback; `reply(body, headers, calls)` gives (status, headers, JSON or text)."""
    calls = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            calls.append(body)
            self.answer(*reply(body, self.headers, len(calls)))

        def do_GET(self):
            self.answer(200, {}, {"data": [{"id": "the-model"}]})

        def answer(self, status, headers, found):
            data = (found if isinstance(found, str) else json.dumps(found)).encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", calls
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
