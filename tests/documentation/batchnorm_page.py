"""The runnable blocks of docs/batchnorm.md."""

from __future__ import annotations

import contextlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tests.places import ROOT

PAGE = ROOT / "docs" / "batchnorm.md"
_BLOCK = re.compile(
    r"```python(?: title=\"(?P<framework>\w+)\")?\n(?P<code>.*?)```\n\n```text\n(?P<output>.*?)```", re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A block of code, what it needs beside numpy and torch, and what the page says that it prints."""

    framework: str
    code: str
    output: str

    def run(self) -> str:
        stream, before = io.StringIO(), Path.cwd()
        os.chdir(ROOT)
        try:
            with contextlib.redirect_stdout(stream):
                exec(compile(self.code, str(PAGE), "exec"), {})
        finally:
            os.chdir(before)
        return stream.getvalue()


def read_blocks() -> list[Block]:
    text = PAGE.read_text(encoding="utf-8")
    blocks = [Block(**match.groupdict("")) for match in _BLOCK.finditer(text)]
    assert len(blocks) == text.count("```python"), "every block of code is followed by what it prints"
    return blocks
