"""One row of a file -> one `Comparison`: every rule about what a row may hold is here.

An empty response is allowed here: real models say nothing at times, and people judge that too.
Whether it may be trained on is settled where it becomes tokens.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple, TypeAlias

from prefloop.data.columns import NAMES, Columns, missing, renamed
from prefloop.data.implicit import answer, cut_messages, cut_texts
from prefloop.types import Comparison, UserError

Messages: TypeAlias = tuple[Mapping[str, str], ...]


SPOKEN = ("role", "content")  # of a message; other texts in it are for the chat template


class _Form(NamedTuple):
    """What a row says about prompt and responses, whichever columns it uses for that."""

    prompt: str | Messages
    responses: tuple[str, ...]
    rank: tuple[int | None, ...] | None = None
    label: tuple[bool, ...] | None = None
    finished: tuple[bool, ...] | None = None


def comparison(row: Mapping[str, Any], columns: Columns, place: str, made_id: str) -> Comparison:
    """The comparison that a row stands for.

    Args:
        row: column -> value, as JSON, CSV, Parquet or a data set gave it.
        columns: our name -> the file's, see `columns`.
        place: "file:line", for messages.
        made_id: the id of a row that has none.

    Raises:
        UserError: names the place, what is wrong with the value found, and what is allowed.
    """
    row = renamed(row, columns, place) if columns else row
    prompt, responses, rank, label, finished = _form(row, place)
    return Comparison(
        prompt,
        responses,
        rank,
        _scores(row.get("scores"), len(responses), place),
        label,
        extra=_extra(row),
        ensemble=_ensemble(row.get("ensemble"), len(responses), place),
        finished=finished,
        **_about(row, place, made_id),
    )


def prompt_only(row: Mapping[str, Any], columns: Columns, place: str, made_id: str) -> Comparison:
    """The prompt of a row, with no response: a row of any form, or of nothing but a prompt."""
    row = renamed(row, columns, place) if columns else row
    if _has(row, "chosen") or not _has(row, "prompt"):
        prompt = _form(row, place).prompt  # the prompt may be what chosen and rejected share
    else:
        prompt = _prompt(row["prompt"], place)
    return Comparison(prompt, (), extra=_extra(row), **_about(row, place, made_id))


def _about(row: Mapping[str, Any], place: str, made_id: str) -> dict[str, Any]:
    return {
        "annotator": _name(row.get("annotator"), "annotator", place),
        "weight": _weight(row.get("weight"), place),
        "id": _name(row.get("id"), "id", place) or made_id,
        "place": place,
    }


def _extra(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in NAMES}


def _form(row: Mapping[str, Any], place: str) -> _Form:
    forms = [name for name in ("responses", "chosen", "completion") if _has(row, name)]
    if len(forms) > 1:
        raise UserError(
            f"{place}: found {' and '.join(forms)}, which say the responses in different ways; a "
            f"row has one of them. Ignore one with --columns {forms[-1]}="
        )
    if forms == ["responses"]:
        return _list(row, place)
    if forms == ["chosen"] or _has(row, "rejected"):
        return _pair(row, place)
    if forms == ["completion"]:
        return _single(row, place)
    raise missing(row, [name for name in ("prompt", "responses") if not _has(row, name)], place)


def _list(row: Mapping[str, Any], place: str) -> _Form:
    _need(row, ["prompt"], place)
    found = row["responses"]
    if not isinstance(found, list | tuple):
        raise UserError(
            f"{place}: responses is {_shown(found)}; it must be a list of texts. Gather columns "
            "with --columns responses=NAME,NAME"
        )
    responses = tuple(
        _response(value, f"response {index}", place) for index, value in enumerate(found, 1)
    )
    labelled = _has(row, "label")
    if len(responses) < (1 if labelled else 2):
        raise UserError(
            f"{place}: responses has {len(responses)} entries; a comparison needs 2 or more, or 1 "
            "with a label. Add responses, or drop the row"
        )
    label = _booleans(row.get("label"), "label", len(responses), place)
    rank = _ranks(row.get("rank"), len(responses), place)
    finished = _booleans(row.get("finished"), "finished", len(responses), place)
    return _Form(_prompt(row["prompt"], place), responses, rank, label, finished)


def _single(row: Mapping[str, Any], place: str) -> _Form:
    _need(row, ["prompt", "label"], place)
    _refuse_beside(row, ["rank"], "completion", place)
    response = _response(row["completion"], "completion", place)
    label = _booleans([row["label"]], "label", 1, place)
    ended = row.get("finished")
    finished = None if ended is None else _booleans([ended], "finished", 1, place)
    return _Form(_prompt(row["prompt"], place), (response,), label=label, finished=finished)


def _pair(row: Mapping[str, Any], place: str) -> _Form:
    _need(row, ["chosen", "rejected"], place)
    _refuse_beside(row, ["rank", "label"], "chosen and rejected", place)
    prompt = _prompt(row["prompt"], place) if _has(row, "prompt") else None
    if isinstance(row["chosen"], list | tuple) and isinstance(row["rejected"], list | tuple):
        prompt, chosen, rejected = _pair_of_chats(row, prompt, place)
    else:
        chosen, rejected = (_text(row[name], name, place) for name in ("chosen", "rejected"))
        if prompt is None:
            prompt, chosen, rejected = cut_texts(chosen, rejected, place)
    finished = _booleans(row.get("finished"), "finished", 2, place)
    return _Form(prompt, (chosen, rejected), (1, 2), finished=finished)


def _pair_of_chats(
    row: Mapping[str, Any], prompt: str | Messages | None, place: str
) -> tuple[str | Messages, str, str]:
    chosen = _messages(row["chosen"], "chosen", place)
    rejected = _messages(row["rejected"], "rejected", place)
    if prompt is not None and (len(chosen) == 1 or len(rejected) == 1):
        return prompt, answer(chosen, "chosen", place), answer(rejected, "rejected", place)
    shared, *answers = cut_messages(chosen, rejected, place)
    if prompt is not None and prompt not in (shared, shared[-1]["content"]):
        raise UserError(
            f"{place}: chosen and rejected hold the whole chat, and it does not begin with what "
            f"the prompt column says ({_shown(prompt)}). Mend the row, or ignore that column with "
            "--columns prompt="
        )
    return _closed(shared, place), answers[0], answers[1]


def _prompt(value: Any, place: str) -> str | Messages:
    if isinstance(value, list | tuple):
        return _closed(_messages(value, "prompt", place), place)
    prompt = _text(value, "prompt", place)
    if not prompt.strip():
        raise UserError(f"{place}: the prompt is empty; it must hold text. Drop the row")
    return prompt


def _closed(messages: Messages, place: str) -> Messages:
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"{place}: the prompt ends with an assistant message, so there is no turn to answer. "
            "End it with the user's message, and put what the assistant said in the responses"
        )
    return messages


def _messages(value: list[Any] | tuple[Any, ...], name: str, place: str) -> Messages:
    if not value:
        raise UserError(f"{place}: {name} has no message; it needs one or more")
    return tuple(_message(one, f"{name} message {at}", place) for at, one in enumerate(value, 1))


def _message(value: Any, name: str, place: str) -> dict[str, str]:
    if not isinstance(value, Mapping) or not {"role", "content"} <= value.keys():
        raise UserError(
            f"{place}: {name} is {_shown(value)}; a message is an object with role and content"
        )
    more = {
        key: found
        for key, found in value.items()
        if key not in SPOKEN and found is not None and found not in ([], {})
    }
    for key, found in more.items():
        if not isinstance(found, str):
            raise UserError(
                f"{place}: {key} of {name} is {_shown(found)}; of a message only texts are read, "
                "no calls of tools and no pictures. Write it out in the content, or drop the row"
            )
    said = {key: value[key] for key in SPOKEN} | more
    return {key: _text(text, f"{key} of {name}", place) for key, text in said.items()}


def _response(value: Any, name: str, place: str) -> str:
    if isinstance(value, list | tuple):
        return answer(_messages(value, name, place), name, place)
    return _text(value, name, place)


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"{place}: {name} is {_shown(value)}, not text; it must be a string. Mend or drop the "
            "row"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place}: {name} holds half of a surrogate pair ({value[error.start]!r}), which "
                "is no character. Mend or drop the row"
            ) from None
    return value


def _ranks(value: Any, count: int, place: str) -> tuple[int | None, ...] | None:
    if value is None:
        return None
    for rank in _sized(value, "rank", count, place):
        if rank is not None and (type(rank) is not int or rank < 1):
            raise UserError(
                f"{place}: rank holds {_shown(rank)}; a rank is a whole number from 1 (the best), "
                "equal for a tie, or null for a response nobody judged"
            )
    return tuple(value)


def _scores(value: Any, count: int, place: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    return tuple(_number(score, "scores", place) for score in _sized(value, "scores", count, place))


def _ensemble(value: Any, count: int, place: str) -> tuple[tuple[float, ...], ...] | None:
    if value is None:
        return None
    rows = _sized(value, "ensemble", count, place)
    if not all(isinstance(row, list | tuple) and len(row) > 0 for row in rows):
        raise UserError(
            f"{place}: ensemble is {_shown(value)}; it must be a list a response, with one number "
            "a reward model"
        )
    if len(sizes := {len(row) for row in rows}) > 1:
        raise UserError(
            f"{place}: ensemble has {' and '.join(map(str, sorted(sizes)))} numbers for responses "
            "of one row; every reward model scores each of them. Mend or drop the row"
        )
    return tuple(tuple(_number(score, "ensemble", place) for score in row) for row in rows)


def _booleans(value: Any, name: str, count: int, place: str) -> tuple[bool, ...] | None:
    if value is None:
        return None
    for one in _sized(value, name, count, place):
        if not isinstance(one, bool):
            raise UserError(f"{place}: {name} holds {_shown(one)}; it must be true or false")
    return tuple(value)


def _sized(value: Any, name: str, count: int, place: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UserError(
            f"{place}: {name} is {_shown(value)}; it must be a list, one entry a response"
        )
    if len(value) != count:
        raise UserError(
            f"{place}: {name} has {len(value)} entries for {count} responses; it must have one "
            "entry a response. Mend or drop the row"
        )
    return value


def _weight(value: Any, place: str) -> float:
    weight = 1.0 if value is None else _number(value, "weight", place)
    if weight < 0:
        raise UserError(f"{place}: weight is {weight}; it must be 0 or more")
    return weight


def _number(value: Any, name: str, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{place}: {name} holds {_shown(value)}; it must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if not isfinite(number):
        raise UserError(f"{place}: {name} holds {number}; it must be finite. Mend or drop the row")
    return number


def _name(value: Any, name: str, place: str) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise UserError(
            f"{place}: {name} is {_shown(value)}; it must be text or a whole number, or null. "
            f"Ignore the column with --columns {name}="
        )
    return value


def _need(row: Mapping[str, Any], names: list[str], place: str) -> None:
    if lacking := [name for name in names if not _has(row, name)]:
        raise missing(row, lacking, place)


def _refuse_beside(row: Mapping[str, Any], names: list[str], form: str, place: str) -> None:
    for name in names:
        if _has(row, name):
            raise UserError(
                f"{place}: found {name} beside {form}, which judge the responses already. Ignore "
                f"it with --columns {name}=, or write the row as prompt and responses"
            )


def _has(row: Mapping[str, Any], name: str) -> bool:
    return row.get(name) is not None


def _shown(value: Any) -> str:
    """The value found, short and on one line, as JSON names it."""
    names = {True: "the boolean true", False: "the boolean false"}
    if isinstance(value, bool):
        return names[value]
    if value is None:
        return "null"
    kind = "the number " if isinstance(value, int | float) else ""
    shown = repr(value)
    return kind + (shown if len(shown) <= 60 else shown[:57] + "...")
