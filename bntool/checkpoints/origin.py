"""Describing in one line where a file comes from and what stage of training it holds."""

from __future__ import annotations

from typing import Any

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.pickles.nodes import Node, as_mapping, is_mapping, iterate_pairs, text_of
from bntool.checkpoints.state_dicts import is_averaged_copy

_OPTIMIZERS = ("optimizer", "optimizer_states", "optimizer_state_dict", "optim", "opt", "optimizer_state", "optimizers")


def describe_origin(checkpoint: Checkpoint) -> str:
    """Describe where a file comes from, e.g. ``mmengine, epoch 12, Adam state, EMA``; ``bare state dict`` where there
    is nothing else.
    """
    entries = checkpoint.entries
    parts = [*_producer(entries), *checkpoint.format.describe_origin(checkpoint), *_progress(entries)]
    word = "compiled" if checkpoint.format.holds_code else "pickled"
    parts += [f"{word} {_class_name(s.modules[''].class_path)}" for s in checkpoint.state_dicts if s.is_module]
    only = checkpoint.state_dicts[0] if len(checkpoint.state_dicts) == 1 else None
    if only is not None and not only.key and not only.modules and not parts:
        parts.append("bare state dict")
    optimizer = next((entries[key] for key in _OPTIMIZERS if key in entries), None)
    if optimizer is not None:
        parts.append(_optimizer_state(optimizer))
    if any(is_averaged_copy(s.key) for s in checkpoint.state_dicts):
        parts.append("EMA")
    return ", ".join(dict.fromkeys(part for part in parts if part))


def _class_name(path: str) -> str:
    return path or "module"


def _producer(entries: Any) -> list[str]:  # noqa: PLR0911 (one for each producer)
    keys = set(entries)
    meta = as_mapping(entries.get("meta")) if "meta" in keys else {}
    if "pytorch-lightning_version" in keys:
        return [f"Lightning {text_of(entries['pytorch-lightning_version']) or ''}".strip()]
    if "message_hub" in keys or "mmengine_version" in meta:
        return ["mmengine"]
    if "mmcv_version" in meta or "mmdet_version" in meta:
        return ["mmcv"]
    if "matching_heuristics" in keys or "__author__" in keys:
        return ["detectron2 model zoo"]
    if "opt" in keys and "hypers" in as_mapping(entries["opt"]):
        return ["fastai"]
    if {"arch", "state_dict", "args"} <= keys and "version" in keys:
        return ["timm"]
    if "train_args" in keys and "ema" in keys:
        return ["ultralytics"]
    if "tensorflow" in keys:
        return [str(entries["tensorflow"])]
    return []


def _progress(entries: Any) -> list[str]:
    return [f"{word} {value}" for word, value in find_progress(entries).items()]


def find_progress(entries: Any) -> dict[str, int]:
    """Find how far the training was, as the file says: its ``epoch``, and its ``step`` or ``iteration``."""
    meta = as_mapping(entries.get("meta")) if is_mapping(entries.get("meta")) else {}
    found: dict[str, int] = {}
    for key, word in (("epoch", "epoch"), ("global_step", "step"), ("iteration", "iteration"), ("iter", "iteration")):
        value = entries.get(key, meta.get(key))
        if type(value) is int and not (found and word == "iteration"):
            found[word] = value
    return found


def _optimizer_state(node: Node) -> str:
    """Return the optimizer's family, by the names of what it keeps for each parameter."""
    for _ in range(3):  # Lightning keeps a list of them; a hostile list may hold itself
        if isinstance(node, list | tuple) and node:
            node = node[0]
    state = as_mapping(node).get("state")
    for _, entry in iterate_pairs(state):
        names = set(as_mapping(entry))
        if "exp_avg" in names:
            return "Adam state" if "exp_avg_sq" in names else "Lion state"
        if "momentum_buffer" in names:
            return "SGD momentum state"
        if "square_avg" in names:
            return "RMSprop state"
        break
    return "optimizer state"
