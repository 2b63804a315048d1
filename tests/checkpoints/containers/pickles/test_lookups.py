"""What is said of ``getattr`` and of numbered extensions in a pickle."""

from __future__ import annotations

import enum
import pickle

import pytest

from bntool.checkpoints.checkpoint import GlobalTrust
from bntool.checkpoints.containers.pickles.reading import read_pickle_bytes
from bntool.checkpoints.containers.pickles.trust import list_globals


class Outer:
    class Inner(enum.Enum):
        MEMBER = 1


def test_a_nested_class_as_pickle_itself_writes_it() -> None:
    found = list_globals(read_pickle_bytes(pickle.dumps(Outer.Inner.MEMBER, 2)))
    outer = f"{__name__}.Outer"
    assert {g.path: g.called for g in found} == {outer: False, f"{outer}.Inner": True}


_CLASS = b"cframework.history\nBuffer\n"
_GETATTR = b"c__builtin__\ngetattr\n"


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (
            _GETATTR + b"(" + _CLASS + b"S'mean'\ntR.",
            {"framework.history.Buffer": False, "framework.history.Buffer.mean": False},
        ),
        (
            _GETATTR + b"(" + _CLASS + b"S'mean'\ntR(tR.",
            {"framework.history.Buffer": False, "framework.history.Buffer.mean": True},
        ),
        (
            b"(" + _GETATTR + _CLASS + b"S'mean'\no.",
            {"framework.history.Buffer": False, "framework.history.Buffer.mean": False},
        ),
    ],
)
def test_attributes_of_classes_are_listed_in_place_of_getattr(data: bytes, names: dict[str, bool]) -> None:
    assert {g.path: g.called for g in list_globals(read_pickle_bytes(b"\x80\x02" + data))} == names


@pytest.mark.parametrize(
    "data",
    [
        _GETATTR + b"(" + _CLASS + b"S'__init__'\ntR.",  # dunder
        _GETATTR + b"(" + _CLASS + b"S'a.b'\ntR.",
        _GETATTR + b"(" + _CLASS + b"S'mean'\nNtR.",  # with a default
        _GETATTR + b"(ctorch.serialization\nos\nS'system'\ntR.",  # of a module
        _GETATTR + b"(" + _GETATTR + b"(" + _CLASS + b"S'mean'\ntRS'x'\ntR.",  # of what was looked up
        _GETATTR + b"(" + _CLASS + b"cos\nname\ntR.",  # by a name that is no text
        b"(" + _GETATTR + b"t.",  # as a value
        b"cfunctools\npartial\n(" + _GETATTR + _CLASS + b"S'mean'\ntR.",
        b"cfunctools\npartial\n(" + _GETATTR + b"tR0N.",  # made and dropped
        b"(cfunctools\npartial\n(" + _GETATTR + b"tR1N.",
        b"cfunctools\npartial\n(" + _GETATTR + b"tRN.",  # left on the stack
        b"c__builtin__\nmap\n(" + _GETATTR + b"(" + _CLASS + b"ltR.",
        _GETATTR + b"p0\n(" + _CLASS + b"S'mean'\ntR(g0\nl0.",  # once as it should be, once kept
    ],
)
def test_getattr_stays_suspicious_where_it_could_reach_anything(data: bytes) -> None:
    trust = {g.path: g.trust for g in list_globals(read_pickle_bytes(b"\x80\x02" + data))}
    assert trust["__builtin__.getattr"] is GlobalTrust.SUSPICIOUS


def test_numbered_extensions_are_listed_as_unknown() -> None:
    for code in (b"\x82\x07", b"\x83\x07\0", b"\x84\x07\0\0\0"):
        (found,) = list_globals(read_pickle_bytes(b"\x80\x02" + code + b")R."))
        assert (found.path, found.called, found.trust) == ("copyreg extension 7", True, GlobalTrust.UNKNOWN)
