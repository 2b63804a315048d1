"""Caffe's ``.caffemodel``: a net with its blobs."""

from __future__ import annotations

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.checkpoint import Checkpoint, Format, Loader, LoadingCode, StateDict
from bntool.checkpoints.files import SourceFile
from bntool.errors import CorruptFileError


class Caffe(Format):
    """A ``.caffemodel``: one protobuf message."""

    name = "caffe"
    title = "Caffe"
    has_records = False  # NetParameter has no field for notes
    writer = "caffe.writing:write_net"
    is_pytorch = False
    loader = Loader.CAFFE
    loading = LoadingCode(("import cv2  # OpenCV before 5", "net = cv2.dnn.readNetFromCaffe({description}, {path})"))
    graph_reader = "bntool.graphs.stored.caffe:caffe_graph"
    needs_prototxt = True
    described_by = ".prototxt"

    def recognises(self, path: Location, head: bytes) -> bool:
        if path.suffix == ".caffemodel":
            return True
        after_name = head[2 + head[1] :] if len(head) > 1 and head[0] == 0x0A and head[1] < 0x80 else b""
        return after_name[:2] == b"\xa2\x06"  # NetParameter.name, then NetParameter.layer

    def read(self, file: SourceFile) -> Checkpoint:
        from bntool.checkpoints.caffe.blobs import NetReading  # a start-up without Caffe files needs none of it
        from bntool.checkpoints.caffe.layers import LAYERS, V1_LAYERS, read_layers
        from bntool.checkpoints.caffe.trust import judge_layers, judge_net_beside
        from bntool.checkpoints.containers.protobufs.reading import Buffer, Message

        net = Message(Buffer(file), 0, file.size)
        if not net.all(LAYERS) and not net.all(V1_LAYERS):
            raise CorruptFileError("no Caffe layer was found: truncated, or not a .caffemodel")
        layers = read_layers(net)
        reading = NetReading(layers, net)
        state_dict = StateDict("", "", reading.tensors, modules=reading.modules)
        entries = {"name": net.text(1)} if net.last(1) is not None else {}
        content = reading.content()
        return Checkpoint(
            file,
            self,
            (state_dict,) if reading.tensors else (),
            entries=entries,
            globals=tuple(dict.fromkeys((*judge_layers(layers), *judge_net_beside(file)))),
            content=content,
            not_understood=tuple(reading.find_not_understood()),
        )
