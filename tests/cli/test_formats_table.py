"""What README's table says of each format that holds any state dict: which commands work, and which refuse."""

from __future__ import annotations

import pytest

from bntool.cli.main import main
from tests.checkpoints.samples import WRITERS, tiny_net

DONE, REFUSED = 0, 4
# fold, fold --layout same-keys, freeze
EXPECTED = {
    "torch-zip": (DONE, DONE, DONE),
    "torch-legacy": (DONE, DONE, DONE),
    "safetensors": (DONE, DONE, DONE),
    "sharded": (DONE, DONE, DONE),
    "torch-tar": (REFUSED, DONE, REFUSED),
    "numpy-pickle": (DONE, DONE, REFUSED),
    "distributed": (REFUSED, REFUSED, REFUSED),
    "tensorflow": (REFUSED, REFUSED, REFUSED),
}


def test_every_format_is_in_the_table():
    assert set(EXPECTED) == set(WRITERS)


@pytest.mark.parametrize("name", WRITERS)
def test_commands_do_or_refuse_as_the_table_says(name, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    source = str(WRITERS[name](tiny_net().state_dict(), tmp_path / "in"))
    pairs = ["fold", source, "--pair", "0=1", "--eps", "1e-5"]
    for number, command in enumerate((pairs, [*pairs, "--layout", "same-keys"], ["freeze", source])):
        folder = tmp_path / str(number)
        folder.mkdir()
        target = folder / source.rpartition("/")[2].lstrip(".")
        assert main([*command, "-o", str(target)]) == EXPECTED[name][number]
        written = list(folder.iterdir())
        assert bool(written) is (EXPECTED[name][number] == DONE)
        if written:
            assert main(["diff", source, str(target)]) == 0
    assert main(["diff", source, source, "--expect", "identical"]) == 0
    assert "0 of 1 BatchNorm layer changed" in capsys.readouterr().out
