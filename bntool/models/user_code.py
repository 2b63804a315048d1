"""Importing and calling the user's own code; whatever it raises becomes one error that says where."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import operator
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from bntool.errors import BntoolError, UsageError, UserCodeError

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_FROM_WORKER = re.compile(r"Caught \w+ in .*\.\s+Original Traceback")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_INSTALLED = tuple(
    str(Path(path)) + os.sep
    for name, path in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
)


@contextlib.contextmanager
def running_user_code(what: str) -> Iterator[None]:
    """Turn anything that the block raises into a :class:`UserCodeError`.

    Args:
        what: what was being done, for the message, e.g. ``the factory build() of model.py``.

    Raises:
        UserCodeError: with the original exception as ``__cause__`` and the user's own line in the message. Errors of
            bntool itself and KeyboardInterrupt pass through.
    """
    try:
        yield
    except BntoolError:
        raise
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"{what} raised {describe_exception(error)}") from error


def describe_exception(error: BaseException) -> str:
    """Describe the kind, message and place in the user's code, e.g. ``ValueError: bad width (model.py:12)``."""
    said = str(error)
    if _FROM_WORKER.match(said):  # torch puts the whole traceback of a worker process into the message
        text = said.strip().splitlines()[-1].strip()
    else:
        said = " ".join(said.split())
        text = type(error).__name__ + (f": {said}" if said else "")
    place = find_user_line(error)
    return f"{text} ({place})" if place else text


def find_user_line(error: BaseException) -> str:
    """Find ``file:line`` of the innermost frame that is the user's own; "" where no frame is.

    Frames of bntool, of the standard library and of installed packages are not the user's.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    # no source is read: signal handlers may raise meanwhile
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if _FROM_WORKER.match(str(error)):
        frames += [(file, int(line)) for file, line in _FRAME.findall(str(error))]
    return next((f"{file}:{line}" for file, line in reversed(frames) if _is_users(file)), "")


def find_calling_line(*, outside: str, until: str) -> str:
    """Find ``file:line`` of the innermost calling frame that is neither bntool's nor in a folder.

    Args:
        outside: the folder, of a library. Where all code is its own, the line of its innermost ``forward`` is given.
        until: the file of bntool that runs the model: what called that is no code of it.
    """
    forwards = []
    for frame, line in traceback.walk_stack(None):
        file = frame.f_code.co_filename
        if file == until:
            break
        if not file.startswith((_PACKAGE, outside, "<")):
            return f"{file}:{line}"
        if file.startswith(outside) and frame.f_code.co_name == "forward":
            forwards.append(f"{Path(file).relative_to(Path(outside).parent)}:{line}")
    return forwards[0] if forwards else ""


def _is_users(filename: str) -> bool:
    return not filename.startswith((_PACKAGE, *_INSTALLED, "<"))


def is_factory_spec(spec: str) -> bool:
    """Return whether the text has the form ``file.py:name`` or ``package.module:name``."""
    module, _, name = spec.rpartition(":")
    if not module or not all(part.isidentifier() for part in name.split(".")):
        return False
    return module.endswith(".py") or all(part.isidentifier() for part in module.split("."))


def import_object(spec: str) -> Any:
    """Import what ``file.py:name`` or ``package.module:name`` names.

    The folder of the file (or the working folder, for a module) is on ``sys.path`` meanwhile, so that the code finds
    its siblings; a file is registered in ``sys.modules`` under its stem, so that what it pickles can be loaded again.

    Raises:
        UsageError: the file, the module or the name in it does not exist.
        UserCodeError: importing it raised.
    """
    location, _, name = spec.rpartition(":")
    module = _import_file(Path(location)) if location.endswith(".py") else _import_module(location)
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        raise UsageError(f"{location} has no {name!r}{_suggest(module)}") from None


def _suggest(module: ModuleType) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return f"; it defines {', '.join(own[:8])}" if own else ""


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError("there is no such file", path=path)
    resolved = path.resolve()
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) and Path(str(known.__file__)).resolve() == resolved:
        return known
    module_spec = importlib.util.spec_from_file_location(path.stem, resolved)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    with _search_path(resolved.parent), running_user_code(f"importing {path}"):
        sys.modules[path.stem] = module
        try:
            module_spec.loader.exec_module(module)
        except BaseException:
            if known is None:
                del sys.modules[path.stem]
            else:
                sys.modules[path.stem] = known
            raise
    return module


def _import_module(name: str) -> ModuleType:
    with _search_path(Path.cwd()), running_user_code(f"importing {name}"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name + ".").startswith(error.name + "."):
                raise UsageError(f"there is no module {error.name!r} to import") from error
            raise


@contextlib.contextmanager
def _search_path(folder: Path) -> Iterator[None]:
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def call_factory(factory: Any, arguments: Mapping[str, Any], *, what: str) -> Any:
    """Call the user's factory.

    Raises:
        UsageError: it does not take these arguments.
        UserCodeError: it raised.
    """
    try:
        inspect.signature(factory).bind(**arguments)
    except ValueError:  # some callables have no signature to ask for
        pass
    except TypeError as error:
        raise UsageError(f"{what} cannot be called with these arguments: {error}") from error
    folder = getattr(sys.modules.get(getattr(factory, "__module__", "")), "__file__", None)
    with _search_path(Path(folder).parent if folder else Path.cwd()), running_user_code(what):
        return factory(**arguments)
