"""Pairs from the command line and from files, and pairs that names suggest."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from bntool.errors import UnreadableFileError, UsageError
from bntool.graphs.declared import read_pairs, suggest_pairs
from bntool.layers.application import read_state


def test_pairs_are_read_from_a_file_and_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_bytes("\ufeff# stem\r\nconv1 = bn1\r\n\r\nlayer.0=layer.1\r\n".encode())
    assert read_pairs([f"@{path}", "fc=norm"]) == {"bn1": "conv1", "layer.1": "layer.0", "norm": "fc"}


@pytest.mark.parametrize(
    ("content", "message"), [(b"conv1\n", "of the form"), (b"a=b\nc=b", "another pair"), (b"\xff\xfe", "UTF-8")]
)
def test_a_bad_file_of_pairs_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "pairs.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_pairs([f"@{path}"])


def test_an_absent_file_of_pairs_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match=r"absent\.txt"):
        read_pairs([f"@{tmp_path / 'absent.txt'}"])


def test_names_suggest_only_what_channels_allow() -> None:
    block = nn.ModuleDict(
        {
            "conv1": nn.Conv2d(3, 4, 1),
            "bn1": nn.BatchNorm2d(4),
            "conv2": nn.Conv2d(4, 5, 1),
            "bn2": nn.BatchNorm2d(4),  # reads something else
            "stem": nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6)),
            "neck": nn.Linear(4, 8),
            "neck_bn": nn.BatchNorm1d(8),
            "alone": nn.BatchNorm1d(8),
        }
    )
    assert suggest_pairs(read_state(block)) == {"bn1": "conv1", "stem.1": "stem.0", "neck_bn": "neck"}
