"""Caffe's ``.prototxt``: a net in protobuf's text format, edited in place so that comments and layout stay."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bntool.checkpoints.caffe.layers import (
    LARGEST,
    LISTS,
    PARAMETERS,
    UNKNOWN,
    V0_TYPES,
    WHOLE,
    WORDS,
    Layer,
    Number,
)
from bntool.checkpoints.files import SourceFile, quote
from bntool.errors import CorruptFileError, UnsafeFileError

MAX_SIZE = 1 << 24
MAX_DEPTH = 50

_TOKEN = re.compile(
    r"""(?P<space>(?:\s|\#[^\n]*)+)
    |(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<word>[-+]?[A-Za-z0-9_.][-+A-Za-z0-9_./]*)
    |(?P<mark>[][{}<>:;,])""",
    re.VERBOSE,
)
_CLOSING = {"{": "}", "<": ">"}


@dataclass(frozen=True, slots=True)
class TextField:
    """One field: a value as it is written, or a message.

    Attributes:
        start, end: where it lies in the text, without the space around it.
        value: as it is written, without quotes; "" for a message.
        value_start: where the value begins.
        fields: of a message.
        body_end: where the closing brace of a message is.
    """

    name: str
    start: int
    end: int
    value: str = ""
    value_start: int = 0
    fields: tuple[TextField, ...] = ()
    body_end: int | None = None

    def all(self, name: str) -> Iterator[TextField]:
        return (one for one in self.fields if one.name == name)

    def values(self, name: str) -> tuple[str, ...]:
        return tuple(one.value for one in self.all(name))

    def last(self, name: str) -> TextField | None:
        return next((one for one in reversed(self.fields) if one.name == name), None)


@dataclass(frozen=True)
class Prototxt:
    """A net in text.

    Attributes:
        text: of the file.
        layers: those that run when the net is tested, in order; ``source`` of each is its :class:`TextField`.
        training: those that run when it is trained.
    """

    text: str = field(repr=False)
    layers: tuple[Layer, ...]
    training: tuple[Layer, ...]

    def edited(self, edits: Sequence[tuple[int, int, str]]) -> str:
        """Return the text with ranges replaced.

        Args:
            edits: start, end and new text of ranges that do not overlap.
        """
        parts, position = [], 0
        for start, end, new in sorted(edits):
            parts += [self.text[position:start], new]
            position = end
        return "".join([*parts, self.text[position:]])


def read_prototxt(file: SourceFile) -> Prototxt:
    """Read a net.

    Raises:
        CorruptFileError: it is no text format.
        UnsafeFileError: it is larger, or nested deeper, than any net.
    """
    if file.size > MAX_SIZE:
        raise UnsafeFileError(f"the .prototxt has {file.size} bytes, more than is allowed", path=file.path)
    try:
        return parse_prototxt(file.read(0, file.size).decode("utf-8", errors="backslashreplace"))
    except (CorruptFileError, UnsafeFileError) as error:
        raise error.about(file.path) from None


def parse_prototxt(text: str) -> Prototxt:
    """Parse the text of a prototxt; see :func:`read_prototxt`."""
    fields = _Parser(text).parse()
    written = [one for one in fields if one.name in ("layer", "layers") and one.body_end is not None]
    tested, trained = (
        tuple(_as_layer(index, one) for index, one in enumerate(one for one in written if _runs_in(phase, one)))
        for phase in ("TEST", "TRAIN")
    )
    return Prototxt(text, tested, trained)


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str, int]] = []
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                line = text.count("\n", 0, position) + 1
                raise CorruptFileError(
                    f"line {line} is not in protobuf's text format: {text[position : position + 20]!r}"
                )
            if match.lastgroup != "space":
                self._tokens.append((match.lastgroup or "", match.group(), position))
            position = match.end()
        self._text = text
        self._next = 0

    def parse(self) -> tuple[TextField, ...]:
        return tuple(self._fields(None, 0))

    def _peek(self) -> tuple[str, str, int]:
        return self._tokens[self._next] if self._next < len(self._tokens) else ("end", "", len(self._text))

    def _take(self) -> tuple[str, str, int]:
        token = self._peek()
        self._next += 1
        return token

    def _fail(self, token: tuple[str, str, int]) -> CorruptFileError:
        line = self._text.count("\n", 0, token[2]) + 1
        return CorruptFileError(f"line {line}: {quote(token[1])} is not expected here; the file is cut or damaged")

    def _fields(self, closing: str | None, depth: int) -> Iterator[TextField]:
        if depth > MAX_DEPTH:
            raise UnsafeFileError(f"messages are nested deeper than {MAX_DEPTH}")
        while True:
            token = self._take()
            if token[0] == "mark" and token[1] in ",;":
                continue
            if (closing is None and token[0] == "end") or (closing is not None and token[1] == closing):
                return
            if token[0] != "word":
                raise self._fail(token)
            yield from self._field(token, depth)

    def _field(self, name: tuple[str, str, int], depth: int) -> Iterator[TextField]:
        has_colon = self._peek()[1] == ":"
        if has_colon:
            self._take()
        if self._peek()[1] == "[" and has_colon:
            self._take()
            while self._peek()[1] != "]":
                yield self._value(name, depth)
                if self._peek()[1] == ",":
                    self._take()
            self._take()
            return
        if not has_colon and self._peek()[1] not in _CLOSING:
            raise self._fail(self._peek())
        yield self._value(name, depth)

    def _value(self, name: tuple[str, str, int], depth: int) -> TextField:
        token = self._take()
        if token[1] in _CLOSING and token[0] == "mark":
            fields = tuple(self._fields(_CLOSING[token[1]], depth + 1))
            close = self._tokens[self._next - 1][2]
            return TextField(name[1], name[2], close + 1, "", token[2], fields, close)
        if token[0] == "text":
            value, end = token[1][1:-1], token[2] + len(token[1])
            while self._peek()[0] == "text":  # adjacent texts are one
                more = self._take()
                value, end = value + more[1][1:-1], more[2] + len(more[1])
            return TextField(name[1], name[2], end, value, token[2])
        if token[0] != "word":
            raise self._fail(token)
        return TextField(name[1], name[2], token[2] + len(token[1]), token[1], token[2])


def _runs_in(phase: str, layer: TextField) -> bool:
    included = [value for rule in layer.all("include") for value in rule.values("phase")]
    excluded = [value for rule in layer.all("exclude") for value in rule.values("phase")]
    return phase not in excluded and (not included or phase in included)


def _as_layer(index: int, text: TextField) -> Layer:
    parameters: dict[str, Number] = {}
    for name, (_, fields) in PARAMETERS.items():
        for message in text.all(name):
            if name in WHOLE and any(one.name not in fields for one in message.fields):
                parameters[f"{name}.{UNKNOWN}"] = True
            for key in fields:
                values = message.values(key)
                if values and key in WORDS:
                    parameters[f"{name}.{key}"] = _as_word(values[-1], WORDS[key])
                elif values:
                    found = [_as_number(value) for value in values]
                    one = max(found) if key in LARGEST else found[-1]
                    parameters[f"{name}.{key}"] = tuple(found) if key in LISTS else one
    before = text.last("layer")  # of the first version of the format
    name, kind = ("".join((before or text).values(key)[-1:]) for key in ("name", "type"))
    return Layer(
        index=index,
        name=name,
        type=kind if before is None else V0_TYPES.get(kind, f"V0 type {kind}"),
        bottoms=text.values("bottom"),
        tops=text.values("top"),
        parameters=parameters,
        shared=tuple(name for spec in text.all("param") for name in spec.values("name")),
        source=text,
    )


def _as_word(text: str, words: Sequence[str]) -> str:
    """Return the word of an enumeration, also where its number is written."""
    return words[int(text)] if text.isdecimal() and int(text) < len(words) else text


def _as_number(text: str) -> float | bool:
    if text in ("true", "True", "t"):
        return True
    if text in ("false", "False", "f"):
        return False
    try:
        return int(text, 0)
    except ValueError:
        pass
    try:
        return float(text.rstrip("fF"))
    except ValueError as error:
        raise CorruptFileError(f"{quote(text)} is no number") from error
