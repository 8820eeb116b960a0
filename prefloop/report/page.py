"""Sections -> one HTML page that needs nothing else: no script, no network, light and dark.

Every text is made visible and escaped in one place, whatever the template does with it; and the
page carries a policy that lets a browser run no script and load nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prefloop.report.drawing import describe, draw, legend
from prefloop.report.section import Figure, Interval, Picture, Section
from prefloop.report.words import number, percent, shorten, visible

HEADING = 120
"""Characters of a title or name."""
LONG = 20_000
"""Characters of a text in the page at all."""


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as text; the same sections give the same text."""
    environment = Environment(
        loader=PackageLoader("prefloop.report", ""),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "kind": lambda value: type(value).__name__,
        "is_number": lambda cell: isinstance(cell, int | float) and not isinstance(cell, bool),
        "drawn": _drawn,
        "legend": lambda figure: () if isinstance(figure, Picture) else legend(figure),
        "interval": _interval,
        "position": _position,
        "cut": _cut,
        "shorten": lambda text: shorten(text, HEADING),
    }
    style = environment.get_template("style.css").render()
    return environment.get_template("page.html.jinja").render(
        title=title, subtitle=subtitle, sections=sections, style=Markup(style)
    )


def _finalize(value: Any) -> Any:
    """What a reader sees of a value: numbers short, nothing hidden, a dash for nothing."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    return visible(str(value))


def _drawn(figure: Figure, identity: str) -> Markup:
    assert not isinstance(figure, Picture)
    return Markup(draw(figure, identity, describe(figure)))


def _interval(estimate: Interval) -> dict[str, Any]:
    """Value and bounds as text, and whether they make a bar."""
    show = percent if estimate.unit == "share" else number
    known = math.isfinite(estimate.low) and math.isfinite(estimate.high)
    unit = "" if estimate.unit == "share" else estimate.unit
    return {
        "value": show(estimate.value),
        "bounds": f"[{show(estimate.low)}, {show(estimate.high)}]" if known else "",
        "unit": unit,
        "bar": known and estimate.unit == "share" and math.isfinite(estimate.value),
    }


def _position(share: float) -> Markup:
    """A share as a CSS length along a bar."""
    return Markup(f"{100 * min(1.0, max(0.0, share)):.2f}%")


def _cut(text: str, room: int) -> tuple[str, str, int]:
    """(what is shown at once, what unfolds, how many characters are left out of the page)."""
    if len(text) <= room + room // 10:  # a few characters more are not worth a click
        return text, "", 0
    space = text.rfind(" ", room // 2, room)
    head = room if space < 0 else space
    return text[:head], text[head:LONG], max(0, len(text) - LONG)
