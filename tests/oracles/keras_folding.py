"""Keras models folded by bntool, judged by Keras 3 on its torch backend.

Recorded in tests/fixtures/interop/keras_folding. Without an argument it holds the recorded files against Keras, and
folds models of keras.applications anew (--zoo does only that). With --record, and names of some or none, it makes
models, folds them, and writes both after Keras has agreed.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["KERAS_BACKEND"] = "torch"

import h5py
import keras
import numpy as np
from keras import Model, Sequential, applications, layers
from keras.src.legacy.saving import legacy_h5_format

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.folding.checkpoint import fold_checkpoint
from bntool.freezing.checkpoint import plan_freeze
from bntool.reports.loading import show_loading_code
from tests.graphs.stored.folding import fold_file
from tests.places import INTEROP

logging.getLogger("absl").setLevel(logging.ERROR)  # that .h5 is considered legacy
warnings.filterwarnings("ignore")

# spliceai without what it asks for: it is there for its files
REQUIREMENTS = ["torch==2.13.0", "keras==3.15.1", "h5py", "numpy", "spliceai==1.3.1"]
RECORDED = INTEROP / "keras_folding"
TOLERANCE = 1e-5  # of the largest output
ZOO = {
    "ResNet50": (32, "53 of 53"),
    "MobileNetV2": (32, "52 of 52"),
    "Xception": (71, "40 of 40"),
    "EfficientNetB0": (32, "49 of 49"),
    "InceptionV3": (75, "94 of 94"),
    "ResNet50V2": (32, ""),
    "DenseNet121": (32, ""),
    "MobileNetV3Small": (32, ""),
    "EfficientNetV2B0": (32, ""),
    "InceptionResNetV2": (75, ""),
}
IN_BOTH = ("nested", "sequential", "uneven_branches", "time_distributed")
MODELS: dict[str, Callable[[], Any]] = {}


def case(build: Callable[[], Any]) -> Callable[[], Any]:
    MODELS[build.__name__] = build
    return build


def bn(x: Any, name: str, **options: Any) -> Any:
    return layers.BatchNormalization(name=name, **options)(x)


@case
def uneven_branches() -> Any:
    """Without its BatchNorms one branch is as long as the other: Keras then counts the convolutions anew."""
    x = inputs = layers.Input((6, 6, 3))
    a = bn(layers.Conv2D(4, 1, name="a1", use_bias=False)(x), "abn1")
    a = bn(layers.Conv2D(4, 3, name="a2", padding="same", use_bias=False)(a), "abn2")
    a = layers.Conv2D(4, 1, name="a3")(a)
    b = layers.Conv2D(4, 1, name="b1")(x)
    b = layers.ReLU()(b)
    b = layers.Conv2D(4, 3, name="b2", padding="same")(b)
    b = layers.ReLU()(b)
    b = bn(layers.Conv2D(4, 1, name="b3")(b), "bbn")
    return Model(inputs, layers.Add()([a, b]))


@case
def kernels_1d_and_3d() -> Any:
    one = layers.Input((9, 3))
    x = bn(layers.Conv1D(4, 3, padding="causal", name="c1", groups=1)(one), "n1")
    x = bn(layers.SeparableConv1D(5, 3, depth_multiplier=2, name="s1", use_bias=False)(x), "n2", scale=False)
    x = bn(layers.Conv1DTranspose(3, 2, strides=2, name="t1")(x), "n3")
    x = bn(layers.DepthwiseConv1D(3, depth_multiplier=3, name="d1")(x), "n4", center=False)
    three = layers.Input((4, 4, 4, 2))
    y = bn(layers.Conv3D(3, 2, name="c3", use_bias=False)(three), "n5", epsilon=1e-5)
    y = bn(layers.Conv3DTranspose(2, 2, name="t3")(y), "n6")
    return Model([one, three], layers.Concatenate()([layers.Flatten()(x), layers.Flatten()(y)]))


@case
def kernels_2d() -> Any:
    x = inputs = layers.Input((8, 8, 4))
    x = bn(layers.Conv2D(6, 3, groups=2, name="grouped", use_bias=False)(x), "n1")
    x = bn(layers.DepthwiseConv2D(3, depth_multiplier=2, name="depth", use_bias=False)(x), "n2")
    x = bn(layers.Conv2DTranspose(5, 3, strides=2, padding="same", name="up", use_bias=False)(x), "n3")
    x = bn(layers.SeparableConv2D(7, 3, depth_multiplier=2, name="sep", use_bias=False)(x), "n4", momentum=0.9)
    x = bn(layers.Dense(3, name="every_position")(x), "n5", scale=False, center=False)
    return Model(inputs, x)


@case
def nested() -> Any:
    inner = Sequential(
        [layers.Input((8, 8, 3)), layers.Conv2D(4, 3, use_bias=False, name="c"), layers.BatchNormalization(name="b"),
         layers.ReLU(), layers.Conv2D(4, 1, name="c2"), layers.BatchNormalization(name="b2")],
        name="block",
    )  # fmt: skip
    i = layers.Input((6, 6, 4))
    y = bn(layers.Conv2D(5, 1, name="c")(i), "b", trainable=False)
    function = Model(i, layers.ReLU()(y), name="function")
    x = inputs = layers.Input((8, 8, 3))
    x = function(inner(x))
    x = layers.TimeDistributed(layers.Dense(3), name="each")(x)
    x = bn(layers.Dense(3, name="d")(x), "last")
    return Model(inputs, x)


@case
def nested_output_feeds_a_norm() -> Any:
    """The BatchNorm after a nested model folds into the convolution at its end; one inside reads its input."""
    inner = Sequential([layers.Input((8, 8, 3)), layers.Conv2D(4, 3, name="c")], name="block")
    after = Sequential([layers.Input((6, 6, 4)), layers.BatchNormalization(name="b"), layers.Conv2D(2, 1, name="c")],
                       name="after")  # fmt: skip
    x = inputs = layers.Input((8, 8, 3))
    return Model(inputs, after(inner(x)))


@case
def functions_of_keras_ops() -> Any:
    x = inputs = layers.Input((8, 8, 3))
    x = bn(layers.Conv2D(4, 3, name="c1")(x), "n1")
    x = keras.ops.relu(x) + 1.0
    x = bn(layers.Conv2D(4, 3, name="c2")(x), "n2")
    return Model(inputs, keras.ops.add(x, x * 2.0))


@case
def not_foldable() -> Any:
    """Each for another reason; only the first is folded."""
    x = inputs = layers.Input((8, 8, 3))
    x = bn(layers.Conv2D(4, 3, name="fine")(x), "folds")
    x = bn(layers.Conv2D(4, 1, activation="relu", name="fused")(x), "after_activation")
    y = layers.Conv2D(4, 1, name="shared_output")(x)
    x = layers.Add()([y, bn(y, "of_two_readers")])
    shared = layers.Conv2D(4, 1, name="shared")
    x = layers.Add()([bn(shared(x), "first_call"), shared(layers.ReLU()(x))])
    x = layers.BatchNormalization(name="in_training")(layers.Conv2D(4, 1, name="c")(x), training=True)
    x = bn(layers.Conv2D(6, 1, name="other_axis")(x), "rows", axis=1)
    return Model(inputs, x)


@case
def called_twice() -> Any:
    """One convolution and one BatchNorm, always together: both calls change alike."""
    convolution, norm = layers.Conv2D(3, 1, name="c"), layers.BatchNormalization(name="n")
    x = inputs = layers.Input((5, 5, 3))
    x = norm(convolution(x))
    x = norm(convolution(layers.ReLU()(x)))
    return Model(inputs, x)


@case
def several_outputs() -> Any:
    """The one that is an output keeps its name: it stays and adds its shift."""
    x = inputs = layers.Input((8, 8, 3))
    x = bn(layers.Conv2D(4, 3, name="c1")(x), "inside")
    a = bn(layers.Conv2D(2, 1, name="c2")(x), "first_output")
    return Model(inputs, {"b": layers.ReLU(name="second_output")(x), "a": a})


@case
def channels_first() -> Any:
    x = inputs = layers.Input((3, 8, 8))
    x = bn(layers.Conv2D(4, 3, data_format="channels_first", name="c1")(x), "n1", axis=1)
    x = bn(layers.DepthwiseConv2D(3, data_format="channels_first", name="c2")(x), "n2", axis=1)
    x = bn(layers.Conv2D(4, 1, data_format="channels_first", name="c3")(x), "wrong_axis", axis=-1)
    return Model(inputs, x)


@case
def sequential() -> Any:
    return Sequential(
        [layers.Input((8, 8, 3)), layers.BatchNormalization(name="first"), layers.Conv2D(4, 3, name="c1"),
         layers.BatchNormalization(name="n1"), layers.ReLU(), layers.Conv2D(4, 3, use_bias=False, name="c2"),
         layers.BatchNormalization(name="n2"), layers.Flatten(), layers.Dense(5, use_bias=False, name="d"),
         layers.BatchNormalization(name="n3")]
    )  # fmt: skip


@case
def renorm() -> Any:
    """Seven variables, of which inference uses the same four."""
    x = inputs = layers.Input((8, 8, 3))
    return Model(inputs, bn(layers.Conv2D(4, 3, name="c1")(x), "n1", renorm=True))


@case
def layers_between() -> Any:
    """What passes a scale and a shift, or gives them as they are; a BatchNorm behind each."""
    x = inputs = layers.Input((8, 8, 3))
    x = bn(layers.Dropout(0.3)(layers.Conv2D(4, 3, name="c1", use_bias=False)(x)), "behind_dropout")
    x = layers.Activation("relu")(x)
    x = bn(layers.Activation("linear")(layers.Conv2D(4, 1, name="c2")(x)), "behind_linear")
    x = layers.LeakyReLU()(x)
    x = bn(layers.SpatialDropout2D(0.2)(layers.AveragePooling2D(2, padding="same")(layers.Conv2D(4, 1, name="c3")(x))),
           "behind_average")  # fmt: skip
    x = layers.ReLU()(x)
    a, b = layers.Conv2D(2, 1, name="c4")(x), layers.Conv2D(2, 1, name="c5", use_bias=False)(x)
    x = bn(layers.Concatenate()([a, b]), "behind_concatenation")
    x = layers.Activation("tanh")(x)
    a, b, c = (layers.Conv2D(4, 1, name=name)(x) for name in ("c6", "c7", "c8"))
    x = bn(layers.Average()([a, b, c]), "behind_an_average_of_three")
    x = layers.Activation("sigmoid")(x)
    a, b = layers.Conv2D(4, 1, name="c9")(x), layers.Conv2D(4, 1, name="c10")(x)
    x = bn(layers.Subtract()([a, b]), "behind_a_difference")
    x = layers.Activation("sigmoid")(x)
    x = bn(layers.UpSampling2D(2, interpolation="bilinear")(layers.Conv2D(4, 1, name="c11")(x)), "behind_interpolation")
    x = layers.Activation("sigmoid")(x)
    x = bn(layers.Permute((2, 1, 3))(layers.Conv2D(4, 1, name="c12")(x)), "behind_permutation")
    x = layers.Activation("sigmoid")(x)
    x = bn(layers.Cropping2D(1)(layers.Conv2D(4, 1, name="c13")(x)), "behind_cropping")
    return Model(inputs, layers.Activation("sigmoid")(x))


@case
def readers() -> Any:
    """BatchNorms that what reads them takes: behind Flatten, pools and by the second half of a SeparableConv."""
    x = inputs = layers.Input((8, 8, 3))
    x = layers.Activation("tanh")(x)
    x = bn(x, "before_separable")
    x = layers.SeparableConv2D(4, 3, depth_multiplier=2, activation="sigmoid", name="s1")(x)
    y = bn(x, "before_flatten")
    y = layers.Dense(5, name="d1")(layers.Dropout(0.5)(layers.Flatten()(y)))
    z = bn(layers.Activation("sigmoid")(x), "before_global_average")
    z = layers.Dense(5, name="d2", use_bias=False)(layers.GlobalAveragePooling2D()(z))
    w = bn(layers.Activation("tanh")(x), "before_padding")  # zeros are no shift
    w = layers.Flatten()(layers.Conv2D(2, 1, name="c")(layers.ZeroPadding2D(1)(w)))
    return Model(inputs, layers.Concatenate()([y, z, w]))


@case
def channels_first_readers() -> Any:
    x = inputs = layers.Input((3, 6, 6))
    x = layers.Activation("tanh")(x)
    x = bn(x, "before_separable", axis=1)
    x = layers.SeparableConv2D(4, 3, data_format="channels_first", activation="sigmoid", name="s1")(x)
    x = layers.AveragePooling2D(2, data_format="channels_first")(x)
    x = bn(x, "before_flatten", axis=1)
    return Model(inputs, layers.Dense(5, name="d1")(layers.Flatten(data_format="channels_first")(x)))


@case
def time_distributed() -> Any:
    """The layers inside are called for each element of a sequence."""
    x = inputs = layers.Input((4, 8, 8, 3))
    x = layers.TimeDistributed(layers.Conv2D(4, 3, use_bias=False), name="c1")(x)
    x = layers.TimeDistributed(layers.BatchNormalization(), name="n1")(x)
    x = layers.TimeDistributed(layers.Activation("relu"), name="a1")(x)
    x = layers.TimeDistributed(layers.Conv2D(4, 1), name="c2")(x)
    x = bn(x, "n2")
    x = layers.TimeDistributed(layers.Flatten(), name="f")(x)
    x = layers.TimeDistributed(layers.Dense(6, use_bias=False), name="d")(x)
    x = layers.TimeDistributed(layers.Dropout(0.2), name="o")(x)
    x = layers.TimeDistributed(layers.BatchNormalization(), name="n3")(x)
    return Model(inputs, x)


@case
def residual_stream() -> Any:
    """A pre-activation network whose scales are positive, as in SpliceAI."""
    x = inputs = layers.Input((30, 4))
    x = layers.Conv1D(4, 1, name="stem")(x)
    skip = layers.Conv1D(4, 1, name="skip")(x)
    for number in range(2):
        y = bn(x, f"positive{number}a")
        y = layers.Conv1D(4, 3, padding="same", name=f"c{number}a")(layers.Activation("relu")(y))
        y = bn(y, f"positive{number}b")
        y = layers.Conv1D(4, 3, padding="same", dilation_rate=2, name=f"c{number}b")(layers.Activation("relu")(y))
        x = layers.Add()([x, y])
    skip = layers.Add()([skip, layers.Conv1D(4, 1, name="last")(x)])
    return Model(inputs, layers.Conv1D(3, 1, activation="softmax", name="out")(layers.Cropping1D(5)(skip)))


@case
def dropout_that_is_on() -> Any:
    """Told to drop in any case, it is no identity; outputs are random, so that nothing may be compared but the plan."""
    x = inputs = layers.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="c")(x)
    x = layers.Dropout(0.0)(x, training=True)
    return Model(inputs, layers.Activation("sigmoid")(bn(x, "n")))


def randomise(model: Any, seed: int) -> None:
    """Weights as after training: statistics that matter, scales of both signs."""
    random = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if type(layer).__name__ == "BatchNormalization":
            for variable in layer.variables:
                positive = variable.name in ("moving_variance", "moving_stddev", "renorm_stddev")
                values = random.uniform(0.5, 1.5, variable.shape)
                if variable.name == "gamma" and not layer.name.startswith("positive"):
                    values *= random.choice([-1.0, 1.0], variable.shape, p=[0.1, 0.9])
                variable.assign(
                    values if positive or variable.name == "gamma" else random.normal(0, 0.3, variable.shape)
                )
        elif hasattr(layer, "bias") and layer.bias is not None:
            layer.bias.assign(random.normal(0, 0.2, layer.bias.shape))


def compute(path: Path, inputs: list[np.ndarray]) -> list[np.ndarray]:
    model = keras.models.load_model(path, compile=False)
    return [np.asarray(one) for one in keras.tree.flatten(model.predict(inputs, verbose=0))]


def inputs_of(model: Any, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(size=[2, *one.shape[1:]]).astype("float32") for one in model.inputs]


def compare(expected: list[np.ndarray], found: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(expected, found, strict=True))


def judge(name: str, model: Any, folder: Path, suffix: str, layout: str) -> dict[str, Any]:
    source, target = folder / f"{name}{suffix}", folder / f"{name}.{layout}{suffix}"
    if not source.exists():
        model.save(source)
    plan = fold_file(source, target, layout=layout)
    inputs = inputs_of(model, 1)
    error = compare(compute(source, inputs), compute(target, inputs))
    norms = len(plan.folds) + len(plan.skips)
    print(f"{name}{suffix} {layout}: {len(plan.folds)} of {norms} folded, relative error {error:.1e}", flush=True)
    assert error <= TOLERANCE, name
    return {
        "folds": {fold.layer: list(fold.into) for fold in plan.folds},
        "skips": {skip.layer: skip.reason.value for skip in plan.skips},
        "error": error,
    }


def record(names: list[str]) -> None:
    """Record the models of these names, or all."""
    index = RECORDED / "index.json"
    facts: dict[str, Any] = json.loads(index.read_text()) if names else {}
    RECORDED.mkdir(parents=True, exist_ok=True)
    for old in RECORDED.glob("*.*"):
        if old.name.partition(".")[0] in names or (not names and old.name != "applications.json"):
            old.unlink()
    for seed, (name, build) in enumerate(MODELS.items()):
        if names and name not in names:
            continue
        keras.utils.clear_session()
        model = build()
        randomise(model, seed)
        for suffix in (".keras", ".h5") if name in IN_BOTH else (".keras",):
            facts[f"{name}.folded{suffix}"] = judge(name, model, RECORDED, suffix, "folded")
    index.write_text(json.dumps(facts, indent=1) + "\n")


def check() -> None:
    facts = json.loads((RECORDED / "index.json").read_text())
    for key, wanted in facts.items():
        name, _, suffix = key.partition(".folded")
        model = keras.models.load_model(RECORDED / f"{name}{suffix}", compile=False)
        inputs = inputs_of(model, 1)
        error = compare(compute(RECORDED / f"{name}{suffix}", inputs), compute(RECORDED / key, inputs))
        print(f"{key}: relative error {error:.1e}")
        assert error <= TOLERANCE, key
        with tempfile.TemporaryDirectory() as folder:
            for layout in ("folded", "same-keys"):
                target = Path(folder) / f"{layout}{suffix}"
                plan = fold_file(RECORDED / f"{name}{suffix}", target, layout=layout)
                assert compare(compute(RECORDED / f"{name}{suffix}", inputs), compute(target, inputs)) <= TOLERANCE
                if layout == "folded":
                    assert {fold.layer: list(fold.into) for fold in plan.folds} == wanted["folds"]


def freeze() -> None:
    """A frozen file gives the same outputs, and training moves everything but its BatchNorms."""
    for name in ("nested.keras", "nested.h5", "sequential.h5", "time_distributed.keras", "time_distributed.h5"):
        with tempfile.TemporaryDirectory() as folder, open_checkpoint(RECORDED / name) as checkpoint:
            target = Path(folder) / name
            save_checkpoint(apply_plan(checkpoint, plan_freeze(checkpoint).plan), target)
            inputs = inputs_of(keras.models.load_model(RECORDED / name, compile=False), 2)
            expected = compute(RECORDED / name, inputs)
            assert compare(expected, compute(target, inputs)) == 0.0, name
            model = keras.models.load_model(target, compile=False)
        norms = [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]
        before = [layer.get_weights() for layer in norms]
        model.compile("sgd", "mse")
        model.fit(inputs, [one + 1 for one in expected], verbose=0)
        assert all(
            np.array_equal(a, b)
            for n, old in zip(norms, before, strict=True)
            for a, b in zip(n.get_weights(), old, strict=True)
        ), name
        assert not np.array_equal(model.predict(inputs, verbose=0), expected[0]), name
        print(f"{name}: {len(norms)} frozen BatchNorms stayed in training")


def weights_alone() -> None:
    """Weights without their model fold by its configuration, under names of another session too."""
    for name in ("nested", "sequential", "uneven_branches", "kernels_2d"):
        source = RECORDED / f"{name}.keras"
        model = keras.models.load_model(source, compile=False)
        inputs = inputs_of(model, 3)
        expected = compute(source, inputs)
        keras.utils.clear_session()
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            model.save_weights(folder / "numbered.weights.h5")
            with h5py.File(folder / "named.h5", "w") as file:
                legacy_h5_format.save_weights_to_hdf5_group(file, model)
            text = model.to_json()
            for layer in model.layers:
                text = text.replace(f'"{layer.name}"', f'"{layer.name}_7"')
            (folder / "other.json").write_text(text)
            model.save(folder / "model.h5")
            for weights, config in (
                ("numbered.weights.h5", source),
                ("named.h5", folder / "other.json"),
                ("named.h5", folder / "model.h5"),
            ):
                target = folder / f"folded_{weights}"
                fold = fold_checkpoint(folder / weights, target, keras_config=config, force=True)
                assert fold.checkpoint is not None
                printed: dict[str, Any] = {}
                lines = show_loading_code(fold.checkpoint, fold.checkpoint.state_dict(""), str(target))
                exec("\n".join(lines), printed)
                folded = printed["model"]
                found = [np.asarray(one) for one in keras.tree.flatten(folded.predict(inputs, verbose=0))]
                error = compare(expected, found)
                print(f"{name} {weights} {config.name}: {len(fold.plan.layers)} folded, relative error {error:.1e}")
                assert error <= TOLERANCE, name
                assert fold.plan.layers, name


def recognise_applications() -> None:
    """Weights alone of keras.applications, without a word of the model they are of."""
    for name in ZOO:
        model = getattr(applications, name)(weights=None)
        shape = [extent or 224 for extent in model.input_shape[1:]]  # some take any size
        shown = np.random.default_rng(0).uniform(-1, 1, (1, *shape)).astype(np.float32)
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "given.weights.h5"
            model.save_weights(weights)
            fold = fold_checkpoint(weights, Path(folder) / "folded.weights.h5")
            folded = keras.models.model_from_json((Path(folder) / "folded.json").read_text())
            folded.load_weights(Path(folder) / "folded.weights.h5")
            error = compare([model.predict(shown, verbose=0)], [folded.predict(shown, verbose=0)])
        print(f"{name} recognised: {len(fold.plan.layers)} folded, relative error {error:.1e}")
        assert error <= TOLERANCE, name


def published() -> None:
    """EfficientNet with published weights has a Rescaling more, which the numbers of its Normalization tell.

    No file of the server is needed: Keras loads one that is made here, by the way that it loads the published one.
    """
    source = keras.src.applications.efficientnet
    for name in ("EfficientNetB0",):
        keras.utils.clear_session()
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            model = getattr(applications, name)(weights=None)
            randomise(model, 5)
            normalization = model.get_layer("normalization")
            mean, deviation = np.asarray([0.485, 0.456, 0.406], "f4"), np.asarray(source.IMAGENET_STDDEV_RGB, "f4")
            normalization.set_weights([mean, deviation, normalization.get_weights()[2]])
            with h5py.File(folder / "published.h5", "w") as file:
                legacy_h5_format.save_weights_to_hdf5_group(file, model)
            with mock.patch.object(source.file_utils, "get_file", return_value=str(folder / "published.h5")):
                published = getattr(applications, name)(weights="imagenet")
            shown = np.random.default_rng(0).uniform(0, 255, (1, *published.input_shape[1:])).astype(np.float32)
            expected = [published.predict(shown, verbose=0)]
            for kind in ("h5", "weights.h5"):
                weights = folder / f"given.{kind}"
                if kind == "h5":
                    weights = folder / "published.h5"
                else:
                    published.save_weights(weights)
                fold = fold_checkpoint(weights, folder / f"folded.{kind}", force=True)
                folded = keras.models.model_from_json((folder / "folded.json").read_text())
                folded.load_weights(folder / f"folded.{kind}")
                error = compare(expected, [folded.predict(shown, verbose=0)])
                print(
                    f"{name} published, {kind}: {len(fold.plan.layers)} folded, relative error {error:.1e}", flush=True
                )
                assert error <= TOLERANCE, name
                (folder / "folded.json").unlink()
        if sys.argv[1:2] == ["--record-published"] and name == "EfficientNetB0":
            record_published(published)


def record_published(model: Any) -> None:
    """Weights that compress well, and the configuration that Keras gives to the model of published ones."""
    for layer in model.layers:
        if not isinstance(layer, layers.Normalization):
            layer.set_weights([np.full_like(one, 0.5 + one.ndim / 8) for one in layer.get_weights()])
    with tempfile.TemporaryDirectory() as place:
        with h5py.File(Path(place) / "published.h5", "w") as file:
            legacy_h5_format.save_weights_to_hdf5_group(file, model)
        target = RECORDED.parent / "keras_applications"
        data = (Path(place) / "published.h5").read_bytes()
        (target / "efficientnet_b0.h5.gz").write_bytes(gzip.compress(data, mtime=0))
        (target / "efficientnet_b0.json.gz").write_bytes(gzip.compress(model.to_json().encode(), mtime=0))


def splice() -> None:
    """SpliceAI's five networks with their real weights, from the package that ships them (models for research only)."""
    spec = importlib.util.find_spec("spliceai")  # its own code needs more than its files
    (place,) = spec.submodule_search_locations
    for path in sorted((Path(place) / "models").glob("*.h5")):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / path.name
            plan = fold_file(path, target)
            sequence = np.random.default_rng(0).integers(0, 4, (1, 10_200))
            before, after = (
                np.log(one[0]) for one in (compute(p, [np.eye(4, dtype="f4")[sequence]]) for p in (path, target))
            )
        error = float(np.abs(before - after).max() / np.abs(before).max())
        print(f"{path.name}: {len(plan.folds)} of {len(plan.folds) + len(plan.skips)} folded, error {error:.1e}")
        assert (len(plan.folds), len(plan.skips)) == (32, 0)
        assert error <= TOLERANCE


def zoo(names: list[str]) -> None:
    target = RECORDED / "applications.json"
    facts: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    for seed, (name, (size, wanted)) in enumerate(ZOO.items()):
        if names and name not in names:
            continue
        keras.utils.clear_session()
        model = getattr(applications, name)(weights=None, input_shape=(size, size, 3), classifier_activation=None)
        randomise(model, seed)
        with tempfile.TemporaryDirectory() as folder:
            for suffix, layout in ((".keras", "folded"), (".h5", "folded"), (".keras", "same-keys")):
                if suffix == ".h5" and name in ("MobileNetV3Small", "InceptionResNetV2"):
                    continue  # Keras cannot load what it saves: a number beside tensors in a function of keras.ops
                found = judge(name, model, Path(folder), suffix, layout)
                counts = f"{len(found['folds'])} of {len(found['folds']) + len(found['skips'])}"
                assert not wanted or counts == wanted, counts
                facts[f"{name}{suffix} {layout}"] = {"folded": counts, "error": float(f"{found['error']:.1e}")}
        target.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        record(sys.argv[2:])
    elif sys.argv[1:2] in (["--published"], ["--record-published"]):
        published()
    elif sys.argv[1:2] == ["--zoo"]:
        zoo(sys.argv[2:])
    else:
        check()
        freeze()
        splice()
        weights_alone()
        recognise_applications()
        published()
        zoo([])
