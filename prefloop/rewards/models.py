"""Rewards that are a model: a reward model, or what a policy was trained to prefer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from jaxtyping import Int
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefloop.data import encoder
from prefloop.errors import UserError
from prefloop.policies import Policy
from prefloop.policies.loading import load_tokenizer, load_weights
from prefloop.rewards.scoring import Prompt
from prefloop.types import Comparison, Logps, Tokenized


class Text(NamedTuple):
    """What a reward model reads: tokens, and which of a pair of sequences each belongs to."""

    ids: list[int]
    types: list[int]


@dataclass(frozen=True, eq=False)
class Classifier:
    """A sequence classifier with one output; the reward is its raw output (a logit).

    What it reads: the chat of prompt and response where its tokenizer has a chat template; else
    the two as a pair of sequences where the tokenizer has a separator (BERT and its kin); else the
    text of the prompt followed by the response.

    Attributes:
        model: the classifier, in eval mode.
        tokenizer: its tokenizer.
        rows: responses of one forward pass; the rewards do not depend on it beyond rounding.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: int = 16

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """The classifier's output for each response."""
        flat = [
            self._tokens(prompt, text)
            for prompt, texts in zip(prompts, responses, strict=True)
            for text in texts
        ]
        values = [0.0] * len(flat)
        order = sorted(range(len(flat)), key=lambda index: len(flat[index].ids))
        for start in range(0, len(order), self.rows):
            batch = order[start : start + self.rows]
            rewards = self._forward([flat[index] for index in batch])
            for index, value in zip(batch, rewards, strict=True):
                values[index] = value
        given = iter(values)
        return [tuple(next(given) for _ in texts) for texts in responses]

    def _tokens(self, prompt: Prompt, response: str) -> Text:
        if self.tokenizer.chat_template is not None:
            opening = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
            messages = [*map(dict, opening), {"role": "assistant", "content": response}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            read = self.tokenizer(str(text), add_special_tokens=False)
        elif not isinstance(prompt, str):
            raise UserError(
                "the prompt is chat messages, and the reward model's tokenizer has no chat "
                "template. Take a reward model for chats, or write the prompt as text"
            )
        elif self.tokenizer.sep_token_id is not None:
            read = self.tokenizer(prompt, response)
        else:
            read = self.tokenizer(prompt + response)
        ids = read["input_ids"]
        limit = self.model.config.get_text_config().to_dict().get("max_position_embeddings")
        if limit is not None and len(ids) > limit:
            raise UserError(
                f"the reward model reads at most {limit} tokens; response {response[:40]!r} has "
                f"{len(ids)} with its prompt. Shorten it, or take another reward model"
            )
        return Text(list(ids), list(read.get("token_type_ids", [0] * len(ids))))

    def _forward(self, texts: Sequence[Text]) -> list[float]:
        named = self.model.config.pad_token_id
        width = max(len(text.ids) for text in texts)
        # The classifier finds the last token of a row by its padding id. Where it names none, any
        # id that occurs in no row will do; the end token, a usual choice, would be skipped.
        used = {token for text in texts for token in text.ids}
        pad = min(set(range(len(used) + 1)) - used) if named is None else named
        given = {
            "input_ids": _padded([text.ids for text in texts], width, pad),
            "attention_mask": _padded([[1] * len(text.ids) for text in texts], width, 0),
        }
        if "token_type_ids" in signature(self.model.forward).parameters:
            given["token_type_ids"] = _padded([text.types for text in texts], width, 0)
        self.model.config.pad_token_id = pad
        try:
            logits = self.model(**{key: rows.to(self.model.device) for key, rows in given.items()})[
                0
            ]
        finally:
            self.model.config.pad_token_id = named
        return logits.float().squeeze(-1).tolist()


def _padded(rows: Sequence[Sequence[int]], width: int, fill: int) -> Int[Tensor, "R L"]:
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def load_reward_model(
    name: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Classifier:
    """Any sequence classifier of `transformers` with one output, from safetensors.

    Raises:
        UserError: not a model, pickled weights, or a classifier with several classes.
    """
    model = load_weights(AutoModelForSequenceClassification, name, dtype)
    if model.config.num_labels != 1:
        raise UserError(
            f"{name}: a classifier of {model.config.num_labels} classes; a reward model has one "
            "output (num_labels 1)"
        )
    device = PartialState().device if device is None else torch.device(device)
    model.to(device)  # pyright: ignore[reportArgumentType] - overloads of .to
    return Classifier(model.eval(), load_tokenizer(name))


@dataclass(frozen=True, eq=False)
class Implicit:
    """The reward that a policy trained by DPO stands for, up to a constant of the prompt.

        r(x, y) = beta * (log pi_theta(y|x) - log pi_ref(y|x)),   in nats times beta

    Attributes:
        policy: pi_theta.
        beta: strength of the KL constraint it was trained with.
        reference: pi_ref; None takes the policy's own (its base with the adapter off).
        rows: comparisons scored at a time.

    References:
        Rafailov et al. 2023, arXiv:2305.18290, Sec. 5.1.
    """

    policy: Policy
    beta: float = 0.1
    reference: Policy | None = None
    rows: int = field(default=16, kw_only=True)

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """beta times the log-ratio of each response, its end-of-turn token included."""
        return self.of_rows(
            [
                Comparison(prompt=prompt, responses=tuple(texts), id=f"prompt {index + 1}")
                for index, (prompt, texts) in enumerate(zip(prompts, responses, strict=True))
            ]
        )

    def of_rows(self, rows: Sequence[Comparison]) -> list[tuple[float, ...]]:
        """The same, without the end-of-turn token for responses that did not finish."""
        tokenized = list(encoder(self.policy.tokenizer).encode(rows))
        return [row for batch in _chunks(tokenized, self.rows) for row in self._rewards(batch)]

    @torch.no_grad()
    def _rewards(self, batch: Sequence[Tokenized]) -> list[tuple[float, ...]]:
        ratio = self.policy.logps(batch).sum - self._reference_logps(batch).sum
        rewards = (self.beta * ratio).tolist()
        return [
            tuple(values[: len(row.responses)]) for values, row in zip(rewards, batch, strict=True)
        ]

    def _reference_logps(self, batch: Sequence[Tokenized]) -> Logps:
        if self.reference is None:
            return self.policy.reference_logps(batch)
        return self.reference.logps(batch)


def _chunks(rows: Sequence[Tokenized], size: int) -> Iterator[Sequence[Tokenized]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
