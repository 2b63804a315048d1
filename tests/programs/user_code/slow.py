"""Models that take their time and say when they run, and data that say when they are read."""

import time

import torch


class Slow(torch.nn.Module):
    seconds = 0.3

    def __init__(self):
        super().__init__()
        self.bn = torch.nn.BatchNorm1d(2)

    def forward(self, x):
        print("running", flush=True)
        time.sleep(self.seconds)
        return self.bn(x)


class Announced(Slow):
    seconds = 0.1

    def __init__(self):
        super().__init__()
        print("the user says this")


def batches():
    return [torch.randn(4, 2)] * 100


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        print("item", index)
        return torch.randn(2)
