"""The memory format that the kernels of a processor are fast at, and models that would notice what they are given."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode

from bntool.data.batches import Batch, find_placement

_READING = frozenset((
    "__array__", "__dlpack__", "as_strided", "as_strided_", "data_ptr", "is_contiguous", "numpy", "resize_", "storage",
    "stride", "untyped_storage",
))  # fmt: skip
# whose kernels take any layout; of others one cannot know
_TORCHS = ("aten", "prim", "prims", "profiler", "torchvision")


def is_faster_channels_last(model: torch.nn.Module) -> bool:
    """Return whether measuring images of that layout is faster: on a CPU by a factor of eight, elsewhere not known."""
    device, _ = find_placement(model)
    return device is None or device.type == "cpu"


def is_laid_out_anew(batch: Batch, model: torch.nn.Module) -> bool:
    """Return whether a batch is given to a model in other memory than its own when that is channels last."""
    inputs = batch.inputs_for(model)
    return (
        isinstance(inputs, torch.Tensor)
        and inputs.ndim == 4
        and not inputs.is_contiguous(memory_format=torch.channels_last)
    )


def is_faster_in_bfloat16(model: torch.nn.Module) -> bool:
    """Return whether the processor that a model is on computes in bfloat16; without that, it takes several times as
    long.
    """
    device, _ = find_placement(model)
    if device is not None and device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class MemoryReads(TorchFunctionMode):
    """Notes whether the code of a model asks where elements lie in memory, for then results may depend on the layout.

    Attributes:
        happened: whether it does: by strides, by an address, or in a kernel that is not torch's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.happened = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "").partition(".")[0] in _READING or (
            isinstance(function, OpOverload | OpOverloadPacket) and _find_namespace(function) not in _TORCHS
        ):
            self.happened = True
        return function(*args, **(kwargs or {}))


def _find_namespace(operator: OpOverload | OpOverloadPacket) -> str:
    packet = operator if isinstance(operator, OpOverloadPacket) else operator.overloadpacket
    return str(packet._qualified_op_name).partition("::")[0]
