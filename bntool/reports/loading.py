"""The few lines of plain Python that load what was written, without bntool."""

from __future__ import annotations

from bntool.checkpoints.checkpoint import Checkpoint, GlobalName, GlobalTrust, StateDict

# beside what is torch's own: the default list of torch._weights_only_unpickler
_ALLOWED = ("collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.set", "builtins.bytearray")

_LOADERS = {
    "torchscript": ("import torch", "model = torch.jit.load({output})  # runs code of the file"),
    "exported-program": ("import torch", "model = torch.export.load({output}).module()  # runs code of the file"),
    "exported-program-legacy": (
        "import torch  # of the version that wrote the file: others may refuse it",
        "model = torch.export.load({output}).module()  # runs code of the file",
    ),
    "torch-tar": ("import torch", "checkpoint = torch.load({output}, weights_only=False)  # runs code of the file"),
    "numpy-pickle": (
        "import pickle",
        "arrays = pickle.load(open({output}, 'rb'), encoding='latin1')  # runs code of the file",
    ),
}


def show_loading_code(checkpoint: Checkpoint, state_dict: StateDict, output: str) -> list[str]:
    """Lines that load a state dict of a written file into ``model``.

    Args:
        checkpoint: what was written.
        state_dict: the one that was worked on.
        output: the file.
    """
    running = show_running_code(checkpoint, output)
    if running:
        return running
    if checkpoint.format.name == "safetensors":
        return ["from safetensors.torch import load_file", *_load(f"load_file({output!r})", state_dict.prefix)]
    if checkpoint.format.name in _LOADERS:
        return [line.format(output=repr(output)) for line in _LOADERS[checkpoint.format.name]]
    if not checkpoint.format.single_file:
        return ["from accelerate import load_checkpoint_in_model", f"load_checkpoint_in_model(model, {output!r})"]
    trusted = all(map(_loads_weights_only, checkpoint.globals)) and not state_dict.is_module
    options = f'map_location="cpu", weights_only={trusted}'
    comment = "" if trusted else "  # runs code of the file: only if you trust its origin"
    lines = ["import torch", f"checkpoint = torch.load({output!r}, {options}){comment}"]
    where = f"checkpoint{state_dict.access}"
    if state_dict.is_module:
        return [*lines, f"model = {where}"]
    return [*lines, *_load(where, state_dict.prefix, holds_arrays=state_dict.holds_arrays)]


def show_running_code(checkpoint: Checkpoint, output: str) -> list[str]:
    """Lines that run a file that holds its graph; none for files of tensors."""
    if checkpoint.format.name == "onnx":
        return ["import onnxruntime", f"session = onnxruntime.InferenceSession({output!r})"]
    if checkpoint.format.name == "caffe":
        net = f"{output.removesuffix('.caffemodel')}.prototxt"
        return ["import cv2  # OpenCV before 5", f"net = cv2.dnn.readNetFromCaffe({net!r}, {output!r})"]
    if checkpoint.format.name == "caffe-hdf5":
        net = f"{output.removesuffix('.h5').removesuffix('.caffemodel')}.prototxt"
        return ["import caffe", f"net = caffe.Net({net!r}, {output!r}, caffe.TEST)"]
    if checkpoint.format.name in ("keras", "keras-hdf5"):
        return ["import keras", f"model = keras.models.load_model({output!r})"]
    return []


def _loads_weights_only(name: GlobalName) -> bool:
    """Whether torch.load(weights_only=True) takes it: fewer names than those known to be harmless."""
    return name.trust is GlobalTrust.KNOWN and (name.path.startswith("torch.") or name.path in _ALLOWED)


def _load(where: str, prefix: str, *, holds_arrays: bool = False) -> list[str]:
    if not prefix and not holds_arrays:
        return [f"model.load_state_dict({where})"]
    value = "torch.as_tensor(t)" if holds_arrays else "t"
    if not prefix:
        return [f"state_dict = {{n: {value} for n, t in {where}.items()}}", "model.load_state_dict(state_dict)"]
    return [
        f"prefix = {prefix!r}",
        f"state_dict = {{n.removeprefix(prefix): {value} for n, t in {where}.items() if n.startswith(prefix)}}",
        "model.load_state_dict(state_dict)",
    ]
