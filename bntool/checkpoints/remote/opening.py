"""Opening what an address names."""

from __future__ import annotations

from bntool.checkpoints.addresses import Address
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.remote.files import open_url
from bntool.checkpoints.remote.http import Limits
from bntool.errors import UsageError

LIMITS = Limits()


def open_address(address: Address) -> SourceFile:
    """Open a file on another machine.

    Raises:
        UsageError: addresses of this kind are not read.
        MissingExtraError: a package is needed for it.
        UnreachableFileError: the server does not give it.
    """
    if address.scheme == "hf":
        from bntool.checkpoints.remote.hub import open_hub

        return open_hub(address, limits=LIMITS)
    if address.scheme in ("https", "http"):
        return open_url(address, limits=LIMITS)
    raise UsageError(f"{address.scheme}:// is not read; https:// and hf:// are, and paths", path=address)
