"""Write which format takes which command into two pages: ``python -m tests.documentation.format_tables``.

What a format takes is said by its :class:`~bntool.checkpoints.checkpoint.Format`; its files of another content, such as
pickled modules, have a line of their own.
"""

from __future__ import annotations

from bntool.checkpoints.checkpoint import Format
from bntool.checkpoints.formats import FORMATS
from tests.documentation.tables import fill, render_table
from tests.places import ROOT

# what people know a format by, and what runs its files in the tests, where its Format does not say both
_README_NAMES = {
    "torch-zip": ("torch.save (zip)", "torch"),
    "torchscript": ("TorchScript", "torch.jit"),
    "keras": ("Keras `.keras`", "Keras 3, tf_keras"),
    "exported-program": ("torch.export `.pt2`, torch 2.8 and later", "torch.export"),
    "exported-program-legacy": ("torch.export `.pt2`, torch 2.1 to 2.7", "torch.export"),
    "torch-legacy": ("torch.save before 1.6 (legacy)", "torch"),
    "torch-tar": ("torch.save before 0.1.2 (tar)", "torch"),
    "distributed": ("torch.distributed.checkpoint folders", "torch.distributed"),
    "keras-hdf5": (
        "Keras `.h5` (1 to 3; frozen from 2 on); weights alone with `--keras-config`, or of keras.applications",
        "Keras 3, tf_keras, Keras 1.2",
    ),
    "caffe-hdf5": ("Caffe `.caffemodel.h5` with `.prototxt`", "h5py"),
    "sharded": ("sharded safetensors or `.bin`", "safetensors, torch"),
    "safetensors": ("safetensors", "safetensors, torch"),
    "numpy-pickle": ("pickles of numpy arrays (detectron2, Caffe2)", "pickle, numpy"),
    "npz": ("`.npz` of arrays under PyTorch's names", "numpy, torch"),
    "mxnet": ("MXNet `.params`", "MXNet"),
    "mindspore": ("MindSpore `.ckpt`", "MindSpore"),
    "torchserve": ("TorchServe `.mar`, with what is in it", "torch-model-archiver, torch"),
    "nemo": ("NeMo `.nemo`", "torch"),
    "flax": ("Flax `.msgpack`", "Flax"),
    "tensorflow": ("TensorFlow checkpoints, SavedModel variables", "TensorFlow"),
    "onnx": ("ONNX, opset 9 to 24, external data", "onnxruntime, onnxslim, onnxsim, onnx.checker"),
    "caffe": ("Caffe `.caffemodel` with `.prototxt`", "OpenCV 4, torch"),
}


def describe_fold(format_: Format) -> str:
    """How BatchNorm is folded in files of a format."""
    if format_.read_only:
        return _describe_way_out(format_)
    if format_.graph_reader:
        return "by its own graph"
    return "`--layout same-keys`" if format_.only_values else "traced, or by declared pairs"


def describe_freeze(format_: Format) -> str:
    """How layers are frozen in files of a format."""
    if format_.read_only:
        return _describe_way_out(format_)
    if format_.is_for_inference:
        return "refused: nothing trains"
    if format_.needs_prototxt:
        return "`use_global_stats`, `lr_mult` 0"
    if format_.trains_whole_layers:
        return "`trainable: false`"
    return "record in the file" if format_.has_records else "refused: no place for it"


def describe_convert(format_: Format) -> str:
    """What files of a format become."""
    return "torch, safetensors" if format_.is_pytorch else "refused: no state dict"


def _describe_way_out(format_: Format) -> str:
    return "convert first" if format_.is_pytorch else "refused: only read"


def render_readme() -> str:
    rows = [
        [title, describe_fold(format_), describe_freeze(format_), client]
        for format_ in FORMATS
        for title, client in [_README_NAMES.get(format_.name, (format_.title, format_.loader.value))]
    ]
    modules = ["whole pickled modules, in any file of torch.save", "`--layout same-keys`", "flags and record", "torch"]
    return render_table(["format", "fold", "freeze", "what runs it in the tests"], [*rows, modules])


def render_commands() -> str:
    rows = [
        [
            format_.title,
            f"`{format_.name}`",
            *(describe(format_) for describe in (describe_fold, describe_freeze, describe_convert)),
            "yes" if format_.has_records else "no",
        ]
        for format_ in FORMATS
    ]
    return render_table(["format", "in JSON", "fold", "freeze", "convert --to", "keeps a record"], rows)


PAGES = {
    ROOT / "README.md": {"formats": render_readme},
    ROOT / "docs" / "formats.md": {"commands": render_commands},
}


if __name__ == "__main__":
    for page, tables in PAGES.items():
        page.write_text(fill(page, tables))
