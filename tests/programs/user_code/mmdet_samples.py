"""Two batches as the models of mmdet take them."""

import torch
from mmdet.structures import DetDataSample


def batches():
    generator = torch.Generator().manual_seed(0)
    facts = {"img_shape": (64, 64), "ori_shape": (64, 64), "scale_factor": (1.0, 1.0)}
    for _ in range(2):
        images = torch.randn(1, 3, 64, 64, generator=generator)
        yield ({"inputs": images, "data_samples": [DetDataSample(metainfo=facts)]},)
