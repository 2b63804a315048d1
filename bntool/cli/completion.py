"""Completion by a shell when Tab is pressed: names out of the checkpoint that is typed already, and of the catalogue.

Shells run what they are given in ways of their own, so no text of a file is offered that is more than a plain name.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_REQUEST = "_BNTOOL_COMPLETE"  # is set by the shell: complete_bash, complete_zsh, ...
_PLAIN = re.compile(r"[\w./+][\w.:/+#-]*", re.ASCII)
_SPECIAL = re.compile(r"([^\w.:/+#=,@%-])", re.ASCII)


def read_typed_words() -> list[str] | None:
    """Return the words that are typed so far, after the name of the program; None where no shell asks."""
    if _REQUEST not in os.environ:
        return None
    typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    return typed.split()[1:]


def prepare_bash() -> None:
    """Let bash have whole names: it takes ``torchvision:resnet50`` for three words."""
    from typer._click.shell_completion import add_completion_class
    from typer._completion_classes import BashComplete

    class WholeWords(BashComplete):
        cut = 0  # characters before the last colon or equals sign, which bash keeps

        def get_completion_args(self) -> tuple[list[str], str]:
            words, last = super().get_completion_args()
            joined: list[str] = []
            for word in (*words, last):
                before = joined[-1] if joined else ""
                if word == "=" and before.startswith("--"):
                    joined.append("")  # what follows belongs to the option
                elif word in (":", "=") or before.endswith((":", "=")) or (before == "" and joined):
                    joined[-1:] = [before + word]
                else:
                    joined.append(word)
            *words, last = joined
            value = last.partition("=")[2] if last.startswith("--") else last
            self.cut = max(value.rfind(":"), value.rfind("=")) + 1
            return words, last

        def format_completion(self, item: Any) -> str:
            return _SPECIAL.sub(r"\\\1", item.value[self.cut :])

    add_completion_class(WholeWords, "bash")


def complete_layers(ctx: Any) -> list[str]:
    """List BatchNorm layers, and before them a glob for each module that several of them lie under."""
    names = list(_list_layers(ctx))
    below = Counter(name[: place + 1] for name in names for place, letter in enumerate(name) if letter == ".")
    return [*(f"{stem}*" for stem, count in below.items() if count > 1), *names]


def complete_state_dict(ctx: Any) -> list[str]:
    """Return the state dicts of the file."""
    return [key for key in _list_state_dicts(ctx, 0) if key]


def complete_state_dict_b(ctx: Any) -> list[str]:
    """Return the state dicts of the second file."""
    return [key for key in _list_state_dicts(ctx, 1) if key]


def complete_architecture(ctx: Any) -> list[str]:
    """List the architectures that the names and shapes of the file allow; the whole catalogue where they allow none."""
    return _list_recognised(ctx) or _list_catalogue()


def complete_preprocessing(incomplete: str) -> list[str]:
    """Return presets and the names of steps, after the steps that are there."""
    from bntool.data.preprocessing import PRESETS, STEPS

    before, comma, _ = incomplete.rpartition(",")
    steps = [f"{before}{comma}{name}=" for name in STEPS if f"{name}=" not in before]
    return steps if before else [*PRESETS, "model", *steps]


def complete_model(ctx: Any, incomplete: str) -> list[str]:
    """List Python files and what they define, which is read and not run, and models of the libraries."""
    file, colon, _ = incomplete.rpartition(":")
    if colon and file.endswith(".py"):
        return [f"{file}:{name}" for name in _list_definitions(Path(file))]
    folder = incomplete[: incomplete.rfind("/") + 1]
    found: list[str] = []
    with contextlib.suppress(OSError):
        for path in sorted(Path(folder or ".").iterdir()):
            if not path.name.startswith((".", "__")):
                found += [f"{path.name}/"] if path.is_dir() else [f"{path.name}:"] if path.suffix == ".py" else []
    files = [folder + name for name in found if _PLAIN.fullmatch(folder + name)]
    return [*files, *(_list_recognised(ctx) or _list_catalogue())]


def complete_code() -> list[tuple[str, str]]:
    """List all that ``explain`` knows."""
    from bntool.reports.explanations import list_explanations

    return [(one.code, one.kind) for one in list_explanations() if _PLAIN.fullmatch(one.code)]


def _list_definitions(path: Path) -> list[str]:
    import ast  # commands need none

    with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.ClassDef)
        return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    return []


def _list_catalogue() -> list[str]:
    from bntool.graphs.architectures.catalogue import load_catalogue

    return sorted({name for entry in load_catalogue().entries for name in entry.names})


def _list_recognised(ctx: Any) -> list[str]:
    from bntool.graphs.architectures.recognition import recognise

    names: dict[str, None] = {}
    with _chosen_state_dict(ctx) as state_dict:
        for architecture in recognise(state_dict) if state_dict is not None else ():
            names |= dict.fromkeys(architecture.names)
    return list(names)


def _list_layers(ctx: Any) -> Iterator[str]:
    """Yield the layers as the command names them: inspect an average that lies in buffers, too, diff those below a
    prefix without it.
    """
    from bntool.checkpoints.batchnorms import find_batchnorms, find_flat_averages
    from bntool.comparison.checkpoint import choose_side
    from bntool.errors import UsageError

    with _open(ctx, 0) as checkpoint, contextlib.suppress(UsageError):
        prefix = ctx.params.get("prefix")
        if checkpoint is not None and prefix:
            side = choose_side(checkpoint, ctx.params.get("state_dict"), prefix, option="--prefix")
            yield from _keep_plain(side.list_layers())
            return
    with _chosen_state_dict(ctx) as state_dict:
        if state_dict is not None:
            layers = find_batchnorms(state_dict)
            averages = find_flat_averages(state_dict, layers).values() if ctx.info_name == "inspect" else ()
            yield from _keep_plain(layer.name for layer in (*layers, *averages))


def _list_state_dicts(ctx: Any, place: int) -> Iterator[str]:
    with _open(ctx, place) as checkpoint:
        if checkpoint is not None:
            yield from _keep_plain(state_dict.key for state_dict in checkpoint.state_dicts)


def _keep_plain(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if _PLAIN.fullmatch(name))


@contextlib.contextmanager
def _chosen_state_dict(ctx: Any) -> Iterator[Any]:
    """Yield the state dict that the command would take; None where there is none."""
    from bntool.checkpoints.state_dicts import choose_state_dict
    from bntool.errors import BntoolError

    with _open(ctx, 0) as checkpoint:
        chosen = None
        if checkpoint is not None:
            with contextlib.suppress(BntoolError):
                chosen = choose_state_dict(checkpoint, ctx.params.get("state_dict"))
        yield chosen


@contextlib.contextmanager
def _open(ctx: Any, place: int) -> Iterator[Any]:
    """Open the checkpoint at a place of the command line; yields None where none is typed that can be read."""
    from bntool.checkpoints.formats import open_checkpoint
    from bntool.errors import BntoolError

    paths = _list_paths(ctx)
    with contextlib.ExitStack() as stack:
        checkpoint = None
        if place < len(paths):
            with contextlib.suppress(BntoolError, OSError, ValueError):
                checkpoint = stack.enter_context(open_checkpoint(paths[place].expanduser()))
        yield checkpoint


def _list_paths(ctx: Any) -> list[Path]:
    """Return the checkpoints of the command line: taken for what they are, or left over by an option without its
    value.
    """
    known = [ctx.params.get(name) for name in ("checkpoint", "a", "b")]
    return [Path(path) for path in (ctx.params.get("checkpoints") or [*filter(None, known)] or ctx.args)]
