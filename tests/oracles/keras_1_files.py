"""Files of Keras 1 on both of its backends, folded by bntool and run by Keras 1.

They are recorded in tests/fixtures/interop/keras_1.

Without an argument it folds the recorded files anew and holds what comes out, and what was recorded, against Keras 1;
with --record it makes them. Keras 1 has one backend for a process, so that a process is started for each.
"""

import os
import subprocess
import sys
import tempfile
import warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("KERAS_BACKEND", "theano")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ.setdefault("THEANO_FLAGS", "device=cpu,floatX=float32,optimizer=None,cxx=")

import numpy as np

if os.environ["KERAS_BACKEND"] == "theano":
    import theano.ifelse  # Keras 1 takes it for imported
from keras import backend
from keras.layers import (
    Activation,
    AtrousConvolution2D,
    AveragePooling2D,
    BatchNormalization,
    Convolution1D,
    Convolution2D,
    Convolution3D,
    Deconvolution2D,
    Dense,
    Dropout,
    Flatten,
    GlobalAveragePooling2D,
    Input,
    MaxPooling2D,
    Merge,
    SeparableConvolution2D,
    TimeDistributed,
    ZeroPadding2D,
    merge,
)
from keras.models import Model, Sequential, load_model, model_from_json

PYTHON = "3.7"
REQUIREMENTS = ["numpy==1.18.5", "scipy==1.4.1", "h5py==2.10.0", "pyyaml<6", "six", "setuptools<60", "theano==1.0.5",
                "tensorflow==1.15.5", "protobuf<3.21", "keras==1.2.2"]  # fmt: skip
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
RECORDED = os.path.join(ROOT, "tests", "fixtures", "interop", "keras_1")
TOLERANCE = 1e-5  # of the largest output
BACKENDS = ("theano", "tensorflow")
AXIS = {"th": 1, "tf": -1}


def image(order, channels, size):
    return (channels, size, size) if order == "th" else (size, size, channels)


def norm(order, name, **options):
    return BatchNormalization(axis=AXIS[order], name=name, **options)


def sequential(order):
    model = Sequential()
    model.add(Convolution2D(4, 3, 3, input_shape=image(order, 3, 8), name="c1"))
    model.add(norm(order, "n1", epsilon=1e-4))
    model.add(Activation("relu"))
    model.add(Convolution2D(5, 2, 2, bias=False, border_mode="same", subsample=(2, 2), name="c2"))
    model.add(Dropout(0.5))
    model.add(norm(order, "n2"))
    model.add(MaxPooling2D())
    model.add(norm(order, "n3"))
    model.add(Flatten())
    model.add(Dense(6, bias=False, name="d1"))
    model.add(BatchNormalization(name="n4", mode=0))
    model.add(Dense(2, name="d2", activation="softmax"))
    return model


def branches(order):
    """One branch is as long as the other without its BatchNorms: Keras then orders layers anew."""
    x = inputs = Input(image(order, 3, 8))
    a = norm(order, "an1")(Convolution2D(4, 1, 1, name="a1", bias=False)(x))
    a = norm(order, "an2")(Convolution2D(4, 3, 3, name="a2", border_mode="same")(a))
    a = Convolution2D(4, 1, 1, name="a3")(a)
    b = Activation("relu")(Convolution2D(4, 1, 1, name="b1")(x))
    b = Activation("relu")(AtrousConvolution2D(4, 3, 3, atrous_rate=(2, 2), border_mode="same", name="b2")(b))
    b = norm(order, "bn")(Convolution2D(4, 1, 1, name="b3")(b))
    x = Activation("tanh")(merge([a, b], mode="sum"))
    y = norm(order, "yn")(AveragePooling2D()(Convolution2D(2, 1, 1, name="y")(x)))
    z = Convolution2D(3, 2, 2, subsample=(2, 2), name="z", bias=False)(norm(order, "before_z")(x))
    x = norm(order, "of_both")(merge([y, z], mode="concat", concat_axis=AXIS[order]))
    x = norm(order, "after_activation")(Activation("sigmoid")(x))
    x = Convolution2D(2, 3, 3, name="padded")(ZeroPadding2D((1, 1))(x))
    x = norm(order, "by_batch", mode=2)(Convolution2D(2, 1, 1, name="last")(x))
    return Model(inputs, GlobalAveragePooling2D()(x))


def transposed(order):
    x = inputs = Input(batch_shape=(2, *image(order, 3, 4)))
    shape = (2, *image(order, 5, 8))
    x = Deconvolution2D(5, 2, 2, shape, subsample=(2, 2), name="up", bias=False)(x)
    x = Activation("relu")(norm(order, "n1")(x))
    if backend.backend() == "tensorflow":
        x = norm(order, "n2")(SeparableConvolution2D(4, 3, 3, name="s", bias=False)(x))
    return Model(inputs, x)


def other_dimensions(order):
    one = Input((9, 3))
    x = BatchNormalization(name="n1")(Convolution1D(4, 3, name="c1", bias=False)(one))
    x = Flatten()(BatchNormalization(name="n2")(TimeDistributed(Dense(3, name="inner"), name="each")(x)))
    three = Input((2, 4, 4, 4) if order == "th" else (4, 4, 4, 2))
    y = norm(order, "n3")(Convolution3D(3, 2, 2, 2, name="c3", bias=False)(three))
    return Model([one, three], merge([x, Flatten()(y)], mode="concat"))


def nested(order):
    """The inner model has no name in the configuration."""
    inner = Sequential()
    inner.add(Convolution2D(4, 3, 3, input_shape=image(order, 3, 8), name="c1", bias=False))
    inner.add(norm(order, "n1"))
    inner.add(Activation("relu"))
    inner.add(Convolution2D(3, 1, 1, name="c2"))
    inner.add(norm(order, "n2"))
    model = Sequential([inner])
    model.add(Flatten())
    model.add(Dense(3, name="d"))
    model.add(BatchNormalization(name="n3"))
    return model


def merged(order):
    """A Merge of models that begins a Sequential model: bntool only lists it."""
    parts = []
    for name in ("left", "right"):
        part = Sequential()
        part.add(Convolution2D(2, 3, 3, input_shape=image(order, 3, 8), name=name, bias=False))
        part.add(norm(order, name + "_norm"))
        parts.append(part)
    model = Sequential([Merge(parts, mode="sum")])
    model.add(Convolution2D(2, 1, 1, name="last"))
    model.add(norm(order, "norm"))
    return model


MODELS = {build.__name__: build for build in (sequential, branches, transposed, other_dimensions, nested)}


def randomise(model, seed):
    random = np.random.RandomState(seed)
    for layer in model.layers:
        if isinstance(layer, Sequential):
            randomise(layer, seed)
            continue
        weights = layer.get_weights()
        if isinstance(layer, BatchNormalization):
            shape = weights[0].shape
            scales = random.uniform(0.5, 1.5, shape) * random.choice([-1, 1], shape, p=[0.2, 0.8])
            weights = [
                scales,
                random.normal(0, 0.5, shape),
                random.normal(0, 0.5, shape),
                random.uniform(0.5, 1.5, shape),
            ]
        else:
            weights = [random.normal(0, 0.3, one.shape) for one in weights]
        layer.set_weights(weights)


def compute(model):
    random = np.random.RandomState(7)
    shapes = model.input_shape if isinstance(model.input_shape, list) else [model.input_shape]
    given = [random.normal(size=(2,) + tuple(shape[1:])).astype("float32") for shape in shapes]
    found = model.predict(given, batch_size=2)
    return np.asarray(found)


def fold(source, target, *options):
    command = [os.environ["BNTOOL_PYTHON"], "-m", "bntool", "fold", source, "-o", target, "--force", *options]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def compare(name, expected, found):
    error = float(np.abs(expected - found).max() / np.abs(expected).max())
    print("%s on %s: relative error %.1e" % (name, backend.backend(), error), flush=True)
    assert error <= TOLERANCE, name


def run(orders, recording):
    for order in orders:
        backend.set_image_dim_ordering(order)
        for seed, (kind, build) in enumerate(sorted(MODELS.items())):
            if order == "tf" and backend.backend() == "theano" and kind in ("other_dimensions", "nested"):
                continue  # Theano's Convolution3D has no such order; what is nested does not depend on it
            name = "%s-%s-%s" % (kind, backend.backend(), order)
            source, folded = (os.path.join(RECORDED, name + end) for end in (".h5", ".folded.h5"))
            backend.clear_session() if backend.backend() == "tensorflow" else None
            if recording:
                model = build(order)
                randomise(model, seed)
                model.save(source)
                fold(source, folded)
            model = load_model(source)
            expected = compute(model)
            with tempfile.TemporaryDirectory() as folder:
                alone, config = os.path.join(folder, "alone.h5"), os.path.join(folder, "model.json")
                model.save_weights(alone)
                with open(config, "w") as file:
                    file.write(model.to_json())
                other = os.path.join(folder, "folded.h5")
                compare(name + " as recorded", expected, compute(load_model(folded)))
                fold(source, other)
                compare(name + " folded again", expected, compute(load_model(other)))
                fold(alone, other, "--keras-config", config)
                with open(os.path.join(folder, "folded.json")) as file:
                    model = model_from_json(file.read())
                model.load_weights(other)
                compare(name + " weights alone", expected, compute(model))


def train_frozen():
    """Keras 1 moves the statistics of a layer that is told not to train."""
    model = Sequential([BatchNormalization(input_shape=(3,), trainable=False)])
    model.compile("sgd", "mse")
    before = model.get_weights()
    model.fit(np.random.normal(2, 3, (64, 3)), np.zeros((64, 3)), nb_epoch=2, verbose=0)
    moved = [not np.array_equal(a, b) for a, b in zip(before, model.get_weights())]  # noqa: B905 of Python 3.10
    assert moved == [False, False, True, True], moved
    print("trainable = False: gamma and beta stay, the statistics move")


if __name__ == "__main__":
    recording = sys.argv[1:2] == ["--record"]
    if os.environ.get("ONE_BACKEND"):
        run(("th", "tf"), recording)
        train_frozen()
        if recording and backend.backend() == "theano":
            backend.set_image_dim_ordering("th")
            model = merged("th")
            randomise(model, 9)
            model.save(os.path.join(RECORDED, "merged.h5"))
    else:
        if recording and not os.path.isdir(RECORDED):
            os.makedirs(RECORDED)
        for one in BACKENDS:
            environment = dict(os.environ, KERAS_BACKEND=one, ONE_BACKEND="1")
            subprocess.run([sys.executable, *sys.argv], check=True, env=environment)
