"""Names of blobs after layers were taken out: what is left reads what it read before, through what is gone."""

from __future__ import annotations

import dataclasses
import random

import pytest

from bntool.checkpoints.caffe.blob_names import can_remove, find_renaming
from bntool.checkpoints.caffe.layers import Layer, Wiring
from bntool.errors import RefusedError


def make(*lines: str) -> Wiring:
    """A net; each layer as ``bottoms > tops``."""
    sides = [line.split(">") for line in lines]
    layers = [
        Layer(index, f"l{index}", "Any", tuple(bottoms.split()), tuple(tops.split()), {})
        for index, (bottoms, tops) in enumerate(sides)
    ]
    return Wiring.of(layers)


def draw(rng: random.Random) -> tuple[Wiring, frozenset[int]]:
    """A net of layers that write in place or not and now and then use a name again, and some of those to remove."""
    blobs, lines = ["data"], []
    for number in range(rng.randint(2, 12)):
        bottom = rng.choice(blobs[-3:])
        place = rng.random()
        tops = [bottom] if place < 0.35 else [f"b{number}"] if place < 0.85 else [f"b{number}", f"c{number}"]
        if place > 0.95:
            tops = [rng.choice(blobs)]
        second = f" {rng.choice(blobs)}" if rng.random() < 0.2 else ""
        lines.append(f"{bottom}{second} > {' '.join(tops)}")
        blobs += [top for top in tops if top not in blobs]
    wiring = make(*lines)
    fitting = [layer.index for layer in wiring.layers if len(layer.bottoms) == len(layer.tops) == 1]
    return wiring, frozenset(index for index in fitting if rng.random() < 0.5)


def blobs_of(wiring: Wiring) -> list[list[tuple[int | None, int]]]:
    """What each layer reads: the layer that wrote it, and which of its tops it is."""
    return [
        [
            (source, 0 if source is None else wiring.layers[source].tops.index(bottom))
            for source, bottom in zip(wiring.producers[layer.index], layer.bottoms, strict=True)
        ]
        for layer in wiring.layers
    ]


def rename(wiring: Wiring, removed: frozenset[int]) -> Wiring:
    """The net without these layers; positions are those of the layers that are left."""
    renaming = find_renaming(wiring, removed)
    layers = []
    for layer in wiring.layers:
        if layer.index not in removed:
            bottoms = [renaming.bottoms.get((layer.index, p), name) for p, name in enumerate(layer.bottoms)]
            tops = [renaming.tops.get((layer.index, p), name) for p, name in enumerate(layer.tops)]
            layers.append(dataclasses.replace(layer, index=len(layers), bottoms=tuple(bottoms), tops=tuple(tops)))
    return Wiring.of(layers)


def test_each_layer_reads_what_it_read() -> None:
    rng, refused = random.Random(5), 0
    for _ in range(3000):
        wiring, removed = draw(rng)
        before = blobs_of(wiring)

        def through(blob: tuple[int | None, int]) -> tuple[int | None, int]:
            while blob[0] is not None and blob[0] in removed:  # noqa: B023 called in this round
                blob = before[blob[0]][0]  # noqa: B023
            return blob

        try:
            after = rename(wiring, removed)
        except RefusedError:
            refused += 1
            continue
        kept = [layer.index for layer in wiring.layers if layer.index not in removed]
        new = {old: position for position, old in enumerate(kept)}
        expected = [[(new.get(s) if s is not None else None, p) for s, p in map(through, before[old])] for old in kept]
        assert blobs_of(after) == expected
        last = {top: (layer.index, place) for layer in wiring.layers for place, top in enumerate(layer.tops)}
        left = {top: (layer.index, place) for layer in after.layers for place, top in enumerate(layer.tops)}
        read = {blob for blobs in before for blob in blobs}
        read_now = {blob for blobs in blobs_of(after) for blob in blobs}
        for top, blob in last.items():
            source, place = through(blob)
            if blob not in read and source is not None:  # a result of the net
                assert left[top] == (new[source], place)
                assert left[top] not in read_now
    assert 0 < refused < 1500


def test_a_chain_lends_its_name_to_what_feeds_it() -> None:
    after = rename(make("data > conv", "conv > norm", "norm > scale", "scale > end"), frozenset({1, 2}))
    assert [(layer.bottoms, layer.tops) for layer in after.layers] == [(("data",), ("scale",)), (("scale",), ("end",))]


def test_others_find_what_they_read_where_its_name_is_written_again() -> None:
    wiring = make("data > conv", "conv > norm", "norm > first", "norm > norm", "norm > second")
    after = rename(wiring, frozenset({1, 3}))
    assert blobs_of(after) == [[(None, 0)], [(0, 0)], [(0, 0)]]
    after = rename(wiring, frozenset({1}))  # one that writes in place hides nothing from those before it
    assert blobs_of(after) == [[(None, 0)], [(0, 0)], [(0, 0)], [(2, 0)]]


@pytest.mark.parametrize("line", ["data > norm", "data data > norm", "data > norm other"])
def test_an_input_is_no_result(line: str) -> None:
    wiring = make(line, "data > conv")
    assert not can_remove(wiring, wiring.layers[0], wiring.layers[0])
    with pytest.raises(RefusedError):
        find_renaming(wiring, frozenset({0}))


def test_a_result_is_not_read_by_other_layers() -> None:
    wiring = make("data > conv", "conv > first", "first > second", "conv > relu")
    assert can_remove(wiring, wiring.layers[1], wiring.layers[1])  # while the one behind it stays
    assert can_remove(wiring, wiring.layers[2], wiring.layers[2])
    assert not can_remove(wiring, wiring.layers[1], wiring.layers[2])
    with pytest.raises(RefusedError, match="other layers read its input"):
        find_renaming(wiring, frozenset({1, 2}))
    norms = Wiring.of([dataclasses.replace(layer, type="BatchNorm") for layer in wiring.layers])
    assert not can_remove(norms, norms.layers[1], norms.layers[1])
    of_parts = make("data > one two", "one > norm", "two > relu")
    assert can_remove(of_parts, of_parts.layers[1], of_parts.layers[1])


def test_one_blob_is_not_two_results() -> None:
    wiring = make("data > conv", "conv > first", "conv > second")
    assert not can_remove(wiring, wiring.layers[1], wiring.layers[1])
    with pytest.raises(RefusedError, match="both results of the net"):
        find_renaming(wiring, frozenset({1, 2}))
