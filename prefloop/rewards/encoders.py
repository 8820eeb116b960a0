"""Texts to vectors by a frozen sentence encoder, each text once: vectors stay on disk."""

import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import torch
from accelerate import PartialState
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from prefloop.errors import UserError
from prefloop.logps import model_identity
from prefloop.minilm import minilm_folder
from prefloop.policies.loading import load_tokenizer, load_weights
from prefloop.runs import cache_folder, read_json

MINILM = "minilm"
"""The name that stands for the encoder of `prefloop.minilm`."""
ROWS = 32  # texts of one forward pass
KEY_BYTES = 16
SHARD = 4096  # texts between two writes: what a kill can cost


@dataclass(frozen=True, eq=False)
class SentenceEncoder:
    """A text as the mean of its last hidden states, scaled to length 1.

    That is the pooling of the sentence-transformers family. What is longer than `max_tokens` is cut
    there, as that family does; `cut` counts such texts.

    Attributes:
        model: any encoder of `transformers`, frozen, in eval mode.
        tokenizer: its tokenizer.
        name: its folder or hub name, or "minilm".
        identity: a hash of its weights; the cache is filed under it.
        max_tokens: most tokens of a text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    identity: str
    max_tokens: int

    @property
    def width(self) -> int:
        """Numbers a text."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "M D"]:
        """One unit vector a text, float32, on the CPU."""
        read = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        given = {name: rows.to(self.model.device) for name, rows in read.items()}
        states = self.model(**given).last_hidden_state.float()
        mask = given["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu()

    def cut(self, texts: Sequence[str]) -> int:
        """How many of `texts` are longer than `max_tokens`."""
        if not texts:
            return 0
        read = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return sum(len(ids) > self.max_tokens for ids in read)


def load_encoder(
    name: str | Path = MINILM, device: torch.device | str | None = None
) -> SentenceEncoder:
    """The sentence encoder by that name: "minilm", a folder, or a name on the hub.

    Raises:
        UserError: no such model, pickled weights, or a pooling other than the mean.
    """
    folder = minilm_folder() if str(name) == MINILM else name
    _refuse_other_pooling(Path(folder))
    model = load_weights(AutoModel, folder, torch.float32).eval().requires_grad_(False)
    device = PartialState().device if device is None else torch.device(device)
    model.to(device)  # pyright: ignore[reportArgumentType] - overloads of .to
    tokenizer = load_tokenizer(folder)
    longest = _max_tokens(Path(folder), model)
    identity = f"{model_identity(model)}-{longest}"
    told = MINILM if str(name) == MINILM else _absolute(name)
    return SentenceEncoder(model, tokenizer, told, identity, longest)


def embed(
    encoder: SentenceEncoder,
    texts: Sequence[str],
    on_texts: Callable[[int, int], None] = lambda done, total: None,
) -> Float[Tensor, "M D"]:
    """The vectors of `texts`, from the cache or made and put there."""
    cache = Vectors(cache_folder() / "embeddings" / encoder.identity)
    missing = sorted({text for text in texts if text not in cache}, key=lambda text: -len(text))
    for start in range(0, len(missing), SHARD):
        shard = missing[start : start + SHARD]
        vectors = torch.zeros(len(shard), encoder.width)
        for row in range(0, len(shard), ROWS):
            vectors[row : row + ROWS] = encoder(shard[row : row + ROWS])
            on_texts(min(start + row + ROWS, len(missing)), len(missing))
        cache.add(shard, vectors)
    return cache(texts)


@dataclass
class Vectors:
    """Vectors of texts in shards of a folder; a shard is written whole or not at all.

    Raises:
        UserError: a shard that cannot be read.
    """

    folder: Path
    _places: dict[bytes, Float[Tensor, " D"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for shard in sorted(self.folder.glob("*.safetensors")):
            self._read(shard)

    def __contains__(self, text: str) -> bool:
        return _key(text) in self._places

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "M D"]:
        """The vectors of `texts`, all of which must be there."""
        return torch.stack([self._places[_key(text)] for text in texts])

    def add(self, texts: Sequence[str], vectors: Float[Tensor, "M D"]) -> None:
        """Keep the vectors of `texts` as a new shard."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shard = self.folder / f"{uuid.uuid4().hex}.safetensors"
        part = shard.with_suffix(".part")
        keys = b"".join(map(_key, texts))
        save_file(
            {"key": torch.frombuffer(bytearray(keys), dtype=torch.uint8), "vector": vectors}, part
        )
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(shard)
        self._read(shard)

    def _read(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as file:
                keys, vectors = file.get_tensor("key"), file.get_tensor("vector")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{shard}: not a readable shard of embeddings ({error}); delete this file, and "
                "what it held is made again"
            ) from None
        flat = keys.numpy().tobytes()
        for row in range(len(vectors)):
            self._places[flat[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = vectors[row]


def _key(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=KEY_BYTES).digest()


def _max_tokens(folder: Path, model: PreTrainedModel) -> int:
    """What the model was used with, where its folder says so; else its context."""
    told = folder / "sentence_bert_config.json"
    if told.is_file() and isinstance(length := read_json(told).get("max_seq_length"), int):
        return length
    return int(model.config.to_dict().get("max_position_embeddings") or 512)


def _refuse_other_pooling(folder: Path) -> None:
    told = folder / "1_Pooling" / "config.json"
    if told.is_file() and not read_json(told).get("pooling_mode_mean_tokens"):
        raise UserError(
            f"{told}: this encoder pools its states in another way than by their mean, which is "
            "the one way supported; take another encoder"
        )


def _absolute(name: str | Path) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)
