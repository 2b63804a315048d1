"""Caffe nets folded and frozen by bntool, judged by OpenCV's dnn; recorded in tests/fixtures/interop/caffe_folding.

Needs an environment of its own: opencv-python-headless<5 (5 cannot read Caffe), and bntool. Without an argument it
holds the recorded files against OpenCV; with --record it makes nets, folds them, and writes both once OpenCV agrees.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

from bntool.checkpoints.caffe.prototxt import parse_prototxt
from bntool.checkpoints.containers.protobufs.writing import embed, integer_field, packed_integers
from tests.graphs.stored.folding import fold_file, freeze_net
from tests.places import INTEROP

REQUIREMENTS = ["opencv-python-headless==4.14.0.94", "numpy"]
RECORDED = INTEROP / "caffe_folding"
TOLERANCE = 1e-5  # of the largest output

# one layer a line: name, type, bottoms, top, shape of the weight (or channels), parameters
NETS = {
    "in_place": """
conv1 Convolution data conv1 4,3,3,3 convolution_param{num_output:4 kernel_size:3 pad:1 bias_term:false}
bn1 BatchNorm conv1 conv1 4
scale1 Scale conv1 conv1 4 scale_param{bias_term:true}
relu1 ReLU conv1 conv1
conv2 Convolution conv1 conv2 6,2,1,1 convolution_param{num_output:6 kernel_size:1 group:2}
bn2 BatchNorm conv2 conv2 6 batch_norm_param{eps:0.001}
scale2 Scale conv2 conv2 6 scale_param{bias_term:true}
""",
    "new_tops": """
conv1 Convolution data conv1 4,3,3,3 convolution_param{num_output:4 kernel_size:3}
bn1 BatchNorm conv1 bn1 4
scale1 Scale bn1 scale1 4 scale_param{bias_term:true}
relu1 ReLU scale1 relu1
conv2 Convolution relu1 conv2 5,4,1,1 convolution_param{num_output:5 kernel_size:1 bias_term:false}
bn2 BatchNorm conv2 bn2 5
scale2 Scale bn2 scale2 5
""",
    "deconvolution_and_inner_product": """
up1 Deconvolution data up1 3,4,2,2 convolution_param{num_output:4 kernel_size:2 stride:2}
bn1 BatchNorm up1 up1 4
scale1 Scale up1 up1 4 scale_param{bias_term:true}
relu1 ReLU up1 up1
fc1 InnerProduct up1 fc1 6,400 inner_product_param{num_output:6 bias_term:false}
bn2 BatchNorm fc1 fc1 6
scale2 Scale fc1 fc1 6 scale_param{bias_term:true}
""",
    "flattened": """
bn0 BatchNorm data bn0 3
scale0 Scale bn0 scale0 3 scale_param{bias_term:true}
fc1 InnerProduct scale0 fc1 6,75 inner_product_param{num_output:6}
""",
    "left_alone": """
conv1 Convolution data conv1 4,3,1,1 convolution_param{num_output:4 kernel_size:1}
bn1 BatchNorm conv1 bn1 4
scale1 Scale bn1 scale1 4 scale_param{bias_term:true}
sum1 Eltwise conv1,scale1 sum1
conv2 Convolution sum1 conv2 4,4,1,1 convolution_param{num_output:4 kernel_size:1}
relu2 ReLU conv2 conv2
bn2 BatchNorm conv2 bn2 4
scale2 Scale bn2 scale2 4 scale_param{bias_term:true}
pool2 Pooling scale2 pool2 - pooling_param{pool:AVE global_pooling:true}
""",
    "split": """
conv1 Convolution data conv1 4,3,1,1 convolution_param{num_output:4 kernel_size:1 bias_term:false}
bn1 BatchNorm conv1 conv1 4
scale1 Scale conv1 conv1 4 scale_param{bias_term:true}
split1 Split conv1 s1,s2
conv2 Convolution s1 conv2 4,4,1,1 convolution_param{num_output:4 kernel_size:1 bias_term:false}
bn2 BatchNorm conv2 conv2 4
scale2 Scale conv2 conv2 4 scale_param{bias_term:true}
sum1 Eltwise s2,conv2 sum1
""",
    "forward": """
bn0 BatchNorm data bn0 3
scale0 Scale bn0 scale0 3 scale_param{bias_term:true}
conv1 Convolution scale0 conv1 4,3,3,3 convolution_param{num_output:4 kernel_size:3 bias_term:false}
relu1 ReLU conv1 conv1
""",
    "layers_between": """
conv1 Convolution data conv1 4,3,1,1 convolution_param{num_output:4 kernel_size:1 bias_term:false}
drop1 Dropout conv1 conv1
bn1 BatchNorm conv1 conv1 4
scale1 Scale conv1 conv1 4 scale_param{bias_term:true}
relu1 ReLU conv1 relu1
conv2 Convolution relu1 conv2 4,4,1,1 convolution_param{num_output:4 kernel_size:1 bias_term:false}
times2 Scale conv2 times2 4 scale_param{bias_term:true}
bn2 BatchNorm times2 bn2 4
scale2 Scale bn2 scale2 4 scale_param{bias_term:true}
sig2 Sigmoid scale2 sig2
conv3 Convolution sig2 conv3 2,4,1,1 convolution_param{num_output:2 kernel_size:1}
conv4 Convolution sig2 conv4 2,4,1,1 convolution_param{num_output:2 kernel_size:1 bias_term:false}
joined Concat conv3,conv4 joined
bn3 BatchNorm joined bn3 4
scale3 Scale bn3 scale3 4 scale_param{bias_term:true}
sig3 Sigmoid scale3 sig3
conv5 Convolution sig3 conv5 4,4,1,1 convolution_param{num_output:4 kernel_size:1}
conv6 Convolution sig3 conv6 4,4,1,1 convolution_param{num_output:4 kernel_size:1}
sum5 Eltwise conv5,conv6 sum5 - eltwise_param{operation:SUM coeff:0.5 coeff:-2}
pool5 Pooling sum5 pool5 - pooling_param{pool:AVE kernel_size:2 stride:1}
bn5 BatchNorm pool5 bn5 4
scale5 Scale bn5 scale5 4 scale_param{bias_term:true}
sig5 Sigmoid scale5 sig5
conv7 Convolution sig5 conv7 4,4,1,1 convolution_param{num_output:4 kernel_size:1}
part Slice conv7 p1,p2 - slice_param{slice_point:1}
bn7 BatchNorm p1 bn7 1
scale7 Scale bn7 scale7 1 scale_param{bias_term:true}
bn8 BatchNorm p2 bn8 3
scale8 Scale bn8 scale8 3 scale_param{bias_term:true}
again Concat scale7,scale8 again
power Power again power - power_param{scale:-0.5}
bn9 BatchNorm power bn9 4
scale9 Scale bn9 scale9 4 scale_param{bias_term:true}
""",
    "variance_below_zero": """
conv1 Convolution data conv1 4,3,3,3 convolution_param{num_output:4 kernel_size:3 pad:1 bias_term:false}
below BatchNorm conv1 conv1 4
scale1 Scale conv1 conv1 4 scale_param{bias_term:true}
relu1 ReLU conv1 conv1
""",
    "stays_between": """
conv1 Convolution data conv1 4,3,1,1 convolution_param{num_output:4 kernel_size:1 bias_term:false}
pool1 Pooling conv1 pool1 - pooling_param{pool:AVE kernel_size:3 stride:1 pad:1}
bn1 BatchNorm pool1 bn1 4
scale1 Scale bn1 scale1 4 scale_param{bias_term:true}
sig1 Sigmoid scale1 sig1
conv2 Convolution sig1 conv2 4,4,1,1 convolution_param{num_output:4 kernel_size:1}
most Eltwise conv2,sig1 most - eltwise_param{operation:MAX}
bn2 BatchNorm most bn2 4
scale2 Scale bn2 scale2 4 scale_param{bias_term:true}
sig2 Sigmoid scale2 sig2
conv3 Convolution sig2 conv3 4,4,1,1 convolution_param{num_output:4 kernel_size:1}
product Eltwise conv3,sig2 product - eltwise_param{operation:PROD}
bn3 BatchNorm product bn3 4
scale3 Scale bn3 scale3 4 scale_param{bias_term:true}
sig3 Sigmoid scale3 sig3
""",
}
# whose position is the seed of the weights
ORDER = ["deconvolution_and_inner_product", "flattened", "forward", "in_place", "left_alone", "new_tops", "split",
         "layers_between", "stays_between", "variance_below_zero"]  # fmt: skip
HEAD = 'name: "net"\ninput: "data"\ninput_shape { dim: 2 dim: 3 dim: 5 dim: 5 }\n# made for tests\n'
_LINE = re.compile(r"(\S+) (\S+) (\S+) (\S+)(?: (\S+))?(?: (.+))?")


def make(name: str, folder: Path) -> Path:
    """Write a net with random weights as ``.prototxt`` and ``.caffemodel``."""
    random = np.random.default_rng(ORDER.index(name))
    text, model = HEAD, b"".join(embed(1, b"net"))
    for line in NETS[name].strip().splitlines():
        layer, kind, bottoms, tops, shape, parameters = _LINE.fullmatch(line).groups()
        text += f'layer {{ name: "{layer}" type: "{kind}" '
        text += "".join(f'bottom: "{b}" ' for b in bottoms.split(",")) + "".join(
            f'top: "{t}" ' for t in tops.split(",")
        )
        text += f"{parameters.replace('{', ' { ').replace('}', ' } ')} }}\n" if parameters else "}\n"
        pieces = [*embed(1, layer.encode()), *embed(2, kind.encode())]
        pieces += [p for b in bottoms.split(",") for p in embed(3, b.encode())]
        pieces += [p for t in tops.split(",") for p in embed(4, t.encode())]
        blobs = _blobs(kind, shape, parameters or "", random)
        if (
            layer == "below"
        ):  # as in the MobileNet that is widely used: rounding made it negative, eps makes it positive
            blobs[1][1], blobs[2][0] = -9.9998997e-06, 1.0
        for blob in blobs:
            pieces += embed(7, *embed(7, packed_integers(1, blob.shape)), *embed(5, blob.astype("<f4").tobytes()))
        pieces += _parameters(kind, parameters or "")
        model += b"".join(embed(100, *pieces))
    model += integer_field(5, 1)  # force_backward, which nobody here reads
    (folder / f"{name}.prototxt").write_text(text)
    (folder / f"{name}.caffemodel").write_bytes(model)
    return folder / f"{name}.caffemodel"


def _blobs(kind: str, shape: str | None, parameters: str, random: np.random.Generator) -> list[np.ndarray]:
    if kind not in ("Convolution", "Deconvolution", "InnerProduct", "BatchNorm", "Scale"):
        return []
    extents = tuple(map(int, shape.split(",")))
    if kind == "BatchNorm":
        factor = 999.98236
        return [random.normal(size=extents) * factor, random.uniform(0.3, 2, extents) * factor, np.array([factor])]
    if kind == "Scale":
        weight = random.uniform(0.5, 2, extents)
        return [weight, random.normal(size=extents)] if "bias_term:true" in parameters else [weight]
    outputs = int(re.search(r"num_output:(\d+)", parameters).group(1))
    weight = random.normal(size=extents) / np.sqrt(np.prod(extents[1:]))
    return [weight] if "bias_term:false" in parameters else [weight, random.normal(size=outputs)]


def _parameters(kind: str, text: str) -> list[bytes]:
    """What a saved net says of the parameters that matter here."""
    number = {"Convolution": 106, "Deconvolution": 106, "InnerProduct": 117, "BatchNorm": 139, "Scale": 142}.get(kind)
    keys = {
        "num_output": 1,
        "bias_term": 4 if kind == "Scale" else 2,
        "pad": 3,
        "kernel_size": 4,
        "group": 5,
        "stride": 6,
    }
    content = b""
    for key, value in re.findall(r"(\w+):([\w.]+)", text):
        if key == "eps":
            content += b"\x1d" + np.array(value, "<f4").tobytes()
        elif key in keys:
            content += integer_field(keys[key], int(value) if value.isdigit() else int(value == "true"))
    return list(embed(number, content)) if number and content else []


def run(model: Path, x: np.ndarray) -> np.ndarray:
    """What the last layer puts out."""
    net = cv2.dnn.readNetFromCaffe(str(model.with_suffix(".prototxt")), str(model))
    net.enableFusion(False)
    net.setInput(x)
    return net.forward()


def judge(model: Path, folded: Path) -> float:
    """The largest difference of the outputs, relative to the largest output."""
    x = np.random.default_rng(1).normal(size=(2, 3, 5, 5)).astype("f4")
    before, after = run(model, x), run(folded, x)
    error = float(np.abs(before - after).max() / np.abs(before).max())
    assert error <= TOLERANCE, (folded.name, error)
    return error


def main() -> int:
    """Judge the recorded files, or record new ones."""
    if "--record" in sys.argv:
        shutil.rmtree(RECORDED, ignore_errors=True)
        RECORDED.mkdir()
        index = {}
        for name in NETS:
            model = make(name, RECORDED)
            for layout in ("folded", "same-keys"):
                with tempfile.TemporaryDirectory() as folder:
                    target = Path(folder) / f"{name}.{layout}.caffemodel"
                    plan = fold_file(model, target, layout=layout)
                    error = judge(model, target)
                    parse_prototxt(target.with_suffix(".prototxt").read_text())
                    for written in Path(folder).iterdir():
                        shutil.copyfile(written, RECORDED / written.name)
                index[f"{name}.{layout}"] = {
                    "folds": {fold.layer: list(fold.into) for fold in plan.folds},
                    "skips": {skip.layer: skip.reason.value for skip in plan.skips},
                    "error": float(f"{error:.2g}"),
                }
        (RECORDED / "index.json").write_text(json.dumps(index, indent=1) + "\n")
        for form in ("policy", "constant"):
            freeze_net(RECORDED / "in_place.caffemodel", RECORDED / f"in_place.{form}.caffemodel", form=form)
    for form in ("policy", "constant"):
        error = judge(RECORDED / "in_place.caffemodel", RECORDED / f"in_place.{form}.caffemodel")
        print(f"in_place, frozen as {form}: {error:.1e}")
    for key, facts in json.loads((RECORDED / "index.json").read_text()).items():
        error = judge(RECORDED / f"{key.rpartition('.')[0]}.caffemodel", RECORDED / f"{key}.caffemodel")
        print(f"{key}: {error:.1e}", facts["folds"], facts["skips"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
