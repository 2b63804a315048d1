"""Layers of a Caffe net that do more than compute: they import Python, or write files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bntool.checkpoints.caffe.layers import Layer
from bntool.checkpoints.caffe.prototxt import TextField, read_prototxt
from bntool.checkpoints.checkpoint import GlobalName, GlobalTrust
from bntool.checkpoints.containers.protobufs.reading import Message
from bntool.checkpoints.files import SourceFile, name_beside
from bntool.errors import BntoolError

_PYTHON_PARAMETER = 130  # of LayerParameter: module, then class
_OUTPUTS = ("HDF5Output", "HDF5_OUTPUT")  # the latter in nets of the format before


def judge_layers(layers: Iterable[Layer]) -> Iterator[GlobalName]:
    """Yield what the layers of a net run or write, each once.

    Layers that read data, which nets for training have, read what they are for; types of forks of Caffe are not known
    to Caffe.
    """
    found: dict[str, None] = {}
    for layer in layers:
        if layer.type == "Python":
            found[".".join(_python_parameters(layer))] = None
        elif layer.type in _OUTPUTS:
            found[f"caffe.{layer.type}"] = None
    return (GlobalName(path, called=True, trust=GlobalTrust.SUSPICIOUS) for path in found)


def _python_parameters(layer: Layer) -> tuple[str, str]:
    """Return the module that is imported, and the class in it that is called."""
    source = layer.source
    if isinstance(source, TextField):
        holder = source.last("python_param")
        named = [holder.last(name) if holder is not None else None for name in ("module", "layer")]
        module, class_name = (one.value if one is not None else "" for one in named)
    else:
        message = source.message(_PYTHON_PARAMETER) if isinstance(source, Message) else None
        module, class_name = (message.text(1), message.text(2)) if message is not None else ("", "")
    return module or "(no module)", class_name or "(no class)"


def judge_net_beside(file: SourceFile) -> Iterator[GlobalName]:
    """Yield what the ``.prototxt`` with the name of a model, by which it is run, does beside computing.

    One that cannot be read counts as unknown.
    """
    name = name_beside(file.path.name, ending=".prototxt")
    try:
        found = file.folder.find(name)
        if found is None:
            return
        with found as beside:
            net = read_prototxt(beside)
    except BntoolError as error:
        yield GlobalName(f"{name} ({error.message})", called=True, trust=GlobalTrust.UNKNOWN)
        return
    yield from judge_layers((*net.layers, *net.training))
