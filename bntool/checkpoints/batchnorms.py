"""Telling normalisation layers apart by the names, shapes and dtypes of their tensors, or by their class."""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from bntool.batchnorm import AFFINE, COUNTER, ROLES, STATISTICS, BatchNorm, EpsSource, NormKind, find_class_kind
from bntool.checkpoints.checkpoint import ModuleInfo, NotUnderstood, StateDict
from bntool.checkpoints.state_dicts import FLAT_AVERAGE, flatten_average
from bntool.checkpoints.tensors import Tensor, count_elements
from bntool.names import join_name

# leaf names that give a relative of BatchNorm away
_TELLTALES = {
    "mean_weight": NormKind.SWITCH_NORM,
    "var_weight": NormKind.SWITCH_NORM,
    "running_std": NormKind.BATCH_RENORM,
    "tau": NormKind.FILTER_RESPONSE_NORM,
    "mean_scale": NormKind.GRAPH_NORM,
}


def find_norms(state_dict: StateDict) -> tuple[BatchNorm, ...]:
    """Return every normalisation layer of a state dict, in its order, BatchNorm or not.

    A layer with running_mean and running_var is a BatchNorm unless something beside them tells otherwise. InstanceNorm
    with affine and statistics has the same tensors and can only be told by its class. A vector ``weight`` and ``bias``
    without statistics belongs to LayerNorm, GroupNorm or their like where the file has module versions that say so;
    else it may belong to a BatchNorm whose statistics were not saved. A BatchNorm of a pickled module that holds no
    tensor at all is a norm without statistics.
    """
    groups = group_tensors(state_dict)
    for path, one in state_dict.modules.items():
        if one.has_statistics:
            groups.setdefault(state_dict.strip(path), {})
    if any(map(_holds_nothing, state_dict.modules.values())):
        places = {state_dict.strip(path): place for place, path in enumerate(state_dict.modules)}
        for path, one in state_dict.modules.items():
            if _holds_nothing(one):
                groups.setdefault(state_dict.strip(path), {})
        groups = dict(sorted(groups.items(), key=lambda group: places.get(group[0], len(places))))
    quantization_aware = {layer.rpartition(".")[0] for layer in groups if layer.endswith("weight_fake_quant")}
    norms = []
    for layer, tensors in groups.items():
        module = state_dict.modules.get(state_dict.prefix + layer if layer else state_dict.prefix.rstrip("."))
        version = _version(state_dict, layer)
        kind = _kind_by_class(module, tensors) or _kind_by_tensors(layer, tensors, version, quantization_aware)
        if kind is not None:
            computed = find_computed(layer, groups)
            norms.append(_make(layer, kind, tensors, module, version, computed))
    return tuple(norms)


def group_tensors(state_dict: StateDict) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each module, by the last part of their names, without the prefix of wrappers."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_dict.tensors.items():
        layer, _, leaf = state_dict.strip(name).rpartition(".")
        groups.setdefault(layer, {})[leaf] = tensor
    return groups


_CALLED_OTHERWISE = {"weight": ("gamma", "scale"), "bias": ("beta", "shift", "offset")}


def find_computed(layer: str, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[str, ...]]:
    """Return weight or bias that is not in the file while what PyTorch computes it from is, with the names of that.

    Pruning, weight_norm and spectral_norm keep ``weight_orig``, ``weight_g`` and their like beside the tensors of a
    module, a parametrization keeps ``parametrizations.weight.original`` below them. What code of one's own calls
    ``gamma`` or ``scale`` counts, too: nothing tells that it is used as a weight is.

    Args:
        groups: the tensors of each module, see :func:`group_tensors`.
    """
    own = groups.get(layer, {})
    found: dict[str, tuple[str, ...]] = {}
    for role in AFFINE:
        if role not in own:
            below = join_name(layer, f"parametrizations.{role}")
            names = [
                join_name(layer, leaf) for leaf in own if leaf.startswith(f"{role}_") or leaf in _CALLED_OTHERWISE[role]
            ]
            names += [f"{below}.{leaf}" for leaf in groups.get(below, ())]
            found |= {role: tuple(names)} if names else {}
    return found


# what profilers leave in every module (thop), and a mask of the kernel itself, which a factor of a channel passes
_IDLE = frozenset(("total_ops", "total_params"))
_MASKS = ("mask", "weight_mask")
# modules inside a convolution that run after it, or before: an activation, dropout, the offsets of a deformable one
_AROUND = re.compile(r"(?:act|activ|activation|\w*relu|drop\w*|\w*offset\w*)\d*(?:\..*)?", re.IGNORECASE)
_ADAPTERS = ("lora_", "hada_", "lokr_", "oft_", "boft_", "ia3_", "vera_")  # beside what they change, as peft has them
_WRAPPED = ("base_layer", "original_module")  # what peft calls a layer inside of what takes its place


def find_unexplained(
    layer: str, groups: Mapping[str, Mapping[str, Tensor]], norms: Collection[str], *, names: Sequence[str]
) -> tuple[str, ...]:
    """Return names of tensors of a module, or of its parts, that no convolution, linear or BatchNorm has by itself:
    nothing tells what its forward does with them.

    Adapters (LoRA) add to the weight, spectral normalisation divides by what it finds in the weight, quantisation
    rounds it with a scale that is stored apart: a weight that is changed then gives something else than it should.

    Args:
        groups: the tensors of each module, see :func:`group_tensors`.
        norms: names of normalisation layers; one that lies inside of the module runs after it.
        names: of the modules, sorted: there are many, and few are near.
    """
    own = groups.get(layer, {})
    if "weight" in own and not own["weight"].dtype.is_floating:
        return ()  # whole numbers are not changed, whatever else there is
    shape = own["weight"].shape if "weight" in own else None
    known = {*ROLES, *_IDLE, *(leaf for leaf in _MASKS if leaf in own and own[leaf].shape == shape)}
    found = [f"{layer}.{leaf}" for leaf in own if leaf not in known]
    outer, _, last = layer.rpartition(".")
    around = f"{outer}." if outer else ""
    inside = f"{layer}."
    starts = (around,) if last in _WRAPPED else tuple(around + adapter for adapter in _ADAPTERS)
    near = {outer, *(group for start in (inside, *starts) for group in _list_starting(start, names))} & groups.keys()
    for group in groups if len(near) > 1 else near:
        if group == layer or group not in near:
            continue
        if group.startswith(inside):
            is_known = _AROUND.fullmatch(group, len(inside)) or _lies_in(group, norms, inside=inside)
            found += [] if is_known else [f"{group}.{leaf}" for leaf in groups[group] if leaf not in _IDLE]
        elif group == outer:
            found += [f"{around}{leaf}" for leaf in groups[group] if leaf.startswith(_ADAPTERS)]
        else:
            found += [f"{group}.{leaf}" for leaf in groups[group]]
    return tuple(found)


def _list_starting(start: str, names: Sequence[str]) -> Iterator[str]:
    """Yield the names that start so, of names that are sorted."""
    place = bisect_left(names, start)
    while place < len(names) and names[place].startswith(start):
        yield names[place]
        place += 1


def _lies_in(group: str, norms: Collection[str], *, inside: str) -> bool:
    """Return whether a module is one of the layers that lie inside of another, or a part of one."""
    while group.startswith(inside):
        if group in norms:
            return True
        group = group.rpartition(".")[0]
    return False


def _holds_nothing(module: ModuleInfo) -> bool:
    """Return whether it is a BatchNorm of PyTorch with neither weight nor statistics, as its flags say."""
    if module.attributes.get("track_running_stats") is not False or module.attributes.get("affine") is not False:
        return False
    kind = find_class_kind(module.class_path.rpartition(".")[2])
    return kind is not None and kind.is_batch_norm


def find_flat_averages(state_dict: StateDict, norms: Sequence[BatchNorm]) -> dict[str, BatchNorm]:
    """Find the averages of BatchNorms that mmcv's EMAHook keeps beside them (``ema_bn1_running_var``).

    Each has a name of its own, with ``_`` for each dot.

    Args:
        norms: the layers of the state dict.

    Returns:
        By the name of the layer that each is an average of.
    """
    if not any(name.startswith(FLAT_AVERAGE) for name in state_dict.tensors):
        return {}
    found = {}
    for norm in norms:
        flat = flatten_average(norm.name)
        names = {role: f"{flat}_{role}" for role in norm.tensors}
        tensors = {role: state_dict.tensors[name] for role, name in names.items() if name in state_dict.tensors}
        if all(role in tensors for role in STATISTICS):
            found[norm.name] = dataclasses.replace(norm, name=flat, tensors=tensors)
    return found


# leaves of names, whatever their case: PyTorch, Keras, Paddle, Flax, Chainer, Torch7 (runningMean), Darknet
# (rolling_mean), neon (gmean), CNTK (aggregateMean), Caffe2 (rm, riv), Lasagne (mean, inv_std)
_COUNTS = ("mean", "mu", "var", "std", "sigma", "rm")
_KEPT = (
    "(?:running|run|rolling|moving|mov|pop|population|global|g|batch|bn|ema|avg|average|averaged|aggregate|accumulated|"
    "tracked|stored|est|estimated)"
)
_MEAN, _VARIANCE = "(?:mean|mu)", "(?:var|variance|std|stdev|sigma|inv_?std|inv_?var)"
# compiled where a file has such names: most have those of PyTorch alone
_MEANS = rf"{_KEPT}_?{_MEAN}(?:_?biased)?|{_MEAN}_{_KEPT}|_?mean|rm"
_VARIANCES = rf"{_KEPT}_?{_VARIANCE}(?:_?biased)?|{_VARIANCE}_{_KEPT}|_?variance|var|inv_?std|inv_?var|rv|riv"
_BARE = {"mean", "var", "variance"}
_KNOWN_STATISTICS = set(STATISTICS)
_BESIDE = {"weight", "bias", "scale", "offset", "gamma", "beta"}
_FLAX = "batch_stats"


def find_unknown_statistics(state_dict: StateDict) -> Iterator[NotUnderstood]:
    """Yield groups of tensors that look like the statistics of a normalisation, and are those of no layer that is
    known.

    A mean and a variance count, under the names of any framework, unless they are called just that and nothing beside
    them belongs to a layer: models keep mean and variance of their inputs, too. Where names have no dots but other
    marks between their parts (``layer1_bn1_running_var``), a weight must stand beside both.
    """
    known: set[str] | None = None
    groups, slashed = _group_leaves(state_dict)
    for layer, leaves in groups.items():
        # most layers hold PyTorch's, which are found by their names, or none, for which nothing has to be compiled
        if (leaves >= _KNOWN_STATISTICS and layer not in slashed) or leaves <= _BESIDE:
            continue
        means = {leaf for leaf in leaves if re.fullmatch(_MEANS, leaf.lower())}
        variances = {leaf for leaf in leaves if re.fullmatch(_VARIANCES, leaf.lower())}
        are_bare = means <= _BARE and variances <= _BARE
        if not means and not variances:
            yield from _find_flattened(state_dict, layer, leaves)
        is_beside = bool(leaves & _BESIDE) or _FLAX in layer.replace("/", ".").split(".")
        if not means or not variances or (are_bare and not is_beside):
            continue
        if known is None:
            known = {norm.name for norm in find_norms(state_dict)}
        if layer not in known:
            names = ", ".join(sorted(means | variances))
            yield NotUnderstood(layer, f"{names} look like statistics, under names that are not known")


def _group_leaves(state_dict: StateDict) -> tuple[dict[str, set[str]], set[str]]:
    """Group last parts of names that may be statistics, or stand beside them, by what is before; and what / ends."""
    groups: dict[str, set[str]] = {}
    slashed: set[str] = set()
    counting: dict[str, bool] = {}  # the same few leaves in every layer
    for name, tensor in state_dict.tensors.items():
        stripped = state_dict.strip(name)
        place = max(stripped.rfind("."), stripped.rfind("/"))
        leaf = stripped[place + 1 :]
        may_count = counting.get(leaf)
        if may_count is None:
            may_count = counting[leaf] = _may_count(leaf.lower())
        if may_count and tensor.dtype.is_floating and count_elements(tensor.shape) > 1:
            groups.setdefault(stripped[: -len(leaf) - 1], set()).add(leaf)
            if place > 0 and stripped[place] == "/":
                slashed.add(stripped[:place])
    return groups, slashed


def _find_flattened(state_dict: StateDict, parent: str, leaves: Collection[str]) -> Iterator[NotUnderstood]:
    """Yield layers whose names stand before those of their statistics in one part of a name.

    Args:
        parent: what stands before that part, in other parts.
        leaves: last parts of names.
    """
    dotted = f"{parent}." if parent else ""
    found: dict[str, dict[str, str]] = {}  # by what stands before: what is known, and under which name
    for leaf in sorted(leaves):
        match = re.fullmatch(rf"(.+?[^a-z0-9])(?:({_KEPT}_?{_MEAN})|({_KEPT}_?{_VARIANCE}))", leaf.lower())
        match = match or re.fullmatch(r"(.+_)(?:(mean)|(variance))", leaf.lower())  # of Paddle before 2
        if match is not None:
            stem = leaf[: match.end(1)]
            found.setdefault(stem, {})["mean" if match[2] else "variance"] = leaf[match.end(1) :]
    norms: Sequence[BatchNorm] | None = None
    for stem, known in found.items():
        name = f"{dotted}{stem}"
        full = state_dict.prefix + name
        beside = {one for one in _BESIDE if f"{full}{one}" in state_dict.tensors}
        is_bare = set(known.values()) <= _BARE  # a mean and variance of anything, but for what stands beside them
        if len(known) < len(STATISTICS) or not beside or (is_bare and len(beside) < len(STATISTICS)):
            continue
        norms = find_norms(state_dict) if norms is None else norms
        layer = re.sub(r"[\W_]+$", "", name)
        if layer in {flatten_average(norm.name) for norm in norms}:
            continue
        names = ", ".join(sorted(known.values()))
        yield NotUnderstood(layer, f"{names} look like statistics, under names that are not those of PyTorch")


def _may_count(leaf: str) -> bool:
    """Return whether a leaf in small letters may name a statistic, or what stands beside one."""
    return leaf in _BESIDE or leaf in ("rv", "riv") or any(part in leaf for part in _COUNTS)


def find_batchnorms(state_dict: StateDict) -> tuple[BatchNorm, ...]:
    """Return the layers that normalise by stored statistics: BatchNorm of any dimension, SyncBatchNorm,
    FrozenBatchNorm.
    """
    return tuple(norm for norm in find_norms(state_dict) if norm.kind.is_batch_norm)


def _as_float(value: object) -> float | None:
    """Convert a value of a file to a float; None where it is no number, or larger than any layer can have."""
    fits = isinstance(value, int | float) and -1e300 < value < 1e300
    return float(value) if fits else None  # type: ignore[arg-type]


def _make(
    name: str,
    kind: NormKind,
    tensors: Mapping[str, Tensor],
    module: ModuleInfo | None,
    version: int | None,
    computed: Mapping[str, tuple[str, ...]],
) -> BatchNorm:
    attributes: Mapping[str, Any] = module.attributes if module is not None else {}
    eps, momentum = attributes.get("eps"), attributes.get("momentum")
    vector = next((tensors[role] for role in (*STATISTICS, *AFFINE) if role in tensors), None)
    return BatchNorm(
        name=name,
        kind=kind,
        num_features=count_elements(vector.shape) if vector is not None else attributes.get("num_features"),
        tensors={role: tensors[role] for role in (*ROLES, *tensors) if role in tensors},
        eps=_as_float(eps),
        eps_source=EpsSource.UNKNOWN if _as_float(eps) is None else _eps_source(attributes),
        momentum=_as_float(momentum),
        class_path=module.class_path if module is not None else "",
        attributes=attributes,
        version=version,
        computed=computed,
    )


def _eps_source(attributes: Mapping[str, Any]) -> EpsSource:
    """Return the module, unless the reader says otherwise; a pickled module may say anything."""
    return EpsSource.PROTOTXT if attributes.get("eps_source") == EpsSource.PROTOTXT.value else EpsSource.MODULE


def _version(state_dict: StateDict, layer: str) -> int | None:
    if state_dict.versions is None:
        return None
    return state_dict.versions.get(state_dict.prefix + layer, state_dict.versions.get(layer))


def _kind_by_class(module: ModuleInfo | None, tensors: Mapping[str, Tensor]) -> NormKind | None:
    """Return the kind that a class name tells, where the tensors do not contradict it."""
    if module is None:
        return None
    kind = find_class_kind(module.class_path.rpartition(".")[2])
    if kind is None or not kind.is_batch_norm:
        return kind
    if not all(role in tensors for role in STATISTICS):
        return kind if module.has_statistics else NormKind.NORM_WITHOUT_STATISTICS
    return (_kind_by_tensors("", tensors, None, set()) or kind) if kind is NormKind.BATCH_NORM else kind


def _kind_by_tensors(
    layer: str, tensors: Mapping[str, Tensor], version: int | None, quantization_aware: set[str]
) -> NormKind | None:
    for leaf, kind in _TELLTALES.items():
        if leaf in tensors and _is_vector(tensors.get("weight", tensors[leaf])):
            return kind
    if all(role in tensors for role in STATISTICS):
        return _kind_with_statistics(layer, tensors, version, quantization_aware)
    if "running_var" in tensors and "v" in tensors:
        return NormKind.EVO_NORM
    if set(tensors) == {"weight", "bias"} and _is_vector(tensors["weight"]) and _is_vector(tensors["bias"]):
        return NormKind.LAYER_OR_GROUP_NORM if version == 1 else NormKind.NORM_WITHOUT_STATISTICS
    return None


def _kind_with_statistics(
    layer: str, tensors: Mapping[str, Tensor], version: int | None, quantization_aware: set[str]
) -> NormKind:
    mean, weight = tensors["running_mean"], tensors.get("weight")
    if "scale" in tensors and "zero_point" in tensors:
        return NormKind.QUANTIZED_BATCH_NORM
    if layer.rpartition(".")[2] == "bn" and layer.rpartition(".")[0] in quantization_aware:
        return NormKind.FUSED_CONV_BATCH_NORM
    if len(mean.shape) > 1 and count_elements(mean.shape) != max(mean.shape):
        return NormKind.HETERO_BATCH_NORM
    if weight is not None and _are_repeated(count_elements(mean.shape), count_elements(weight.shape)):
        return NormKind.GHOST_BATCH_NORM
    # torch before 0.4.1 had no num_batches_tracked either, but no versions: those count as BatchNorm
    if COUNTER not in tensors and weight is not None and version in (1, 3):
        return NormKind.FROZEN_BATCH_NORM
    return NormKind.BATCH_NORM


def _are_repeated(statistics: int, channels: int) -> bool:
    """Return whether there are statistics for several parts of a batch, each of as many channels as the weight has."""
    return channels > 0 and statistics > channels and statistics % channels == 0


def _is_vector(tensor: Tensor) -> bool:
    return len(tensor.shape) == 1
