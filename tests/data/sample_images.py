"""Images that the tests and the oracle of preprocessing share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SIZES = [(301, 200), (150, 333), (97, 64)]


def make_image(size: tuple[int, int]) -> Image:
    """Smooth and sharp parts, the same on every machine; ``size`` is (width, height)."""
    from PIL import Image

    width, height = size
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 // width, y * 255 // height, (x // 7 + y // 5) % 2 * 200]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))
