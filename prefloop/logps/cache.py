"""Log-probabilities of a model that does not change, kept on disk: the reference is scored once.

A folder a model, named by a hash of its weights. In it shards: safetensors files that are written
whole or not at all and never changed. An entry is one response; its key is a hash of (prompt
tokens, response tokens), so that any batch of any run finds what it needs, and what another process
or a killed run has scored stays.
"""

import json
import os
import re
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

import torch
from accelerate import PartialState
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prefloop.logps.layout import TOKENS, buckets, response_mask, table_shape
from prefloop.logps.ways import causal_model
from prefloop.types import Logps, Tokenized, UserError, score

SECONDS_A_SHARD = 20.0  # between two writes: what a kill can cost
KEY_BYTES = 16
NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "transformers_version", "use_cache")


def cached_reference(
    scorer: nn.Module,
    rows: Sequence[Tokenized],
    path: Path,
    identity: str,
    token_budget: int = TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "CachedLogps":
    """What `scorer` says of `rows`, from `path`; only what is not there yet is scored.

    Batches are packed over the whole of `rows`. Under several processes each scores its share, and
    all find everything afterwards, even if they do not share a disk.

    Args:
        scorer: of the model that `identity` names; not needed any more afterwards.
        rows: everything that will be asked for.
        path: the folder that holds the caches of all models.
        token_budget: tokens of one forward pass.
        progress: called with (comparisons done, comparisons to do) on this process.
    """
    state = PartialState()
    cache = CachedLogps(Path(path) / identity)
    for share in (slice(state.process_index, None, state.num_processes), slice(None)):
        missing = cache.missing(rows)[share]
        for done in cache.add(scorer, missing, token_budget):
            progress(done, len(missing))
        state.wait_for_everyone()
        cache.reload()
    return cache


@dataclass
class CachedLogps:
    """Log-probabilities by content, for any batch: a reference that needs no model.

    Attributes:
        folder: of one model; made when the first shard is written.

    Raises:
        UserError: a shard that cannot be read.
    """

    folder: Path
    _places: dict[bytes, tuple[Path, int, int]] = field(default_factory=dict)
    _shards: dict[Path, Float[Tensor, " M"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reload()

    def __call__(self, batch: Sequence[Tokenized]) -> Logps:
        """`Logps` (B, N, T) of the batch.

        Raises:
            KeyError: a response that was never scored; `cached_reference` was not given it.
        """
        token = torch.zeros(table_shape(batch))
        for index, row in enumerate(batch):
            for place, response in enumerate(row.responses):
                shard, start, end = self._places[_key(row.prompt, response)]
                token[index, place, : end - start] = self._shards[shard][start:end]
        return Logps(token, response_mask(batch))

    def __len__(self) -> int:
        return len(self._places)

    def missing(self, rows: Sequence[Tokenized]) -> list[Tokenized]:
        """The rows with just those responses that are not there yet, each once."""
        seen = set(self._places)
        found = []
        for row in rows:
            keyed = {_key(row.prompt, response): response for response in row.responses}
            wanted = tuple(response for key, response in keyed.items() if key not in seen)
            seen.update(keyed)
            if wanted:
                found.append(replace(row, responses=wanted, rank=None, scores=None, label=None))
        return found

    def add(self, scorer: nn.Module, rows: Sequence[Tokenized], token_budget: int) -> Iterator[int]:
        """Score `rows`, write a shard every few seconds; yields how many rows are scored."""
        fresh: dict[bytes, Float[Tensor, " T"]] = {}
        written, done = time.monotonic(), 0
        try:
            for part in buckets(rows, token_budget):
                batch = [rows[index] for index in part]
                with torch.no_grad():
                    token = score(scorer, batch).token.float().cpu()
                for index, row in enumerate(batch):
                    for place, response in enumerate(row.responses):
                        fresh[_key(row.prompt, response)] = token[index, place, : len(response)]
                if time.monotonic() - written > SECONDS_A_SHARD:
                    self._write(fresh)
                    fresh, written = {}, time.monotonic()
                done += len(part)
                yield done
        finally:  # Ctrl-C comes here too
            self._write(fresh)

    def reload(self) -> None:
        """Take in the shards written since the last look, by this process or another."""
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard not in self._shards:
                self._read(shard)

    def _read(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as file:
                keys, ends, token = (file.get_tensor(name) for name in ("key", "end", "token"))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{shard}: not a readable shard of the reference's log-probabilities ({error}); "
                "delete this file, and what it held is scored again."
            ) from None
        flat, borders = keys.numpy().tobytes(), [0, *ends.tolist()]
        for index, end in enumerate(borders[1:]):
            key = flat[index * KEY_BYTES : (index + 1) * KEY_BYTES]
            self._places[key] = (shard, borders[index], end)
        self._shards[shard] = token  # mapped, not read

    def _write(self, entries: dict[bytes, Float[Tensor, " T"]]) -> None:
        if not entries:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        shard = self.folder / f"{uuid.uuid4().hex}.safetensors"
        part = shard.with_suffix(".part")
        tensors = {
            "key": torch.frombuffer(bytearray(b"".join(entries)), dtype=torch.uint8),
            "end": torch.tensor(list(accumulate(len(token) for token in entries.values()))),
            "token": torch.cat(list(entries.values())),
        }
        save_file(tensors, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(shard)
        self._read(shard)


def _key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """What stands for the tokens of a prompt and a response."""
    text = array("q", [len(prompt), *prompt, *response]).tobytes()
    return blake2b(text, digest_size=KEY_BYTES).digest()


def model_identity(model: nn.Module) -> str:
    """A hash of a causal model's configuration, of every byte of its weights and, under autocast,
    of the type that products are computed in.

    Adapters count only while they are active: with the adapter off, an adapted model has the
    identity of its base. About a second a gigabyte.
    """
    base = causal_model(model)
    digest = blake2b(digest_size=16)
    config = base.config.to_dict()
    known = {name: value for name, value in config.items() if name not in NOT_OF_THE_MODEL}
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    for name, value in sorted(_weights_in_use(base).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(flat.numpy()))  # pyright: ignore[reportArgumentType] - a buffer
    if torch.is_autocast_enabled(base.device.type):
        digest.update(f"autocast {torch.get_autocast_dtype(base.device.type)}".encode())
    return digest.hexdigest()


def _weights_in_use(base: nn.Module) -> dict[str, Tensor]:
    """Weights under the names they have without adapters; of adapters, the active ones."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # seconds to import
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapters: dict[str, Sequence[str]] = {}
    for place, module in base.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            active = [] if module.disable_adapters else module.active_adapters
            adapters.update({f"{place}.{part}.": active for part in module.adapter_layer_names})

    def used(name: str) -> bool:
        places = [place for place in adapters if name.startswith(place)]
        return all(name.removeprefix(p).split(".")[0] in adapters[p] for p in places)

    return {
        re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.|$)", "", name): value
        for name, value in base.state_dict().items()
        if used(name)
    }
