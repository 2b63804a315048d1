"""docs/batchnorm.md says what the libraries do."""

from __future__ import annotations

import json

import pytest

from tests.documentation.batchnorm_page import Block, read_blocks
from tests.places import INTEROP

RECORDED = INTEROP / "batchnorm_page.json"
BLOCKS = read_blocks()


@pytest.mark.parametrize("block", [b for b in BLOCKS if not b.framework], ids=lambda b: b.output.split("\n")[0][:40])
def test_numpy_and_torch_print_what_the_page_shows(block: Block) -> None:
    assert block.run() == block.output


def test_other_frameworks_printed_what_the_page_shows() -> None:
    """Recorded by tests/oracles/batchnorm_page.py, which runs the blocks."""
    shown = [{"framework": b.framework, "code": b.code, "output": b.output} for b in BLOCKS if b.framework]
    assert {b["framework"] for b in shown} == {"keras", "tensorflow", "onnx", "opencv"}
    assert json.loads(RECORDED.read_text()) == shown
