"""Partials of ``bntool recalibrate``: safetensors files with the moments that a share of the batches gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bntool.checkpoints.checkpoint import Checkpoint, Content, Format
from bntool.checkpoints.containers.json_texts import read_json
from bntool.checkpoints.files import SourceFile, quote
from bntool.checkpoints.tensors import Tensor
from bntool.errors import CorruptFileError

PARTIAL_KEY = "bntool_partial"
PARTIAL_VERSION = 1


@dataclass(frozen=True)
class PartialContent(Content):
    """The contents of a partial.

    Attributes:
        facts: JSON data; docs/recalibration.md lists them.
        tensors: by name.
    """

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Partial(Format):
    """A safetensors file that is no model, told by its metadata.

    Args:
        reader: the format that reads it, too.
    """

    name = "partial"
    title = "a partial of bntool recalibrate"
    read_only = (
        "this file is a partial: moments that a share of the batches gave; bntool recalibrate CKPT --from-partials "
        "merges it with the others"
    )
    is_pytorch = False
    has_records = False

    def __init__(self, reader: Format) -> None:
        self._reader = reader

    def read(self, file: SourceFile) -> Checkpoint:
        return self._reader.read(file)

    def describe_other(self, checkpoint: Checkpoint) -> str:
        facts = PartialContent.of(checkpoint).facts
        shard, options = facts.get("shard"), facts.get("options")
        number, count = shard if isinstance(shard, list) and len(shard) == 2 else ("?", "?")
        method = options.get("method") if isinstance(options, dict) else None
        layers = facts.get("layers")
        parts = [
            f"shard {_show(number)} of {_show(count)}",
            f"{len(layers) if isinstance(layers, list) else 0:,} BatchNorm layers",
            f"method {_show(method)}",
        ]
        if facts.get("complete") is not True:
            parts.append("not complete: --resume goes on with it")
        return (
            f"a partial of bntool recalibrate, no model ({', '.join(parts)}); bntool recalibrate CKPT --from-partials "
            "merges partials"
        )


def _show(value: object) -> str:
    is_plain = isinstance(value, int) or value in ("pooled", "paper")
    return str(value) if is_plain else quote(str(value))


def make_partial(file: SourceFile, text: str, tensors: Mapping[str, Tensor], reader: Format) -> Checkpoint:
    """Return a partial as a checkpoint without state dicts.

    Raises:
        CorruptFileError: its facts cannot be read.
    """
    facts = read_json(text, what="the facts of the partial")
    if not isinstance(facts, dict):
        raise CorruptFileError("the facts of the partial are not a JSON object")
    return Checkpoint(file=file, format=Partial(reader), state_dicts=(), content=PartialContent(facts, tensors))
