"""``torchrun -m bntool recalibrate``: several processes, one result."""

import os
import subprocess
import sys

import pytest
import torch

from bntool.cli.main import main
from tests.places import ROOT, SAMPLES
from tests.programs import copy_user_code, run_bntool_as_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


DIGITS = (
    *("recalibrate", SAMPLES / "drifted.pt", "--model", f"{SAMPLES / 'digits_net.py'}:build", "--prior", "3"),
    *("--data", SAMPLES / "digits_train.npz", "--batch-size", "150"),
)


@pytest.fixture(scope="module", params=["pooled", "exact"])
def alone(request, tmp_path_factory):
    """A method, and the bytes that one process writes by it."""
    path = tmp_path_factory.mktemp("alone") / "one.pt"
    assert main([*map(str, DIGITS), "--method", request.param, "-o", str(path)]) == 0
    return request.param, path.read_bytes()


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_bytes_for_every_number_of_ranks(tmp_path, alone, ranks):
    method, bytes_of_one = alone
    done = run_bntool_as_ranks(ranks, *DIGITS, "--method", method, "-o", "several.pt", cwd=tmp_path)
    assert [rank.returncode for rank in done] == [0] * ranks, done
    # which no number of ranks here divides evenly
    assert "1,437 samples in 10 batches" in done[0].stdout
    assert [rank.stdout.count("wrote several.pt") for rank in done] == [1] + [0] * (ranks - 1)
    assert (tmp_path / "several.pt").read_bytes() == bytes_of_one


@pytest.mark.parametrize("alone", ["pooled"], indirect=True)
def test_torchrun_starts_the_ranks(tmp_path, alone):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bntool"]
    done = subprocess.run(
        [sys.executable, *command, *map(str, DIGITS), "-o", "several.pt"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote several.pt") == 1
    assert (tmp_path / "several.pt").read_bytes() == alone[1]


@pytest.mark.parametrize(
    ("fault", "codes", "message"), [("failing", [4, 6], "disk gone"), ("ending", [4, 3], "another rank was lost")]
)
def test_a_rank_that_fails_ends_the_job_without_a_file(tmp_path, fault, codes, message):
    copy_user_code("failing_ranks", tmp_path)
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), tmp_path / "in.pt")
    arguments = ["recalibrate", "in.pt", "--model", "torch.nn:BatchNorm1d", "--model-arg", "num_features=2"]
    arguments += ["--data", f"failing_ranks.py:{fault}", "-o", "out.pt"]
    done = run_bntool_as_ranks(2, *arguments, cwd=tmp_path)
    assert [rank.returncode for rank in done] == codes, done
    assert message in done[0].stderr
    assert not (tmp_path / "out.pt").exists()
