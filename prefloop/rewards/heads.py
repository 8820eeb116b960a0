"""Reward heads on a frozen sentence encoder: what a head reads, and what it makes of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.errors import UserError
from prefloop.rewards.encoders import SentenceEncoder, embed
from prefloop.rewards.scoring import Prompt

Vectors: TypeAlias = Float[Tensor, "U D"]
Feature: TypeAlias = Callable[[Vectors, Vectors, Float[Tensor, " U"]], Float[Tensor, "U F"]]

FEATURES: Mapping[str, Feature] = {
    "response": lambda prompt, response, words: response,
    "product": lambda prompt, response, words: prompt * response,
    "distance": lambda prompt, response, words: (prompt - response).abs(),
    "length": lambda prompt, response, words: words.log1p().unsqueeze(-1),
}
"""What a head may read, of the vectors of prompt and response and the response's words."""


def refuse_unknown_features(names: Sequence[str]) -> None:
    """Refuse a feature that does not exist, or none at all."""
    unknown = [name for name in names if name not in FEATURES]
    if unknown or not names:
        raise UserError(
            f"features holds {', '.join(unknown) or 'nothing'}; a head reads one or more of "
            f"{', '.join(FEATURES)}"
        )


def read_features(
    encoder: SentenceEncoder,
    names: Sequence[str],
    texts: Sequence[tuple[str, str]],
    on_texts: Callable[[int, int], None] = lambda done, total: None,
) -> Float[Tensor, "U F"]:
    """The features of each (prompt, response), float64."""
    flat = [prompt for prompt, _ in texts] + [response for _, response in texts]
    vectors = embed(encoder, flat, on_texts).double()
    prompt, response = vectors[: len(texts)], vectors[len(texts) :]
    words = torch.tensor([float(num_words(text)) for _, text in texts], dtype=torch.float64)
    return torch.cat([FEATURES[name](prompt, response, words) for name in names], dim=-1)


def widths(encoder: SentenceEncoder, names: Sequence[str]) -> tuple[int, ...]:
    """Numbers of each feature."""
    return tuple(1 if name == "length" else encoder.width for name in names)


def prompt_text(prompt: Prompt) -> str:
    """The prompt as one text; of a chat, its messages one below the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt)


def num_words(text: str) -> int:
    """Words of a text, by white space."""
    return len(text.split())


@dataclass(frozen=True, eq=False)
class Head:
    """A reward as a function of features x, float64.

        linear:            r = output . z                         z = (x - shift) / scale
        one hidden layer:  r = output . tanh(hidden z + bias)

    Attributes:
        shift, scale: what makes the features alike, see `reward_training.encoder`.
        output: weights of the last layer.
        hidden, bias: of the hidden layer, or None.
    """

    shift: Float[Tensor, " F"]
    scale: Float[Tensor, " F"]
    output: Float[Tensor, " H"]
    hidden: Float[Tensor, "H F"] | None = None
    bias: Float[Tensor, " H"] | None = None

    def __call__(self, features: Float[Tensor, "U F"]) -> Float[Tensor, " U"]:
        """The reward of each row of features."""
        scaled = (features - self.shift) / self.scale
        if self.hidden is None or self.bias is None:
            return scaled @ self.output
        return torch.tanh(scaled @ self.hidden.T + self.bias) @ self.output

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps of it."""
        kept = {
            "shift": self.shift,
            "scale": self.scale,
            "output": self.output,
            "hidden": self.hidden,
            "bias": self.bias,
        }
        return {name: value.contiguous() for name, value in kept.items() if value is not None}


@dataclass(frozen=True, eq=False)
class EncoderMembers:
    """K heads on one frozen encoder.

    Attributes:
        encoder: the frozen encoder.
        features: what the heads read, names of `FEATURES`.
        heads: one a member.
    """

    encoder: SentenceEncoder
    features: tuple[str, ...]
    heads: tuple[Head, ...]

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> list[tuple[tuple[float, ...], ...]]:
        """K rewards for each response of each prompt."""
        told = [
            (prompt_text(prompt), text)
            for prompt, texts in zip(prompts, responses, strict=True)
            for text in texts
        ]
        distinct = list(dict.fromkeys(told))
        read = read_features(self.encoder, self.features, distinct)
        table = torch.stack([head(read) for head in self.heads], dim=-1).tolist()
        found = {key: tuple(values) for key, values in zip(distinct, table, strict=True)}
        given = iter(told)
        return [tuple(found[next(given)] for _ in texts) for texts in responses]
