"""What freezing means in other frameworks, measured; written to tests/fixtures/freezing_semantics.json with --record.

Without an argument the recorded file is held against the frameworks. docs/freezing.md shows the table.
"""

from __future__ import annotations

import json
import os
import sys
import warnings

os.environ.setdefault("KERAS_BACKEND", "torch")

import torch
from torch import nn

from tests.places import FIXTURES

REQUIREMENTS = ["torch==2.13.0", "torchvision==0.28.0", "timm", "lightning", "keras"]
RECORDED = FIXTURES / "freezing_semantics.json"


class Model(nn.Module):
    """A 2d and a 1d BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn2d = nn.BatchNorm2d(4, momentum=0.3)
        self.linear = nn.Linear(4, 4)
        self.bn1d = nn.BatchNorm1d(4, momentum=0.3)

    def forward(self, x):
        return self.bn1d(self.linear(self.bn2d(self.conv(x)).mean((2, 3))))


def measure(freeze, unfreeze=None):
    """Freeze, call train(), take one step of SGD with weight decay; what stayed."""
    torch.manual_seed(0)
    model = Model().train()
    for _ in range(3):
        model(torch.randn(8, 3, 6, 6) + 1)
    original = {key: value.clone() for key, value in model.state_dict().items()}
    keys = list(original)
    images = torch.randn(8, 3, 6, 6) * 2
    features = model.conv(images).detach()
    expected = nn.functional.batch_norm(
        features, original["bn2d.running_mean"], original["bn2d.running_var"], model.bn2d.weight, model.bn2d.bias
    ).detach()
    model = freeze(model) or model
    model.train()
    own_statistics = torch.allclose(model.bn2d(features), expected, atol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(images).square().mean().backward()
    optimizer.step()
    after = model.state_dict()

    def stays(*names):
        return all(name in after and torch.equal(after[name], original[name]) for name in names)

    facts = {
        "statistics of 2d stay": stays("bn2d.running_mean", "bn2d.running_var"),
        "statistics of 1d stay": stays("bn1d.running_mean", "bn1d.running_var"),
        "weight and bias stay": stays("bn2d.weight", "bn2d.bias", "bn1d.weight", "bn1d.bias"),
        "normalises by running statistics": bool(own_statistics),
        "same keys": list(after) == keys,
        "undo is exact": None,
    }
    if unfreeze is not None:
        model = unfreeze(model) or model
        again = model.bn2d
        facts["undo is exact"] = (
            type(again) is nn.BatchNorm2d
            and again.momentum == 0.3
            and again.training
            and int(again.num_batches_tracked) == 3
            and all(p.requires_grad for p in model.parameters())
            and list(model.state_dict()) == keys
        )
    return facts


def bntool_rows():
    from bntool.freezing.live import freeze, unfreeze

    return {
        "bntool.freeze(model)": measure(lambda m: freeze(m) and None, unfreeze),
        "bntool.freeze(model, requires_grad=False)": measure(
            lambda m: freeze(m, requires_grad=False) and None, unfreeze
        ),
    }


def freeze_bn(model):
    """The recipe of RetinaNet and many other detectors."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def recipe_rows():
    return {
        "freeze_bn() of RetinaNet, once": measure(freeze_bn, lambda m: m.train()),
        "model.eval(), then train()": measure(lambda m: m.eval(), lambda m: m.train()),
    }


def timm_rows():
    from timm.utils.model import freeze_batch_norm_2d, unfreeze_batch_norm_2d

    return {"timm freeze_batch_norm_2d": measure(freeze_batch_norm_2d, lambda m: unfreeze_batch_norm_2d(m).train())}


def lightning_rows():
    from lightning.pytorch.callbacks import BaseFinetuning

    def freeze(model):
        BaseFinetuning.freeze(model, train_bn=False)
        model.linear.requires_grad_(requires_grad=True)  # something must train

    def unfreeze(model):
        BaseFinetuning.make_trainable(model)

    return {"Lightning BaseFinetuning.freeze(train_bn=False)": measure(freeze, unfreeze)}


def keras_rows():
    """Keras has its own layers: the same questions to a model of the same kind."""
    import keras
    import numpy as np

    inputs = keras.Input((6, 6, 3))
    two = keras.layers.BatchNormalization()
    one = keras.layers.BatchNormalization()
    x = keras.layers.GlobalAveragePooling2D()(two(keras.layers.Conv2D(4, 3)(inputs)))
    model = keras.Model(inputs, one(keras.layers.Dense(4)(x)))
    images = np.random.default_rng(0).normal(1, 2, (8, 6, 6, 3)).astype("float32")
    model.compile(keras.optimizers.SGD(0.1, weight_decay=0.1), loss="mse")
    model.fit(images, np.zeros((8, 4), "float32"), epochs=3, verbose=0)
    names = [v.path for v in model.variables]
    two.trainable = one.trainable = False
    model.compile(keras.optimizers.SGD(0.1, weight_decay=0.1), loss="mse")
    before = [[v.numpy().copy() for v in layer.variables] for layer in (two, one)]
    features = np.random.default_rng(1).normal(2, 3, (8, 4, 4, 4)).astype("float32")
    same = np.allclose(
        keras.ops.convert_to_numpy(two(features, training=True)),
        keras.ops.convert_to_numpy(two(features, training=False)),
        atol=1e-5,
    )
    model.fit(images, np.zeros((8, 4), "float32"), epochs=1, verbose=0)
    after = [[v.numpy() for v in layer.variables] for layer in (two, one)]
    equal = [
        [bool(np.array_equal(a, b)) for a, b in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)
    ]
    two.trainable = one.trainable = True
    facts = {
        "statistics of 2d stay": all(equal[0][2:]),
        "statistics of 1d stay": all(equal[1][2:]),
        "weight and bias stay": all(equal[0][:2]) and all(equal[1][:2]),
        "normalises by running statistics": bool(same),
        "same keys": [v.path for v in model.variables] == names,
        "undo is exact": len(two.trainable_variables) == 2,
    }
    return {"Keras layer.trainable = False": facts}


def main() -> int:
    """Derive the rows; hold them against the recorded ones, or record them."""
    warnings.simplefilter("ignore")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # a binary for another build of torch: only its presence is wanted
        from tests.oracles.freezing_frameworks import stand_in_for_vision_operators

        stand_in_for_vision_operators()
    rows = {**bntool_rows(), **recipe_rows(), **timm_rows(), **lightning_rows(), **keras_rows()}
    if "--record" in sys.argv:
        RECORDED.write_text(json.dumps(rows, indent=1) + "\n")
        return 0
    recorded = json.loads(RECORDED.read_text())
    for name, facts in rows.items():
        print(f"{name}: {'as recorded' if recorded.get(name) == facts else f'NOT as recorded: {facts}'}")
    return 0 if recorded == rows else 1


if __name__ == "__main__":
    sys.exit(main())
