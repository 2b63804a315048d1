"""The few lines of plain Python that load what was written, without bntool."""

from __future__ import annotations

from pathlib import Path

from bntool.checkpoints.checkpoint import Checkpoint, Format, GlobalName, GlobalTrust, StateDict
from bntool.checkpoints.files import place_beside

# beside what is torch's own: the default list of torch._weights_only_unpickler
_ALLOWED = ("collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.set", "builtins.bytearray")

# what Lightning puts before all names, and a usual name of a model's own only part: the model at hand tells
_AMBIGUOUS = "model."


def show_loading_code(checkpoint: Checkpoint, state_dict: StateDict, output: str) -> list[str]:
    """Return lines that load a state dict of a written file into ``model``.

    Args:
        checkpoint: what was written.
        state_dict: the one that was worked on.
        output: the file.
    """
    code = checkpoint.format.describe_loading(checkpoint, output)
    if code is not None:
        lines = [_fill_in(line, checkpoint.format, output) for line in code.lines]
        if not code.state_dict:
            return lines
        return [*lines, *_load(_fill_in(code.state_dict, checkpoint.format, output), state_dict.prefix)]
    trusted = all(map(_loads_weights_only, checkpoint.globals)) and not state_dict.is_module
    options = f'map_location="cpu", weights_only={trusted}'
    comment = "" if trusted else "  # runs code of the file: only if you trust its origin"
    lines = ["import torch", f"checkpoint = torch.load({output!r}, {options}){comment}"]
    where = f"checkpoint{state_dict.access}"
    if state_dict.is_module:
        return [*lines, f"model = {where}"]
    return [*lines, *_load(where, state_dict.prefix, holds_arrays=state_dict.holds_arrays)]


def _fill_in(line: str, format_: Format, output: str) -> str:
    description = place_beside(Path(output), ending=format_.described_by)
    return line.format(path=repr(output), description=repr(str(description)))


def _loads_weights_only(name: GlobalName) -> bool:
    """Return whether torch.load(weights_only=True) takes it: fewer names than those known to be harmless."""
    return name.trust is GlobalTrust.KNOWN and (name.path.startswith("torch.") or name.path in _ALLOWED)


def _load(where: str, prefix: str, *, holds_arrays: bool = False) -> list[str]:
    if not prefix and not holds_arrays:
        return [f"model.load_state_dict({where})"]
    value = "torch.as_tensor(t)" if holds_arrays else "t"
    if not prefix:
        return [f"state_dict = {{n: {value} for n, t in {where}.items()}}", "model.load_state_dict(state_dict)"]
    if prefix.endswith(_AMBIGUOUS):
        shorter = prefix.removesuffix(_AMBIGUOUS)
        choice = f"max({shorter!r}, {prefix!r}, key=lambda p: sum(p + n in tensors for n in model.state_dict()))"
        lines, where = [f"tensors = {where}", f"prefix = {choice}"], "tensors"
    else:
        lines = [f"prefix = {prefix!r}"]
    return [
        *lines,
        f"state_dict = {{n.removeprefix(prefix): {value} for n, t in {where}.items() if n.startswith(prefix)}}",
        "model.load_state_dict(state_dict)",
    ]
