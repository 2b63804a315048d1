from __future__ import annotations

from bntool.reports.blocks import Cell, Column, Histogram, Line, Style, Table, line, verbatim
from bntool.reports.plain import draw
from tests.reports.blocks import EVIL, TABLE


def test_columns_line_up_and_empty_ones_are_left_out() -> None:
    assert draw([TABLE]) == (
        "layer                                           C  wide only\n"
        "backbone.layer1.0.downsample.1.very.long.name  64  x\n"
        "bn1                                             8\n"
    )


def test_lines_are_as_long_as_they_are() -> None:
    pieces = Line((Cell("warning ", Style.WARNING), Cell("text " * 30)), indent=2)
    assert draw([line("title", Style.HEADING), pieces]) == f"title\n  warning {('text ' * 30).rstrip()}\n"


def test_pipes_get_no_pictures_and_lines_stand_between_rows() -> None:
    columns = (Column("layer"), Column("", pictures=True))
    rows = [(Cell("a"), Cell("", picture=Histogram((1, 2)))), line("between", indent=2), (Cell("b"), Cell(""))]
    assert draw([Table(columns, rows, caption="of pictures")]) == "layer\na\n  between\nb\n"


def test_text_from_files_never_reaches_a_log_raw() -> None:
    table = Table((Column(EVIL),), ((Cell(EVIL, Style.ERROR),),))
    assert "\x1b" not in draw([line(EVIL), table, *verbatim([EVIL])])


def test_wide_characters_are_counted_as_the_terminal_does() -> None:
    table = Table((Column("name"), Column("n")), ((Cell("层一"), Cell("1")), (Cell("abcd"), Cell("2"))))
    rows = draw([table]).splitlines()
    assert rows[1] == "层一  1"
    assert rows[2] == "abcd  2"


def test_what_is_pasted_is_whole() -> None:
    code = f"bntool.apply_freeze(model, {'x' * 3000!r})"
    assert draw(verbatim([code], indent=4)) == f"    {code}\n"
