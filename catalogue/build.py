"""Write bntool/graphs/architectures/catalogue.bin from the architectures of torchvision and timm.

    python -m catalogue.build --keep FOLDER

Needs timm and torchvision beside what the tests need; nothing is downloaded. Every architecture is traced on the meta
device and its graph reduced to what decides a fold. Each one must then be recognised in its own tensors, whole and as a
part, and what the catalogue plans for it must be what its trace plans: else the script ends with 1.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from bntool.graphs.architectures.catalogue import PATH, Catalogue, Runs, Scope, fingerprint_scope
from catalogue.checking import check_recognition, fold_alike
from catalogue.observing import Observation, observe_all
from catalogue.writing import pack

# their weights COCO_V1 are used with eps 0 (torchvision's overwrite_eps), other weights with 1e-5
_TWO_EPS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn")


_USUAL_MOMENTUM = 0.1  # of torch.nn.BatchNorm*


class Row(NamedTuple):
    """One architecture as the catalogue holds it."""

    name: str
    scope: Scope
    inside: int
    rest: int
    eps: Runs
    structure: str
    momentum: Runs | None


def build(observations: Iterable[Observation], earlier: Catalogue | None = None) -> bytes:
    """The catalogue of these architectures; those without a structure are left out.

    Args:
        earlier: one whose entries stay where an architecture was not observed. Architectures with the same tensors stay
            or go together.
    """
    rows = list(_read_rows(observations))
    if earlier is not None:
        kept = [
            Row(
                name,
                entry.scope,
                entry.fingerprint,
                entry.rest,
                entry.eps,
                earlier.structure(entry.structure),
                earlier.momentum(name),
            )
            for entry in earlier.entries
            for name in entry.names
        ]
        observed = {row.name for row in rows}
        stays = {(row.scope, row.inside) for row in kept if row.name not in observed}
        rows = [row for row in rows if (row.scope, row.inside) not in stays]
        rows += [row for row in kept if row.name not in {row.name for row in rows}]
    return _pack(sorted(rows, key=lambda row: (row.name.rpartition(":")[2], row.name)))


def _read_rows(observations: Iterable[Observation]) -> Iterator[Row]:
    alike: dict[tuple[Scope, int], list[str]] = {}  # structures of architectures with the same tensors
    for seen in sorted(observations, key=lambda seen: (seen.name.rpartition(":")[2], seen.name)):
        if not seen.structure or seen.scope is None:
            continue
        inside, rest = fingerprint_scope(seen.scope, seen.shapes)
        twins = alike.setdefault((seen.scope, inside), [])
        same = (
            text for text in twins if fold_alike(seen.structure, text, shapes=seen.shapes, eps=seen.eps, name=seen.name)
        )
        text = next(same, seen.structure)
        if text == seen.structure and text not in twins:
            twins.append(text)
        layers = sorted(find_layers(seen.scope, seen.shapes))
        runs = [_run([seen.eps[layer] for layer in layers])]
        if seen.name.rpartition(":")[2] in _TWO_EPS:
            runs.append(((len(layers), 0.0),))
        momentum = _run([seen.momentum.get(layer, _USUAL_MOMENTUM) for layer in layers])
        unusual = None if momentum == ((len(layers), _USUAL_MOMENTUM),) else momentum
        for run in runs:
            yield Row(seen.name, seen.scope, inside, rest, run, text, unusual)


def _pack(rows: Sequence[Row]) -> bytes:
    structures: dict[str, int] = {}
    scopes: dict[Scope, int] = {}
    eps: dict[Runs, int] = {}
    entries: dict[tuple[int, int, int, int, int], list[str]] = {}
    for row in rows:
        scope = scopes.setdefault(row.scope, len(scopes))
        structure = structures.setdefault(row.structure, len(structures))
        key = (scope, row.inside, row.rest, eps.setdefault(row.eps, len(eps)), structure)
        entries.setdefault(key, []).append(row.name)
    index = {
        "versions": {package: metadata.version(package).partition("+")[0] for package in ("torchvision", "timm")},
        "scopes": [[list(s.children), sorted(s.left_out), sorted(s.stems)] for s in scopes],
        "eps": [list(map(list, runs)) for runs in eps],
        "momentum": {row.name: list(map(list, row.momentum)) for row in rows if row.momentum is not None},
        "entries": [[sorted(names, key=_usual_first), *key] for key, names in entries.items()],
    }
    return pack(index, list(structures))


def find_layers(scope: Scope, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The BatchNorms in a scope."""
    return [
        name.removesuffix(".running_var")
        for name in shapes
        if name.endswith(".running_var") and name.partition(".")[0] in scope.children and name not in scope.left_out
    ]


def _run(values: Sequence[float]) -> Runs:
    runs: list[tuple[int, float]] = []
    for value in values:
        if runs and runs[-1][1] == value:
            runs[-1] = (runs[-1][0] + 1, value)
        else:
            runs.append((1, value))
    return tuple(runs)


def _usual_first(name: str) -> tuple[bool, bool, str]:
    return "quantized" in name, not name.startswith("torchvision:"), name


def count(seen: Sequence[Observation], catalogue: Catalogue) -> tuple[Counter[str], list[str]]:
    """What the architectures are, and what is wrong with them."""
    totals: Counter[str] = Counter()
    problems = []
    for one in seen:
        totals["architectures"] += 1
        if one.verdict is None:
            totals["do not run" if one.problem else "without BatchNorm"] += 1
            problems += [f"{one.name} does not run: {one.problem}"] if one.problem else []
            continue
        totals["BatchNorms"] += one.verdict.folded + one.verdict.skipped
        totals["folded"] += one.verdict.folded
        totals["other details"] += one.verdict.other_details
        wrong = one.verdict.problem or check_recognition(one.name, one.shapes, catalogue)
        totals["wrong" if wrong else "as traced"] += 1
        problems += [f"{one.name}: {wrong}"] if wrong else []
    return totals, problems


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder for observations, so that a stopped run can go on")
    parser.add_argument("--names", nargs="*", default=(), help="only architectures whose name contains one of these")
    parser.add_argument("--onto", action="store_true", help="keep the entries of architectures that are not observed")
    parser.add_argument("--output", type=Path, default=PATH)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    seen = list(observe_all(options.names, keep=options.keep))
    data = build(seen, Catalogue(options.output) if options.onto else None)
    options.output.write_bytes(data)
    catalogue = Catalogue(options.output)
    totals, problems = count(seen, catalogue)
    print("\n".join([*problems, f"{len(data):,} bytes, {len(catalogue.entries)} entries, {dict(totals)}"]))
    return int(totals["wrong"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
