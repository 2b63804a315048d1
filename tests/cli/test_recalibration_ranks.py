"""``torchrun -m bntool recalibrate``: several processes, one result."""

import os
import subprocess
import sys

import pytest
import torch

from bntool.cli.main import main
from tests.places import SAMPLES
from tests.programs import copy_user_code

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def torchrun(ranks, *arguments, folder):
    environment = {**os.environ, "PYTHONPATH": str(SAMPLES.parent)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "bntool",
        *arguments,
    ]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.parametrize(("method", "ranks"), [("pooled", 3), ("exact", 2)])
def test_the_same_bytes_for_every_number_of_ranks(tmp_path, method, ranks, capsys):
    arguments = ["recalibrate", str(SAMPLES / "drifted.pt"), "--model", f"{SAMPLES / 'digits_net.py'}:build"]
    arguments += [
        "--data",
        str(SAMPLES / "digits_train.npz"),
        "--method",
        method,
        "--batch-size",
        "150",
        "--prior",
        "3",
    ]
    done = torchrun(ranks, *arguments, "-o", "several.pt", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote several.pt") == 1
    assert main([*arguments, "-o", str(tmp_path / "one.pt")]) == 0
    assert "1,437 samples in 10 batches" in capsys.readouterr().out  # which no number of ranks here divides evenly
    assert (tmp_path / "several.pt").read_bytes() == (tmp_path / "one.pt").read_bytes()


@pytest.mark.parametrize(
    ("fault", "message"),
    [("failing", "disk gone"), ("ending", "another rank was lost")],
)
def test_a_rank_that_fails_ends_the_job_without_a_file(tmp_path, fault, message):
    copy_user_code("failing_ranks", tmp_path)
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), tmp_path / "in.pt")
    arguments = ["recalibrate", "in.pt", "--model", "torch.nn:BatchNorm1d", "--model-arg", "num_features=2"]
    arguments += ["--data", f"failing_ranks.py:{fault}", "-o", "out.pt"]
    done = torchrun(2, *arguments, folder=tmp_path)
    assert done.returncode != 0
    # torchrun may end the other rank before that says whom it waited for
    ended = any(words in done.stderr for words in ("Signal 15 (SIGTERM)", "closing signal SIGTERM"))
    assert message in done.stderr or (fault == "ending" and ended)
    assert not (tmp_path / "out.pt").exists()
