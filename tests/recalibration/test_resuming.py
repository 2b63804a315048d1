"""``resume``: what was measured and judged is kept, and a call that was killed goes on from there."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bntool.cli.main import main
from bntool.errors import RefusedError, UserCodeError
from bntool.recalibration.checkpoint import recalibrate_checkpoint
from bntool.recalibration.merging import merge_statistics
from bntool.recalibration.partials import read_partial
from tests import programs
from tests.programs.user_code import small_net


class Unreliable:
    """Batches that end with an error at one of them, as often as it is asked for."""

    def __init__(self, fault=None, passes=0, size=2):
        x = torch.randn(60, 3, 9, 9, generator=torch.Generator().manual_seed(3)) * 2 + 1
        self.batches = list(zip(x.split(size), torch.arange(60).remainder(4).split(size), strict=True))
        self.fault, self.passes = fault, passes
        self.read = 0

    def __iter__(self):
        self.passes -= 1
        for number, batch in enumerate(self.batches):
            if self.passes < 0 and number == self.fault:
                raise OSError("the node is gone")
            self.read += 1
            yield batch


class Classifier(torch.nn.Module):
    """Counts the samples that go through it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = small_net.build()
        self.samples = 0

    def forward(self, x):
        self.samples += len(x)
        return self.body(x).mean((2, 3))


@pytest.fixture
def file(tmp_path):
    torch.save(Classifier().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def recalibrate(file, data, name, model=None, **options):
    model = Classifier() if model is None else model
    return recalibrate_checkpoint(file, file.with_name(name), model=model, data=data, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a call gives that nothing ends early, and the bytes that it writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.save(Classifier().state_dict(), folder / "net.pt")
    return recalibrate(folder / "net.pt", Unreliable(size=6), "one.pt"), (folder / "one.pt").read_bytes()


# judging before, measuring and judging after each read the data once; a batch of judging is read beforehand
@pytest.mark.parametrize("passes", [0, 1, 2, 3])
@pytest.mark.parametrize("fault", [0, 1, 5, 9])
def test_a_call_that_failed_goes_on(passes, fault, file, tmp_path, undisturbed):
    one, expected = undisturbed
    kept = {"resume": tmp_path / "kept", "resume_every": 0}
    with pytest.raises(UserCodeError, match="the node is gone"):
        recalibrate(file, Unreliable(fault, passes, size=6), "out.pt", **kept)
    assert not (tmp_path / "out.pt").exists()
    result = recalibrate(file, Unreliable(size=6), "out.pt", **kept)
    assert (tmp_path / "out.pt").read_bytes() == expected
    assert (result.before.value, result.after.value) == (one.before.value, one.after.value)
    assert (result.before.samples, result.flipped) == (60, one.flipped)
    assert result.recalibration.drifts == one.recalibration.drifts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pt", "out.pt"]


def test_no_forward_is_done_twice(file, tmp_path):
    counts = []
    for fault, passes in ((None, 0), (5, 0), (5, 1), (5, 3)):
        data, seen = Unreliable(fault, passes, size=6), []

        class Counted(Classifier):
            def forward(self, x, seen=seen):
                seen.append(len(x))
                return super().forward(x)

        kept = {"resume": tmp_path / "kept", "resume_every": 0, "force": True}
        if fault is not None:
            with pytest.raises(UserCodeError):
                recalibrate(file, data, "out.pt", model=Counted(), **kept)
        data.fault = None
        recalibrate(file, data, "out.pt", model=Counted(), **kept)
        counts.append(sum(seen))
    # a few samples show what the statistics of single layers do to the outputs, and no more than that is done again
    assert max(counts) - counts[0] <= 2 * 32


def test_shards_go_on(file, tmp_path):
    share = {"shard": "2/3", "force": True}
    recalibrate_checkpoint(file, model=Classifier(), data=Unreliable(), partial=tmp_path / "whole", **share)
    kept = {"resume": tmp_path / "kept", "resume_every": 0, "partial": tmp_path / "part", **share}
    for fault in (5, 11, 17):
        with pytest.raises(UserCodeError):
            recalibrate_checkpoint(file, model=Classifier(), data=Unreliable(fault), **kept)
    position = read_partial(tmp_path / "kept").position
    recalibrate_checkpoint(file, model=Classifier(), data=Unreliable(), **kept)
    assert position > 11
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "kept").exists()


def test_what_another_run_kept_is_refused(file, tmp_path):
    kept = {"resume": tmp_path / "kept", "resume_every": 0}
    with pytest.raises(UserCodeError):
        recalibrate(file, Unreliable(17, 1), "out.pt", **kept)
    before = (tmp_path / "kept").read_bytes()
    for options, words in (({"seed": 1}, "the seed 0"), ({"method": "paper"}, "the method pooled")):
        with pytest.raises(RefusedError, match=f"kept by another run, which has {words}"):
            recalibrate(file, Unreliable(), "out.pt", **kept, **options)
    torch.save(Classifier().double().state_dict(), file)
    with pytest.raises(RefusedError, match="another checkpoint"):
        recalibrate(file, Unreliable(), "out.pt", **kept)
    assert (tmp_path / "kept").read_bytes() == before
    assert not (tmp_path / "out.pt").exists()


def test_going_on_in_another_way_is_told(file, tmp_path):
    """Last bits depend on the number of threads, so the bytes of one run are no longer promised."""
    kept = {"resume": tmp_path / "kept", "resume_every": 0}
    threads = torch.get_num_threads()
    words = f"threads {threads} and {threads + 1}"
    with pytest.raises(UserCodeError):
        recalibrate(file, Unreliable(3, 1, size=12), "out.pt", **kept)
    share = {"model": Classifier(), "shard": "1/1", "partial": tmp_path / "part", "resume": tmp_path / "of-part"}
    with pytest.raises(UserCodeError):
        recalibrate_checkpoint(file, data=Unreliable(3, size=12), resume_every=0, **share)
    torch.set_num_threads(threads + 1)
    try:
        result = recalibrate(file, Unreliable(size=12), "out.pt", **kept)
        recalibrate_checkpoint(file, data=Unreliable(size=12), **share)
    finally:
        torch.set_num_threads(threads)
    (warning,) = [one for one in result.warnings if "measured in different ways" in one]
    assert f"threads {threads}, " in warning
    assert read_partial(tmp_path / "part").platform["threads"] == words.removeprefix("threads ")
    merged = merge_statistics(file, [tmp_path / "part"], tmp_path / "merged.pt")
    assert any(words in one for one in merged.warnings)


def test_exact_keeps_nothing(file, tmp_path):
    with pytest.raises(RefusedError, match="all batches are on their way at once"):
        recalibrate(file, Unreliable(), "out.pt", resume=tmp_path / "kept", method="exact")


def test_inspect_says_that_what_is_kept_is_not_complete(file, tmp_path, capsys):
    with pytest.raises(UserCodeError):
        recalibrate(file, Unreliable(17, 1), "out.pt", resume=tmp_path / "kept.safetensors", resume_every=0)
    assert main(["inspect", str(tmp_path / "kept.safetensors"), "--json"]) == 0
    (finding,) = json.loads(capsys.readouterr().out)["files"][0]["findings"]
    assert "not complete" in finding["message"]


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no fork")
def test_killed_runs_end_with_the_same_bytes():
    done = programs.run_forked("killed_runs", 2, 300)
    assert "2 kills" in done.stdout
