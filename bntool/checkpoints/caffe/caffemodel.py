"""Caffe's ``.caffemodel``: a net with its blobs."""

from __future__ import annotations

from pathlib import Path

from bntool.checkpoints.checkpoint import Checkpoint, Format, StateDict
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.outputs import OutputFiles
from bntool.errors import CorruptFileError


class Caffe(Format):
    """See the module."""

    name = "caffe"
    title = "Caffe"
    is_pytorch = False

    def recognises(self, path: Path, head: bytes) -> bool:
        if path.suffix == ".caffemodel":
            return True
        after_name = head[2 + head[1] :] if len(head) > 1 and head[0] == 0x0A and head[1] < 0x80 else b""
        return after_name[:2] == b"\xa2\x06"  # NetParameter.name, then NetParameter.layer

    def read(self, file: SourceFile) -> Checkpoint:
        from bntool.checkpoints.caffe.blobs import NetReading  # a start-up without Caffe files needs none of it
        from bntool.checkpoints.caffe.layers import LAYERS, V1_LAYERS, read_layers
        from bntool.checkpoints.containers.protobufs.reading import Buffer, Message

        net = Message(Buffer(file), 0, file.size)
        if not net.all(LAYERS) and not net.all(V1_LAYERS):
            raise CorruptFileError("no Caffe layer was found: truncated, or not a .caffemodel")
        reading = NetReading(read_layers(net), net)
        state_dict = StateDict("", "", reading.tensors, modules=reading.modules, source=dict(reading.tensors))
        entries = {"name": net.text(1)} if net.last(1) is not None else {}
        content = reading.content()
        return Checkpoint(file, self, (state_dict,) if reading.tensors else (), entries=entries, content=content)

    def write(self, checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
        from bntool.checkpoints.caffe.writing import write_net  # only those who write need it

        write_net(checkpoint, output.open(path))

    def can_record(self, checkpoint: Checkpoint, state_dict: StateDict) -> bool:  # noqa: ARG002
        """No: NetParameter has no field for notes."""
        return False
