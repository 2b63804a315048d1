"""Real output of every command against its schema in docs/schema/."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from bntool.cli.main import main
from tests.places import SAMPLES
from tests.schemas import SCHEMAS, read_document

MODEL = ["--model", f"{SAMPLES / 'digits_net.py'}:build", "--data", str(SAMPLES / "digits_train.npz")]

# sample files are named by what follows an @; OUT is a file to write
CASES = [
    "recalibrate @drifted.pt MODEL --samples 32 --dry-run",
    "recalibrate @drifted.pt MODEL --samples 32 --method exact -o OUT",
    "recalibrate @broken_nan_variance.pt MODEL --samples 32 --dry-run",
    "recalibrate absent.pt MODEL --samples 32 --dry-run",
    "freeze @digits.pt --dry-run",
    "freeze @digits_training.pt --no-requires-grad --as constant --eps 1e-5 --dry-run",
    "freeze @digits_module.pt --frozen-stages 1 --no-requires-grad -o OUT",
    "freeze @digits_training.pt --frozen-stages 1 --emit python --dry-run",
    "freeze absent.pt --dry-run",
    "fold @digits_training.pt --layers bn1 MODEL -o OUT",
    "fold @digits.pt MODEL --export OUT.pt2 --dry-run",
    "fold @digits.safetensors --pair conv1=bn1 --eps 1e-5 --dry-run",
    "fold @dead_channels.pt --layout same-keys MODEL --dry-run",
    "fold absent.pt --dry-run",
    "diff @digits.pt @drifted.pt",
    "diff @digits.pt @broken_nan_variance.pt --expect stats-only",
    "diff @digits.pt @digits.safetensors --expect identical",
    "diff @digits.pt absent.pt",
    "convert @digits.pt --to safetensors -o OUT",
    "convert @digits.pt --to frozen-batchnorm --eps 1e-5 --dry-run",
    "convert @digits.pt --to batchnorm --dry-run",
    "convert @digits_training.pt --to torch -o OUT",
    "convert @digits.pt --rename bn1=norm1 --dry-run",
    "average @digits.pt @drifted.pt @digits.safetensors --weights 1,2,3 -o OUT",
    "average @digits_training.pt @drifted.pt --statistics-from @digits.pt --dry-run",
    "average @digits.pt absent.pt --dry-run",
    "inspect @digits_module.pt --all",
    "inspect absent.pt",
]


@pytest.mark.parametrize("case", CASES)
def test_output_fits_the_schema(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[str] = []
    for word in case.split():
        if word == "MODEL":
            arguments += MODEL
        elif word.startswith("OUT"):
            arguments.append(str(tmp_path / f"out{word[3:]}"))
        else:
            arguments.append(str(SAMPLES / word[1:]) if word.startswith("@") else word)
    main([*arguments, "--json"])
    document = read_document(capsys.readouterr().out, arguments[0])
    (facts,) = document["files"]
    assert ("error" in facts) == ("absent.pt" in case or "--to batchnorm" in case), facts.get("error")


def test_schemas_are_schemas() -> None:
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)
