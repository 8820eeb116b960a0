"""Text from any OpenAI-compatible server: vLLM, SGLang, llama.cpp, `transformers serve`, a cloud.

Servers differ in what they honour, and drop what they do not without a word. So a connection asks a
few short questions first and sends what the server is known to understand; every reply is counted
and checked, and what cannot be had from a server is refused with the reason.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import httpx2

from prefloop.errors import UserError
from prefloop.policies.sampling import FromPolicy, Sampler, derived_seed
from prefloop.policies.settings import Sampling
from prefloop.servers.threads import side_by_side

Prompt: TypeAlias = str | tuple[Mapping[str, str], ...]

BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Replies after which asking again may help."""
FIRST_PAUSE = 0.5  # seconds before the first new try; each further one takes twice as long
LONGEST_PAUSE = 20.0
FIRST_PATIENCE = 15.0  # seconds for a server that has not answered yet: its address may be wrong
PATIENCE = 600.0  # seconds for one that has: it may be loading its model again
PROBE = "Write a few random words."
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where a server is and how it is asked. Holds no secret, so it can stand in a config.

    Attributes:
        url: its address, http://host:port or with the path before /chat/completions.
        model: the model's name in requests; empty asks the server, which must then serve one.
        chat: the chat endpoint, a plain prompt becoming one user message; else the completion
            endpoint, which gets the prompt as it stands.
        key_variable: environment variable with the API key, if the server wants one. It is read
            when a request is sent and written nowhere.
        timeout: seconds until one request counts as lost.
        patience: seconds for which lost requests are sent again before giving up.
        concurrency: requests under way at a time.
    """

    url: str
    model: str = ""
    chat: bool = True
    key_variable: str = "PREFLOOP_API_KEY"
    timeout: float = 120.0
    patience: float = PATIENCE
    concurrency: int = 4

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UserError(f"server {self.url!r}: give its address as http://host:port")
        if parts.username or parts.password or parts.query:
            raise UserError(
                "the server's address must hold no name, password or query, since it is written to "
                f"config files. Put the key into the environment variable {self.key_variable}"
            )
        if self.concurrency < 1:
            raise UserError(f"concurrency must be at least 1, got {self.concurrency}")
        for name, value in (("timeout", self.timeout), ("patience", self.patience)):
            if not value > 0:
                raise UserError(f"{name} must be positive (seconds), got {value}")

    @property
    def root(self) -> str:
        """The address that endpoints are appended to."""
        url = self.url.rstrip("/")
        return url if urlsplit(url).path else f"{url}/v1"


@dataclass(frozen=True)
class Abilities:
    """What a server was seen to do.

    Attributes:
        many: one request for n answers gives n different ones.
        logps: log-probabilities come with the answer.
        samples: other seeds give other answers; without it every answer is the likeliest one.
        repeats: the same seed gives the same answer again.
    """

    many: bool
    logps: bool
    samples: bool
    repeats: bool


@dataclass(frozen=True)
class Answer:
    """One answer of a server.

    Attributes:
        text: what it said.
        finished: it ended by itself; otherwise it was cut at the longest length.
        logp: log-probability of each token in nats, as the server gives it (before temperature
            with llama.cpp and vLLM); None where the server gives none.
        silent: the server sent no text at all, as of a model that thought aloud until it was cut.
    """

    text: str
    finished: bool
    logp: tuple[float, ...] | None
    silent: bool = False


@contextmanager
def connect(
    server: Server, say: Callable[[str], None] = lambda line: None
) -> Iterator["Connection"]:
    """A connection to `server`, its model's name and its abilities found out.

    Args:
        say: told when the server stops answering, and when it answers again.

    Raises:
        UserError: nobody answers, or what answers is no such server.
    """
    local = urlsplit(server.url).hostname in LOOPBACK
    with httpx2.Client(timeout=server.timeout, trust_env=not local) as client:
        hasty = _Wire(replace(server, patience=min(server.patience, FIRST_PATIENCE)), client)
        server = replace(server, model=server.model or _only_model(hasty))
        wire = _Wire(server, client, _Outage(server, say))
        yield Connection(server, wire, _probe(server, hasty))


@dataclass(frozen=True, eq=False)
class Connection:
    """A server that is known to answer. Made by `connect`."""

    server: Server
    wire: "_Wire"
    abilities: Abilities

    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        settings: Sampling,
        seed: int,
        sampler: Sampler = FromPolicy(),  # noqa: B008 - frozen, without fields
        needs_logps: bool = False,
    ) -> list[list[Answer]]:
        """`n` answers to each prompt; the seeds sent follow from (seed, prompt, answer).

        Args:
            needs_logps: refuse a server that gives no log-probabilities; otherwise they are None.

        Raises:
            UserError: a sampler that mixes models, something this server cannot do, a reply that
                is not what was asked for, a server that is gone for longer than its patience.
        """
        self.refuse_impossible(n, settings, sampler, needs_logps)
        answers = self._answers(prompts, n, settings, seed)
        if any(one.silent for row in answers for one in row):
            raise UserError(
                f"{self.server.url}: an answer without text. A model that thinks aloud may have "
                "used up its length; allow longer answers"
            )
        return answers

    def replies(self, prompts: Sequence[Prompt], settings: Sampling, seed: int) -> list[str]:
        """One reply to each prompt; "" where the server sent no text."""
        return [row[0].text for row in self._answers(prompts, 1, settings, seed)]

    def _answers(
        self, prompts: Sequence[Prompt], n: int, settings: Sampling, seed: int
    ) -> list[list[Answer]]:
        jobs = [(prompt, *part) for prompt in prompts for part in self._requests(n)]
        found = side_by_side(
            lambda job: self._ask(*job, settings, seed), jobs, self.server.concurrency
        )
        parts = len(self._requests(n))
        return [
            [one for part in found[start : start + parts] for one in part]
            for start in range(0, len(jobs), parts)
        ]

    def _requests(self, n: int) -> list[tuple[int, int]]:
        """(first answer, how many answers) of each request for one prompt."""
        return [(0, n)] if self.abilities.many else [(answer, 1) for answer in range(n)]

    def _ask(
        self, prompt: Prompt, first: int, count: int, settings: Sampling, seed: int
    ) -> list[Answer]:
        body = _body(self.server, prompt, settings, self.abilities.logps)
        body["seed"] = _seed(seed, prompt, first)
        found = self.wire.several(body, count) if count > 1 else self.wire.choices(body)
        if count > 1 and len(found) < count:  # a server may have room for fewer at a time
            more = range(first + len(found), first + count)
            seeds = [{"seed": _seed(seed, prompt, answer)} for answer in more]
            found += [choice for extra in seeds for choice in self.wire.choices(body | extra)[:1]]
        if len(found) != count:
            raise UserError(
                f"{self.server.url}: asked for {count} answers, got {len(found)}; what the server "
                "sends cannot be matched with what it was asked"
            )
        return [_answer(self.server, choice) for choice in found]

    def refuse_impossible(
        self, n: int, settings: Sampling, sampler: Sampler, needs_logps: bool = False
    ) -> None:
        """Refuse what this server was seen not to do, as `sample` does; nothing is sent."""
        url = self.server.url
        if n < 1:
            raise UserError(f"n must be at least 1 answer a prompt, got {n}")
        if not isinstance(sampler, FromPolicy):
            raise UserError(
                f"{sampler} cannot answer through {url}: it needs the logits of two models, and a "
                "server gives the text of one. Sample with the model in this process"
            )
        if settings.top_k:
            raise UserError(
                f"top_k {settings.top_k} is no field of the OpenAI interface, and servers drop it "
                "silently. Use top_p, or sample with the model in this process"
            )
        if n > 1 and settings.temperature > 0 and not self.abilities.samples:
            raise UserError(
                f"{url} gave the same answer to three seeds at temperature 1.5: it does not "
                f"sample, so {n} answers would be {n} copies. (transformers serve needs do_sample "
                "in the model's generation_config.json.)"
            )
        if needs_logps and not self.abilities.logps:
            raise UserError(
                f"{url} sends no log-probabilities, and importance weights need them. Take another "
                "server, or sample with the model in this process"
            )


@dataclass(eq=False)
class _Outage:
    """Whether the server is known to be away, so that it is said once for all requests."""

    server: Server
    say: Callable[[str], None]
    since: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begins(self, trouble: str) -> None:
        """A request was lost more than once."""
        with self.lock:
            if self.since is None:
                self.since = time.monotonic()
                self.say(
                    f"{self.server.url} does not answer ({trouble}); trying again for "
                    f"{self.server.patience:g} s. Ctrl-C stops, and --resume goes on"
                )

    def ends(self) -> None:
        """A reply came."""
        with self.lock:
            if self.since is not None:
                away = time.monotonic() - self.since
                self.say(f"{self.server.url} answers again, after {away:.0f} s")
                self.since = None


class _Refused(UserError):
    """The server understood the request and does not want it."""


@dataclass(frozen=True, eq=False)
class _Wire:
    """Requests and replies: sent again when lost, checked for their form, without the key."""

    server: Server
    client: httpx2.Client
    outage: _Outage | None = None

    def choices(self, body: Mapping[str, Any]) -> list[Any]:
        """The answers in the reply to `body`."""
        endpoint = "chat/completions" if self.server.chat else "completions"
        reply = self.json("POST", endpoint, body)
        found = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(found, list) or not found:
            raise self.garbled(endpoint, "no list of choices", reply)
        return found

    def several(self, body: dict[str, Any], count: int) -> list[Any]:
        """Up to `count` answers to one request; none where the server refuses so many at once."""
        try:
            return self.choices(body | {"n": count})
        except _Refused:
            return []

    def json(self, method: str, endpoint: str, body: Mapping[str, Any] | None = None) -> Any:
        """The reply as JSON; lost requests are sent again, with ever longer pauses."""
        response = self._patiently(method, endpoint, body)
        if response.status_code != 200:
            raise _Refused(
                f"{self.server.root}/{endpoint} refuses (status {response.status_code}): "
                f"{self._shown(response.text)}"
            )
        try:
            return response.json()
        except ValueError:
            raise self.garbled(endpoint, "no JSON", response.text) from None

    def garbled(self, endpoint: str, what: str, found: Any) -> UserError:
        """The error for a reply of a wrong form."""
        return UserError(
            f"{self.server.root}/{endpoint}: {what} in the reply, so this is no OpenAI-compatible "
            f"server, or it is broken: {self._shown(str(found))}"
        )

    def _patiently(
        self, method: str, endpoint: str, body: Mapping[str, Any] | None
    ) -> httpx2.Response:
        until, pause, lost = time.monotonic() + self.server.patience, FIRST_PAUSE, 0
        while True:
            wanted = pause
            try:
                response = self.client.request(
                    method, f"{self.server.root}/{endpoint}", json=body, headers=self._headers()
                )
            except httpx2.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                if response.status_code not in BUSY:
                    if self.outage:
                        self.outage.ends()
                    return response
                trouble = f"status {response.status_code}: {response.text}"
                wanted = max(pause, _asked_to_wait(response))
            if time.monotonic() + wanted > until:
                raise UserError(
                    f"{self.server.root}/{endpoint} does not answer ({self._shown(trouble)}); "
                    f"tried for {self.server.patience:g} s. Start the server, and run the command "
                    "again with --resume to go on"
                )
            lost += 1
            if self.outage and lost > 1:
                self.outage.begins(self._shown(trouble))
            time.sleep(wanted)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _headers(self) -> dict[str, str]:
        key = self._key()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _key(self) -> str:
        """The key of the environment, without the white space that a file ends with."""
        key = os.environ.get(self.server.key_variable, "").strip()
        if key.isascii() and key.isprintable():
            return key
        raise UserError(
            f"the environment variable {self.server.key_variable} holds characters that no key "
            "has (line breaks, letters beyond ASCII); set it again"
        )

    def _shown(self, text: str) -> str:
        """What a server said, on one line, cut, and without the key it may echo."""
        key = self._key()
        line = " ".join(text.split())
        return (line.replace(key, "[key]") if key else line)[:200] or "nothing"


def _asked_to_wait(response: httpx2.Response) -> float:
    """Seconds the server asks to be left alone for; 0 where it does not say, or says a date."""
    try:
        return max(0.0, float(response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0


def _only_model(wire: _Wire) -> str:
    reply = wire.json("GET", "models")
    listed = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(listed, list):
        raise wire.garbled("models", "no list of models", reply)
    names = [str(one.get("id")) for one in listed if isinstance(one, dict)]
    if len(names) != 1:
        raise UserError(
            f"{wire.server.url}: name the model (--server-model, --judge-model); the server lists "
            f"{', '.join(names[:10]) or 'none'}"
        )
    return names[0]


def _probe(server: Server, wire: _Wire) -> Abilities:
    """A few short questions at a high temperature: what comes back shows what is honoured."""
    heated = Sampling(temperature=1.5, max_new_tokens=16)
    body = _body(server, PROBE, heated, logps=True)
    try:
        first = _answer(server, wire.choices(body | {"seed": 1})[0])
    except _Refused:  # some servers drop log-probabilities, others refuse whoever asks for them
        body = _body(server, PROBE, heated, logps=False)
        first = _answer(server, wire.choices(body | {"seed": 1})[0])
    again, *others = (_answer(server, wire.choices(body | {"seed": seed})[0]) for seed in (1, 2, 3))
    together = [_answer(server, choice) for choice in wire.several(body | {"seed": 1}, 3)]
    return Abilities(
        many=len(together) == 3 and len({one.text for one in together}) > 1,
        logps=all(one.logp is not None for one in (first, again, *others, *together)),
        # Silent ones say nothing either way: a model that thinks aloud has used up the probe.
        samples=first.silent or len({one.text for one in (first, *others)}) > 1,
        repeats=again.text == first.text,
    )


def _body(server: Server, prompt: Prompt, settings: Sampling, logps: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": server.model,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_new_tokens,
    }
    if server.chat:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        body["messages"] = [dict(one) for one in messages]
        return body | {"logprobs": True} if logps else body
    if not isinstance(prompt, str):
        raise UserError(
            "the prompt is chat messages, and the completion endpoint takes plain text. Use the "
            "chat endpoint"
        )
    body["prompt"] = prompt
    return body | {"logprobs": 1} if logps else body


def _seed(seed: int, prompt: Prompt, answer: int) -> int:
    return derived_seed(seed, answer, repr(prompt)) % 2**31  # what every server takes


def _answer(server: Server, choice: Any) -> Answer:
    choice = choice if isinstance(choice, dict) else {}
    message = choice.get("message") if server.chat else choice
    name = "content" if server.chat else "text"
    text = message.get(name) if isinstance(message, dict) else 0
    if not isinstance(text, str | None):
        raise UserError(
            f"{server.url}: an answer without text: {str(choice)[:200]}, so this is no "
            "OpenAI-compatible server, or it is broken"
        )
    ended = choice.get("finish_reason") == "stop"
    return Answer(text or "", ended, _logps(server, choice.get("logprobs")), silent=text is None)


def _logps(server: Server, given: Any) -> tuple[float, ...] | None:
    """Log-probabilities in the form of the chat endpoint or of the completion endpoint."""
    if not isinstance(given, dict):
        return None
    values = given.get("token_logprobs")
    if isinstance(given.get("content"), list):
        values = [one.get("logprob") for one in given["content"] if isinstance(one, dict)]
    if not values:
        return None
    if not isinstance(values, list) or not all(map(_is_number, values)):
        raise UserError(f"{server.url}: log-probabilities that are no numbers: {str(values)[:200]}")
    return tuple(float(value) for value in values if value is not None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
