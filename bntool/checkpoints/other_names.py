"""Names that TensorFlow, Keras and libraries of JAX give the variables of layers, in PyTorch's words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bntool.checkpoints.checkpoint import ModuleInfo
from bntool.checkpoints.containers.protobufs.writing import unused_name
from bntool.names import join_name

# last parts of names that Keras, tf.layers and slim give
TENSORFLOW_ROLES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "kernel": "weight",
    "_kernel": "weight",
    "weights": "weight",
    "embeddings": "weight",
    "biases": "bias",
}
_FLAX_ROLES = {"scale": "weight", "kernel": "weight", "embedding": "weight"}
PARAMETERS, STATISTICS = "params", "batch_stats"  # the collections of Flax
_MEANS = ("moving_mean", "running_mean", "mean_ema/average", "mean")
_VARIANCES = ("moving_variance", "moving_var", "running_var", "running_variance", "var_ema/average", "variance", "var")
_AFFINE = {"gamma": "weight", "scale": "weight", "weight": "weight", "beta": "bias", "offset": "bias", "bias": "bias"}
_BARE = ("mean", "variance", "var")  # statistics of a layer only where something of a layer lies beside them
_NOT_PYTORCH = {"gamma", "beta", "moving_mean", "moving_variance", "moving_var", "kernel"}
FLAX_CLASS, TENSORFLOW_CLASS = "flax.linen.BatchNorm", "tensorflow.BatchNormalization"


@dataclass(frozen=True)
class Translation:
    """Names in PyTorch's words.

    Attributes:
        names: by the name in the file, in its order.
        modules: the layers with statistics, by their names in PyTorch's words.
    """

    names: Mapping[str, str]
    modules: Mapping[str, ModuleInfo]


def are_pytorch(names: Iterable[str]) -> bool:
    """Return whether names may be those of a state dict of PyTorch: none ends as those of others do."""
    return not any(map(_is_of_another, names))


def _is_of_another(name: str) -> bool:
    _, slash, last = name.rpartition("/")
    return bool(slash and "." not in last) or name.endswith(":0") or name.rpartition(".")[2] in _NOT_PYTORCH


def translate(paths: Mapping[str, Sequence[str]], *, kind: str = "") -> Translation:
    """Translate the names of variables to PyTorch's.

    Args:
        paths: the parts of each name, by the name.
        kind: the class of layers with statistics; "" for that of Flax or TensorFlow, as the names tell.
    """
    is_flax = any(STATISTICS in path for path in paths.values())
    split: dict[str, tuple[str, str]] = {}
    groups: dict[str, set[str]] = {}
    for name, path in paths.items():
        parts = [part for part in path if part not in ("", "~", PARAMETERS, STATISTICS)] or [name]
        width = 2 if len(parts) > 2 and f"{parts[-2]}/{parts[-1]}" in (_MEANS + _VARIANCES) else 1
        leaf = "/".join(parts[-width:]).removesuffix(":0")
        if is_flax and STATISTICS in path:
            leaf = {"mean": "moving_mean", "var": "moving_variance"}.get(leaf, leaf)
        split[name] = ".".join(parts[:-width]), leaf
        groups.setdefault(split[name][0], set()).add(leaf)
    roles = {layer: _find_statistics(leaves) for layer, leaves in groups.items()}
    others = _FLAX_ROLES if is_flax else TENSORFLOW_ROLES
    names: dict[str, str] = {}
    taken: set[str] = set()
    for name, (layer, leaf) in split.items():
        role = roles[layer].get(leaf) or others.get(leaf, leaf.replace("/", "."))
        names[name] = unused_name(join_name(layer, role), taken)
        taken.add(names[name])
    kind = kind or (FLAX_CLASS if is_flax else TENSORFLOW_CLASS)
    return Translation(names, {layer: ModuleInfo(kind, {}) for layer, found in roles.items() if found})


def _find_statistics(leaves: set[str]) -> dict[str, str]:
    """Return the roles of the variables of a layer that has a mean and a variance; empty for others."""
    mean = next((leaf for leaf in _MEANS if leaf in leaves), None)
    variance = next((leaf for leaf in _VARIANCES if leaf in leaves), None)
    affine = {leaf: role for leaf, role in _AFFINE.items() if leaf in leaves}
    if mean is None or variance is None or ((mean in _BARE or variance in _BARE) and not affine):
        return {}
    return {mean: "running_mean", variance: "running_var", **affine}
