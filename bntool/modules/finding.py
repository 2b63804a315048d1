"""Finding BatchNorm modules of every kind in a live model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from bntool.batchnorm import DEFAULT_EPS, STATISTICS, NormKind, find_class_kind, selects
from bntool.checkpoints.checkpoint import ModuleInfo
from bntool.checkpoints.state_dicts import find_prefix
from bntool.errors import RefusedError, UsageError
from bntool.names import join_name
from bntool.plan import Skip, SkipReason

_WRAPPERS = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel, AveragedModel)
# what gives away a relative that normalises otherwise
_FOREIGN_TENSORS = ("running_std", "mean_weight", "var_weight", "zero_point", "v", "tau")

_ONLY_THESE = "and only running_mean and running_var are known as statistics"

ORIGINAL = "_bntool_original"  # on the class of a frozen module: the one that it had


def original_class(kind: type) -> type[torch.nn.Module]:
    """Return the class that a frozen module had; its own where it is not frozen."""
    return next((vars(base)[ORIGINAL] for base in kind.__mro__ if ORIGINAL in vars(base)), kind)


def check_is_model(model: object, *, for_files: str) -> None:
    """Check that what a caller gave as a live model is one.

    Args:
        for_files: the function that does the same to a file.

    Raises:
        UsageError: it is something else, as a path or a state dict.
    """
    if not isinstance(model, torch.nn.Module):
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        given = f"the class {kind}" if isinstance(model, type) else f"an object of the type {kind}"
        raise UsageError(f"a live model is needed, not {given}; for a file there is bntool.{for_files}")


def walk_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield every module under every name it has, the model itself as ``""``, in order of definition.

    Unlike ``named_modules()`` this lists a shared module under each of its names, and does not rely on methods that a
    model may have overridden.
    """
    yield from _walk(model, "", ())


def _walk(
    module: torch.nn.Module, name: str, above: tuple[torch.nn.Module, ...]
) -> Iterator[tuple[str, torch.nn.Module]]:
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None and child is not module and not any(child is parent for parent in above):
            yield from _walk(child, join_name(name, child_name), (*above, module))


def find_batchnorm_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return every module that normalises as BatchNorm, once, under the first of its names.

    BatchNorm1d/2d/3d, SyncBatchNorm and subclasses, lazy ones before their first call (see :func:`is_uninitialized`),
    those without statistics (``track_running_stats=False``), FrozenBatchNorm as torchvision, timm and detectron2 write
    it, and classes of one's own with running_mean and running_var for each channel. InstanceNorm, quantised BatchNorm
    and relatives like BatchRenorm are not.
    """
    found: dict[str, torch.nn.Module] = {}
    seen: set[int] = set()
    for name, module in walk_modules(model):
        if id(module) not in seen and is_batchnorm(module):
            seen.add(id(module))
            found[name] = module
    return found


def find_scripted(model: torch.nn.Module) -> list[str]:
    """Find BatchNorms inside parts that are TorchScript programs: these can be neither watched nor replaced."""
    return [
        name
        for name, module in walk_modules(model)
        if isinstance(module, torch.jit.ScriptModule)
        and (kind := find_class_kind(_class_name(module))) is not None
        and kind.is_batch_norm
    ]


def find_names(model: torch.nn.Module) -> dict[torch.nn.Module, tuple[str, ...]]:
    """Return all names under which a model holds each of its modules."""
    names: dict[torch.nn.Module, tuple[str, ...]] = {}
    for name, module in walk_modules(model):
        names[module] = (*names.get(module, ()), name)
    return names


def is_batchnorm(module: torch.nn.Module) -> bool:
    """Return whether a module normalises as BatchNorm does, by its class and its tensors."""
    if "running_mean" in module._non_persistent_buffers_set:  # what took the place of one that was folded
        return False
    kind = find_class_kind(_class_name(module))
    # what is compiled has no hooks, and nothing of it can be replaced
    if isinstance(module, torch.jit.ScriptModule | _InstanceNorm) or (kind is not None and not kind.is_batch_norm):
        return False
    if any(tensor in module._buffers or tensor in module._parameters for tensor in _FOREIGN_TENSORS):
        return False
    if is_uninitialized(module):
        return isinstance(module, _BatchNorm)
    statistics = [module._buffers.get(role) for role in STATISTICS]
    if any(tensor is None for tensor in statistics):
        return isinstance(module, _BatchNorm)
    shapes = {tuple(tensor.shape) for tensor in statistics if tensor is not None}
    shapes |= {
        tuple(t.shape) for t in (module._parameters.get("weight"), module._buffers.get("weight")) if t is not None
    }
    # of whatever class: one of one's own around torch.nn.functional.batch_norm has the same tensors
    return len(shapes) == 1 and len(next(iter(shapes))) == 1


def find_eps(module: torch.nn.Module) -> float:
    """Return what a BatchNorm adds to its variance; PyTorch's default where its class keeps it elsewhere."""
    eps = read_eps(module)
    return DEFAULT_EPS if eps is None else eps


def read_eps(module: torch.nn.Module) -> float | None:
    """Return the attribute ``eps`` of a module, a number or a tensor of one element; None where there is no such
    thing.
    """
    eps = getattr(module, "eps", None)
    if isinstance(eps, torch.Tensor) and eps.numel() == 1 and not eps.is_meta:
        # 1e-3 in float32 is meant to be 1e-3
        return float(f"{float(eps):.6g}") if eps.dtype is torch.float32 else float(eps)
    return float(eps) if isinstance(eps, int | float) else None


def has_statistics(module: torch.nn.Module) -> bool:
    """Return whether a module keeps running statistics."""
    return all(module._buffers.get(role) is not None for role in STATISTICS)


def normalises_by_statistics(module: torch.nn.Module) -> bool:
    """Return whether a module has running statistics in eval mode, be they kept or computed (by a parametrization)."""
    return all(getattr(module, role, None) is not None for role in STATISTICS)


def has_other_statistics(module: torch.nn.Module) -> bool:
    """Return whether a module keeps statistics as BatchNorm does and its class says that it is none: InstanceNorm and
    such.
    """
    kept = "running_mean" not in module._non_persistent_buffers_set
    return module._buffers.get("running_mean") is not None and kept and not is_batchnorm(module)


def find_unread_statistics(model: torch.nn.Module) -> dict[str, tuple[str, str]]:
    """Return modules that seem to keep a mean and a variance of each channel under other names than BatchNorm, and the
    names.

    Classes of one's own may call them as another framework does: nothing tells which is which for sure.
    """
    found = {}
    for name, module in walk_modules(model):
        vectors = {key: tensor for key, tensor in module._buffers.items() if tensor is not None and tensor.ndim == 1}
        means = [key for key in vectors if "mean" in key.lower()]
        variances = [key for key in vectors if "var" in key.lower()]
        one = len(means) == len(variances) == 1 and means != variances
        if one and means != ["running_mean"] and vectors[means[0]].shape == vectors[variances[0]].shape:
            found[name] = (means[0], variances[0])
    return found


def describe_unread_statistics(model: torch.nn.Module) -> str:
    """Describe which modules hold statistics that are not read, in a clause for a message; "" where there are none."""
    modules = dict(walk_modules(model))
    said = [
        f"{type(modules[path]).__name__} ({path or 'the model itself'}) has {mean} and {variance}"
        for path, (mean, variance) in find_unread_statistics(model).items()
    ]
    more = f" and {len(said) - 1:,} more" if len(said) > 1 else ""
    return f"{said[0]}{more}, {_ONLY_THESE}" if said else ""


def skip_unread_statistics(model: torch.nn.Module, globs: Sequence[str], *, prefix: str) -> list[Skip]:
    """Skip those of these modules that globs select.

    Args:
        globs: on names without the prefix; none for all.
        prefix: what wrappers put before all names.
    """
    modules = dict(walk_modules(model))
    return [
        Skip(
            path.removeprefix(prefix),
            SkipReason.NOT_RECOGNISED,
            f"{type(modules[path]).__name__} has {mean} and {variance}, {_ONLY_THESE}",
        )
        for path, (mean, variance) in find_unread_statistics(model).items()
        if selects(globs, path.removeprefix(prefix)) and mean.lower() != "mean"  # those may be constants of the data
    ]


def is_frozen_class(module: torch.nn.Module) -> bool:
    """Return whether a module is a FrozenBatchNorm: its class never updates statistics."""
    return not isinstance(module, _BatchNorm) and find_class_kind(_class_name(module)) is NormKind.FROZEN_BATCH_NORM


def is_uninitialized(module: torch.nn.Module) -> bool:
    """Return whether a lazy module has not seen its first batch: its tensors have no shape yet."""
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return any(tensor is not None and is_lazy(tensor) for tensor in tensors)


def check_has_elements(model: torch.nn.Module) -> None:
    """Refuse models that compute nothing yet.

    Raises:
        RefusedError: a module is lazy and has seen no batch, or a tensor is on the meta device.
    """
    for name, module in walk_modules(model):
        if is_uninitialized(module):
            raise RefusedError("this lazy layer has no weights yet: run the model once", tensor=name)
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(tensor is not None and tensor.is_meta for tensor in tensors):
            raise RefusedError("the model is on the meta device, which computes nothing", tensor=name)


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside of DataParallel, DDP, torch.compile and AveragedModel: these hand ``train()`` on to
    it.
    """
    wrapped = model._modules.get("_orig_mod")
    if wrapped is None and isinstance(model, _WRAPPERS):
        wrapped = model._modules["module"]
    return model if wrapped is None else unwrap(wrapped)


def find_wrapper_prefix(model: torch.nn.Module) -> str:
    """Find the prefix that wrappers (DataParallel, DDP, torch.compile, AveragedModel) put before all names of a model.

    Layers of a live model are called as ``named_modules()`` of the model inside calls them.
    """
    inner = unwrap(model)
    path = next(name for name, module in walk_modules(model) if module is inner)
    return f"{path}." if path else ""


def find_name_prefix(model: torch.nn.Module, names: Iterable[str]) -> str:
    """Find what a model puts before names of tensors or modules that come from a plan or a file.

    Names of a file go without what all its keys begin with, be it of a wrapper or the one attribute that holds
    everything (``model.``); those of a plan for the live model only without that of wrappers.
    """
    wrapper, whole = find_wrapper_prefix(model), find_prefix(list(model.state_dict(keep_vars=True)))
    if wrapper == whole:
        return wrapper
    paths = {name for name, _ in walk_modules(model)}
    parents = [name.rpartition(".")[0] for name in names]

    def count(prefix: str) -> int:
        return sum((prefix + parent).strip(".") in paths for parent in parents)

    return max((wrapper, whole), key=count)


def describe_producers(model: torch.nn.Module, names: Iterable[str]) -> dict[str, ModuleInfo]:
    """Describe the convolutions and linears of a model: which are transposed, and their groups.

    Args:
        names: of some of its modules, without prefix; those of other classes are left out.
    """
    names = list(names)
    prefix = find_name_prefix(model, [f"{name}." for name in names])
    modules = dict(walk_modules(model))
    found = {}
    for name in names:
        module = modules.get(prefix + name)
        if isinstance(module, _ConvNd):
            class_name = "ConvTranspose" if isinstance(module, _ConvTransposeNd) else "Conv"
            found[name] = ModuleInfo(class_name, {"groups": module.groups})
        elif isinstance(module, torch.nn.Linear):
            found[name] = ModuleInfo("Linear", {})
    return found


def _class_name(module: torch.nn.Module) -> str:
    # TorchScript modules keep the name of the class that they were made from
    return str(getattr(module, "original_name", "") or type(module).__name__)
