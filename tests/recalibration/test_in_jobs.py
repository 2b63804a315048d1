"""The library call inside a distributed job that is not bntool's, and on models that torch.compile wraps."""

import pytest
import torch

from bntool.recalibration.live import recalibrate
from tests import programs
from tests.recalibration.calibration_network import Network, make_batches


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("method", ["pooled", "exact"])
@pytest.mark.parametrize("count", [3, 1])  # two for the one and one for the other, or none
def test_every_rank_ends_with_the_statistics_of_all_batches(tmp_path, method, count):
    programs.run_ranks("job_recalibrating", tmp_path, method, count)
    alone = Network()
    recalibrate(alone, make_batches("a small last batch of outliers")[:count], method=method)
    for rank in range(2):
        state = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert all(torch.equal(state[name], tensor) for name, tensor in alone.state_dict().items())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_what_ranks_exchange_arrives_whatever_its_size(tmp_path):
    programs.run_ranks("job_exchanging_bytes", tmp_path)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_a_replica_inside_a_model_waits_for_nobody(tmp_path, method):
    programs.run_ranks("job_with_replica_inside", tmp_path, method)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_exact_refuses_sharded_models_by_name(tmp_path):
    programs.run_forked("job_of_shards", tmp_path)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("way", ["in place", "functional"])
def test_what_a_forward_exchanges_itself(tmp_path, way):
    programs.run_ranks("job_exchanging_in_forward", tmp_path, way)


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
