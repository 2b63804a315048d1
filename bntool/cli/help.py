"""The layout of --help: options in groups, commands with their whole first sentence, in colours on a terminal."""

from __future__ import annotations

import sys
from typing import Any

import typer.core

# groups of the options that several commands share; a command's own come under "Options"
MODEL, JUDGING, SHARES = "Model and data", "Before and after", "Shares and going on"
SELECTION, OUTPUT = "What to work on", "Output"


class Command(typer.core.TyperCommand):
    """A command whose options are shown in groups, those of the output last."""

    def get_help(self, ctx: Any) -> str:
        return _paint(super().get_help(ctx), ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(_group_of(parameter), []).append(record)
        groups[OUTPUT] = groups.pop(OUTPUT, [])
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Group(typer.core.TyperGroup):
    """The list of commands, with summaries that are wrapped rather than cut."""

    def get_help(self, ctx: Any) -> str:
        return _paint(super().get_help(ctx), ctx)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, _summarise(self.get_command(ctx, name))) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _paint(text: str, ctx: Any) -> str:
    """Colour a text where it is drawn for a person; the words stay as they are."""
    from bntool.cli.output import is_drawn

    if not is_drawn(sys.stdout):
        return text
    from bntool.reports.terminal import draw_help

    ctx.color = True  # otherwise click takes colours out again where FORCE_COLOR asks for them
    return draw_help(text, sys.stdout)


def _group_of(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    if parameter.name == "help":
        return OUTPUT
    return getattr(parameter, "rich_help_panel", None) or "Options"


def _summarise(command: Any) -> str:
    """Return the first paragraph of its help, on one line."""
    return " ".join((command.help or "").partition("\n\n")[0].split())
