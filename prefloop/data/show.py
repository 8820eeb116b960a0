"""The tokens of a row as a person can read them: what is prompt, what is scored."""

from collections.abc import Sequence

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from prefloop.data.tokens import where
from prefloop.types import Tokenized

PROMPT = ("black on bright_blue", "black on bright_cyan")
RESPONSE = ("black on bright_green", "black on bright_yellow")
"""Two colours each, in turn, so that one sees where a token ends."""


def show_tokens(row: Tokenized, tokenizer: PreTrainedTokenizerBase, colours: bool) -> Text:
    """Every token of a row: prompt (mask 0), then each response (mask 1, what a loss sees).

    Characters that do not print are escaped, newlines included, so nothing in the data can move
    the cursor.

    Args:
        row: one row in tokens.
        tokenizer: the one it was tokenised with.
        colours: tell tokens apart by colour; otherwise each stands in [brackets].
    """
    lengths = " + ".join(str(len(response)) for response in row.responses)
    found = Text(f"{escaped(where(row))}: {len(row.prompt)} tokens of prompt, {lengths} of ")
    found.append("responses\n")
    found.append("prompt, mask 0, read but not scored\n  ")
    found.append_text(_line(row.prompt, tokenizer, PROMPT if colours else None))
    for number, response in enumerate(row.responses):
        judged = _judgement(row, number)
        found.append(f"\nresponse {number + 1}{judged}, mask 1, scored\n  ")
        found.append_text(_line(response, tokenizer, RESPONSE if colours else None))
    return found


def escaped(text: str) -> str:
    """`text` with what does not print written as an escape: \\n, \\x1b, \\u202e."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def token_text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """One token as text, escaped; the mark that SentencePiece puts for a space is a space."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if "\u2581" in piece:  # decoding a single token would lose its space
        return escaped(piece.replace("\u2581", " "))
    return escaped(str(tokenizer.decode([token], clean_up_tokenization_spaces=False)))


def _line(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, styles: Sequence[str] | None
) -> Text:
    line = Text()
    for at, token in enumerate(ids):
        text = token_text(token, tokenizer)
        if styles is None:
            line.append(f"[{text}]")
        else:
            line.append(text, style=styles[at % len(styles)])
    return line


def _judgement(row: Tokenized, number: int) -> str:
    facts = []
    if row.rank is not None:
        facts.append(f"rank {row.rank[number]}" if row.rank[number] else "not judged")
    if row.scores is not None:
        facts.append(f"score {row.scores[number]:g}")
    if row.label is not None:
        facts.append("good" if row.label[number] else "bad")
    return f" ({', '.join(facts)})" if facts else ""
