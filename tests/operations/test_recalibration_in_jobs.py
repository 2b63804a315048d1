"""The library call inside a distributed job that is not bntool's, and on models that torch.compile wraps."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bntool.operations.recalibration import recalibrate
from tests.operations.calibration_network import Network, make_batches

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]


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
    run_two_ranks("-m", "tests.operations.calibration_worker", str(tmp_path), method, str(count))
    alone = Network()
    recalibrate(alone, make_batches("a small last batch of outliers")[:count], method=method)
    for rank in range(2):
        state = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert all(torch.equal(state[name], tensor) for name, tensor in alone.state_dict().items())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_what_ranks_exchange_arrives_whatever_its_size(tmp_path):
    code = (
        "import sys, torch.distributed as dist\n"
        "from bntool.operations.ranks import _FRAME, find_ranks\n"
        f"rank, address = int(sys.argv[1]), {'file://' + str(tmp_path / 'rendezvous')!r}\n"
        "dist.init_process_group('gloo', init_method=address, rank=rank, world_size=2)\n"
        "for sizes in [(0, 0), (3, 5), (_FRAME, 1), (1, 3 * _FRAME), *((_FRAME - n, 2) for n in range(64))]:\n"
        "    given = [bytes([65 + r]) * size for r, size in enumerate(sizes)]\n"
        "    assert find_ranks().share(lambda: given[rank]) == given, sizes\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    run_two_ranks("-W", "error", "-c", code)


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
