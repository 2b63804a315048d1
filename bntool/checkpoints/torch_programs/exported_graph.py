"""Reading what the graph of an exported program says of its BatchNorm layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_OPERATORS = ("batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_")


def read_batchnorms(model: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return class and attributes (eps, momentum, training) of each layer whose running_mean an operator reads.

    Args:
        model: the parsed ``models/NAME.json`` or, before torch 2.8, ``serialized_exported_program.json``. What is not
            as expected counts as absent.
    """
    module = _dict(_dict(model).get("graph_module"))
    buffers = dict(_buffer_names(_dict(module.get("signature"))))
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for node in _list(_dict(module.get("graph")).get("nodes")):
        operator = str(_dict(node).get("target")).removeprefix("torch.ops.aten.")
        if not operator.startswith(_OPERATORS):
            continue
        given = map(_dict, _list(node.get("inputs")))
        inputs = {name: _dict(one.get("arg")) for one in given if isinstance(name := one.get("name"), str)}
        mean = _dict(inputs.get("running_mean", {}).get("as_tensor")).get("name")
        buffer = buffers.get(mean) if isinstance(mean, str) else None
        if buffer is None or not buffer.endswith("running_mean"):
            continue
        layer = buffer.removesuffix("running_mean").removesuffix(".")
        attributes: dict[str, Any] = {}
        for name, kind in (("eps", "as_float"), ("momentum", "as_float"), ("training", "as_bool")):
            value = inputs.get(name, {}).get(kind)
            if isinstance(value, bool if kind == "as_bool" else float):
                attributes[name] = value
        if layer in found and found[layer][1] != attributes:
            attributes = {}  # used twice, differently: the file does not tell
        found[layer] = (_class_of(_dict(node.get("metadata"))), attributes)
    return found


def _buffer_names(signature: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for argument, buffer_name in _dict(signature.get("inputs_to_buffers")).items():  # torch 2.1
        if isinstance(buffer_name, str):
            yield argument, buffer_name
    for spec in _list(signature.get("input_specs")):
        buffer = _dict(_dict(spec).get("buffer"))
        inside, name = _dict(buffer.get("arg")).get("name"), buffer.get("buffer_name")
        if isinstance(inside, str) and isinstance(name, str):
            yield inside, name


def _class_of(metadata: Mapping[str, Any]) -> str:
    """Return the innermost module of ``path,name,class;path,name,class``; torch 2.1 writes ``path:(name,class)``."""
    stack = metadata.get("nn_module_stack")
    return stack.rpartition(";")[2].rpartition(",")[2].removesuffix(")") if isinstance(stack, str) else ""


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
