"""Numbers and text as a reader should see them."""

import math

ELLIPSIS = "\u2026"
HIDDEN = {
    *range(0x202A, 0x202F),
    *range(0x2060, 0x206A),
    *range(0xE0000, 0xE0080),
    *(0x061C, 0x200B, 0x200E, 0x200F, 0xFEFF),
}
"""Characters that reorder text without being seen, or that are not seen at all; the joiners stay,
which scripts and pictures need."""


def number(value: int | float, digits: int = 4) -> str:
    """A number in `digits` significant digits, as short as it goes; NaN and infinities by name."""
    if isinstance(value, int) or (
        math.isfinite(value) and value == int(value) and abs(value) < 1e15
    ):
        whole = int(value)
        return f"{whole:,}".replace(",", "\u202f").replace("-", "\u2212")
    if not math.isfinite(value):
        return str(value).replace("-", "\u2212").replace("nan", "NaN").replace("inf", "\u221e")
    return f"{value:.{digits}g}".replace("-", "\u2212")


def percent(share: float) -> str:
    """A share in [0, 1] as a percentage with one decimal."""
    return "NaN" if math.isnan(share) else f"{100 * share:.1f}\u202f%"


def shorten(text: str, length: int) -> str:
    """`text` on one line, at most `length` characters of it."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + ELLIPSIS


def visible(text: str) -> str:
    """`text` with nothing hidden: control characters as pictures, direction marks as codes.

    Tabs and line ends stay. Half of a surrogate pair, which no file can hold, is replaced.
    """
    return "".join(_seen(character) for character in text)


def _seen(character: str) -> str:
    code = ord(character)
    if code < 0x20 and character not in "\n\t":
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0x80 <= code < 0xA0 or code in HIDDEN:
        return f"[U+{code:04X}]"
    if 0xD800 <= code < 0xE000 or code in (0xFFFE, 0xFFFF):
        return "\ufffd"
    return character
