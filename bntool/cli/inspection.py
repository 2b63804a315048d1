"""``bntool inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bntool.cli import options
from bntool.cli.listing import list_checkpoints
from bntool.inspection.findings import Severity


def command(
    checkpoints: options.Checkpoints,
    state_dict: options.StateDictKey = None,
    layers: options.Layers = None,
    all_tensors: Annotated[
        bool, typer.Option("--all", help="List every BatchNorm layer, then every tensor; of several files each.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="List every tensor, with its minimum, mean and maximum.")
    ] = False,
    fail_on: Annotated[
        Severity | None,
        typer.Option(
            "--fail-on", help="Exit with 1 if there is a finding of this severity or worse.", show_default=False
        ),
    ] = None,
    verify_crc: Annotated[
        bool, typer.Option("--verify-crc", help="Hold every byte against the checksums of the file (reads all of it).")
    ] = False,
    prototxt: Annotated[
        Path | None,
        typer.Option(
            "--prototxt",
            metavar="NET",
            help="The .prototxt that a .caffemodel is run by; its eps wins.",
            show_default=False,
        ),
    ] = None,
    keras_config: Annotated[
        Path | None,
        typer.Option(
            "--keras-config",
            metavar="FILE",
            help="The JSON of the Keras model that weights alone (.h5) belong to, or its .keras or .h5 file.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Findings that are meant to be so, and what --fail-on is else.",
            show_default="bntool.toml or pyproject.toml, here or above",
        ),
    ] = None,
    no_config: Annotated[bool, typer.Option("--no-config", help="Take no such file.")] = False,
    html: options.Html = None,
    force: options.ForceHtml = False,
    report_as: options.ReportAs = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Show what the BatchNorm layers of a checkpoint hold, and what is wrong with them.

    Several files are taken as a run: a row each, in the order of their epochs, and in which of them something broke.
    Nothing in the file is executed, whatever it is; torch is not needed for it either.

    Examples:

      bntool inspect ckpt.pt

      bntool inspect ckpt.pt --layers 'backbone.layer3.*' --json

      bntool inspect run/epoch_*.pt

      bntool inspect *.pt --fail-on error --quiet

      bntool inspect ckpt.pt --html page.html

      bntool inspect net.caffemodel --prototxt deploy.prototxt

    Findings are marked X (error), ! (warning) and i (notice); bntool explain CODE says what each means and what to do.
    """
    form = options.choose_form(report_as, as_json=as_json, judges=True)
    options.check_html(html, force=force, inputs=checkpoints)
    return list_checkpoints(
        checkpoints,
        form=form,
        quiet=quiet,
        fail_on=fail_on,
        config=config,
        no_config=no_config,
        html=html,
        force=force,
        every_tensor=all_tensors,
        statistics=stats,
        verify_checksums=verify_crc,
        state_dict=state_dict,
        layers=layers or (),
        prototxt=prototxt,
        keras_config=keras_config,
    )
