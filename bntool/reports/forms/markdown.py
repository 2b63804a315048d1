"""A report as Markdown, for comments on pull requests, summaries of jobs and notes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from bntool.reports.blocks import Block, Cell, Line, Style, Table
from bntool.reports.report import Report
from bntool.reports.text import sanitize

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")


def draw(report: Report) -> str:
    """Draw lines as paragraphs, what is meant to be pasted as code, tables as tables; all text from files is
    escaped.
    """
    sections = [_draw_blocks(blocks) for blocks in (*(file.blocks for file in report.files), report.blocks) if blocks]
    sections += [
        f"**error** {_escape(file.error.path or file.path)}: {_escape(file.error.sentence)}\n"
        for file in report.files
        if file.error is not None
    ]
    return "\n".join(sections)


def _draw_blocks(blocks: Iterable[Block]) -> str:
    parts: list[str] = []
    code: list[str] = []
    for block in blocks:
        if isinstance(block, Line) and block.verbatim:
            code.append("".join(text for text, _ in block.pieces()))
            continue
        parts += _fence(code)
        code = []
        parts.append(_draw_table(block) if isinstance(block, Table) else _draw_line(block))
    return "\n".join(part for part in [*parts, *_fence(code)] if part)


def _fence(code: list[str]) -> list[str]:
    if not code:
        return []
    longest = max((len(run) for text in code for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return ["\n".join([fence, *code, fence]) + "\n"]


def _draw_line(block: Line) -> str:
    text = "".join(_mark(_escape(text), style) for text, style in block.pieces())
    return f"{'- ' if block.indent else ''}{text.strip()}\n" if text.strip() else ""


def _mark(text: str, style: Style) -> str:
    """Mark text as bold where a terminal is bold or red, with white space outside of the marks."""
    stripped = text.strip()
    if not stripped or style not in (Style.HEADING, Style.ERROR, Style.WARNING):
        return text
    return text.replace(stripped, f"**{stripped}**")


def _draw_table(table: Table) -> str:
    shown = table.select(None)
    rows = [row for row in table.rows if not isinstance(row, Line)]
    if not shown or not rows:
        return ""
    lines = [
        _row([_escape(table.columns[index].title) for index in shown]),
        _row(["---:" if table.columns[index].right else "---" for index in shown]),
    ]
    lines += [_row([_draw_cell(row[index]) for index in shown]) for row in rows]
    between = [_draw_line(row) for row in table.rows if isinstance(row, Line)]
    return "\n".join([*lines, "", *between])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _draw_cell(cell: Cell) -> str:
    return _mark(_escape(sanitize(cell.text)), cell.style)


def _escape(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)
