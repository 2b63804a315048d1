"""Ctrl-C in the middle of an import."""

import importlib
import os
import select
import signal
import sys
import threading
import time

import pytest

from bntool.cli.interrupts import InterruptHandler
from tests.programs import copy_user_code


@pytest.fixture(autouse=True)
def handled(monkeypatch, tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    InterruptHandler().install()
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    for name in ("pressed_once", "pressed_twice"):
        sys.modules.pop(name, None)


def import_and_read(name, pipe):
    importlib.import_module(name)
    os.read(pipe, 1)


def test_an_import_is_finished_first_and_what_blocks_after_it_is_cut_short(tmp_path):
    copy_user_code("pressed_once", tmp_path)
    empty, end = os.pipe()
    given_up = threading.Timer(30, os.write, (end, b"nothing came"))
    given_up.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            import_and_read("pressed_once", empty)
        assert sys.modules["pressed_once"].whole
        assert not select.select([empty], [], [], 0)[0]
        assert given_up.is_alive()
    finally:
        given_up.cancel()
        os.close(empty)
        os.close(end)


def test_a_second_one_does_not_wait(tmp_path):
    copy_user_code("pressed_twice", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module("pressed_twice")
    assert "pressed_twice" not in sys.modules
    time.sleep(0.2)  # nothing more comes of the first one


def test_who_is_late_to_remind_of_the_first_one_adds_none():
    handler = signal.getsignal(signal.SIGINT)
    handler._is_waiting = True
    with pytest.raises(KeyboardInterrupt):
        handler(signal.SIGINT, None)
    handler._is_reminder = True  # the timer has looked before the second one came
    handler(signal.SIGINT, None)


def test_elsewhere_it_is_raised_at_once():
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_who_ignores_interrupts_goes_on_doing_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    InterruptHandler().install()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
