"""Partials, the measurement of a share of the batches as a file: written while it grows, read again, and compared with
others.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bntool.checkpoints.addresses import split_numbers
from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.dtypes import BY_NAME, FLOAT64, INT64
from bntool.checkpoints.files import quote
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.safetensors.file import Safetensors
from bntool.checkpoints.safetensors.file_writing import make_header
from bntool.checkpoints.safetensors.partial import PARTIAL_KEY, PARTIAL_VERSION, PartialContent
from bntool.checkpoints.tensors import LiteralTensor, StoredTensor, Tensor, read_bytes
from bntool.data.policies import LeftOut, OnBadData
from bntool.data.shares import Share
from bntool.errors import BntoolError, CorruptFileError, RefusedError, UnknownFormatError, UnsafeFileError
from bntool.plan import Skip, SkipReason
from bntool.recalibration.batch_tree import BatchTree, Measured, Place, find_runs
from bntool.recalibration.moments import Array, Moments, Tally
from bntool.recalibration.new_statistics import LayerFacts, Paths
from bntool.recalibration.options import Method, Precision
from bntool.representation import html_repr, short_repr
from bntool.version import __version__

_COUNTS = ("level", "index", "samples", "batches")  # int64, shape (nodes,)
_BY_LAYER = ("order", "positions", "calls")  # int64, shape (nodes, layers)
_BY_CHANNEL = ("mean", "squares", "batch_mean", "batch_squares", "variances")  # float64, shape (nodes, channels)
_LARGEST = 1 << 53  # counts up to here are exact in float64
_MOST_BYTES = 1 << 32
_FINITE = sys.float_info.max
_MOST_LEVELS = 53
_LISTED = 8  # runs of missing shards
_LONGEST = 200  # characters of what a platform is called


@dataclass(frozen=True)
class Origin:
    """The origin that partials must have in common to be merged.

    Attributes:
        checkpoint, model, data: fingerprints of the state dict, of the live model, and of the list of all batches as
            far as it can be told before it is read.
        state_dict: key of the state dict.
        data_name: the data in words, as it was given.
        method, precision, layers: how was measured, and the globs that selected layers.
        batch_size, samples, seed, on_bad_data: how data were read.
        preprocessing, preprocessing_origin: what was done to images, and who says so; None for other data.
    """

    checkpoint: str
    model: str
    data: str
    state_dict: str
    data_name: str
    method: Method
    precision: Precision
    layers: tuple[str, ...]
    batch_size: int
    samples: int | None
    seed: int
    on_bad_data: OnBadData
    preprocessing: str | None
    preprocessing_origin: str | None


@dataclass(frozen=True)
class Partial:
    """The measurement of a share of the batches.

    Attributes:
        origin: of what it was measured.
        share: which share.
        count: batches in the list of all; None while that is not known.
        position: all batches of the share before it are measured.
        is_complete: all are.
        layers: what is known of the layers, by their names in the live model, in the order in which they stand side by
            side in the nodes.
        skips: layers that were not measured, and why.
        called, read: how layers ran, see :class:`~bntool.recalibration.new_statistics.Paths`.
        platform: what last bits depend on: bntool, torch, processor, threads, device.
        nodes: what was measured, by place in the tree of all batches.
        path: of the file; None where it was not read from one.
    """

    origin: Origin
    share: Share
    count: int | None
    position: int
    is_complete: bool
    layers: Mapping[str, LayerFacts]
    skips: tuple[Skip, ...]
    called: tuple[str, ...]
    read: tuple[str, ...]
    platform: Mapping[str, Any]
    nodes: Mapping[Place, Measured]
    path: str | None = None

    __repr__ = short_repr
    _repr_html_ = html_repr

    @property
    def samples(self) -> int:
        """The number of samples that went through."""
        return sum(node.samples for node in self.nodes.values())

    @property
    def batches(self) -> int:
        """The number of batches that went through."""
        return sum(node.batches for node in self.nodes.values())

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The samples and batches that were not used, and why."""
        places = sorted(self.nodes, key=lambda place: place[1] << place[0])
        return tuple(left_out for place in places for left_out in self.nodes[place].left_out)

    @property
    def has_all_before(self) -> bool:
        """Whether all batches of the share before the position are there, but for those of which nothing was read."""
        held = sum(map(len, find_runs(self.nodes)))
        left_out = sum(one.samples for one in self.left_out)
        # of data whose length is told at their end the batches were dealt without it
        totals = {self.count, None} if self.is_complete else {self.count}
        expected = [self.share.count_before(self.position, total) for total in totals]
        return any(held - min(left_out, 1) <= count <= held + left_out for count in expected)

    @property
    def channels(self) -> dict[str, int]:
        """The number of channels of each layer."""
        return {name: facts.channels for name, facts in self.layers.items()}


@dataclass(frozen=True)
class MergedPartials:
    """All partials together.

    Attributes:
        first: one of them, for what they have in common; without numbers.
        measured: what all batches gave.
        platforms: how each was measured.
        paths: how layers ran.
    """

    first: Partial
    measured: Measured
    platforms: Sequence[Mapping[str, Any]]
    paths: Paths


def write_partial(partial: Partial, path: Path, *, force: bool) -> None:
    """Write a partial; it appears whole or not at all.

    Args:
        force: replace a file that exists.

    Raises:
        UnwritableFileError: it exists and ``force`` is not given, or the system refuses.
    """
    nodes = list(partial.nodes.items())
    tensors = {
        name: LiteralTensor(FLOAT64 if a.dtype.kind == "f" else INT64, a.shape, a.tobytes())
        for name, a in _stack(nodes, list(partial.channels.values())).items()
    }
    facts = {
        "version": PARTIAL_VERSION,
        "bntool": __version__,
        "checkpoint": {"fingerprint": partial.origin.checkpoint, "state_dict": partial.origin.state_dict},
        "model": {"fingerprint": partial.origin.model},
        "data": {
            "fingerprint": partial.origin.data,
            "name": partial.origin.data_name,
            "batches": partial.count,
            "preprocessing": partial.origin.preprocessing,
            "preprocessing_origin": partial.origin.preprocessing_origin,
        },
        "options": {
            "method": partial.origin.method.value,
            "precision": partial.origin.precision.value,
            "layers": list(partial.origin.layers),
            "batch_size": partial.origin.batch_size,
            "samples": partial.origin.samples,
            "seed": partial.origin.seed,
            "on_bad_data": partial.origin.on_bad_data.value,
        },
        "shard": [partial.share.shard + 1, partial.share.shards],
        "rank": [partial.share.rank, partial.share.ranks],
        "position": partial.position,
        "complete": partial.is_complete,
        "platform": dict(partial.platform),
        "layers": [{"module": name, **asdict(one)} for name, one in partial.layers.items()],
        "called": list(partial.called),
        "read": list(partial.read),
        "skips": [[skip.layer, skip.reason.value, skip.detail] for skip in partial.skips],
        "left_out": [[[one.reason, one.samples, one.layer] for one in node.left_out] for _, node in nodes],
    }
    header = make_header(tensors, {PARTIAL_KEY: json.dumps(facts, separators=(",", ":"))}, list(tensors))
    with OutputFiles(force=force) as output:
        stream = output.open(path)
        stream.write(header)
        for tensor in tensors.values():
            stream.write(tensor.data)
        output.flush()
        Safetensors().judge(output.temporary(path))


def _stack(nodes: Sequence[tuple[Place, Measured]], channels: Sequence[int]) -> dict[str, Array]:
    """Return the numbers of nodes as arrays, a row for each node."""
    width, starts = sum(channels), np.cumsum([0, *channels])[:-1]
    arrays = {
        "level": np.array([place[0] for place, _ in nodes], np.int64),
        "index": np.array([place[1] for place, _ in nodes], np.int64),
        "samples": np.array([node.samples for _, node in nodes], np.int64),
        "batches": np.array([node.batches for _, node in nodes], np.int64),
        "order": np.full((len(nodes), len(channels)), -1, np.int64),
        **{name: np.zeros((len(nodes), len(channels)), np.int64) for name in _BY_LAYER[1:]},
        **{name: np.zeros((len(nodes), width)) for name in _BY_CHANNEL},
    }
    for row, (_, node) in enumerate(nodes):
        arrays["order"][row, : len(node.order)] = node.order
        tally = node.tally
        if tally is not None:
            arrays["positions"][row] = np.asarray(tally.pooled.count)[starts]
            arrays["calls"][row] = np.asarray(tally.means.count)[starts]
            parts = (tally.pooled.mean, tally.pooled.squares, tally.means.mean, tally.means.squares, tally.variances)
            for name, part in zip(_BY_CHANNEL, parts, strict=True):
                arrays[name][row] = part
    return arrays


def read_partial(path: Path) -> Partial:
    """Read a partial, and hold all of it against what it can be.

    Raises:
        UnreadableFileError: the system does not give the file.
        UnknownFormatError: it is no partial, or of another version.
        CorruptFileError, UnsafeFileError: it is damaged, or built to do harm.
    """
    with open_checkpoint(path) as checkpoint:
        try:
            return replace(_read(checkpoint), path=str(path))
        except BntoolError as error:
            raise error.about(path) from error.__cause__
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CorruptFileError("the facts of this partial are not what bntool writes", path=path) from error


def _read(checkpoint: Checkpoint) -> Partial:
    if not isinstance(checkpoint.content, PartialContent):
        raise UnknownFormatError("this is no partial of bntool recalibrate")
    facts, tensors = checkpoint.content.facts, checkpoint.content.tensors
    if facts.get("version") != PARTIAL_VERSION or type(facts["version"]) is not int:
        raise UnknownFormatError(
            f"a partial of version {quote(str(facts.get('version')))}; this bntool reads version {PARTIAL_VERSION}"
        )
    data, options = facts["data"], facts["options"]
    origin = Origin(
        checkpoint=_text(facts["checkpoint"]["fingerprint"]),
        model=_text(facts["model"]["fingerprint"]),
        data=_text(data["fingerprint"]),
        state_dict=_text(facts["checkpoint"]["state_dict"]),
        data_name=_text(data["name"]),
        method=Method(options["method"]),
        precision=Precision(options["precision"]),
        layers=tuple(map(_text, options["layers"])),
        batch_size=_number(options["batch_size"]),
        samples=None if options["samples"] is None else _number(options["samples"]),
        seed=_seed(options["seed"]),
        on_bad_data=OnBadData(options["on_bad_data"]),
        preprocessing=None if data["preprocessing"] is None else _text(data["preprocessing"]),
        preprocessing_origin=None if data["preprocessing"] is None else _text(data["preprocessing_origin"]),
    )
    (number, shards), (rank, ranks) = (map(_number, pair) for pair in (facts["shard"], facts["rank"]))
    share = Share(number - 1, shards, rank, ranks)
    if not (0 <= share.shard < shards and 0 <= rank < ranks):
        raise ValueError("no such share")
    layers = {_text(one["module"]): _read_layer(one) for one in facts["layers"]}
    if len(layers) != len(facts["layers"]):
        raise ValueError("a layer twice")
    partial = Partial(
        origin=origin,
        share=share,
        count=None if data["batches"] is None else _number(data["batches"]),
        position=_number(facts["position"]),
        is_complete=facts["complete"] is True,
        layers=layers,
        skips=tuple(Skip(_text(layer), SkipReason(why), _text(detail)) for layer, why, detail in facts["skips"]),
        called=tuple(map(_text, facts["called"])),
        read=tuple(map(_text, facts["read"])),
        platform={_text(name): _plain(value) for name, value in facts["platform"].items()},
        nodes=_read_nodes(tensors, [one.channels for one in layers.values()], facts["left_out"]),
    )
    _check_places(partial)
    return partial


def _read_layer(facts: Mapping[str, Any]) -> LayerFacts:
    if facts["dtype"] not in BY_NAME or type(facts["has_counter"]) is not bool or not facts["names"]:
        raise ValueError("no such layer")
    if type(facts["eps"]) not in (int, float) or not 0 <= facts["eps"] <= _FINITE:
        raise ValueError("no such eps")
    return LayerFacts(
        name=_text(facts["name"]),
        names=tuple(map(_text, facts["names"])),
        channels=_number(facts["channels"]),
        eps=float(facts["eps"]),
        dtype=facts["dtype"],
        has_counter=facts["has_counter"],
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ValueError(f"no count: {value!r:.40}")
    return value


def _seed(value: Any) -> int:
    if type(value) is not int or not -1 << 63 <= value < 1 << 64:
        raise ValueError(f"no seed: {value!r:.40}")
    return value


def _plain(value: Any) -> str | int:
    if type(value) is not int and (not isinstance(value, str) or len(value) > _LONGEST):
        raise ValueError("nothing that a platform is called")
    return value


def _read_nodes(
    tensors: Mapping[str, Tensor], channels: Sequence[int], left_out: Sequence[Any]
) -> dict[Place, Measured]:
    arrays = dict(_read_arrays(tensors, nodes=len(left_out), layers=len(channels), channels=sum(channels)))
    nodes: dict[Place, Measured] = {}
    for row, of_node in enumerate(left_out):
        level, index, samples, batches = (int(arrays[name][row]) for name in _COUNTS)
        order = tuple(layer for layer in arrays["order"][row].tolist() if layer != -1)
        if level > _MOST_LEVELS or len(set(order)) < len(order) or (level, index) in nodes:
            raise CorruptFileError("its nodes are not those of a tree")
        if batches > 1 << level:
            raise CorruptFileError(f"a node of level {level} claims to hold {batches:,} batches")
        _check_counts(arrays["positions"][row], arrays["calls"][row], order)
        pooled, means = (np.repeat(arrays[name][row], channels) for name in _BY_LAYER[1:])
        mean, squares, batch_mean, batch_squares, variances = (arrays[name][row] for name in _BY_CHANNEL)
        nodes[level, index] = Measured(
            Tally(Moments(pooled, mean, squares), Moments(means, batch_mean, batch_squares), variances)
            if batches
            else None,
            order,
            samples,
            batches,
            tuple(
                LeftOut(_text(reason), _number(count), None if layer is None else _text(layer))
                for reason, count, layer in of_node
            ),
        )
    return nodes


def _check_counts(positions: Array, calls: Array, order: Sequence[int]) -> None:
    """Check that the counts of a node's layers agree.

    Raises:
        CorruptFileError: a layer saw values and was not called, or the other way round.
    """
    if set(np.flatnonzero(calls).tolist()) != set(order) or (positions < calls).any() or positions[calls == 0].any():
        raise CorruptFileError("a node counts values of layers that were not called, or calls without values")


def _read_arrays(
    tensors: Mapping[str, Tensor], *, nodes: int, layers: int, channels: int
) -> Iterator[tuple[str, Array]]:
    """Yield the arrays by name, with the numbers that they can hold.

    Raises:
        CorruptFileError: one is missing, has another shape or dtype, or holds a number that it cannot hold.
        UnsafeFileError: there are too many.
    """
    shapes = {
        **dict.fromkeys(_COUNTS, (nodes,)),
        **dict.fromkeys(_BY_LAYER, (nodes, layers)),
        **dict.fromkeys(_BY_CHANNEL, (nodes, channels)),
    }
    if 8 * nodes * (len(_COUNTS) + len(_BY_LAYER) * layers + len(_BY_CHANNEL) * channels) > _MOST_BYTES:
        raise UnsafeFileError("this partial claims to hold more numbers than any model has")
    for name, shape in shapes.items():
        dtype = FLOAT64 if name in _BY_CHANNEL else INT64
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype is not dtype:
            raise CorruptFileError(f"it should hold {dtype} of shape {list(shape)}", tensor=name)
        array = np.frombuffer(_read_at_once(tensor), "<f8" if dtype is FLOAT64 else "<i8").reshape(shape)
        least, most = {
            FLOAT64: (-_FINITE if name.endswith("mean") else 0.0, _FINITE),
            INT64: (-1, layers - 1) if name == "order" else (0, _LARGEST),
        }[dtype]
        # NaN is neither
        if array.size and not (array.min() >= least and array.max() <= most):
            raise CorruptFileError("it holds NaN, infinity, or a number that nothing can have", tensor=name)
        yield name, array


def _read_at_once(tensor: Tensor) -> bytes:
    """Return all elements, which a partial has without gaps."""
    if not isinstance(tensor, StoredTensor) or tensor.storage is None:
        return read_bytes(tensor)
    return tensor.storage.source.read(tensor.storage.offset, tensor.storage.nbytes)


def _check_places(partial: Partial) -> None:
    """Check the places of nodes against the share.

    Raises:
        CorruptFileError: they hold a batch twice, or one of another share.
    """
    runs = find_runs(partial.nodes)
    if any(one.stop > other.start for one, other in itertools.pairwise(runs)):
        raise CorruptFileError("its nodes hold a batch twice")
    total = partial.count
    if total is not None and runs and runs[-1].stop > total:
        raise CorruptFileError(f"it holds batches up to {runs[-1].stop} of {total}")
    if partial.is_complete and total is None:
        raise CorruptFileError("it is complete, and does not say of how many batches")
    if total is not None and partial.position > total:
        raise CorruptFileError(f"it goes on after {partial.position:,} of {total:,} batches")
    if not partial.is_complete and runs and runs[-1].stop != partial.position:
        raise CorruptFileError(f"it goes on after batch {partial.position:,}, and holds those up to {runs[-1].stop:,}")


def merge_partials(paths: Sequence[Path], *, checkpoint: Callable[[Origin], str], path: object) -> MergedPartials:
    """Read partials and merge what they hold; together they must be all batches, each once.

    One after the other is read and merged, neighbours first as far as their names are numbered: so little waits in
    memory for what comes later.

    Args:
        paths: of the files, in any order.
        checkpoint: the fingerprint of the state dict that is to be given new statistics.
        path: of its file.

    Raises:
        FileError: a file cannot be read.
        RefusedError: they do not fit; the message says which, by number. Or their sums are not finite.
    """
    tree = BatchTree()
    facts: list[Partial] = []
    fingerprint, values = "", 0
    for place in sorted(paths, key=lambda one: split_numbers(str(one))):
        partial = read_partial(place)
        name = _name(partial)
        fingerprint = fingerprint or checkpoint(partial.origin)
        if partial.origin.checkpoint != fingerprint:
            raise RefusedError(f"{name} was measured with another checkpoint than {path}", path=partial.path)
        if not partial.is_complete:
            raise RefusedError(f"{name} is not complete; the command that wrote it goes on with it", path=partial.path)
        difference = _compare(facts[0], partial) if facts else None
        if difference is not None:
            raise RefusedError(f"{name} has {difference}, which {facts[0].path} has not", path=partial.path)
        values += sum(int(np.max(one.tally.pooled.count, initial=0)) for one in partial.nodes.values() if one.tally)
        if values > _LARGEST:
            raise RefusedError(f"up to {name} there are more values than can be counted", path=partial.path)
        tree.update(partial.nodes)
        facts.append(replace(partial, nodes={place: replace(one, tally=None) for place, one in partial.nodes.items()}))
    _check_together(facts)
    measured = tree.finish()
    if measured.tally is not None and not measured.tally.is_finite:
        raise RefusedError("merged, the moments of these partials are not finite: one of them is damaged")
    return MergedPartials(
        facts[0],
        measured,
        [one.platform for one in facts],
        Paths({n for one in facts for n in one.called}, {n for one in facts for n in one.read}),
    )


def _check_together(partials: Sequence[Partial]) -> None:
    """Check that shards fit together, by number and by position."""
    first = partials[0]
    seen: dict[int, Partial] = {}
    for partial in partials:
        other = seen.setdefault(partial.share.shard, partial)
        if other is not partial:
            raise RefusedError(f"{_name(partial)} is there twice: the other is {other.path}", path=partial.path)
    edges = [-1, *sorted(seen), first.share.shards]
    missing = [range(one + 1, other) for one, other in itertools.pairwise(edges) if other - one > 1]
    if missing:
        raise RefusedError(f"{_list_shards(missing)} missing, of {first.share.shards:,}")
    places = [(place, partial) for partial in partials for place in partial.nodes]
    places.sort(key=lambda entry: entry[0][1] << entry[0][0])
    for ((level, index), one), ((other_level, other_index), other) in itertools.pairwise(places):
        if (index + 1) << level > other_index << other_level:
            raise RefusedError(
                f"{_name(one)} and {_name(other)} both hold batch {other_index << other_level:,}", path=other.path
            )
    _check_all_there(first.count or 0, find_runs(place for place, _ in places), partials)


def _check_all_there(total: int, runs: Sequence[range], partials: Sequence[Partial]) -> None:
    """Check that the partials together have all batches of the list.

    Batches of which nothing could be read leave gaps, and the samples that were left out for it are counted.

    Raises:
        RefusedError: more are missing than samples were left out.
    """
    edges = [range(0), *runs, range(total, total)]
    gaps = [range(one.stop, other.start) for one, other in itertools.pairwise(edges) if one.stop < other.start]
    left_out = sum(one.samples for partial in partials for one in partial.left_out)
    if sum(map(len, gaps)) > left_out:
        raise RefusedError(f"none of these partials holds batch {gaps[0].start:,} of {total:,}: one is damaged")


def find_difference(one: Origin, other: Origin) -> str | None:
    """Describe what two origins differ in; None where in nothing."""
    words = {
        "checkpoint": "another checkpoint",
        "model": "another model",
        "state_dict": f"the state dict {quote(other.state_dict)}",
        "method": f"the method {other.method.value}",
        "precision": f"the precision {other.precision.value}",
        "layers": f"other layers ({quote(', '.join(other.layers) or 'all')})",
        "batch_size": f"batches of {other.batch_size}",
        "samples": f"{'all' if other.samples is None else other.samples} samples",
        "seed": f"the seed {other.seed}",
        "on_bad_data": f"--on-bad-data {other.on_bad_data.value}",
        "preprocessing": f"the preprocessing {quote(str(other.preprocessing))}",
        "preprocessing_origin": f"the preprocessing of {quote(str(other.preprocessing_origin))}",
        # last: the order of samples and their batches are part of it
        "data_name": f"the data {quote(other.data_name)}",
        "data": "other data",
    }
    return next((text for name, text in words.items() if getattr(one, name) != getattr(other, name)), None)


def _compare(first: Partial, other: Partial) -> str | None:
    """Describe what two partials of different runs differ in; None where in nothing."""
    difference = find_difference(first.origin, other.origin)
    if difference is not None:
        return difference
    if first.share.shards != other.share.shards:
        return f"{other.share.shards:,} shards"
    if first.count != other.count:
        return f"a list of {other.count:,} batches"
    if first.layers != other.layers or first.skips != other.skips:
        return "other layers"
    return None


def _name(partial: Partial) -> str:
    return f"shard {partial.share.shard + 1}/{partial.share.shards}"


def _list_shards(runs: Sequence[range]) -> str:
    """List shards in words: ``shard 3 is``, ``shards 3, 7 and 9 to 64 are``."""
    shown = [f"{run.start + 1:,}" + f" to {run.stop:,}" * (len(run) > 1) for run in runs[:_LISTED]]
    shown += [f"{len(runs) - _LISTED} other runs"] if len(runs) > _LISTED else []
    listed = " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
    return f"shard {listed} is" if listed.replace(",", "").isdecimal() else f"shards {listed} are"
