"""Columns added to a file of responses of any size: rewards, log-probabilities, hidden statistics.

A file is read in blocks; each block's rows with their new columns are a file of their own, written
whole or not at all. Processes share the blocks, a killed run goes on with those that are missing,
and at the end they are joined in order. Memory holds one block.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.data import as_row, as_text, encoder, where
from prefloop.data.blocks import ArrowBlock, Block, Sizes, blocks, is_columnar, write_tables
from prefloop.logps import TOKENS, Scorer, buckets, logps_and_hidden_sums
from prefloop.policies import Policy
from prefloop.policies.policy import evaluating
from prefloop.rewards import Reward
from prefloop.rewards import score as rewarded
from prefloop.rewards.encoders import SentenceEncoder
from prefloop.runs import is_whole, read_json, write_json, write_jsonl
from prefloop.shares import ALONE, Worker
from prefloop.types import Comparison, Tokenized, UserError
from prefloop.types import score as logps_of

if TYPE_CHECKING:
    import pyarrow

ROUND = Sizes(text=256, columns=256)
"""Rows between two writes to the disk: what a kill can cost."""


@runtime_checkable
class Column(Protocol):
    """What is added to each row."""

    def __call__(self, rows: Sequence[Comparison]) -> list[Comparison]: ...


@runtime_checkable
class ById(Protocol):
    """A number a row, found by the row's id."""

    def __getitem__(self, name: str, /) -> float: ...


@dataclass(frozen=True, eq=False)
class WithReward:
    """`scores` (and `ensemble`, of an ensemble) by a reward; earlier ones are replaced."""

    reward: Reward

    def __call__(self, rows: Sequence[Comparison]) -> list[Comparison]:
        """The rows with a reward a response."""
        return rewarded(rows, self.reward)


@dataclass(frozen=True, eq=False, kw_only=True)
class WithLogps:
    """What policy and reference say of each response, with its end-of-turn token if it finished.

    `policy_logps`, `reference_logps`: log-probability, nats a response. `tokens`: response tokens.
    A response of no text is its end-of-turn token.
    With `hidden`, `hidden_gram`: <E_i, E_j> of the responses of the row, E the sum of the policy's
    last hidden states that predict a response, from the same pass.

    Attributes:
        policy: pi_theta.
        reference: the policy that is pi_ref; None takes the policy's own, where it has one.
        hidden: also the hidden statistics, see `selection.CHES`.
        token_budget: tokens of one forward pass.
        drop_overlong: leave out rows longer than the policy's context, instead of an error.
    """

    policy: Policy
    reference: Policy | None = None
    hidden: bool = False
    token_budget: int = TOKENS
    drop_overlong: bool = False

    @torch.no_grad()
    def __call__(self, rows: Sequence[Comparison]) -> list[Comparison]:
        """The rows with these columns."""
        tokenized = encoder(self.policy.tokenizer).as_answers(rows)
        context = self.policy.context
        if self.drop_overlong and context is not None:
            fits = [_longest(row) <= context for row in tokenized]
            rows, tokenized = list(compress(rows, fits)), list(compress(tokenized, fits))
        for row in tokenized:
            _refuse_unreadable(row, context)
        found: list[Comparison | None] = [None] * len(rows)
        for part in buckets(tokenized, self.token_budget):
            batch = [tokenized[at] for at in part]
            for at, columns in zip(part, self._columns(batch), strict=True):
                found[at] = _with(rows[at], columns)
        return [row for row in found if row is not None]

    def _columns(self, batch: Sequence[Tokenized]) -> Iterator[dict[str, Any]]:
        """For each row of a batch what is added to it."""
        scorer = self.policy.scorer(self.token_budget)
        grams: list[Any] = [None] * len(batch)
        with evaluating(self.policy.model):
            if self.hidden:
                logps, sums = logps_and_hidden_sums(scorer, batch)
                sums = sums.cpu().double()
                grams = (sums @ sums.mT).tolist()
            else:
                logps = logps_of(scorer, batch)
        ours, theirs = logps.sum.tolist(), self._reference(batch)
        for at, row in enumerate(batch):
            count = len(row.responses)
            columns: dict[str, Any] = {
                "policy_logps": ours[at][:count],
                "tokens": [len(response) for response in row.responses],
            }
            if theirs is not None:
                columns["reference_logps"] = theirs[at][:count]
            if self.hidden:
                columns["hidden_gram"] = [line[:count] for line in grams[at][:count]]
            yield columns

    def _reference(self, batch: Sequence[Tokenized]) -> list[list[float]] | None:
        if self.reference is not None:
            scorer = Scorer(self.reference.model, token_budget=self.token_budget)
            with evaluating(self.reference.model):
                return logps_of(scorer, batch).sum.tolist()
        if self.policy.adapter or self.policy.frozen is not None:
            return self.policy.reference_logps(batch, self.token_budget).sum.tolist()
        return None


@dataclass(frozen=True, eq=False)
class WithEmbedding:
    """`embedding`: the prompt as a unit vector of a sentence encoder, for `--spread`.

    What is longer than the encoder reads is cut there.
    """

    encoder: SentenceEncoder
    rows: int = 32

    def __call__(self, rows: Sequence[Comparison]) -> list[Comparison]:
        """The rows with their vectors, rounded to six decimals."""
        texts = [as_text(row.prompt) for row in rows]
        order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        found = list(rows)
        for start in range(0, len(order), self.rows):
            part = order[start : start + self.rows]
            vectors: Float[Tensor, "M D"] = self.encoder([texts[at] for at in part])
            for at, vector in zip(part, vectors.tolist(), strict=True):
                found[at] = _with(rows[at], {"embedding": [round(x, 6) for x in vector]})
        return found


@dataclass(frozen=True, eq=False)
class WithNumbers:
    """A number a row, by the row's id: what was worked out for the whole file before.

    Attributes:
        name: of the column.
        numbers: number of the row of an id.
    """

    name: str
    numbers: ById

    def __call__(self, rows: Sequence[Comparison]) -> list[Comparison]:
        """The rows with their numbers."""
        return [_with(row, {self.name: self.numbers[row.id]}) for row in rows]


def score_file(
    source: Path,
    out: Path,
    columns: Sequence[Column],
    worker: Worker = ALONE,
    on_rows: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """`source` with more columns: `out`/scored.jsonl, or scored.arrow where the source has columns.

    Returns what scoring.json holds: file, rows, rows left out, answers, and the mean reward of an
    answer where there are scores.

    Args:
        columns: what is added, one after the other.
        worker: this process among those that share the file.
        on_rows: called with the number of rows that have been passed.

    Raises:
        UserError: a row that is not allowed or cannot be scored; no row at all.
    """
    finished, parts = out / "scoring.json", out / "parts"
    if not is_whole(finished):
        parts.mkdir(parents=True, exist_ok=True)
        write = _write_arrow if is_columnar(source) else _write_lines
        count = _score_blocks(source, parts, columns, worker, on_rows, write)
        worker.wait()
        if worker.leads:
            totals = _totals(parts, count)
            if not totals["rows"]:
                raise UserError(f"{source}: all {totals['left_out']} rows are left out as too long")
            join = _join_arrow if is_columnar(source) else _join_lines
            file = join(out, [_file(parts, number) for number in range(count)])
            write_json(finished, {"file": file.name, **totals})
        worker.wait()
    if worker.leads:  # also where a run was killed before it came to this
        shutil.rmtree(parts, ignore_errors=True)
    return read_json(finished)


def _score_blocks(
    source: Path,
    parts: Path,
    columns: Sequence[Column],
    worker: Worker,
    on_rows: Callable[[int], None],
    write: Callable[[Block, Sequence[Comparison], Path], None],
) -> int:
    """Score this worker's blocks that are not there yet; how many blocks there are."""
    count = 0

    def wanted(number: int) -> bool:
        nonlocal count
        count = number + 1
        return worker.owns(number) and not _file(parts, number).exists()

    for block in blocks(source, sizes=ROUND, wanted=wanted):
        rows = block.comparisons()
        for column in columns:
            rows = column(rows)
        scores = [value for row in rows for value in row.scores or ()]
        answers = sum(len(row.responses) for row in rows)
        totals = {
            "rows": len(rows),
            "left_out": len(block) - len(rows),
            "answers": answers,
            "scores": len(scores),
            "sum": sum(scores),
        }
        write_json(_file(parts, block.number).with_suffix(".json"), totals)
        write(block, rows, _file(parts, block.number))
        on_rows(block.start + len(block))
    if not count:
        raise UserError(f"{source}: holds no row; at least one is needed")
    return count


def _totals(parts: Path, count: int) -> dict[str, Any]:
    found = [read_json(_file(parts, at).with_suffix(".json")) for at in range(count)]
    sums = {name: sum(one[name] for one in found) for name in found[0]}
    scores, total = sums.pop("scores"), sums.pop("sum")
    return {**sums, "reward": total / scores if scores else None}


def _write_lines(block: Block, rows: Sequence[Comparison], file: Path) -> None:
    write_jsonl(file, map(as_row, rows))


def _join_lines(out: Path, parts: Sequence[Path]) -> Path:
    whole = out / "scored.jsonl"
    part = out / ".scored.jsonl.part"
    with part.open("wb") as file:
        for one in parts:
            with one.open("rb") as read:
                shutil.copyfileobj(read, file)
    part.replace(whole)
    return whole


def _write_arrow(block: Block, rows: Sequence[Comparison], file: Path) -> None:
    """The block's own columns, and ours with the types that they have in every block."""
    import pyarrow

    assert isinstance(block, ArrowBlock)
    number = pyarrow.float64()
    types = {
        "ensemble": pyarrow.list_(pyarrow.list_(number)),
        "tokens": pyarrow.list_(pyarrow.int64()),
        "hidden_gram": pyarrow.list_(pyarrow.list_(number)),
        "embedding": pyarrow.list_(pyarrow.float32()),
        "validation_loss": number,
    } | dict.fromkeys(("scores", "policy_logps", "reference_logps"), pyarrow.list_(number))
    here = {row.place for row in rows}
    table = block.table.filter(pyarrow.array([block.place(at) in here for at in range(len(block))]))
    for name, kind in types.items():
        values = [_value(row, name) for row in rows]
        if all(value is None for value in values):
            continue
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, pyarrow.array(values, type=kind))
    write_tables(file, [table])


def _value(row: Comparison, name: str) -> Any:
    return {"scores": row.scores, "ensemble": row.ensemble}.get(name, row.extra.get(name))


def _join_arrow(out: Path, parts: Sequence[Path]) -> Path:
    return write_tables(out / "scored.arrow", _filled(parts))


def _filled(parts: Sequence[Path]) -> Iterator["pyarrow.Table"]:
    """The tables with rows: one whose rows were all left out has no new column."""
    import pyarrow

    for one in parts:
        with pyarrow.memory_map(str(one)) as read:
            table = pyarrow.ipc.open_stream(read).read_all()
            if len(table):
                yield table


def _file(parts: Path, number: int) -> Path:
    return parts / f"block-{number:07}.rows"


def _with(row: Comparison, columns: Mapping[str, Any]) -> Comparison:
    return replace(row, extra={**row.extra, **columns})


def _longest(row: Tokenized) -> int:
    return len(row.prompt) + max(len(response) for response in row.responses)


def _refuse_unreadable(row: Tokenized, context: int | None) -> None:
    if not row.prompt:
        raise UserError(f"{where(row)}: the prompt has no token for this policy; drop the row")
    if context is not None and _longest(row) > context:
        raise UserError(
            f"{where(row)}: {_longest(row)} tokens of prompt and response, and the policy reads "
            f"at most {context}. Shorten the row, or leave such rows out with --overlong drop"
        )
