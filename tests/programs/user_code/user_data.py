"""Data in all the forms that users have it in."""

import os
import signal
import typing

import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

x, y = torch.arange(10.0).reshape(10, 1), torch.arange(10)


def dataset():
    return TensorDataset(x, y)


def loader():
    return DataLoader(dataset(), batch_size=4)


def generator():
    yield x[:4], y[:4]
    yield x[4:], y[4:]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(x, y, strict=True))


class Mapped:
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"signal": x[index], "label": y[index]}


batches = [x[:4], x[4:]]


def mixed():
    numpy = x.numpy()
    yield numpy[:4], y.numpy()[:4]
    yield {"signal": numpy[4:], "label": y[4:].tolist(), "path": ["a"] * 6}


def samples():
    return [(x[i], i) for i in range(10)]


def sample_stream():
    for i in range(10):
        yield {"signal": x[i].numpy(), "label": i}


def arrays():
    return x.numpy(), y.numpy()


def named_arrays():
    return {"x": x, "y": y}


class Pair(typing.NamedTuple):
    input: torch.Tensor
    target: torch.Tensor


def named_tuples():
    return [Pair(x[:4], y[:4]), Pair(x[4:], y[4:])]


class Rotten(Mapped):
    def __getitem__(self, index):
        if index == 5:
            raise ValueError("sample 5 is rotten")
        return super().__getitem__(index)


class Deadly(Mapped):
    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def rotten_loader():
    return DataLoader(Rotten(), batch_size=4, num_workers=1)


def deadly_loader():
    return DataLoader(Deadly(), batch_size=4, num_workers=2)


class Foreign:  # tensors of TensorFlow and JAX convert so
    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values.numpy()


def foreign():
    yield Foreign(x[:4]), Foreign(y[:4])
    yield Foreign(x[4:]), Foreign(y[4:])


def working_loader():
    return DataLoader(dataset(), batch_size=4, num_workers=1)


class Rows:  # as the datasets of Hugging Face: iterable, with an index, of dicts
    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index >= 10:
            raise IndexError
        return {"pixel_values": x[index], "labels": index}

    def __iter__(self):
        return (self[i] for i in range(10))


once = generator()


def raising():
    yield x[:4]
    raise OSError("disk gone")


def empty():
    return []


def nones():
    yield None


def number():
    return 3
