"""The library call inside a distributed job that is not bntool's, and on models that torch.compile wraps."""

import subprocess
import sys

import pytest
import torch

from bntool.recalibration.live import recalibrate
from tests.places import ROOT
from tests.recalibration.calibration_network import Network, make_batches


def run_two_ranks(*arguments):
    """Run Python twice, each time with the number of the rank as the last argument."""
    command = [sys.executable, *arguments]
    ranks = [subprocess.Popen([*command, str(rank)], cwd=ROOT, stderr=subprocess.PIPE) for rank in range(2)]
    try:
        for rank in ranks:
            _, stderr = rank.communicate(timeout=100)
            assert rank.returncode == 0, stderr.decode()
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("method", ["pooled", "exact"])
@pytest.mark.parametrize("count", [3, 1])  # two for the one and one for the other, or none
def test_every_rank_ends_with_the_statistics_of_all_batches(tmp_path, method, count):
    run_two_ranks("-m", "tests.recalibration.calibration_worker", str(tmp_path), method, str(count))
    alone = Network()
    recalibrate(alone, make_batches("a small last batch of outliers")[:count], method=method)
    for rank in range(2):
        state = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert all(torch.equal(state[name], tensor) for name, tensor in alone.state_dict().items())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_what_ranks_exchange_arrives_whatever_its_size(tmp_path):
    code = (
        "import sys, torch.distributed as dist\n"
        "from bntool.recalibration.ranks import _FRAME, find_ranks\n"
        f"rank, address = int(sys.argv[1]), {'file://' + str(tmp_path / 'rendezvous')!r}\n"
        "dist.init_process_group('gloo', init_method=address, rank=rank, world_size=2)\n"
        "for sizes in [(0, 0), (3, 5), (_FRAME, 1), (1, 3 * _FRAME), *((_FRAME - n, 2) for n in range(64))]:\n"
        "    given = [bytes([65 + r]) * size for r, size in enumerate(sizes)]\n"
        "    assert find_ranks().share(lambda: given[rank]) == given, sizes\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    run_two_ranks("-W", "error", "-c", code)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_a_replica_inside_a_model_waits_for_nobody(tmp_path, method):
    code = (
        "import sys, torch, torch.distributed as dist\n"
        "from torch import nn\n"
        "from bntool.recalibration.live import recalibrate\n"
        f"method, rank, address = {method!r}, int(sys.argv[1]), {'file://' + str(tmp_path / 'rendezvous')!r}\n"
        "dist.init_process_group('gloo', init_method=address, rank=rank, world_size=2)\n"
        "torch.manual_seed(0)\n"
        "inner = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))\n"
        "result = recalibrate(nn.Sequential(inner), [torch.randn(4, 3, 5, 5)][rank:], method=method)\n"
        "assert result.batches == 1 and inner.require_forward_param_sync\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    run_two_ranks("-c", code)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_exact_refuses_sharded_models_by_name(tmp_path):
    code = (
        "import torch, torch.distributed as dist\n"
        "from torch import nn\n"
        "from torch.distributed.fsdp import FullyShardedDataParallel\n"
        "from bntool.errors import RefusedError\n"
        "from bntool.recalibration.live import recalibrate\n"
        f"address = {'file://' + str(tmp_path / 'rendezvous')!r}\n"
        "dist.init_process_group('gloo', init_method=address, rank=0, world_size=1)\n"
        "net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))\n"
        "model = FullyShardedDataParallel(net, device_id=torch.device('cpu'))\n"
        "try:\n"
        "    recalibrate(model, [torch.randn(4, 3, 5, 5)], method='exact')\n"
        "except RefusedError as error:\n"
        "    assert 'parameters are sharded' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('not refused')\n"
        "dist.destroy_process_group()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("exchange", ["dist.all_reduce(x)", "functional.all_reduce(x, 'sum', dist.group.WORLD)"])
def test_what_a_forward_exchanges_itself(tmp_path, exchange):
    code = (
        "import os, sys, torch, torch.distributed as dist\n"
        "import torch.distributed._functional_collectives as functional\n"
        "from torch import nn\n"
        "from bntool.errors import RefusedError\n"
        "from bntool.recalibration.live import recalibrate\n"
        f"rank, address = int(sys.argv[1]), {'file://' + str(tmp_path / 'rendezvous')!r}\n"
        "dist.init_process_group('gloo', init_method=address, rank=rank, world_size=2)\n"
        "class Summing(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.norm = nn.BatchNorm2d(3)\n"
        "    def forward(self, x):\n"
        f"        x = x.clone(); y = {exchange}\n"
        "        return self.norm(x if y is None else y + 0)\n"
        "torch.manual_seed(0)\n"
        "batches, model = [torch.randn(4, 3, 5, 5) for _ in range(4)], Summing()\n"
        "recalibrate(model, batches[rank::2])\n"
        "sums = torch.cat([batches[0] + batches[1], batches[2] + batches[3]])\n"
        "torch.testing.assert_close(model.norm.running_mean, sums.mean((0, 2, 3)))\n"
        "try:\n"
        "    recalibrate(model, batches[rank::2], method='exact')\n"
        "except RefusedError as error:\n"
        "    assert 'exchanges something with the other ranks' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('not refused')\n"
        "half = nn.SyncBatchNorm(3).half()\n"
        "try:\n"
        "    recalibrate(half, [x.half() for x in batches])\n"
        "except RefusedError as error:\n"
        "    assert 'SyncBatchNorm of half precision' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('not refused')\n"
        "dist.barrier()\n"
        "os._exit(0)\n"  # gloo itself may abort when a process ends in order (one time in twenty)
    )
    run_two_ranks("-c", code)


@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_compiled_models(method):
    plain, given = Network(), Network()
    compiled = torch.compile(given, backend="eager")
    batches = make_batches("full batches")
    recalibrate(plain, batches, method=method)
    result = recalibrate(compiled, batches, method=method)
    assert result.plan.layers == ("0", "2", "6")
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(given.state_dict()[name], tensor)
