"""Answers to a file of prompts: shared by processes, kept as they come, resumed after a kill."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from prefloop.data import as_row, encoder, iterate
from prefloop.policies import Policy, Sampling
from prefloop.policies.sampling import FromPolicy, Sample, Sampler, sample
from prefloop.runs import append_jsonl, read_jsonl, write_jsonl
from prefloop.servers import Answer, Connection
from prefloop.shares import ALONE, Worker
from prefloop.types import Comparison, UserError


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How answers are drawn: `n` a prompt, by `sampler`, following from `seed` and the prompt."""

    n: int
    settings: Sampling
    seed: int
    sampler: Sampler = field(default_factory=FromPolicy)

    def __call__(self, policy: Policy, prompts: Sequence[Sequence[int]]) -> list[list[Sample]]:
        """The answers to each prompt, given in tokens."""
        return sample(policy, prompts, self.n, self.settings, self.seed, self.sampler)


def sample_to_file(
    policy: Policy,
    prompts: Sequence[Comparison],
    out: Path,
    draw: Draw,
    worker: Worker = ALONE,
    on_prompts: Callable[[int], None] = lambda done: None,
) -> list[Comparison]:
    """Answers of `policy` to each prompt as `out`/responses.jsonl, see `collect`."""
    coder = encoder(policy.tokenizer)

    def answer(chunk: Sequence[Comparison]) -> list[Comparison]:
        drawn = draw(policy, coder.prompts(chunk))
        return [_answered(prompt, one) for prompt, one in zip(chunk, drawn, strict=True)]

    return collect(answer, prompts, out, max(1, draw.settings.rows // draw.n), worker, on_prompts)


def ask_server(
    connection: Connection,
    prompts: Sequence[Comparison],
    out: Path,
    draw: Draw,
    worker: Worker = ALONE,
    on_prompts: Callable[[int], None] = lambda done: None,
) -> list[Comparison]:
    """Answers of the model behind `connection` as `out`/responses.jsonl, see `collect`.

    `server_logps` is the log-probability of each answer as the server gives it, null where it
    gives none; most give the model's own, before temperature.
    """

    def answer(chunk: Sequence[Comparison]) -> list[Comparison]:
        drawn = connection.sample(
            [row.prompt for row in chunk], draw.n, draw.settings, draw.seed, draw.sampler
        )
        name = connection.server.model
        return [_from_server(prompt, one, name) for prompt, one in zip(chunk, drawn, strict=True)]

    size = max(1, 2 * connection.server.concurrency)
    return collect(answer, prompts, out, size, worker, on_prompts)


def collect(
    answer: Callable[[Sequence[Comparison]], list[Comparison]],
    prompts: Sequence[Comparison],
    out: Path,
    size: int,
    worker: Worker = ALONE,
    on_prompts: Callable[[int], None] = lambda done: None,
) -> list[Comparison]:
    """`out`/responses.jsonl by `answer`, `size` prompts at a time; what is there is not redone.

    Answers follow from (seed, prompt) alone, so a killed run ends in the same file. Each worker
    answers its chunks and appends them to a file of its own.
    """
    _refuse_repeated(prompts)
    part, whole = _part(out, worker.index), out / "responses.jsonl"
    if not worker.led(whole.exists):
        done = worker.led(lambda: _found(out))
        missing = [prompt for prompt in prompts if prompt.id not in done]
        chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
        for chunk in worker.share(chunks):
            for row in answer(chunk):
                append_jsonl(part, as_row(row))
            done.update(row.id for row in chunk)
            on_prompts(len(done))
        worker.wait()
        worker.led(lambda: _join(out, prompts))
    if worker.leads:  # also where a run was killed before it came to this
        for part in _parts(out):
            part.unlink()
    return list(iterate(whole))


def _found(out: Path) -> set[str]:
    """Ids of the prompts that are answered, by however many processes; torn lines go away."""
    rows = {row["id"]: row for part in _parts(out) for row in read_jsonl(part)}
    write_jsonl(_part(out, 0), rows.values())
    for part in set(_parts(out)) - {_part(out, 0)}:
        part.unlink()
    return set(rows)


def _join(out: Path, prompts: Sequence[Comparison]) -> None:
    rows = {row["id"]: row for part in _parts(out) for row in read_jsonl(part)}
    write_jsonl(out / "responses.jsonl", [rows[prompt.id] for prompt in prompts])


def _part(out: Path, index: int) -> Path:
    """What worker `index` has answered."""
    return out / (f"responses.part-{index}.jsonl" if index else "responses.part.jsonl")


def _parts(out: Path) -> list[Path]:
    return sorted(out.glob("responses.part*.jsonl"))


def _from_server(prompt: Comparison, drawn: Sequence[Answer], model: str) -> Comparison:
    """A row of responses.jsonl: texts, and what the server says of them."""
    return Comparison(
        prompt=prompt.prompt,
        responses=tuple(one.text for one in drawn),
        id=prompt.id,
        finished=tuple(one.finished for one in drawn),
        extra={
            **prompt.extra,
            "sampler": [f"server:{model}"] * len(drawn),
            "server_logps": [None if one.logp is None else sum(one.logp) for one in drawn],
        },
    )


def with_answers(row: Comparison, answers: Sequence[Sample]) -> Comparison:
    """`row` with `answers` as its responses, and which of them finished."""
    return replace(
        row,
        responses=tuple(one.text for one in answers),
        finished=tuple(one.finished for one in answers),
    )


def _answered(prompt: Comparison, drawn: Sequence[Sample]) -> Comparison:
    """A row of responses.jsonl: texts, and the log-probabilities they were drawn with."""
    return Comparison(
        prompt=prompt.prompt,
        responses=tuple(one.text for one in drawn),
        id=prompt.id,
        finished=tuple(one.finished for one in drawn),
        extra={
            **prompt.extra,
            "sampler": [one.sampler for one in drawn],
            "tokens": [len(one.tokens) for one in drawn],
            "policy_logps": [
                None if one.policy_logp is None else sum(one.policy_logp) for one in drawn
            ],
            "drawn_logps": [sum(one.drawn_logp) for one in drawn],
        },
    )


def _refuse_repeated(prompts: Sequence[Comparison]) -> None:
    if not prompts:
        raise UserError("there is no prompt to sample from")
    seen: dict[str, Comparison] = {}
    for prompt in prompts:
        if prompt.id in seen:
            raise UserError(
                f"{prompt.place}: id {prompt.id!r} stands at {seen[prompt.id].place} already; give "
                "each prompt its own"
            )
        seen[prompt.id] = prompt
