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


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_same_bytes_for_every_number_of_ranks(tmp_path, alone, ranks):
    method, bytes_of_one = alone
    done = run_bntool_as_ranks(ranks, *DIGITS, "--method", method, "-o", "several.pt", cwd=tmp_path)
    assert [rank.returncode for rank in done] == [0] * ranks, done
    # which no number of ranks here divides evenly
    assert "1,437 samples in 10 batches" in done[0].stdout
    assert [rank.stdout.count("wrote several.pt") for rank in done] == [1] + [0] * (ranks - 1)
    assert (tmp_path / "several.pt").read_bytes() == bytes_of_one


def torchrun(*options, arguments, folder):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options, "-m", "bntool"]
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


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


def test_torchrun_starts_the_ranks_and_again_after_one_was_killed(tmp_path):
    """It starts all ranks again; each goes on from what it kept."""
    (tmp_path / "rank_data.py").write_text(
        "import os, pathlib, signal, numpy, torch\n"
        "def data():\n"
        f"    x = torch.from_numpy(numpy.load({str(SAMPLES / 'digits_train.npz')!r})['images'][:640])\n"
        "    restarts = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 1))\n"
        "    for index, batch in enumerate(x.split(20)):\n"
        "        if index == 20 and os.environ.get('RANK') == '1':\n"
        "            if not restarts:\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "            kept = sorted(path.name for path in pathlib.Path().glob('kept.*'))\n"
        "            pathlib.Path('seen').write_text(' '.join(kept))\n"
        "        yield batch\n"
    )
    arguments = ["recalibrate", str(SAMPLES / "drifted.pt"), "--model", f"{SAMPLES / 'digits_net.py'}:build"]
    arguments += ["--data", f"{tmp_path / 'rank_data.py'}:data"]
    kept = ["--resume", "kept.safetensors", "--resume-every", "0"]
    done = torchrun("--max-restarts", "1", arguments=[*arguments, *kept, "-o", "several.pt"], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote several.pt") == 1
    assert "kept.1-of-2.safetensors" in (tmp_path / "seen").read_text().split()
    assert not list(tmp_path.glob("kept*"))
    assert main([*arguments, "-o", str(tmp_path / "one.pt")]) == 0
    assert (tmp_path / "several.pt").read_bytes() == (tmp_path / "one.pt").read_bytes()
