"""Texts as vectors: the mean of an encoder's last hidden states, its leading directions, length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from prefloop.policies.loading import load_tokenizer, load_weights


@dataclass(frozen=True, eq=False)
class Encoder:
    """A text encoder of `transformers`: the mean of the last hidden states over tokens.

    Attributes:
        model: in eval mode.
        tokenizer: its tokenizer; texts past the model's context are cut there.
        rows: texts of one forward pass.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: int = 64

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "A D"]:
        """One vector a text, of length 1."""
        limit = self.model.config.get_text_config().to_dict().get("max_position_embeddings")
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        parts = []
        for start in range(0, len(order), self.rows):
            some = [texts[index] for index in order[start : start + self.rows]]
            read = self.tokenizer(
                some, padding=True, truncation=limit is not None, max_length=limit,
                return_tensors="pt",
            ).to(self.model.device)  # fmt: skip
            states = self.model(
                input_ids=read["input_ids"], attention_mask=read["attention_mask"]
            ).last_hidden_state.float()
            mask = read["attention_mask"].unsqueeze(-1)
            parts.append(((states * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu())
        table = torch.empty(len(texts), parts[0].shape[-1])
        table[torch.tensor(order)] = torch.cat(parts)
        return torch.nn.functional.normalize(table, dim=-1)


def load_encoder(name: str | Path) -> Encoder:
    """Any encoder of `transformers`, from a folder or the hub, from safetensors only."""
    model = load_weights(AutoModel, name, torch.float32)
    return Encoder(model.eval(), load_tokenizer(name))


def answer_features(
    encode: Callable[[Sequence[str]], Tensor] | None, directions: int
) -> Callable[[Sequence[str]], Tensor]:
    """Features of answers: leading directions of their vectors, and the log of their length.

    Each feature has mean 0 and spread 1 over the answers. The last one is log(1 + words).

    Args:
        encode: texts -> (A, D), an `Encoder` for one; None leaves the length alone.
        directions: how many principal directions are kept, at most as many as there are.
    """

    def features(texts: Sequence[str]) -> Tensor:
        words = torch.tensor([float(len(text.split())) for text in texts]).log1p().unsqueeze(-1)
        table = words
        if encode is not None:
            vectors = encode(texts)
            centred = vectors - vectors.mean(0)
            _, _, leading = torch.linalg.svd(centred, full_matrices=False)
            table = torch.cat([centred @ leading[:directions].mT, words], -1)
        spread = table.std(0, unbiased=False)
        return (table - table.mean(0)) / torch.where(spread > 0, spread, 1.0)

    return features
