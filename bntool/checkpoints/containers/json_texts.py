"""JSON as its standard has it, where a file that cannot be trusted holds some."""

from __future__ import annotations

import json
import re
from typing import Any

from bntool.errors import CorruptFileError

_HALF_ESCAPED = r"\\u[dD][89a-fA-F]"  # perhaps without the other half, which makes it no text


def read_json(data: bytes | str, *, what: str, allow_nan: bool = False) -> Any:
    """Parse a JSON text of a file.

    Args:
        what: names the text in the error.
        allow_nan: as Python writes it, with Infinity and NaN.

    Raises:
        CorruptFileError: it is no JSON, or names a key twice.
    """
    try:
        return parse_json(data, allow_nan=allow_nan)
    except ValueError as error:
        raise CorruptFileError(f"{what} is not valid JSON: {error}") from error


def parse_json(data: bytes | str, *, allow_nan: bool = False) -> Any:
    """Parse JSON as the standard has it: no key twice, and no NaN unless that is allowed.

    Args:
        data: the text.
        allow_nan: as Python writes it, with Infinity and NaN.

    Raises:
        ValueError: it is not; the message says why in words for people.
    """
    try:
        if isinstance(data, str):
            text = data
            text.encode()
        else:
            text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=None if allow_nan else _reject_constant)
        if re.search(_HALF_ESCAPED, text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8") from error
    except UnicodeEncodeError as error:
        raise ValueError("a string holds half of a surrogate pair, which is no text") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _reject_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
