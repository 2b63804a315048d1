"""The architectures of torchvision and timm, with random weights and statistics, and an input that each one runs on."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from bntool.errors import BntoolError
from bntool.graphs.traced.inputs import find_input
from bntool.modules.calling import call
from bntool.modules.finding import find_batchnorm_modules

_SIZES = (64, 96, 128, 224, 256, 299, 384, 512)
_DETECTORS = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "ssd", "fcos", "deeplab", "fcn", "lraspp")
Factory = Callable[[], nn.Module]


def import_torchvision() -> None:
    """Import torchvision also where its compiled operations do not fit the installed torch."""
    original = torch.library.register_fake

    def skip_torchvision(op, *args, **kwargs):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return original(op, *args, **kwargs)

    torch.library.register_fake = skip_torchvision
    try:
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = original


def list_architectures() -> dict[str, Factory]:
    """All names that torchvision and timm list, and what builds each; nothing is downloaded."""
    import_torchvision()
    import timm
    import torchvision

    found: dict[str, Factory] = {}
    for name in torchvision.models.list_models():
        found[f"torchvision:{name}"] = lambda name=name: _build_torchvision(name)
    for name in timm.list_models():
        found[f"timm:{name}"] = lambda name=name: _build_timm(name)
    return found


def _build_timm(name: str) -> nn.Module:
    import timm

    # these take one size only; at the usual one a forward of the larger takes minutes
    smaller = {"img_size": 64} if name.startswith(("coatnet", "maxvit", "volo")) else {}
    return timm.create_model(name, pretrained=False, **smaller)


def _build_torchvision(name: str) -> nn.Module:
    import torchvision

    options: dict[str, object] = {"weights": None}
    if name.startswith(_DETECTORS):
        options["weights_backbone"] = None
    if "resnet50_fpn" in name:  # a detector, which makes images of any size as large as this
        options |= {"min_size": 224, "max_size": 224}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return torchvision.models.get_model(name, **options)


def order_architectures(names: Iterable[str], *, seed: int) -> list[str]:
    """One of each family first, by name; then the others as drawn by chance.

    A family is a source file of the package and the first word of the name without its numbers: ``resnet18``,
    ``resnet50`` and ``resnet50_gn`` are one family, ``resnet50d`` is another. The shortest name stands for it.
    """
    from timm.models import _registry

    modules: Mapping[str, str] = _registry._model_to_module
    families: dict[tuple[str, str, str], str] = {}
    for name in sorted(names, key=lambda name: (len(name), name)):
        package, _, plain = name.partition(":")
        word = re.sub(r"\d+", "", plain.removeprefix("tf_").partition("_")[0])
        families.setdefault((package, modules.get(plain, ""), word), name)
    first = sorted(families.values())
    others = sorted(set(names) - set(first))
    random.Random(seed).shuffle(others)
    return first + others


def find_family(name: str) -> str:
    """The source file of a timm architecture, or the first word of a torchvision one."""
    from timm.models import _registry

    package, _, plain = name.partition(":")
    return _registry._model_to_module.get(plain, plain) if package == "timm" else re.split(r"[\d_]", plain)[0]


def randomise(model: nn.Module, seed: int, *, negative: float = 0.2) -> None:
    """Statistics, scales and shifts of every BatchNorm: of both signs, some tiny, none harmless.

    Args:
        negative: share of the scales that are.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in find_batchnorm_modules(model).values():
        tensors = {**module._parameters, **module._buffers}
        if tensors.get("running_var") is None:
            continue
        size = tensors["running_var"].shape
        sign = torch.where(torch.rand(size, generator=generator) < negative, -1.0, 1.0)
        weight = (0.5 + torch.rand(size, generator=generator)) * sign
        weight[torch.rand(size, generator=generator) < 0.05] = 1e-6
        with torch.no_grad():
            tensors["running_mean"].copy_(torch.randn(size, generator=generator) * 0.3)
            tensors["running_var"].copy_(0.5 + torch.rand(size, generator=generator))
            if tensors.get("weight") is not None:
                tensors["weight"].copy_(weight)
            if tensors.get("bias") is not None:
                tensors["bias"].copy_(torch.randn(size, generator=generator) * 0.3)


def find_zoo_input(model: nn.Module):
    """The smallest usual image that the model runs on, in float64."""
    with torch.no_grad():
        for size in _SIZES:
            inputs = torch.randn(2, 3, size, size, dtype=torch.float64)
            try:
                call(model, inputs)
            except BntoolError:
                continue
            return inputs
    return find_input(model)
