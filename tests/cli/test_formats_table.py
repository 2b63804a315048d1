"""The commands take or refuse each format that holds any state dict as its Format says, and with it README's table."""

from __future__ import annotations

import pytest

from bntool.checkpoints.checkpoint import Format
from bntool.checkpoints.formats import FORMATS
from bntool.cli.main import main
from tests.checkpoints.samples import WRITERS, tiny_net

DONE, REFUSED = 0, 4
FORMAT_OF = {format_.name: format_ for format_ in FORMATS}


def expected_codes(format_: Format) -> tuple[int, int, int]:
    """Of fold, fold --layout same-keys, and freeze."""
    if format_.read_only:
        return REFUSED, REFUSED, REFUSED
    return REFUSED if format_.only_values else DONE, DONE, DONE if format_.has_records else REFUSED


@pytest.mark.parametrize("name", WRITERS)
def test_commands_do_or_refuse_as_the_table_says(name, tmp_path, capsys):
    expected = expected_codes(FORMAT_OF[name])
    (tmp_path / "in").mkdir()
    source = str(WRITERS[name](tiny_net().state_dict(), tmp_path / "in"))
    pairs = ["fold", source, "--pair", "0=1", "--eps", "1e-5"]
    for number, command in enumerate((pairs, [*pairs, "--layout", "same-keys"], ["freeze", source])):
        folder = tmp_path / str(number)
        folder.mkdir()
        target = folder / source.rpartition("/")[2].lstrip(".")
        assert main([*command, "-o", str(target)]) == expected[number]
        written = list(folder.iterdir())
        assert bool(written) is (expected[number] == DONE)
        if written:
            assert main(["diff", source, str(target)]) == 0
    assert main(["diff", source, source, "--expect", "identical"]) == 0
    assert "0 of 1 BatchNorm layer changed" in capsys.readouterr().out
