"""Columns of a block of rows as tensors: what rules and filters read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefloop.data import prompt_key
from prefloop.data.blocks import ArrowBlock, Block, TextBlock
from prefloop.data.convert import rank_from_scores
from prefloop.selection import Table
from prefloop.selection.filters import DIFFERENT, LENGTHS, PROMPT_KEY
from prefloop.selection.rule import BEST_WORST, ROWS
from prefloop.types import Comparison, UserError

FORMS = ("prompt", "responses", "chosen", "rejected", "completion", "label", "rank", "scores")
"""Columns that a comparison is made of."""

MADE_BY = {
    "scores": "prefloop score --reward REWARD",
    "policy_logps": "prefloop score --policy MODEL",
    "reference_logps": "prefloop score --policy MODEL --reference MODEL",
    "tokens": "prefloop score --policy MODEL",
    "drawn_logps": "prefloop sample",
    "hidden_gram": "prefloop score --policy MODEL --hidden",
    "embedding": "prefloop score --encoder minilm",
    "validation_loss": "prefloop score --learning-order MODEL",
}
"""Column -> the command that writes it."""


def stored(names: Iterable[str], available: Sequence[str]) -> list[str]:
    """The columns to read from a columnar source for the columns `names` of a table."""
    wanted: set[str] = set()
    pairs = "chosen" in available
    for name in names:
        if name in {PROMPT_KEY, LENGTHS, DIFFERENT} or (name == BEST_WORST and pairs):
            wanted.update(FORMS)
        elif name == BEST_WORST:
            wanted.update(("rank", "scores"))
        elif name == ROWS:
            wanted.add(_counted(available))
        else:
            wanted.add(name)
    return [name for name in available if name in wanted]


def table_of(block: Block, names: Iterable[str]) -> Table:
    """The columns `names` of the block's rows, float64 (keys of prompts int64).

    Raises:
        UserError: a column that a row lacks, with the command that makes it; a number that is
            missing or not finite; columns that differ in length in one row.
    """
    columns = _TextColumns(block) if isinstance(block, TextBlock) else _ArrowColumns(block)
    table = {name: columns(name) for name in dict.fromkeys(names)}
    _refuse_uneven(table, block)
    return table


def values_of(block: Block, name: str) -> list[Any]:
    """A column as it stands in the file, a value a row.

    Raises:
        UserError: the rows have no such column.
    """
    if isinstance(block, ArrowBlock):
        if name not in block.table.column_names:
            raise _lacking(block.place(0), name, block.source.columns)
        return block.table.column(name).to_pylist()
    for raw in block.raws:
        if name not in raw.row:
            raise _lacking(raw.place, name, tuple(raw.row))
    return [raw.row[name] for raw in block.raws]


def place_of(block: Block, row: int) -> str:
    """Where row `row` of the block stands."""
    return block.place(row) if isinstance(block, ArrowBlock) else block.raws[row].place


class _TextColumns:
    """Columns of comparisons that were read one by one."""

    def __init__(self, block: Block):
        self.block = block
        self.rows = block.comparisons()

    def __call__(self, name: str) -> Tensor:
        if name in DERIVED:
            return DERIVED[name](self.rows)
        found = [row.scores if name == "scores" else row.extra.get(name) for row in self.rows]
        for row, values in zip(self.rows, found, strict=True):
            if values is None:
                raise _lacking(row.place, name)
        array = _nested(found, self.rows, name)
        if bad := [at for at, fine in enumerate(_finite(array, found)) if not fine]:
            raise _not_finite(self.rows[bad[0]].place, name)
        return array


class _ArrowColumns:
    """Columns of an Arrow table, without a Python object a row."""

    def __init__(self, block: ArrowBlock):
        self.block = block
        self.parsed: _TextColumns | None = None

    def __call__(self, name: str) -> Tensor:
        columns = self.block.table.column_names
        if name == ROWS:
            return _count(self.block)
        if name == BEST_WORST and "chosen" not in columns:
            return self._order(columns)
        if name in DERIVED:
            self.parsed = _TextColumns(self.block) if self.parsed is None else self.parsed
            return self.parsed(name)
        if name not in columns:
            raise _lacking(self.block.place(0), name)
        return self._numbers(name, allow_null=False)

    def _order(self, columns: Sequence[str]) -> Tensor:
        if "rank" not in columns:
            return _order_of(self("scores"))
        rank = self._numbers("rank", allow_null=True)
        unranked = rank.isnan().all(-1)
        if not unranked.any() or "scores" not in columns:
            return rank
        scored = _order_of(self._numbers("scores", allow_null=True))
        width = max(rank.shape[-1], scored.shape[-1])
        rank, scored = (_widened(one, width) for one in (rank, scored))
        return torch.where(unranked.unsqueeze(-1), scored, rank)

    def _numbers(self, name: str, allow_null: bool) -> Tensor:
        """A column of numbers, lists or lists of lists, padded with NaN."""
        import pyarrow

        array = self.block.table.column(name).combine_chunks()
        try:
            found, exists = _padded(array)
        except pyarrow.ArrowException as error:
            raise UserError(
                f"{self.block.place(0)}: {name} is of type {array.type}; numbers, or lists of "
                f"them, are needed: {error}"
            ) from None
        bad = np.asarray(array.is_null()) if not allow_null else np.zeros(len(array), bool)
        if not allow_null:
            wrong = ~np.isfinite(found) & exists
            bad = bad | wrong.reshape(len(wrong), -1).any(-1)
        if bad.any():
            raise _not_finite(self.block.place(int(bad.argmax())), name)
        return torch.from_numpy(found)


def _padded(array: Any) -> tuple[np.ndarray, np.ndarray]:
    """(values padded with NaN, where a value belongs to the row), of an Arrow array."""
    import pyarrow
    from pyarrow import compute

    kind = array.type
    if not (
        pyarrow.types.is_list(kind)
        or pyarrow.types.is_large_list(kind)
        or pyarrow.types.is_fixed_size_list(kind)
    ):
        values = array.cast(pyarrow.float64()).to_numpy(zero_copy_only=False)
        return np.array(values), np.ones(len(values), bool)
    length = compute.call_function("list_value_length", [array]).fill_null(0)
    length = length.to_numpy(zero_copy_only=False)
    inner, inner_exists = _padded(array.flatten())
    width = int(length.max(initial=0))
    if len(inner) == width * len(length):  # as long everywhere: nothing to pad
        shape = (len(length), width, *inner.shape[1:])
        return inner.reshape(shape), inner_exists.reshape(shape)
    exists = np.arange(width) < length[:, None]
    found = np.full((*exists.shape, *inner.shape[1:]), np.nan)
    found[exists] = inner
    whole = np.zeros(found.shape, bool)
    whole[exists] = inner_exists
    return found, whole


def _nested(found: Sequence[Any], rows: Sequence[Comparison], name: str) -> Tensor:
    """Numbers, lists, or lists of lists of rows, padded with NaN."""
    try:
        parts = [torch.tensor(values, dtype=torch.float64) for values in found]
    except (TypeError, ValueError):
        bad = next(at for at, values in enumerate(found) if not _is_numbers(values))
        raise _not_finite(rows[bad].place, name) from None
    shape = tuple(max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True))
    whole = torch.full((len(parts), *shape), torch.nan, dtype=torch.float64)
    for at, part in enumerate(parts):
        whole[(at, *map(slice, part.shape))] = part
    return whole


def _is_numbers(values: Any) -> bool:
    if isinstance(values, list | tuple):
        return all(map(_is_numbers, values))
    return isinstance(values, int | float)


def _finite(array: Tensor, found: Sequence[Any]) -> list[bool]:
    """For each row, whether what it holds (not its padding) is finite."""
    given = torch.tensor([np.size(values) for values in found])
    return (array.reshape(len(array), -1).isfinite().sum(-1) == given).tolist()


def _count_of(rows: Sequence[Comparison]) -> Tensor:
    return torch.tensor([len(row.responses) for row in rows])


def _lengths_of(rows: Sequence[Comparison]) -> Tensor:
    found = [[float(len(response)) for response in row.responses] for row in rows]
    return _nested(found, rows, LENGTHS)


def _different_of(rows: Sequence[Comparison]) -> Tensor:
    return torch.tensor([len(set(row.responses)) for row in rows])


def _keys_of(rows: Sequence[Comparison]) -> Tensor:
    return torch.tensor([hashed(prompt_key(row.prompt)) for row in rows])


def _ranks_of(rows: Sequence[Comparison]) -> Tensor:
    """Ranks, by score where nobody ranked; NaN where a response was not judged."""
    found = []
    for row in rows:
        ranks: Sequence[int | None] | None = row.rank
        if ranks is None and row.scores is None:
            raise UserError(
                f"{row.place}: this rule needs to know which response is better, and the row has "
                "neither rank nor scores. Make scores with: prefloop score --reward REWARD"
            )
        if ranks is None and row.scores is not None:
            ranks = rank_from_scores(row.scores)
        found.append([float("nan") if rank is None else float(rank) for rank in ranks or ()])
    return _nested(found, rows, BEST_WORST)


DERIVED: Mapping[str, Callable[[Sequence[Comparison]], Tensor]] = {
    ROWS: _count_of,
    LENGTHS: _lengths_of,
    DIFFERENT: _different_of,
    PROMPT_KEY: _keys_of,
    BEST_WORST: _ranks_of,
}
"""Columns that are worked out from a row."""


def hashed(text: str) -> int:
    """64 bits that stand for a text."""
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _order_of(scores: Tensor) -> Tensor:
    """1 + how many of the row's scores are higher: equal scores are equal."""
    higher = (scores.unsqueeze(-2) > scores.unsqueeze(-1)).sum(-1) + 1.0
    return torch.where(scores.isnan(), torch.nan, higher.double())


def _widened(array: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(array, (0, width - array.shape[-1]), value=torch.nan)


def _counted(available: Sequence[str]) -> str:
    """The lightest column that says how many responses a row has."""
    for name in ("scores", "policy_logps", "tokens", "rank", "responses", "chosen", "completion"):
        if name in available:
            return name
    raise UserError(
        f"the rows hold no responses and no scores; they have {', '.join(available)}. Give rows "
        "with prompt and responses"
    )


def _count(block: ArrowBlock) -> Tensor:
    from pyarrow import compute

    name = _counted(block.table.column_names)
    if name in {"chosen", "completion"}:
        return torch.full((len(block),), 2 if name == "chosen" else 1)
    column = block.table.column(name).combine_chunks()
    length = compute.call_function("list_value_length", [column]).fill_null(0)
    return torch.from_numpy(length.to_numpy(zero_copy_only=False).astype("int64"))


def _refuse_uneven(table: Table, block: Block) -> None:
    """Columns with a number a response have as many numbers in each row."""
    sizes = {
        name: (~values.isnan()).sum(-1)
        for name, values in table.items()
        if values.dim() == 2 and name not in {BEST_WORST, "embedding"}
    }
    names = list(sizes)
    for name in names[1:]:
        if (uneven := sizes[name] != sizes[names[0]]).any():
            at = int(uneven.int().argmax())
            raise UserError(
                f"{place_of(block, at)}: {name} has {int(sizes[name][at])} numbers and {names[0]} "
                f"has {int(sizes[names[0]][at])}; each has one a response. Score the rows again"
            )


def _lacking(place: str, name: str, columns: Sequence[str] = ()) -> UserError:
    made = MADE_BY.get(name)
    known = f" ({', '.join(columns)})" if columns else ""
    help_ = f"make it with: {made}" if made else f"name a column that the rows have{known}"
    return UserError(f"{place}: this reads {name!r}, which the row does not have; {help_}")


def _not_finite(place: str, name: str) -> UserError:
    return UserError(
        f"{place}: {name} holds something that is not a finite number; every response needs one. "
        "Score the row again, or drop it"
    )
