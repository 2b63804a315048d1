"""Models and data whose code raises."""

import runpy

import numpy as np

from tests.places import SAMPLES


def model():
    raise ValueError("\x1b[31mno weights")


def failing():
    model = runpy.run_path(str(SAMPLES / "digits_net.py"))["build"]()
    model.bn1.forward = lambda x: {}["nothing"]
    return model


def data():
    yield np.zeros((4, 1, 16, 16), np.float32)
    raise RuntimeError("the disk is gone")
