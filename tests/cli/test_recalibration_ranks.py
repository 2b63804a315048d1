"""``torchrun -m bntool recalibrate``: several processes, one result."""

import signal
from pathlib import Path

import pytest
import torch

from bntool.cli.main import main
from bntool.recalibration.partials import read_partial
from tests.places import SAMPLES
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


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_same_bytes_for_every_number_of_ranks(tmp_path, alone, ranks):
    method, bytes_of_one = alone
    done = run_bntool_as_ranks(ranks, *DIGITS, "--method", method, "-o", "several.pt", cwd=tmp_path)
    assert [rank.returncode for rank in done] == [0] * ranks, done
    # which no number of ranks here divides evenly
    assert "1,437 samples in 10 batches" in done[0].stdout
    assert [rank.stdout.count("wrote several.pt") for rank in done] == [1] + [0] * (ranks - 1)
    assert (tmp_path / "several.pt").read_bytes() == bytes_of_one


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


def test_ranks_that_are_started_again_after_one_was_killed_go_on(tmp_path, monkeypatch):
    """As torchrun starts them again with --max-restarts, which tests/oracles/torchrun.py runs."""
    copy_user_code("killed_rank", tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), "in.pt")
    command = ["recalibrate", "in.pt", "--model", "killed_rank.py:Counted", "--model-arg", "num_features=2"]
    command += ["--data", "killed_rank.py:batches"]

    def count_forwards():
        return [len(path.read_text()) for path in (tmp_path / f"forwards-{rank}" for rank in range(2))]

    kept = ["--resume", "kept.safetensors", "--resume-every", "0", "-o", "several.pt"]
    killed = run_bntool_as_ranks(2, *command, *kept, cwd=tmp_path)
    assert [rank.returncode for rank in killed] == [4, -signal.SIGKILL], killed
    assert "another rank was lost" in killed[0].stderr
    assert not Path("several.pt").exists()
    before = count_forwards()
    positions = [read_partial(Path(f"kept.{rank}-of-2.safetensors")).position for rank in range(2)]
    assert min(positions) > 0
    done = run_bntool_as_ranks(2, *command, *kept, cwd=tmp_path)
    assert [rank.returncode for rank in done] == [0, 0], done
    assert [rank.stdout.count("wrote several.pt") for rank in done] == [1, 0]
    assert not list(tmp_path.glob("kept*"))
    after = count_forwards()
    assert main([*command, "-o", "one.pt"]) == 0
    assert Path("several.pt").read_bytes() == Path("one.pt").read_bytes()
    whole = run_bntool_as_ranks(2, *command, "-o", "whole.pt", cwd=tmp_path)
    assert [rank.returncode for rank in whole] == [0, 0], whole
    counts = zip(before, after, count_forwards(), strict=True)
    assert all(again - first < last - again for first, again, last in counts)  # what was kept is not done again
