"""The prompt of a row that has none: what its chosen and rejected text begin with in common.

Messages are cut between messages. Plain strings are cut behind the last "Assistant:" turn they
share, else before the first word that differs: never inside a word, and never so that a response
is empty. Cutting at the last shared character instead, as is often done, turns "A: foo" and
"A: fob" into the prompt "A: fo" with the responses "o" and "b".
"""

from collections.abc import Mapping, Sequence
from typing import Any

from prefloop.types import UserError

TURN = "\n\nAssistant:"
"""How Anthropic's HH data, the best known without a prompt column, writes a turn."""


def cut_texts(chosen: str, rejected: str, place: str) -> tuple[str, str, str]:
    """(prompt, chosen response, rejected response) of two texts that begin alike."""
    shared = _num_shared(chosen, rejected)
    turn = chosen.rfind(TURN, 0, shared)
    if turn >= 0:
        cut = turn + len(TURN)
        return chosen[:cut], chosen[cut:], rejected[cut:]
    cut = next((at for at in range(shared, 0, -1) if _may_cut(chosen, rejected, at)), None)
    if cut is None:
        raise UserError(
            f"{place}: there is no prompt column, and chosen ({chosen[:40]!r}) and rejected "
            f"({rejected[:40]!r}) share no whole word at their beginning that could be the prompt. "
            "Add a prompt column, or rename one with --columns prompt=NAME"
        )
    if chosen[cut - 1] == " ":  # the space belongs to the word behind it, as tokenizers have it
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _may_cut(chosen: str, rejected: str, at: int) -> bool:
    """Whether a word begins at `at`, with text before it and behind it on both sides."""
    between_words = chosen[at - 1].isspace()
    return between_words and all(part.strip() for part in (chosen[:at], chosen[at:], rejected[at:]))


def _num_shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def cut_messages(
    chosen: Sequence[Mapping[str, str]], rejected: Sequence[Mapping[str, str]], place: str
) -> tuple[tuple[Mapping[str, str], ...], str, str]:
    """(prompt messages, chosen text, rejected text) of two chats that begin alike."""
    shared = min(_num_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if shared < 1:
        raise UserError(
            f"{place}: there is no prompt column, and chosen and rejected share no message at "
            "their beginning that could be the prompt. Add a prompt column"
        )
    prompt = tuple(chosen[:shared])
    return (
        prompt,
        answer(chosen[shared:], "chosen", place),
        answer(rejected[shared:], "rejected", place),
    )


def answer(messages: Sequence[Mapping[str, str]], name: str, place: str) -> str:
    """The text of the one assistant message that a response must be."""
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        raise UserError(
            f"{place}: {name} must be one assistant message behind the prompt; found messages of "
            f"the roles {roles}. Several turns of response are not supported: move "
            "the shared turns into the prompt"
        )
    return messages[0]["content"]
