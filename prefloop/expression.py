"""Objects written as text, the way their own repr writes them: `DPO(beta=0.3)`.

An objective, a sampler or a rule is a frozen dataclass, and its repr is its configuration: the
same text stands on the command line, in config.json and in a Python session. Reading it back runs
no code: a call of a known name with literals, lists and other such calls is all there is.
"""

import ast
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from prefloop.errors import UserError

NUMBERS = (int, float)
KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    float: ("a number", NUMBERS),
    int: ("a whole number", (int,)),
    bool: ("True or False", (bool,)),
    str: ("text in quotes", (str,)),
}
"""Type of a field -> how it is named, and what may stand there."""


def parse(text: str, known: Iterable[type]) -> Any:
    """The object that `text` describes, made of the dataclasses in `known`.

    `DPO` alone means `DPO()`. Names match whatever their case.

    Raises:
        UserError: text that is no such expression, an unknown name or field (with the nearest
            known one), or a value that the object itself refuses.
    """
    classes = {made.__name__: made for made in known}
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise UserError(
            f"cannot read {text!r}: write it as Name or Name(field=value), for example "
            f"{next(iter(classes))}()"
        ) from None
    return _build(tree, {name.lower(): c for name, c in classes.items()}, text)


def _build(node: ast.expr, classes: Mapping[str, type], text: str) -> Any:
    if isinstance(node, ast.Name) and node.id not in {"inf", "nan"}:
        return _make(node.id, [], [], classes, text)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _make(node.func.id, node.args, node.keywords, classes, text)
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(_build(item, classes, text) for item in node.elts)
    if isinstance(node, ast.Name):
        return float(node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UserError(
            f"cannot read {ast.unparse(node)!r} in {text!r}: only names, numbers, strings, lists "
            "and Name(field=value) are allowed"
        ) from None


def _make(
    name: str,
    positional: list[ast.expr],
    keywords: list[ast.keyword],
    classes: Mapping[str, type],
    text: str,
) -> Any:
    made = classes.get(name.lower())
    if made is None:
        names = [c.__name__ for c in classes.values()]
        raise UserError(f"there is no {name!r} in {text!r}; {_nearest(name, names)}")
    allowed = [field.name for field in fields(made) if field.init]
    values: dict[str, Any] = {}
    if positional:
        raise UserError(f"{made.__name__} in {text!r}: name each value, field=value; {allowed}")
    for keyword in keywords:
        if keyword.arg not in allowed:
            near = _nearest(str(keyword.arg), allowed)
            raise UserError(f"{made.__name__} has no field {keyword.arg!r}; {near}")
        values[keyword.arg] = _build(keyword.value, classes, text)
        _refuse_other_kind(made, keyword.arg, values[keyword.arg])
    try:
        return made(**values)
    except TypeError as error:
        raise UserError(f"{text!r}: a value is of the wrong kind: {error}") from None


def _refuse_other_kind(made: type, name: str, value: Any) -> None:
    """Text where a number belongs would be compared with one, a number for a truth value taken."""
    (kind,) = (field.type for field in fields(made) if field.name == name)
    wanted, allowed = KINDS.get(kind, ("anything", (object,)))
    if not isinstance(value, allowed) or (kind in NUMBERS and isinstance(value, bool)):
        raise UserError(f"{made.__name__}.{name} must be {wanted}, got {value!r}")


def _nearest(name: str, allowed: list[str]) -> str:
    lowered = {item.lower(): item for item in allowed}
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    known = ", ".join(allowed) or "no field"
    return f"perhaps you meant {lowered[close[0]]}? Known: {known}" if close else f"known: {known}"
