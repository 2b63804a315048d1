"""TensorFlow checkpoints, read by bntool and by TensorFlow; recorded in tests/fixtures/interop/tensorflow.

Without an argument it holds the recorded values against TensorFlow; with --record it makes the checkpoints and writes
down what TensorFlow reads from them and what the models hold.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1")
import cramjam
import numpy as np
import tensorflow as tf
import tf_keras

from bntool.checkpoints.containers.leveldb_table import read_varint
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.tensors import read_bytes
from tests.checkpoints.tensorflow.bundle_files import make_table, write_bundle
from tests.places import INTEROP

REQUIREMENTS = ["tensorflow-cpu==2.21.0", "tf_keras==2.21.0", "cramjam==2.14.0", "numpy"]
RECORDED = INTEROP / "tensorflow"
VARIABLE = "/.ATTRIBUTES/VARIABLE_VALUE"


def make_model(keras: Any) -> Any:
    """A small trained network, with Adam's state."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Input((6, 6, 3)),
        keras.layers.Conv2D(4, 3, use_bias=False, name="conv"),
        keras.layers.BatchNormalization(name="bn", epsilon=0.002, momentum=0.9),
        keras.layers.BatchNormalization(name="bare", scale=False, center=False),
        keras.layers.Flatten(name="flatten"),
        keras.layers.LayerNormalization(name="norm"),
        keras.layers.Dense(2, name="dense"),
    ]
    model = keras.Sequential(layers, name="net")
    model.compile(optimizer="adam", loss="mse")
    random = np.random.default_rng(0)
    model.fit(random.random((16, 6, 6, 3)), random.random((16, 2)), verbose=0)
    return model


def weights_of(model: Any) -> dict[str, np.ndarray]:
    """The variables of a Keras model, by layer and Keras's own name for each."""
    found = {}
    for layer in model.layers:
        for variable in layer.weights:
            found[f"{layer.name}.{variable.name.split('/')[-1].removesuffix(':0')}"] = variable.numpy()
    return found


def save_keras(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    models = {"keras2": make_model(tf_keras), "keras3": make_model(tf.keras)}
    for name, model in models.items():
        tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(folder / name))
    with tempfile.TemporaryDirectory() as scratch:
        models["keras2"].save(scratch, save_format="tf")
        (folder / "saved_model" / "variables").mkdir(parents=True)
        for part in ("keras_metadata.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"):
            shutil.copyfile(Path(scratch) / part, folder / "saved_model" / part)
    with tempfile.TemporaryDirectory() as scratch:
        models["keras3"].export(scratch, verbose=False)
        (folder / "exported" / "variables").mkdir(parents=True)
        for part in ("variables/variables.index", "variables/variables.data-00000-of-00001"):
            shutil.copyfile(Path(scratch) / part, folder / "exported" / part)
    weights = {name: weights_of(model) for name, model in models.items()}
    return {**weights, "saved_model": weights["keras2"], "exported": weights["keras3"]}


def save_named(folder: Path) -> dict[str, np.ndarray]:
    """A session of TensorFlow 1: Adam, moving averages of the variables, and a variable in two parts."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        v1.set_random_seed(0)
        names = {"conv/weights": (3, 4), "bn/gamma": (4,), "bn/beta": (4,), "bn/moving_mean": (4,)}
        made = {name: v1.get_variable(name, shape) for name, shape in {**names, "bn/moving_variance": (4,)}.items()}
        parts = v1.get_variable("table", (5, 4), partitioner=v1.fixed_size_partitioner(2))
        loss = tf.add_n([tf.reduce_sum(v**2) for v in [*made.values(), *parts]])
        step = v1.train.get_or_create_global_step()
        train = v1.train.AdamOptimizer().minimize(loss, global_step=step)
        with tf.control_dependencies([train]):
            average = v1.train.ExponentialMovingAverage(0.5).apply(list(made.values()))
        session.run(v1.global_variables_initializer())
        for _ in range(3):
            session.run(average)
        v1.train.Saver().save(session, str(folder / "named.ckpt"), write_meta_graph=False, write_state=False)
        old = v1.train.Saver(list(made.values()), write_version=v1.train.SaverDef.V1)
        old.save(session, str(folder / "version_1.ckpt"), write_meta_graph=False, write_state=False)
        return {name: session.run(variable) for name, variable in made.items()}


def save_dtypes(folder: Path) -> dict[str, np.ndarray]:
    """One tensor of each dtype in two shards, once more with a compressed index."""
    names = "float16 float32 float64 bfloat16 int8 int16 int32 int64 uint8 uint16 uint32 uint64 complex64 complex128"
    values = {name: tf.cast(tf.reshape(tf.range(6), (2, 3)), name) for name in names.split()}
    values |= {name: tf.cast(tf.range(-2.0, 3.0), name) for name in ("float8_e5m2", "float8_e4m3fn")}
    values |= {"bool": tf.constant([True, False]), "empty": tf.zeros((0, 3)), "scalar": tf.constant(2.5)}
    shards = []
    for number in range(2):
        part = list(values)[number::2]
        shards.append(str(folder / f"part-{number}"))
        tf.raw_ops.SaveV2(
            prefix=shards[-1], tensor_names=part, shape_and_slices=[""] * len(part), tensors=[values[n] for n in part]
        )
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=shards, destination_prefix=str(folder / "dtypes"))
    compress(folder / "dtypes", folder / "snappy")
    return {name: np.asarray(value) for name, value in values.items()}


def compress(source: Path, target: Path) -> None:
    """The same checkpoint with the blocks of its index packed by Snappy."""
    index = source.with_name(f"{source.name}.index").read_bytes()
    end = read_varint(index, len(index) - 48)[0] - 5  # the only block lies before that of the metadata
    last = max(tf.train.load_checkpoint(str(source)).get_variable_to_shape_map()).encode()
    packed = bytes(cramjam.snappy.compress_raw(index[:end]))
    assert len(packed) < end
    target.with_name(f"{target.name}.index").write_bytes(make_table([(last, packed)], compression=1))
    for shard in source.parent.glob(f"{source.name}.data-*"):
        shutil.copyfile(shard, shard.with_name(shard.name.replace(source.name, target.name, 1)))


def judge(prefix: Path) -> int:
    """Hold the bytes of every tensor that bntool names against what TensorFlow reads under the same key."""
    reader = tf.train.load_checkpoint(str(prefix))
    count = 0
    with open_checkpoint(prefix) as checkpoint:
        bundle = checkpoint.content
        checkpoint.format.verify_checksums(checkpoint)
        assert set(bundle.entries) == set(reader.get_variable_to_shape_map()), prefix
        for key, tensor in bundle.tensors.items():
            if tensor.wrapper is None:
                assert read_bytes(tensor) == np.asarray(reader.get_tensor(key)).tobytes(), (prefix, key)
                count += 1
    return count


def record() -> None:
    shutil.rmtree(RECORDED, ignore_errors=True)
    RECORDED.mkdir(parents=True)
    values = {**save_keras(RECORDED), "named.ckpt": save_named(RECORDED), "dtypes": save_dtypes(RECORDED)}
    values["snappy"] = values["dtypes"]
    index = {}
    for name, arrays in values.items():
        index[name] = {
            key: {"dtype": str(array.dtype), "shape": list(array.shape), "data": array.tobytes().hex()}
            for key, array in arrays.items()
        }
    (RECORDED / "values.json").write_text(json.dumps(index, indent=1) + "\n")


def main() -> int:
    """Judge the recorded files, or record new ones."""
    if "--record" in sys.argv:
        record()
    for index in sorted(RECORDED.rglob("*.index")):
        print(f"{index.relative_to(RECORDED)}: {judge(index.with_suffix(''))} tensors, bit for bit")
    with tempfile.TemporaryDirectory() as folder:
        array = np.arange(6, dtype="f4")
        written = write_bundle({"by/hand": (1, (2, 3), array.tobytes())}, Path(folder) / "model")
        read = tf.train.load_checkpoint(str(written.with_suffix(""))).get_tensor("by/hand")
        assert np.array_equal(read, array.reshape(2, 3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
