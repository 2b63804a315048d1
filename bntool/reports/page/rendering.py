"""Pages drawn as HTML: one file that needs nothing else, or a part for a notebook."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from itertools import count
from typing import TYPE_CHECKING, Any

from bntool.reports.page.document import Column, Page
from bntool.reports.page.strips import Kind
from bntool.reports.text import MAX_SENTENCE, sanitize
from bntool.representation import format_number
from bntool.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

_LONGEST_SUBJECT = 600  # characters of a path
_NOTEBOOK_ROWS = 40  # of a table; a notebook is no place to scroll in
_numbers = count(1)


def render_page(page: Page) -> str:
    """Render a whole document, whose only script and style are its own: its Content Security Policy allows no other."""
    environment = _make_environment()
    style, script = _read("page.css"), _read("page.js")
    return environment.get_template("page.html").render(
        page=page,
        style=_as_is(style),
        script=_as_is(script),
        policy=(
            f"default-src 'none'; img-src data:; style-src 'sha256-{_hash(style)}'; "
            f"script-src 'sha256-{_hash(script)}'; base-uri 'none'; form-action 'none'"
        ),
        version=__version__,
    )


def render_part(page: Page) -> str:
    """Render a page for a cell of a notebook: without a script, with names of its own, and of long tables what is
    wrong.
    """
    return (
        _make_environment()
        .get_template("notebook.html")
        .render(page=page, style=_as_is(_read("parts.css")), prefix=f"bntool{next(_numbers)}-", most=_NOTEBOOK_ROWS)
    )


@cache
def _make_environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bntool.reports.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        harmless=lambda text: sanitize(text, limit=MAX_SENTENCE),
        name=sanitize,
        subject=lambda text: sanitize(text, limit=_LONGEST_SUBJECT),
        verbatim=lambda text: sanitize(text, limit=None),
        number=_format_sortable,
        ends=_describe_ends,
        place_names=_name_places,
        data_url=lambda data: "data:image/png;base64," + b64encode(data).decode(),
    )
    return environment


def _read(name: str) -> str:
    environment = _make_environment()
    assert environment.loader is not None
    text, _, _ = environment.loader.get_source(environment, name)
    if name == "page.css":
        text = f"{_read('parts.css')}\n{text}"
    return text.strip()


def _as_is(text: str) -> Any:
    """Mark a text of this package as one that is not escaped."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704


def _hash(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()


def _format_sortable(value: float) -> str:
    """Format a number as JavaScript reads it."""
    if math.isnan(value):
        return "-1e999"
    return f"{value:.5g}" if math.isfinite(value) else f"{'-' * (value < 0)}1e999"


def _name_places(places: str | Sequence[str]) -> str:
    """Name what pixels stand for, a line for each name; of a text alone, what one is called."""
    return sanitize(places) if isinstance(places, str) else "\n".join(map(sanitize, places))


def _describe_ends(column: Column) -> tuple[str, str, str]:
    """Return the numbers at the low end, in the middle and at the high end of the scale of a column."""
    assert column.scale is not None
    low, high = column.scale.low, column.scale.high
    numbers = [math.pow(10, value) for value in (low, (low + high) / 2, high)]
    if column.scale.kind is Kind.CHANGE:
        least, _, most = numbers
        return f"÷ {format_number(1 / least, 2)}", "unchanged", f"× {format_number(most, 2)}"
    first, middle, last = (format_number(number, 2) for number in numbers)
    return first, middle, last
