"""Log-probabilities of a model that does not change, kept on disk: the reference is scored once.

What is kept is keyed by what it depends on: a folder a model (hash of its weights), and in it a
number a response token under the hash of (prompt tokens, response tokens). So any batch of any run
finds what it needs, whatever its order; and what another process or a killed run has scored stays.

    IDENTITY/shard-*.index.npz   keys (M, 16) and lengths (M,) of M responses
    IDENTITY/shard-*.npy         their log-probabilities, one after the other; memory-mapped
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from prefloop.logps.layout import buckets
from prefloop.types import Logps, Tokenized, score

SHARD = 4096
"""Responses between two writes: what a kill can cost."""


def model_identity(model: nn.Module) -> str:
    """A hash of every weight of `model`, its adapters left out: equal numbers, equal identity."""
    digest = blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items(), key=lambda item: _plain(item[0])):
        if "lora_" in name:
            continue
        digest.update(f"{_plain(name)} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cached_reference(
    scorer: nn.Module,
    rows: Sequence[Tokenized],
    path: Path,
    identity: str,
    token_budget: int = 8192,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "CachedLogps":
    """What `scorer` says of `rows`, from `path`; only what is not there yet is scored.

    Under several processes each scores its share, and all find everything afterwards.

    Args:
        scorer: of the model that `identity` names; not needed any more afterwards.
        rows: everything that will be asked for.
        path: the folder that holds the caches of all models.
        progress: called with (rows done, rows to do) on this process.
    """
    state = PartialState()
    cache = CachedLogps(path / identity)
    missing = cache.missing(rows)[state.process_index :: state.num_processes]
    for done in cache.add(scorer, missing, token_budget):
        progress(done, len(missing))
    state.wait_for_everyone()
    cache.reload()
    return cache


@dataclass
class CachedLogps:
    """Log-probabilities by content, for any batch: a reference that needs no model.

    Attributes:
        folder: of one model.
    """

    folder: Path
    _places: dict[bytes, tuple[int, int, int]] = field(default_factory=dict)
    _shards: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.reload()

    def __call__(self, batch: Sequence[Tokenized]) -> Logps:
        """`Logps` (B, N, T) of the batch.

        Raises:
            KeyError: a response that was never scored; `cached_reference` was not given it.
        """
        width = max(len(row.responses) for row in batch)
        longest = max(len(response) for row in batch for response in row.responses)
        token = torch.zeros(len(batch), width, longest)
        mask = torch.zeros(len(batch), width, longest, dtype=torch.bool)
        for number, row in enumerate(batch):
            for place, response in enumerate(row.responses):
                shard, start, length = self._places[_key(row.prompt, response)]
                found = self._shards[shard][start : start + length]
                token[number, place, :length] = torch.from_numpy(np.array(found))
                mask[number, place, :length] = True
        return Logps(token, mask)

    def missing(self, rows: Sequence[Tokenized]) -> list[Tokenized]:
        """The rows with a response that is not there yet, each distinct content once."""
        seen: set[tuple[bytes, ...]] = set()
        found = []
        for row in rows:
            keys = tuple(_key(row.prompt, response) for response in row.responses)
            if keys not in seen and any(key not in self._places for key in keys):
                seen.add(keys)
                found.append(row)
        return found

    def add(self, scorer: nn.Module, rows: Sequence[Tokenized], token_budget: int) -> Iterator[int]:
        """Score `rows`, write them shard by shard; yields how many are on disk."""
        keys: list[bytes] = []
        values: list[np.ndarray] = []
        done = 0
        for part in buckets(rows, token_budget):
            batch = [rows[index] for index in part]
            with torch.no_grad():
                logps = score(scorer, batch)
            for number, row in enumerate(batch):
                for place, response in enumerate(row.responses):
                    keys.append(_key(row.prompt, response))
                    kept = logps.token[number, place, : len(response)]
                    values.append(kept.float().cpu().numpy())
            done += len(part)
            if len(keys) >= SHARD or done == len(rows):
                self._write(keys, values)
                keys, values = [], []
                yield done

    def reload(self) -> None:
        """Find what is on disk now, from this process or another."""
        self._places.clear()
        self._shards.clear()
        for index in sorted(self.folder.glob("shard-*.index.npz")):
            data = index.with_name(index.name.replace(".index.npz", ".npy"))
            stored = np.load(index, allow_pickle=False)
            keys, lengths = stored["keys"], stored["lengths"]
            starts = np.concatenate([[0], np.cumsum(lengths)])
            for number, key in enumerate(keys):
                place = (len(self._shards), int(starts[number]), int(lengths[number]))
                self._places[key.tobytes()] = place
            self._shards.append(np.load(data, mmap_mode="r", allow_pickle=False))

    def _write(self, keys: list[bytes], values: list[np.ndarray]) -> None:
        """One shard; its index comes last, so a shard without one does not count."""
        name = f"shard-{blake2b(b''.join(keys), digest_size=12).hexdigest()}-{os.getpid()}"
        data, index = self.folder / f"{name}.npy", self.folder / f"{name}.index.npz"
        part = self.folder / f".{name}.part"
        with part.open("wb") as file:
            np.save(file, np.concatenate(values))
        part.replace(data)
        with part.open("wb") as file:
            np.savez(
                file,
                keys=np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1),
                lengths=np.array([len(value) for value in values]),
            )
        part.replace(index)


def _key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """16 bytes that stand for the tokens of a prompt and a response."""
    digest = blake2b(digest_size=16)
    digest.update(np.asarray(prompt, dtype=np.int64).tobytes())
    digest.update(b"|")
    digest.update(np.asarray(response, dtype=np.int64).tobytes())
    return digest.digest()


def _plain(name: str) -> str:
    """The name of a weight without what an adapter's wrapper puts into it."""
    return name.replace(".base_layer", "")
