"""The names of blobs after layers were taken out of a net.

A name stands for what was written under it last, so that one name can stand for several blobs, one after the other.
Where a layer is taken out, those that read its top read its bottom, under a name by which they find it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bntool.checkpoints.caffe.layers import Layer, Wiring
from bntool.checkpoints.containers.protobufs.writing import unused_name
from bntool.checkpoints.files import quote
from bntool.errors import RefusedError

Blob = tuple[int | None, str]  # the layer that writes it, None for an input of the net, and its name there
Place = tuple[int, int]  # a layer, and which of its bottoms or tops


@dataclass(frozen=True)
class Renaming:
    """New names of blobs after layers were taken out.

    Attributes:
        tops, bottoms: those that have another name, by layer and place.
    """

    tops: Mapping[Place, str]
    bottoms: Mapping[Place, str]


def can_remove(wiring: Wiring, first: Layer, last: Layer) -> bool:
    """Return whether a layer and the one that alone reads it, or one alone, can be removed, with others like them or
    not, and the net keeps its results: a blob that a layer reads is none.
    """
    if any(len(layer.bottoms) != 1 or len(layer.tops) != 1 for layer in (first, last)):
        return False
    source = wiring.producers[first.index][0], first.bottoms[0]
    if source[0] is None:
        return bool(wiring.readers.get(last.index)) or first.bottoms == last.tops
    return len(wiring.readers_of_blobs[source]) == 1 or last.index not in wiring.leading_to_results


def find_renaming(wiring: Wiring, removed: frozenset[int]) -> Renaming:
    """Find the names that change when layers are removed; results of the net keep theirs.

    Raises:
        RefusedError: one of them has several bottoms or tops, one blob would be two results of the net, an input and
            a result, or a result that other layers read, or two of those would need one name at a time.
    """
    for index in removed:
        layer = wiring.layers[index]
        if len(layer.bottoms) != 1 or len(layer.tops) != 1:
            raise RefusedError("it has several bottoms or tops", tensor=layer.name)
    return _Names(wiring, removed).find()


class _Names:
    def __init__(self, wiring: Wiring, removed: frozenset[int]) -> None:
        self._wiring, self._removed = wiring, removed
        self._kept = [layer for layer in wiring.layers if layer.index not in removed]
        self._read = {self._blob(layer, place) for layer in self._kept for place in range(len(layer.bottoms))}
        self._fixed: dict[Blob, None] = {}  # results of the net
        self._names: dict[Blob, str] = {}
        self._taken = {name for layer in wiring.layers for name in (*layer.bottoms, *layer.tops)}

    def find(self) -> Renaming:
        read = {self._blob_before(layer, place) for layer in self._wiring.layers for place in range(len(layer.bottoms))}
        last = {top: layer for layer in self._wiring.layers for top in layer.tops}
        for top, layer in last.items():
            if (layer.index, top) not in read:
                self._fix(layer, top)
        for index in sorted(self._removed):
            self._prefer(self._wiring.layers[index])
        while (found := self._find_hidden()) is not None:
            self._rename(*found)
        tops = {
            (layer.index, place): self._name((layer.index, top))
            for layer in self._kept
            for place, top in enumerate(layer.tops)
        }
        bottoms = {
            (layer.index, place): self._name(self._blob(layer, place))
            for layer in self._kept
            for place in range(len(layer.bottoms))
        }
        layers = self._wiring.layers
        return Renaming(
            {(index, place): name for (index, place), name in tops.items() if layers[index].tops[place] != name},
            {(index, place): name for (index, place), name in bottoms.items() if layers[index].bottoms[place] != name},
        )

    def _name(self, blob: Blob) -> str:
        return self._names.get(blob, blob[1])

    def _blob_before(self, layer: Layer, place: int) -> Blob:
        """Return the blob that a layer reads in the net as it was."""
        return self._wiring.producers[layer.index][place], layer.bottoms[place]

    def _blob(self, layer: Layer, place: int) -> Blob:
        """Return the blob that a layer reads without those that are removed."""
        return self._resolve(self._blob_before(layer, place))

    def _resolve(self, blob: Blob) -> Blob:
        while blob[0] is not None and blob[0] in self._removed:
            blob = self._blob_before(self._wiring.layers[blob[0]], 0)
        return blob

    def _fix(self, layer: Layer, top: str) -> None:
        """Let a result of the net keep its name."""
        blob = self._resolve((layer.index, top))
        if layer.index in self._removed and (blob[0] is None or blob in self._fixed) and self._name(blob) != top:
            raise RefusedError("its input and its output are both results of the net", tensor=layer.name)
        if layer.index in self._removed and blob in self._read:
            raise RefusedError("its output is a result of the net, and other layers read its input", tensor=layer.name)
        self._fixed[blob] = None
        self._names[blob] = top

    def _prefer(self, layer: Layer) -> None:
        """Give what a removed layer alone reads the name of what that wrote."""
        before = self._blob_before(layer, 0)
        blob = self._resolve(before)
        alone = before[0] is not None and self._wiring.only_reader(self._wiring.layers[before[0]]) is layer
        if alone and blob[0] is not None and blob not in self._fixed and self._is_chain(before, blob):
            self._names[blob] = layer.tops[0]

    def _is_chain(self, blob: Blob, first: Blob) -> bool:
        """Return whether each removed layer between two blobs alone reads what comes before it."""
        while blob != first:
            layer = self._wiring.layers[blob[0] or 0]
            before = self._blob_before(layer, 0)
            if before[0] is None or self._wiring.only_reader(self._wiring.layers[before[0]]) is not layer:
                return False
            blob = before
        return True

    def _find_hidden(self) -> tuple[Blob, Blob] | None:
        """Find a blob that a layer, or who wants the results of the net, does not find under its name, and the one that
        is found instead.
        """
        written: dict[str, Blob] = {}

        def find(blob: Blob) -> Blob:
            return written.get(self._name(blob), (None, self._name(blob)))

        for layer in self._kept:
            for place in range(len(layer.bottoms)):
                blob = self._blob(layer, place)
                if find(blob) != blob:
                    return blob, find(blob)
            for blob in dict.fromkeys((layer.index, top) for top in layer.tops):
                if find(blob)[0] == layer.index:
                    return blob, find(blob)
                written[self._name(blob)] = blob
        return next(((blob, find(blob)) for blob in self._fixed if find(blob) != blob), None)

    def _rename(self, blob: Blob, instead: Blob) -> None:
        """Give a blob that is not found, or what is found instead of it, another name."""
        if blob in self._fixed or blob[0] is None:
            if instead in self._fixed or instead[0] is None:
                raise RefusedError(
                    f"an input or result of the net would hide another, both are called {quote(self._name(instead))}"
                )
            blob = instead
        elif self._name(blob) != blob[1]:
            del self._names[blob]
            return
        self._names[blob] = unused_name(blob[1], self._taken)
        self._taken.add(self._names[blob])
