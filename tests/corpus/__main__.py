"""Make every mistake on every network, inspect the files, and print what was named: ``python -m tests.corpus``.

--record   write the results to tests/fixtures/corpus.json, from which docs/findings.md has its table
--only X   mistakes, files or networks whose name holds X
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import bntool
from bntool.inspection.findings import Severity
from bntool.inspection.results import Inspection
from bntool.inspection.verdict import Health
from tests.corpus.extremes import measure_extremes, measure_jumps, merge_extremes
from tests.corpus.mistakes import MISTAKES, SOUND, Mistake
from tests.corpus.networks import NETWORKS, Network
from tests.places import FIXTURES, INTEROP, SAMPLES, SHARED

RECORD = FIXTURES / "corpus.json"
ALARMS = (Health.SICK, Health.SUSPICIOUS)
# what no threshold decides, and small fixtures have: nobody trained them for longer than two batches
_FACTS = {"never-updated", "counter-low", "negative-variance", "zero-variance"}
_BROKEN = ("broken_", "dead_channels", "drifted", "variance_below_zero")
_SUFFIXES = (".pt", ".pth", ".th", ".safetensors", ".onnx", ".h5", ".hdf5", ".keras", ".caffemodel", ".index", ".ckpt")


def list_codes(inspection: Inspection, severity: Severity = Severity.NOTICE) -> set[str]:
    """The codes of all findings of this severity or worse."""
    found = [*inspection.findings]
    for state_dict in inspection.state_dicts:
        found += [*state_dict.findings, *(finding for layer in state_dict.layers for finding in layer.findings)]
    return {finding.code.value for finding in found if finding.severity.rank >= severity.rank}


def is_named(mistake: Mistake, network: Network, folder: Path) -> bool:
    """Whether the file that comes of a mistake has a finding that names it."""
    path = folder / "mistake.pt"
    mistake.make(network, path)
    return not list_codes(bntool.inspect(path)).isdisjoint(code.value for code in mistake.codes)


def list_real_files() -> Iterator[Path]:
    """Files at hand that real trainings and other programs wrote."""
    yield from (
        path for path in sorted(SAMPLES.iterdir()) if path.suffix in _SUFFIXES and not path.name.startswith(_BROKEN)
    )
    for folder in (SHARED / "weights", SHARED / "fixtures" / "interop", INTEROP):
        yield from (
            path
            for path in sorted(folder.rglob("*"))
            if path.suffix in _SUFFIXES and path.is_file() and not path.name.startswith(_BROKEN)
        )


def try_network(network: Network, folder: Path, *, only: str = "") -> dict[str, Any]:
    """What is named of its mistakes, and which of its sound files raise an alarm."""
    named: dict[str, bool] = {}
    alarms: list[str] = []
    for mistake in MISTAKES:
        if only in f"{mistake.title} {mistake.make.__name__}":
            named[mistake.title] = is_named(mistake, network, folder)
            print(
                f"{network.name:10} {mistake.title:52} {'named' if named[mistake.title] else 'NOT NAMED'}", flush=True
            )
    sound = []
    for make in SOUND:
        if only in make.__name__:
            path = folder / f"{make.__name__}.pt"
            make(network, path)
            sound.append(path)
            verdict = bntool.inspect(path).verdict
            print(f"{network.name:10} {make.__name__:52} {verdict.sentence}", flush=True)
            alarms += [f"{make.__name__}: {verdict.sentence}"] * (verdict.health in ALARMS)
    longer = [path for path in sound if path.stem in ("sound_early", "sound_longer")]
    return {
        "held_out": network.held_out,
        "named": named,
        "sound_files": len(SOUND),
        "false_alarms": alarms,
        "extremes": merge_extremes(measure_extremes(sound), measure_jumps(longer)),
    }


def try_real_files() -> dict[str, Any]:
    """How many of the files at hand hold BatchNorms, and which of them raise an alarm that some threshold decides."""
    alarms, checked = [], 0
    for path in list_real_files():
        try:
            inspection = bntool.inspect(path)
        except bntool.BntoolError as error:
            print(f"{path.name}: {error}")
            continue
        checked += bool(inspection.verdict.layers)
        alarms += [f"{path.name}: {code}" for code in sorted(list_codes(inspection, Severity.WARNING) - _FACTS)]
    print(f"{checked} real files: {alarms}")
    return {"files": checked, "alarms": alarms, "extremes": measure_extremes(list_real_files())}


def main() -> int:
    """Print the results; 1 where less than 95 % are named, or a sound or real file is called sick or suspicious."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("networks", nargs="*", default=[network.name for network in NETWORKS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tried = {
            network.name: try_network(network, Path(folder), only=options.only)
            for network in NETWORKS
            if network.name in options.networks
        }
    real = {} if options.only else try_real_files()
    if options.record:
        known: dict[str, Any] = json.loads(RECORD.read_text())["networks"] if RECORD.exists() else {}
        networks = {n.name: tried.get(n.name, known.get(n.name)) for n in NETWORKS if n.name in {**known, **tried}}
        codes = {mistake.title: [code.value for code in mistake.codes] for mistake in MISTAKES}
        RECORD.write_text(json.dumps({"codes": codes, "networks": networks, "real": real}, indent=1) + "\n")
    for name, results in tried.items():
        named = results["named"].values()
        print(f"{name}: {sum(named)} of {len(named)} named; false alarms: {results['false_alarms']}")
    missed = any(sum(results["named"].values()) < 0.95 * len(results["named"]) for results in tried.values())
    return int(missed or bool(real.get("alarms")) or any(results["false_alarms"] for results in tried.values()))


if __name__ == "__main__":
    sys.exit(main())
