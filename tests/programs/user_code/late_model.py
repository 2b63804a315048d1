"""A user's model that leaves a thread, a function for the end and open files behind."""

import atexit
import sys
import threading
from pathlib import Path

import torch

here = Path(__file__).parent
text = (here / "text").open("w")
text.write("not flushed")
raw = (here / "raw").open("wb")
raw.write(b"bytes")
atexit.register(lambda: print("function for the end", file=sys.__stdout__))


def wait():
    threading.main_thread().join()
    print("thread", file=sys.__stdout__)


threading.Thread(target=wait).start()


def build():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
