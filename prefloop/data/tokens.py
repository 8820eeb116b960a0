"""Texts to tokens. The boundary between prompt and response is fixed here, in token space.

A prompt is rendered and tokenised once; each response is tokenised by itself and the end-of-turn
token is put behind it. So a prompt has the same tokens before each of its responses, and no token
straddles the boundary. This is the only place that adds BOS or EOS.

The text of a response is data: where it spells a special token ("</s>", "<|im_start|>"), it is
tokenised as those characters, never as the token. In prompts special tokens are parsed, since a
chat template writes them and since a plain prompt may be a chat that was rendered before.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice
from typing import TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from prefloop.types import Comparison, Tokenized, UserError

Prompt: TypeAlias = str | tuple[Mapping[str, str], ...]

CHUNK = 256  # comparisons a call of the tokenizer: enough for its threads, little to hold
PROBE = "prefloop"  # a word that no template changes


class Overlong(Enum):
    """What to do with a row whose prompt and longest response pass the limit together."""

    refuse = "refuse"
    """A user error that names the row, the lengths and the limit."""
    drop = "drop"
    """The row is left out and counted."""
    truncate = "truncate"
    """Responses are cut at their end, counted, and get no end-of-turn token: they do not end."""


class Empty(Enum):
    """What to do with a row that has an empty response, or one of nothing but white space."""

    refuse = "refuse"
    """A user error that names the row."""
    drop = "drop"
    """The row is left out and counted."""


@dataclass(frozen=True)
class Report:
    """What `tokenize` did besides tokenising.

    Attributes:
        rows: comparisons that came in.
        dropped: places of the rows that were left out as over-long.
        truncated: places of the rows with a response that was cut.
        empty: places of the rows that were left out for an empty response.
    """

    rows: int
    dropped: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for people: "2,997 rows, 162 with an empty response dropped, ..."."""
        counts = {
            "with an empty response dropped": len(self.empty),
            "over-long dropped": len(self.dropped),
            "truncated": len(self.truncated),
        }
        notes = [f"{count:,} {what}" for what, count in counts.items() if count]
        return ", ".join([f"{self.rows:,} rows", *notes])


@dataclass(frozen=True)
class Encoder:
    """How one tokenizer turns prompts and responses into tokens; made by `encoder`.

    Attributes:
        tokenizer: the Hugging Face tokenizer.
        chat: prompts are rendered with the chat template.
        opening: tokens the tokenizer puts before a plain text, usually BOS or none. A chat
            template writes its own.
        end: the token that ends a response: of the turn in a chat, else EOS.
        adds_space: the tokenizer puts a space before every text by itself (Llama 2 and its kin).
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    opening: tuple[int, ...]
    end: int
    adds_space: bool

    def prompts(self, comparisons: Sequence[Comparison]) -> list[tuple[int, ...]]:
        """Token ids of each comparison's rendered prompt, BOS included where it belongs."""
        texts = [self.render(comparison) for comparison in comparisons]
        distinct = list(dict.fromkeys(texts))
        ids = dict(zip(distinct, _ids(self.tokenizer, distinct, literal=False), strict=True))
        opened = (ids[text] for text in texts)
        if self.chat:
            return list(opened)
        return [row if self._is_opened(row) else self.opening + row for row in opened]

    def responses(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of each response by itself, without the end-of-turn token."""
        if self.adds_space:  # the space of " word" is the one that the tokenizer puts there
            texts = [text.removeprefix(" ") for text in texts]
        return _ids(self.tokenizer, texts, literal=True)

    def render(self, comparison: Comparison) -> str:
        """The prompt as the model reads it, up to where a response begins."""
        prompt = comparison.prompt
        if not self.chat:
            if isinstance(prompt, str):
                return prompt
            raise UserError(
                f"{where(comparison)}: the prompt is chat messages, but no chat template is in "
                "use. Take a model whose tokenizer has one, allow chat, or write the prompt as text"
            )
        if isinstance(prompt, str):
            prompt = ({"role": "user", "content": prompt},)
        try:
            return _render(self.tokenizer, prompt, open_turn=True)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in prompt)
            reason = " ".join(str(error).split())
            raise UserError(
                f"{where(comparison)}: the tokenizer's chat template refuses messages of roles "
                f"{roles!r}: {reason}. Change the messages, or take another model"
            ) from None

    def encode(self, comparisons: Sequence[Comparison]) -> Iterator[Tokenized]:
        """Each comparison in tokens, however long."""
        prompts = self.prompts(comparisons)
        texts = list(dict.fromkeys(text for row in comparisons for text in row.responses))
        responses = dict(zip(texts, self.responses(texts), strict=True))
        for comparison, prompt in zip(comparisons, prompts, strict=True):
            _refuse_no_tokens(comparison, prompt, responses)
            rank = comparison.rank
            yield Tokenized(
                prompt=prompt,
                responses=self.closed(comparison, responses),
                rank=None if rank is None else tuple(place or 0 for place in rank),
                scores=comparison.scores,
                label=comparison.label,
                annotator=comparison.annotator,
                weight=comparison.weight,
                id=comparison.id,
                place=comparison.place,
                ensemble=comparison.ensemble,
            )

    def as_answers(self, comparisons: Sequence[Comparison]) -> list[Tokenized]:
        """Each comparison in tokens, to be scored and not trained on: saying nothing is an answer.

        Prompt, responses, id and place only.
        """
        texts = list(dict.fromkeys(text for row in comparisons for text in row.responses))
        ids = dict(zip(texts, self.responses(texts), strict=True))
        return [
            Tokenized(prompt=prompt, responses=self.closed(row, ids), id=row.id, place=row.place)
            for row, prompt in zip(comparisons, self.prompts(comparisons), strict=True)
        ]

    def closed(
        self, comparison: Comparison, ids: Mapping[str, tuple[int, ...]]
    ) -> tuple[tuple[int, ...], ...]:
        """The token ids of the row's responses, the end token behind those that finished.

        One without any token is its end token, finished or not: a model reads at least one.
        """
        return tuple(
            (*ids[text], self.end) if ended or not ids[text] else ids[text]
            for text, ended in zip(comparison.responses, comparison.ends, strict=True)
        )

    def special_texts(self) -> list[str]:
        """How the special tokens are spelled."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        return [token.content for token in tokens if token.special]

    def _is_opened(self, prompt: tuple[int, ...]) -> bool:
        return prompt[: len(self.opening)] == self.opening


def encoder(tokenizer: PreTrainedTokenizerBase, chat: bool | None = None) -> Encoder:
    """How `tokenizer` is used: with its chat template, or on plain text.

    Args:
        tokenizer: any Hugging Face tokenizer for a causal model.
        chat: use the chat template; a plain prompt then becomes one user message. None: whenever
            the tokenizer has a template.

    Raises:
        UserError: `chat=True` without a template, or no token that could end a response.
    """
    if chat and tokenizer.chat_template is None:
        raise UserError(
            "this tokenizer has no chat template. Take the chat version of the model, or train on "
            "plain text without chat"
        )
    chat = tokenizer.chat_template is not None if chat is None else chat
    end = _end_of_turn(tokenizer) if chat else None
    end = tokenizer.eos_token_id if end is None else end
    if not isinstance(end, int):
        raise UserError(
            "this tokenizer has no token that ends a response: eos_token is not set. Set "
            "tokenizer.eos_token, so that a model can learn where to stop"
        )
    first = str(tokenizer.convert_ids_to_tokens(_ids(tokenizer, ["a"], literal=True)[0][0]))
    return Encoder(tokenizer, chat, _opening(tokenizer), end, first.startswith(("▁", "Ġ")))


def tokenize(
    comparisons: Iterable[Comparison],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    overlong: Overlong = Overlong.refuse,
    chat: bool | None = None,
    empty: Empty = Empty.refuse,
) -> tuple[list[Tokenized], Report]:
    """Comparisons in tokens, and a report of the rows that were dropped or cut.

    Args:
        comparisons: rows with at least one response each.
        tokenizer: of the model that will read the tokens.
        max_length: most tokens of a prompt and its longest response together, the end-of-turn
            token included; usually the model's context. None: no limit.
        overlong: what happens to a row past the limit. A prompt that leaves no room for a single
            response token is refused under `truncate` too.
        chat: as in `encoder`.
        empty: what happens to a row with an empty response.

    Raises:
        UserError: an over-long row (see `overlong`), an empty response (see `empty`), messages
            that the template refuses.
    """
    if max_length is not None and max_length < 2:
        raise UserError(
            f"max_length must be at least 2, one token of prompt and one of response; got "
            f"{max_length}. Usual is the model's context"
        )
    coder = encoder(tokenizer, chat)
    rows: list[Tokenized] = []
    dropped: list[str] = []
    truncated: list[str] = []
    silent: list[str] = []
    count = 0
    for chunk in chunks(comparisons):
        count += len(chunk)
        if empty is Empty.drop:
            silent += [where(row) for row in chunk if has_empty(row)]
            chunk = [row for row in chunk if not has_empty(row)]
        for whole in coder.encode(chunk):
            row = fit(whole, max_length, overlong)
            if row is None:
                dropped.append(where(whole))
                continue
            rows.append(row)
            if row is not whole:
                truncated.append(where(row))
    return rows, Report(count, tuple(dropped), tuple(truncated), tuple(silent))


def fit(row: Tokenized, max_length: int | None, overlong: Overlong) -> Tokenized | None:
    """`row` where prompt and longest response fit `max_length` together; else what `overlong` says.

    The row itself if it fits, None if it is dropped, a new row if it is truncated.
    """
    longest = max(map(len, row.responses))
    if max_length is None or len(row.prompt) + longest <= max_length:
        return row
    if overlong is Overlong.drop:
        return None
    room = max_length - len(row.prompt)
    if room < 1:
        raise UserError(
            f"{where(row)}: the prompt alone has {len(row.prompt)} tokens, and the limit for "
            f"prompt and response together is {max_length}. Shorten the prompt, raise the limit "
            "if the model's context allows, or drop over-long rows (--overlong drop)"
        )
    if overlong is Overlong.refuse:
        raise UserError(
            f"{where(row)}: {len(row.prompt)} tokens of prompt and {longest} of the longest "
            f"response pass the limit of {max_length} together. Raise the limit if the model's "
            "context allows, or choose to drop or to truncate over-long rows (--overlong)"
        )
    return replace(row, responses=tuple(response[:room] for response in row.responses))


def empty_response(comparison: Comparison, number: int) -> UserError:
    """The error of a row whose response `number`, counted from 1, has no text or no token."""
    return UserError(
        f"{where(comparison)}: response {number} is empty "
        f"({comparison.responses[number - 1][:40]!r}); a response must hold text. Mend the row, or "
        "choose to drop rows with empty responses (--empty drop)"
    )


def has_empty(comparison: Comparison) -> bool:
    """Whether a response holds no text, or nothing but white space."""
    return not all(map(str.strip, comparison.responses))


def chunks(comparisons: Iterable[Comparison]) -> Iterator[list[Comparison]]:
    """Comparisons in lists of a size that suits a tokenizer."""
    rows = iter(comparisons)
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def where(row: Comparison | Tokenized) -> str:
    """The place of a row for a message: its file and line, or its id where it was never read."""
    return row.place or f"comparison {row.id!r}"


def _refuse_no_tokens(
    comparison: Comparison, prompt: tuple[int, ...], responses: Mapping[str, tuple[int, ...]]
) -> None:
    if not comparison.responses:
        raise UserError(
            f"{where(comparison)}: the row has no responses; every row needs one to be tokenised. "
            "Sample some first"
        )
    if not prompt:
        raise UserError(
            f"{where(comparison)}: the prompt has no token, and a response needs one before it. "
            "Mend the prompt, or drop the row"
        )
    for number, text in enumerate(comparison.responses, 1):
        if not text.strip() or not responses[text]:
            raise empty_response(comparison, number)


def _ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], literal: bool
) -> list[tuple[int, ...]]:
    if not texts:
        return []
    batch = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=literal,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [tuple(ids) for ids in batch["input_ids"]]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], open_turn: bool
) -> str:
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=False, add_generation_prompt=open_turn
    )
    assert isinstance(text, str)
    return text


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token that the template writes behind an assistant's answer, or None.

    Not always EOS: Gemma ends a turn with <end_of_turn>, and its EOS is <eos>.
    """
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        text = _render(tokenizer, messages, open_turn=False)
    except TemplateError as error:
        raise UserError(
            f"the tokenizer's chat template cannot render a question and its answer: {error}. "
            "Mend the template, or train on plain text without chat"
        ) from None
    behind = text.rpartition(PROBE)[2]
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = _ids(tokenizer, [behind], literal=False)[0] if behind else ()
    return next((id for id in ids if id in special), None)


def _opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before a text by itself."""
    bare = _ids(tokenizer, [PROBE], literal=True)[0]
    dressed = tuple(tokenizer(PROBE)["input_ids"])
    starts = range(len(dressed) - len(bare) + 1)
    start = next((at for at in starts if dressed[at : at + len(bare)] == bare), 0)
    return dressed[:start]
