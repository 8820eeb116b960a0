"""The page on which answers are ranked: this machine only, and only who was given its address.

Listens on 127.0.0.1. A request must come from this machine, name this machine in its Host header (a
web page elsewhere that points its own name here does not) and begin with a random token.
"""

import hmac
import ipaddress
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from prefloop.errors import UserError
from prefloop.labelling.store import Store
from prefloop.labelling.tasks import Task
from prefloop.report.words import visible

LONGEST = 65_536  # bytes of a request
STATIC = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass
class Labeller:
    """One annotator at work: what is asked next, and what the answer means.

    Attributes:
        store: where judgements go.
        tasks: in the order in which they are asked.
        annotator: the name that judgements carry.
    """

    store: Store
    tasks: Sequence[Task]
    annotator: str
    _by_id: dict[str, Task] = field(init=False)

    def __post_init__(self) -> None:
        if not self.annotator.strip():
            raise UserError("the annotator needs a name; judgements carry it")
        self._by_id = {task.row.id: task for task in self.tasks}
        self.store.add(self.tasks)

    def state(self) -> dict[str, Any]:
        """What the page shows: the next task, and how far we are."""
        done = self.store.done(self.annotator)
        count = self.store.count(self.annotator)
        waiting = next((task for task in self.tasks if task.row.id not in done), None)
        return {
            "task": None if waiting is None else self._shown(waiting),
            "annotator": visible(self.annotator),
            "judged": count.judged,
            "skipped": count.skipped,
            "total": len(self.tasks),
        }

    def act(self, action: str, said: Any) -> dict[str, Any]:
        """Do what the page asks (judge, skip or undo); the state afterwards.

        Raises:
            UserError: a request that means nothing; nothing is stored then.
        """
        if action == "undo":
            self.store.undo(self.annotator)
            return self.state()
        task = self._by_id.get(str(said.get("id"))) if isinstance(said, dict) else None
        if task is None:
            raise UserError("there is no such task; load the page again")
        seconds = said.get("seconds")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            seconds = None
        rank = None if action == "skip" else task.ranks(self.annotator, _ranks(said))
        self.store.judge(task.row.id, self.annotator, rank, seconds)
        return self.state()

    def _shown(self, task: Task) -> dict[str, Any]:
        prompt = task.row.prompt
        messages = [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt
        return {
            "id": task.row.id,
            "prompt": [
                {"role": visible(one["role"]), "content": visible(one["content"])}
                for one in messages
            ],
            "answers": [visible(task.row.responses[place]) for place in task.order(self.annotator)],
        }


def serve(labeller: Labeller, port: int = 0, token: str | None = None) -> "Server":
    """A server for `labeller` on 127.0.0.1, not yet running; its `url` is the page's address.

    Args:
        labeller: who answers.
        port: 0 takes a free one.
        token: first part of every path; random when None.

    Raises:
        UserError: the port is taken, or not a port.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"port must be 0 (a free one) to 65535, got {port}")
    try:
        return Server(labeller, port, token or secrets.token_urlsafe(18))
    except OSError as error:
        raise UserError(f"port {port} cannot be used ({error.strerror}); --port 0 finds one") from (
            None
        )


class Server(ThreadingHTTPServer):
    """The server of one labeller; `serve_forever` runs it."""

    daemon_threads = True

    def __init__(self, labeller: Labeller, port: int, token: str) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.labeller = labeller
        self.token = token
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride] - ours is the only one
    server_version = "prefloop"
    sys_version = ""
    timeout = 30  # seconds for a request that never ends

    def do_GET(self) -> None:
        """The page, its style and script, and its state."""
        name = self._name()
        if name == "state":
            self._send_json(HTTPStatus.OK, self.server.labeller.state())
        elif name in STATIC:
            file, kind = STATIC[name]
            self._send(HTTPStatus.OK, kind, files("prefloop.labelling").joinpath(file).read_bytes())
        elif name is not None:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    def do_POST(self) -> None:
        """judge, skip, undo."""
        name = self._name()
        if name is None:
            return
        origin = self.headers.get("Origin")
        if origin is not None and origin.removeprefix("http://") not in self.server.hosts:
            return self._refuse(HTTPStatus.FORBIDDEN, "this request comes from another page")
        if name not in {"judge", "skip", "undo"}:
            return self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")
        if self.headers.get_content_type() != "application/json":
            return self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LONGEST:
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too long")
        try:
            said = json.loads(self.rfile.read(int(length)))
            self._send_json(HTTPStatus.OK, self.server.labeller.act(name, said))
        except UserError as error:
            self._refuse(HTTPStatus.CONFLICT, str(error))
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST, "not JSON")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the token would stand in the terminal's history."""

    def _name(self) -> str | None:
        """What is asked for, after the token; None where the request was refused."""
        local = ipaddress.ip_address(self.client_address[0]).is_loopback
        if not local or self.headers.get("Host", "").lower() not in self.server.hosts:
            self._refuse(HTTPStatus.FORBIDDEN, "this page is for this machine only")
            return None
        token, _, name = self.path.partition("?")[0].lstrip("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")
            return None
        return name

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._send_json(status, {"error": why})

    def _send_json(self, status: HTTPStatus, value: Any) -> None:
        body = json.dumps(value, ensure_ascii=False).encode()
        self._send(status, "application/json; charset=utf-8", body)

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", POLICY),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _ranks(said: dict[str, Any]) -> list[int]:
    ranks = said.get("ranks")
    whole = isinstance(ranks, list) and all(type(rank) is int and rank > 0 for rank in ranks)
    if not (whole and ranks):
        raise UserError(f"ranks must be a list of whole numbers from 1, got {ranks!r:.60}")
    return ranks
