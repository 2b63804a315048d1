"""Weights of Darknet, run by OpenCV; what it computes is recorded in tests/fixtures/interop/darknet.

Without an argument it holds the recorded outputs against OpenCV; with --record it writes them down for new inputs.
"""

from __future__ import annotations

import sys

import cv2
import numpy as np

from tests.places import INTEROP

REQUIREMENTS = ["opencv-python-headless==4.14.0.94", "numpy"]  # 5 cannot read Darknet
RECORDED = INTEROP / "darknet"


def run(inputs: np.ndarray) -> np.ndarray:
    network = cv2.dnn.readNetFromDarknet(str(RECORDED / "tiny.cfg"), str(RECORDED / "tiny.weights"))
    network.setInput(inputs)
    return np.array(network.forward())


if __name__ == "__main__":
    answer = np.load(RECORDED / "answer.npz")
    inputs = answer["inputs"]
    if sys.argv[1:] == ["--record"]:
        inputs = np.random.default_rng(0).normal(size=inputs.shape).astype("f4")
        np.savez(RECORDED / "answer.npz", inputs=inputs, outputs=run(inputs))
    else:
        error = np.abs(run(inputs) - answer["outputs"]).max() / np.abs(answer["outputs"]).max()
        print(f"outputs of {cv2.__version__}: relative difference {error:.1e}")
        assert error <= 1e-6
