"""The options that several commands share: one spelling of each, defined once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from bntool.checkpoints.addresses import as_location
from bntool.cli import completion
from bntool.cli.help import MODEL, OUTPUT, SELECTION
from bntool.errors import UsageError
from bntool.reports.forms.form import ReportForm

if TYPE_CHECKING:
    Location: TypeAlias = os.PathLike[str]  # a path, or an address
else:
    Location = os.PathLike  # typer takes classes only
Checkpoint = Annotated[
    Location,
    typer.Argument(
        metavar="CKPT",
        help="Checkpoint file, https:// or hf://OWNER/NAME; it is never written to.",
        parser=as_location,
        show_default=False,
    ),
]
Checkpoints = Annotated[
    list[Location],
    typer.Argument(
        metavar="CKPT...",
        help="Checkpoint files, folders that are one, https:// or hf://OWNER/NAME.",
        parser=as_location,
        show_default=False,
    ),
]
StateDictKey = Annotated[
    str | None,
    typer.Option(
        "--state-dict",
        metavar="KEY",
        help="The state dict to work on, where the file holds several, e.g. model_ema.",
        show_default="chosen by rule",
        rich_help_panel=SELECTION,
        autocompletion=completion.complete_state_dict,
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        metavar="GLOB",
        help="Only layers whose name matches, e.g. 'backbone.layer3.*'. Repeatable.",
        show_default=False,
        rich_help_panel=SELECTION,
        autocompletion=completion.complete_layers,
    ),
]
Prototxt = Annotated[
    Path | None,
    typer.Option(
        "--prototxt",
        metavar="NET",
        help="The .prototxt that a .caffemodel is run by; its eps wins, and a changed one is written beside OUT.",
        show_default=False,
    ),
]
KerasConfig = Annotated[
    Path | None,
    typer.Option(
        "--keras-config",
        metavar="FILE",
        help="The JSON of the Keras model that weights alone (.h5) belong to, or its .keras or .h5 file; the changed "
        "JSON is written beside OUT.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="File to write. Required unless --dry-run.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be done and write nothing.", rich_help_panel=OUTPUT)
]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.", rich_help_panel=OUTPUT)]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Refuse (exit 4) if any layer is skipped or anything is assumed.", rich_help_panel=OUTPUT
    ),
]
Json = Annotated[bool, typer.Option("--json", help="The same as --report json.", rich_help_panel=OUTPUT)]
ReportAs = Annotated[
    ReportForm | None,
    typer.Option(
        "--report",
        metavar="FORM",
        help="Print the result as json, markdown or csv; inspect and diff also list what is wrong as github, sarif or "
        "junit.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors only, and why a gate failed.", rich_help_panel=OUTPUT)
]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Write the result as a page for a browser, too: one file with pictures that needs no network.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
ForceHtml = Annotated[bool, typer.Option("--force", help="Replace the page if it exists.", rich_help_panel=OUTPUT)]
ModelSpec = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="The model: FILE.py:factory, package.module:factory, torchvision:NAME, timm:NAME, "
        "mmdet:CONFIG.py. This runs your code.",
        show_default=False,
        rich_help_panel=MODEL,
        autocompletion=completion.complete_model,
    ),
]
ModelArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        metavar="K=V",
        help="An argument for the factory. Repeatable.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
DataSpec = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="Input data: a folder of images or a .txt list of them; .npy, .npz, .pt or .safetensors; tar archives as "
        "'shards-{0000..0099}.tar'; hf://datasets/OWNER/NAME:SPLIT, a saved dataset or .parquet; or FILE.py:factory "
        "(runs your code).",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="DEVICE", help="Where the model runs, e.g. cpu or cuda:0.", rich_help_panel=MODEL),
]


def check_specs(model: str | None, *data: str | None) -> None:
    """Find out what ``--model`` and ``--data`` need and is not there, before torch is imported, which takes seconds.

    Raises:
        UsageError: a spec cannot be understood, or a file is missing.
        MissingExtraError: a package is missing.
    """
    if model is not None:
        from bntool.models.loading import check_model

        check_model(model)
    for spec in data:
        if spec is not None:
            from bntool.data.specs import check_data

            check_data(spec)


def choose_form(given: ReportForm | None, *, as_json: bool, judges: bool = False) -> ReportForm | None:
    """Return the form that a report is printed in; None for text for people.

    Args:
        given: by ``--report``.
        as_json: ``--json`` was given.
        judges: the command has findings or expectations to list.

    Raises:
        UsageError: the two contradict each other, or the form lists problems and the command has none.
    """
    if as_json and given not in (None, ReportForm.JSON):
        raise UsageError(f"--json is --report json: it does not go with --report {given.value}")
    if given is not None and given.lists_problems and not judges:
        raise UsageError(f"--report {given.value} lists what is wrong with files: it is of inspect and diff")
    return ReportForm.JSON if as_json else given


def check_html(
    path: Path | None, *, force: bool, inputs: Sequence[Location], outputs: Sequence[Path | None] = ()
) -> None:
    """Find out before any work whether the page can be written; see :func:`~bntool.reports.page.writing.check_page`."""
    if path is not None:
        from bntool.reports.page.writing import check_page

        check_page(path, force=force, inputs=inputs, outputs=outputs)


def require_output(output: Path | None, *, unless: bool) -> None:
    """Refuse a missing output, unless an option makes it needless.

    Raises:
        UsageError: there is none, and ``unless`` is false.
    """
    if output is None and not unless:
        raise UsageError("name the file to write with -o OUT, or use --dry-run to write nothing")
