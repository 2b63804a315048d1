"""Files of the Hugging Face hub, by ``hf://OWNER/NAME[@REVISION][/PATH]``: found by huggingface_hub, read by ranges."""

from __future__ import annotations

import re
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bntool.checkpoints.addresses import Address, Location
from bntool.checkpoints.files import Folder, SourceFile, describe_missing
from bntool.checkpoints.hub_files import choose_file, describe_choice
from bntool.checkpoints.remote.files import CachedFile, open_transfers
from bntool.checkpoints.remote.http import Limits, MissingFileError, check_url
from bntool.checkpoints.remote.transfers import Transfers
from bntool.errors import MissingExtraError, UnreachableFileError, UsageError

_FORM = "hf://OWNER/NAME, with @REVISION and /PATH behind it where they are needed"
_PART = re.compile(r"[\w.-]{1,96}", re.ASCII)
_REFERENCE = re.compile(r"refs/(?:convert|pr)/[\w.-]+", re.ASCII)

Result = TypeVar("Result")


class HubFile(NamedTuple):
    """The file of the hub that an address names.

    Attributes:
        repository: OWNER/NAME.
        revision: branch, tag or commit; None for the default.
        path: of a file in it; "" for whichever holds the weights.
    """

    repository: str
    revision: str | None
    path: str

    @property
    def address(self) -> Address:
        revision = "" if self.revision is None else "@" + urllib.parse.quote(self.revision, safe="")
        return Address(f"hf://{self.repository}{revision}" + (f"/{self.path}" if self.path else ""))


def parse_address(address: Address) -> HubFile:
    """Return the parts of an address of the hub.

    Raises:
        UsageError: it has another form.
    """
    rest = address.text.partition("://")[2]
    repository, at, behind = rest.partition("@")
    revision: str | None = None
    if at and repository.count("/") == 1:
        reference = _REFERENCE.match(behind)
        given = reference[0] if reference else behind.partition("/")[0]
        revision, path = urllib.parse.unquote(given), behind[len(given) :].removeprefix("/")
    else:
        owner, _, behind = rest.partition("/")
        name, _, path = behind.partition("/")
        repository = f"{owner}/{name}"
    parts = repository.split("/")
    is_clean = ".." not in path.split("/") and path == path.strip("/") and "\\" not in path
    if len(parts) != 2 or not all(map(_PART.fullmatch, parts)) or revision == "" or not is_clean:
        raise UsageError(f"this is no address of the hub: {_FORM}", path=address)
    if parts[0] in ("datasets", "spaces"):
        raise UsageError("models of the hub are read, not its datasets or spaces", path=address)
    return HubFile(repository, revision, path)


def open_hub(address: Address, *, limits: Limits) -> SourceFile:
    """Open a file of the hub, or the weights of a repository; token, endpoint and cache are those of huggingface_hub.

    Raises:
        UsageError: the address has another form.
        MissingExtraError: huggingface_hub is not installed.
        UnreachableFileError: the hub does not give the file.
    """
    wanted = parse_address(address)
    hub = _import_hub()
    check_url(hub.hf_hub_url(wanted.repository, "config.json"), address)  # the endpoint may be anything
    try:
        info = _ask(lambda: hub.HfApi().model_info(wanted.repository, revision=wanted.revision), hub, wanted, limits)
    except _OfflineError:
        return _open_offline(hub, wanted)
    names = [one.rfilename for one in info.siblings or ()]
    folder = _HubFolder(hub, wanted._replace(path=""), str(info.sha), limits)
    if wanted.path:
        return folder.open_file(wanted.path)
    chosen = choose_file(names)
    if chosen is None:
        raise UnreachableFileError(
            f"no file of this repository is the one to read: {describe_choice(names)}", path=address
        )
    file = folder.open_file(chosen.name)
    file.found = (chosen.reason,)
    return file


def _import_hub() -> Any:
    try:
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise MissingExtraError('reading hf:// needs huggingface_hub: pip install "bntool[hub]"') from error
    return huggingface_hub


class _OfflineError(Exception):
    """HF_HUB_OFFLINE is set."""


def _ask(question: Callable[[], Result], hub: Any, wanted: HubFile, limits: Limits) -> Result:
    """Return the answer of huggingface_hub to a question, within the time for one.

    Raises:
        UnreachableFileError: there is none.
    """
    outcome: list[Result | Exception] = []

    def ask() -> None:
        try:
            outcome.append(question())
        except Exception as error:  # noqa: BLE001 (whatever the library raises in another thread)
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(limits.answer)
    if not outcome:
        raise UnreachableFileError("the hub takes too long to answer", path=wanted.address)
    (result,) = outcome
    if not isinstance(result, Exception):
        return result
    if isinstance(result, hub.errors.OfflineModeIsEnabled):
        raise _OfflineError from result
    raise UnreachableFileError(_describe(result, hub, wanted), path=wanted.address) from result


def _describe(error: Exception, hub: Any, wanted: HubFile) -> str:
    if isinstance(error, hub.errors.GatedRepoError):
        return "its owner gives it to those who asked for it: ask on its page, and log in with: hf auth login"
    if isinstance(error, hub.errors.RevisionNotFoundError):
        return f"the repository has no revision {wanted.revision!r}"
    if isinstance(error, hub.errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private and this token does not open it: hf auth login"
    if isinstance(error, hub.errors.HFValidationError):
        return f"this is no address of the hub: {_FORM}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"the hub answers {status}"
    return f"the hub does not answer: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"


def _open_offline(hub: Any, wanted: HubFile) -> SourceFile:
    """Open the file from the cache of huggingface_hub."""
    options = {"repo_id": wanted.repository, "revision": wanted.revision, "local_files_only": True}
    try:
        if wanted.path:
            kept = Path(hub.hf_hub_download(filename=wanted.path, **options))
            folder = Folder(kept.parent)
            return CachedFile(str(kept), wanted.address, folder)
        snapshot = Path(hub.snapshot_download(**options))
    except (hub.errors.LocalEntryNotFoundError, FileNotFoundError) as error:
        raise UnreachableFileError(
            "HF_HUB_OFFLINE is set, and the cache of huggingface_hub lacks it", path=wanted.address
        ) from error
    names = [path.name for path in snapshot.iterdir()]
    chosen = choose_file(names)
    if chosen is None:
        raise UnreachableFileError(f"in the cache of huggingface_hub, {describe_choice(names)}", path=wanted.address)
    file = CachedFile(str(snapshot / chosen.name), wanted._replace(path=chosen.name).address, Folder(snapshot))
    file.found = (chosen.reason,)
    return file


class _HubFolder(Folder):
    """A folder of a repository, at one commit."""

    def __init__(self, hub: Any, wanted: HubFile, commit: str, limits: Limits) -> None:
        self._hub, self._wanted, self._commit, self._limits = hub, wanted, commit, limits

    def open(self, name: str, *, named_by: Location) -> SourceFile:
        try:
            return self.open_file(self._join(name))
        except MissingFileError as error:
            raise describe_missing(self._name(self._join(name)), named_by) from error

    def find(self, name: str) -> SourceFile | None:
        try:
            return self.open_file(self._join(name))
        except (MissingFileError, ValueError):
            return None

    def contains(self, name: str) -> bool:
        return ".." not in name.split("/")

    def _join(self, name: str) -> str:
        return urllib.parse.urljoin(f"{self._wanted.path}/" if self._wanted.path else "", name)

    def _name(self, path: str) -> Address:
        return self._wanted._replace(path=path).address

    def open_file(self, path: str) -> CachedFile | Any:
        """Return a file by its path in the repository.

        Raises:
            UnreachableFileError
        """
        repository, address = self._wanted.repository, self._name(path)
        beside = _HubFolder(self._hub, self._wanted._replace(path=path.rpartition("/")[0]), self._commit, self._limits)
        kept = self._hub.try_to_load_from_cache(repository, path, revision=self._commit)
        if isinstance(kept, str):
            return CachedFile(kept, address, beside)
        url = self._hub.hf_hub_url(repository, path, revision=self._commit)
        headers = self._hub.utils.build_hf_headers()
        return open_transfers(Transfers(address, url, headers, self._limits), beside)
