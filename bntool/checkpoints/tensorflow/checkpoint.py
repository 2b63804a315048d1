"""TensorFlow checkpoints (``X.index`` and ``X.data-00000-of-0000N``) and the variables of SavedModel folders."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.checkpoint import Checkpoint, Format, Loader, StateDict
from bntool.checkpoints.files import SourceFile

_LATEST = re.compile(rb'^model_checkpoint_path: *"([^"\n]{1,1000})"', re.MULTILINE)
_BESIDE = re.compile(r"(.+)\.data-\d{5}-of-\d{5}")


class Tensorflow(Format):
    """A checkpoint of TensorFlow or the variables of a SavedModel; it is only read."""

    name = "tensorflow"
    title = "TensorFlow"
    has_records = False
    is_pytorch = False
    loader = Loader.TENSORFLOW
    read_only = (
        "a TensorFlow checkpoint holds variables without the graph that uses them, in TensorFlow's layout: bntool "
        "inspects and compares it; change the model in TensorFlow, or export it to ONNX and fold that"
    )

    def locate(self, path: Path) -> Path | None:
        beside = _BESIDE.fullmatch(path.name)
        if path.is_dir():
            latest = _find_latest(path)
            candidates = [path / "variables" / "variables.index", path / "variables.index"]
            candidates += [path / f"{latest}.index"] if latest else []
        elif beside is not None:
            return path.with_name(f"{beside[1]}.index")
        elif not path.exists():
            candidates = [path.with_name(f"{path.name}.index")]
        else:
            return None
        return next((candidate for candidate in candidates if candidate.is_file()), None)

    def recognises(self, path: Location, head: bytes) -> bool:
        if path.name.endswith(".index"):
            return True
        # the first entry of the first block: an empty key, and as its value the header or what came before that
        value = head[3 if head[2:3] < b"\x80" else 4 :]
        return head[:2] == b"\0\0" and value[:1] in (b"\x08", b"\x0a")

    def read(self, file: SourceFile) -> Checkpoint:
        from bntool.checkpoints.tensorflow.bundle import Bundle  # a start-up without such files needs none of it
        from bntool.checkpoints.tensorflow.names import name_variables
        from bntool.checkpoints.tensorflow.trust import judge_saved_model

        bundle = Bundle(file)
        naming = name_variables(bundle)
        groups = {"": naming.variables, "ema": naming.averaged}
        state_dicts = []
        for key, names in groups.items():
            tensors = {name: bundle.tensors[entry] for name, entry in names.items()}
            if tensors:
                state_dicts.append(StateDict(key, "", tensors, modules=naming.modules))
        is_saved_model = file.path.name == "variables.index"
        acting = tuple(judge_saved_model(file.folder)) if is_saved_model else ()
        return Checkpoint(file, self, tuple(state_dicts), entries=naming.entries, globals=acting, content=bundle)

    def size(self, checkpoint: Checkpoint) -> int:
        from bntool.checkpoints.tensorflow.bundle import Bundle

        return checkpoint.file.size + Bundle.of(checkpoint).size

    def verify_checksums(self, checkpoint: Checkpoint) -> int:
        from bntool.checkpoints.tensorflow.bundle import Bundle

        return Bundle.of(checkpoint).verify_checksums()


def _find_latest(folder: Path) -> str | None:
    """Return the prefix that the file ``checkpoint`` of a folder names as the latest, if it lies in the folder."""
    place = folder / "checkpoint"
    if not place.is_file():
        return None
    with SourceFile(place) as file:
        found = _LATEST.search(file.read(0, min(file.size, 1 << 16)))
    return os.fsdecode(found[1]).replace("\\", "/").rpartition("/")[2] if found is not None else None
