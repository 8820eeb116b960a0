"""Log-probabilities of the reference, scored once and kept on disk.

A folder holds shards; a shard is one safetensors file that is written whole or not at all and
never changed. An entry is one response: its key is a hash of (prompt tokens, response tokens), so
that any grouping of the responses into comparisons and batches is served. Processes that share the
folder each write shards of their own; a killed run loses what it scored since its last shard.
"""

import json
import os
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prefloop.logps.check import undisturbed
from prefloop.logps.head import computing_dtype
from prefloop.logps.layout import buckets, response_mask, table_shape
from prefloop.logps.scorer import Scorer
from prefloop.logps.ways import causal_model
from prefloop.types import Logps, Tokenized, UserError, score

SECONDS_A_SHARD = 20.0
TOKEN_BUDGET = 8192  # of a forward pass, where the scorer has none
KEY_BYTES = 16
UNRELATED = ("_name_or_path", "transformers_version", "use_cache", "architectures")

Reference = Callable[[Sequence[Tokenized]], Logps]
Progress = Callable[[int, int], None]


def cached_reference(
    scorer: Scorer,
    rows: Sequence[Tokenized],
    *,
    path: Path,
    identity: str,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, total: None,
) -> Reference:
    """A function from a batch of `rows` to the log-probabilities the scorer's model has NOW.

    What is not in the cache is scored here, without gradients and in evaluation mode, in batches
    packed over the whole of `rows`; under torch.distributed each process scores its share. The
    function that is returned does not touch the model.

    Args:
        path: folder of the cache, made if it does not exist; shared by all processes.
        identity: what names the model, see `model_identity`.
        device: where the function puts its answers.
        progress: called with (comparisons scored, comparisons to score).
    """
    device_of_model = causal_model(scorer.model).device
    dtype = str(computing_dtype(device_of_model, causal_model(scorer.model).dtype))
    cache = ReferenceCache(path, f"{identity}-{dtype.removeprefix('torch.')}")
    rank, processes = _place()
    _fill(cache, scorer, cache.missing(rows), (rank, processes), progress)
    if processes > 1:
        torch.distributed.barrier()
        cache.reload()
        _fill(cache, scorer, cache.missing(rows), (0, 1), progress)  # folders that are not shared
    return lambda batch: cache.read(batch, device)


class ReferenceCache:
    """Entries of one model in a folder: look up, add, never change.

    Args:
        path: folder of all caches.
        key: names the model; entries of other models are in other folders.

    Raises:
        UserError: a shard that cannot be read.
    """

    def __init__(self, path: Path, key: str):
        self.folder = Path(path) / key
        self.entries: dict[bytes, Float[Tensor, " T"]] = {}
        self.read_shards: set[Path] = set()
        self.reload()

    def __len__(self) -> int:
        return len(self.entries)

    def reload(self) -> None:
        """Take in the shards that were written since the last look."""
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard not in self.read_shards:
                self.entries.update(_read(shard))
                self.read_shards.add(shard)

    def missing(self, rows: Sequence[Tokenized]) -> list[Tokenized]:
        """The rows with just those responses that are not here, each once."""
        found: list[Tokenized] = []
        seen: set[bytes] = set()
        for row in rows:
            keys = [_key(row.prompt, response) for response in row.responses]
            new = {k: r for k, r in zip(keys, row.responses, strict=True) if k not in seen}
            wanted = tuple(response for key, response in new.items() if key not in self.entries)
            seen.update(new)
            if wanted:
                found.append(replace(row, responses=wanted))
        return found

    def add(self, rows: Sequence[Tokenized], logps: Sequence[Logps]) -> None:
        """Keep the log-probabilities of `rows` (one `Logps` (N, T) a row) as one new shard."""
        entries = {
            _key(row.prompt, response): scores.token[place, : len(response)].float().cpu()
            for row, scores in zip(rows, logps, strict=True)
            for place, response in enumerate(row.responses)
        }
        if entries:
            self.read_shards.add(_write(self.folder, entries))
            self.entries.update(entries)

    def read(self, batch: Sequence[Tokenized], device: torch.device | str = "cpu") -> Logps:
        """The log-probabilities of `batch`.

        Raises:
            UserError: a response that was never scored.
        """
        token = torch.zeros(table_shape(batch))
        for index, row in enumerate(batch):
            for place, response in enumerate(row.responses):
                entry = self.entries.get(_key(row.prompt, response))
                if entry is None:
                    raise UserError(
                        f"{row.place or row.id}: response {place + 1} is not in the reference "
                        f"cache {self.folder}; only rows that were given to it can be read. "
                        "Score the rows first."
                    )
                token[index, place, : len(response)] = entry
        return Logps(token.to(device), response_mask(batch).to(device))


@dataclass
class _Shard:
    """Scored rows on their way to disk."""

    rows: list[Tokenized] = field(default_factory=list)
    logps: list[Logps] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


def _fill(
    cache: ReferenceCache,
    scorer: Scorer,
    rows: Sequence[Tokenized],
    share: tuple[int, int],
    progress: Progress,
) -> None:
    """Score this process's share of `rows`, a shard every few seconds."""
    mine = buckets(rows, scorer.token_budget or TOKEN_BUDGET)[share[0] :: share[1]]
    done, total = 0, sum(map(len, mine))
    shard = _Shard()
    with undisturbed(scorer.model):
        for group in mine:
            batch = [rows[index] for index in group]
            logps = score(scorer, batch)
            shard.rows.extend(batch)
            shard.logps.extend(logps.at(torch.tensor(index)) for index in range(len(batch)))
            if time.monotonic() - shard.since > SECONDS_A_SHARD:
                cache.add(shard.rows, shard.logps)
                shard = _Shard()
            done += len(batch)
            progress(done, total)
    cache.add(shard.rows, shard.logps)


def _place() -> tuple[int, int]:
    """(rank, processes)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    text = array("q", [len(prompt), *prompt, *response]).tobytes()
    return blake2b(text, digest_size=KEY_BYTES).digest()


def _write(folder: Path, entries: dict[bytes, Float[Tensor, " T"]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shard = folder / f"{uuid.uuid4().hex}.safetensors"
    temporary = shard.with_suffix(".part")
    ends = list(accumulate((len(token) for token in entries.values()), initial=0))
    keys = torch.frombuffer(bytearray(b"".join(entries)), dtype=torch.uint8)
    tensors = {
        "key": keys.reshape(-1, KEY_BYTES),
        "end": torch.tensor(ends),
        "token": torch.cat(list(entries.values())),
    }
    save_file(tensors, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(shard)
    return shard


def _read(shard: Path) -> Iterator[tuple[bytes, Tensor]]:
    try:
        with safe_open(shard, framework="pt") as file:
            keys, ends, token = (file.get_tensor(name) for name in ("key", "end", "token"))
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{shard}: not a readable part of a reference cache ({error}); delete this file, and "
            "what it held is scored again."
        ) from None
    flat = keys.numpy().tobytes()
    borders = ends.tolist()
    for index, (start, end) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        yield flat[index * KEY_BYTES : (index + 1) * KEY_BYTES], token[start:end]


def model_identity(model: nn.Module) -> str:
    """A hash of the model's configuration and of every byte of its weights, in hexadecimal.

    An adapter that is switched off does not count, nor that it is there at all: the base of an
    adapted model has the identity of the plain model. About a second a gigabyte.
    """
    digest = blake2b(digest_size=16)
    config = causal_model(model).config.to_dict()
    known = {name: value for name, value in config.items() if name not in UNRELATED}
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in sorted(_weights_in_use(causal_model(model)).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy())
    return digest.hexdigest()


def _weights_in_use(base: nn.Module) -> dict[str, Tensor]:
    """Weights by the name they have without adapters; of adapters, the active ones only."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    unused: list[str] = []
    for place, module in base.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            active = [] if module.disable_adapters else module.active_adapters
            for part in module.adapter_layer_names:
                held = module.get_submodule(part)
                unused += [
                    f"{place}.{part}.{name}."
                    for name, _ in held.named_children()
                    if name not in active
                ]
    return {
        name.replace(".base_layer", "").replace(".original_module", ""): tensor
        for name, tensor in base.state_dict().items()
        if not name.startswith(tuple(unused))
    }
