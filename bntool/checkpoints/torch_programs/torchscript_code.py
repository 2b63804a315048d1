"""Reading what the source text in a TorchScript archive says of a class, as text: nothing of it is compiled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bntool.checkpoints.containers.zips.reading import ZipArchive

MAX_CODE = 1 << 24  # bytes of one file, and of all that is read

_CLASS = re.compile(r"^class (\w+)\(", re.MULTILINE)
_MANGLED = re.compile(r"___torch_mangle_\d+\.")
_NAMES = re.compile(r'"((?:[^"\\]|\\.)*)"')
_CONSTANT = re.compile(r"^  (\w+) : Final\[[^\n]*?\] = ([^\n]{1,200})$", re.MULTILINE)
# torch.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
_BATCH_NORM = re.compile(
    r"torch\.batch_norm\((?:[^(),\n]{1,100}, ){5}(True|False), ([-+.\deE]{1,40}), ([-+.\deE]{1,40}), (?:True|False)\)"
)


@dataclass(frozen=True)
class ClassText:
    """One class of the archive.

    Attributes:
        class_path: dotted name without what TorchScript adds to it.
        parameters, buffers: names of its own, in the order of state_dict().
        attributes: constants of the class; eps and momentum of a traced BatchNorm, which stand in its forward.
    """

    class_path: str
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)


class CodeReader:
    """Finds classes in the files under ``code/`` of an archive, each file read once."""

    def __init__(self, archive: ZipArchive, root: str) -> None:
        self._archive = archive
        self._root = root
        self._files: dict[str, dict[str, str]] = {}
        self._classes: dict[str, ClassText] = {}
        self._left = MAX_CODE

    def find(self, path: str) -> ClassText:
        """Return the class of a dotted name such as ``__torch__.torch.nn.modules.conv.Conv2d``; empty where there is
        none.
        """
        if path not in self._classes:
            module, _, name = path.rpartition(".")
            body = self._read(module).get(name)
            class_path = _MANGLED.sub("", path.removeprefix("__torch__."))
            self._classes[path] = _parse(class_path, body) if body is not None else ClassText(class_path)
        return self._classes[path]

    def _read(self, module: str) -> dict[str, str]:
        """Return the text of each class of a file, by its name."""
        if module not in self._files:
            record = self._archive.records.get(f"{self._root}code/{module.replace('.', '/')}.py")
            text = ""
            if record is not None and record.size <= self._left:
                self._left -= record.size
                text = self._archive.read(record).decode("utf-8", "replace")
            self._files[module] = dict(_split(text))
        return self._files[module]


def _split(text: str) -> Iterator[tuple[str, str]]:
    starts = list(_CLASS.finditer(text))
    for index, match in enumerate(starts):
        end = starts[index + 1].start() if index + 1 < len(starts) else len(text)
        yield match.group(1), text[match.start() : end]


def _parse(class_path: str, body: str) -> ClassText:
    attributes = {}
    for name, literal in _CONSTANT.findall(body):
        value = _parse_literal(literal)
        if value is not None:
            attributes[name] = value
    calls = _BATCH_NORM.findall(body)
    if len(calls) == 1 and "eps" not in attributes:
        momentum, eps = _parse_literal(calls[0][1]), _parse_literal(calls[0][2])
        attributes.update({name: v for name, v in (("momentum", momentum), ("eps", eps)) if v is not None})
    return ClassText(class_path, _listed(body, "__parameters__"), _listed(body, "__buffers__"), attributes)


def _listed(body: str, name: str) -> tuple[str, ...]:
    found = re.search(rf"^  {name} = \[(.*)\]$", body, re.MULTILINE)
    return tuple(dict.fromkeys(_NAMES.findall(found.group(1)))) if found else ()


def _parse_literal(text: str) -> bool | int | float | tuple[int, ...] | str | None:
    """Return a number, a truth value, a plain text, or a tuple of integers; None for anything else."""
    if text in ("True", "False"):
        return text == "True"
    if text[:1] == '"' and text[-1:] == '"' and '"' not in text[1:-1] and "\\" not in text:
        return text[1:-1]
    try:
        if text[:1] == "(" and text[-1:] == ")":
            return tuple(int(part) for part in text[1:-1].split(",") if part.strip())
        return int(text) if re.fullmatch(r"-?\d{1,18}", text) else float(text)
    except ValueError:
        return None
