"""Shards measured apart and merged: the file of one run byte for byte, and nothing from partials that do not fit."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import bntool
from bntool.cli.main import main
from bntool.errors import RefusedError, UsageError
from bntool.recalibration.checkpoint import recalibrate_checkpoint
from tests import programs
from tests.programs import copy_user_code
from tests.programs.user_code import small_net

BATCHES = 67


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "net.pt"
    torch.save(small_net.build().state_dict(), path)
    return path


def build():
    torch.manual_seed(0)
    return small_net.build()


def images(seed=3, count=2 * BATCHES):
    return torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def batches():
    return list(images().split(2))


def measure(file, shard, partial, **options):
    options = {"model": build(), "data": batches(), **options}
    return recalibrate_checkpoint(file, shard=shard, partial=partial, **options)


def measure_all(file, shards, folder, **options):
    folder.mkdir()
    paths = [folder / f"part-{number}.safetensors" for number in range(1, shards + 1)]
    for number, path in enumerate(paths, start=1):
        measure(file, f"{number}/{shards}", path, **options)
    return paths


@pytest.mark.parametrize(
    ("method", "prior", "counts"), [("pooled", 7.0, (1, 2, 7, 16)), ("pooled", 0.0, (2,)), ("paper", 0.0, (3,))]
)
def test_the_bytes_of_one_run(file, tmp_path, method, prior, counts):
    options = {"model": build(), "data": batches(), "method": method}
    one = recalibrate_checkpoint(file, tmp_path / "one.pt", prior=prior, **options)
    expected = (tmp_path / "one.pt").read_bytes()
    for shards in counts:
        paths = measure_all(file, shards, tmp_path / str(shards), method=method)
        for order in (paths, paths[::-1], random.Random(shards).sample(paths, shards)):
            merged = bntool.merge_statistics(file, order, tmp_path / "merged.pt", prior=prior, force=True)
            assert (tmp_path / "merged.pt").read_bytes() == expected
            assert merged.recalibration.drifts == one.recalibration.drifts
            assert (merged.recalibration.samples, merged.recalibration.batches) == (2 * BATCHES, BATCHES)


def test_data_that_a_spec_names(file, tmp_path, capsys):
    """Arrays, whose length is known, and a generator, whose length is not: on the command line, into safetensors."""
    np.savez(tmp_path / "images.npz", images=images().numpy(), labels=np.zeros(2 * BATCHES, np.int64))
    (tmp_path / "stream.py").write_text(
        f"import numpy, torch\ndef batches():\n    x = numpy.load({str(tmp_path / 'images.npz')!r})['images']\n"
        "    for batch in torch.from_numpy(x).split(3):\n        yield batch\n"
    )
    net = f"{copy_user_code('small_net', tmp_path)}:build"
    for number, data in enumerate((tmp_path / "images.npz", f"{tmp_path / 'stream.py'}:batches")):
        arguments = ["recalibrate", str(file), "--model", net, "--data", str(data), "--batch-size", "5", "-q"]
        assert main([*arguments, "-o", str(tmp_path / f"one{number}.pt")]) == 0
        for shard in range(1, 5):
            arguments[-1] = "--json"
            part = tmp_path / f"{number}-part-{shard}.safetensors"
            assert main([*arguments, "--shard", f"{shard}/4", "--partial", str(part)]) == 0
            facts = json.loads(capsys.readouterr().out)["files"][0]["partial"]
            assert (facts["shard"], facts["shards"]) == (shard, 4)
            assert facts["batches_of_all"] in (27, 45)
        merging = ["recalibrate", str(file), "--from-partials", str(tmp_path / f"{number}-part-*")]
        assert main([*merging, "-o", str(tmp_path / f"merged{number}.pt")]) == 0
        assert (tmp_path / f"merged{number}.pt").read_bytes() == (tmp_path / f"one{number}.pt").read_bytes()
        assert "134 samples in" in capsys.readouterr().out


def test_merging_needs_no_torch(file, tmp_path):
    paths = measure_all(file, 2, tmp_path / "parts")
    globs = [argument for path in paths for argument in ("--from-partials", path)]
    loaded = programs.list_loaded("recalibrate", file, *globs, "-o", tmp_path / "out.pt", "--quiet")
    assert (tmp_path / "out.pt").exists()
    assert not {"torch", "rich", "jinja2"} & loaded


def test_layers_that_are_not_selected_keep_their_statistics(file, tmp_path):
    paths = measure_all(file, 2, tmp_path / "parts")
    names = [name for name, module in build().named_modules() if isinstance(module, nn.BatchNorm2d)]
    merged = bntool.merge_statistics(file, paths, tmp_path / "out.pt", layers=[names[0]])
    assert merged.recalibration.plan.layers == (names[0],)
    old, new, one = (torch.load(path, weights_only=True) for path in (file, tmp_path / "out.pt", file))
    recalibrate_checkpoint(file, tmp_path / "all.pt", model=build(), data=batches())
    one = torch.load(tmp_path / "all.pt", weights_only=True)
    for name, tensor in new.items():
        assert torch.equal(tensor, (one if name.startswith(f"{names[0]}.") else old)[name]), name
    with pytest.raises(UsageError, match="selects no"):
        bntool.merge_statistics(file, paths, layers=["nothing*"])


def test_samples_that_are_left_out_are_told(file, tmp_path):
    data = batches()
    data[5] = data[5] * float("nan")
    paths = measure_all(file, 3, tmp_path / "parts", data=data, on_bad_data="skip")
    recalibrate_checkpoint(file, tmp_path / "one.pt", model=build(), data=data, on_bad_data="skip")
    merged = bntool.merge_statistics(file, paths, tmp_path / "out.pt")
    assert (tmp_path / "out.pt").read_bytes() == (tmp_path / "one.pt").read_bytes()
    assert [(one.samples, one.reason) for one in merged.recalibration.left_out] == [
        (2, "NaN or infinity in samples 10 to 11 of the batches given (all 2 samples of the batch)")
    ]


def test_more_shards_than_batches(file, tmp_path):
    paths = measure_all(file, 5, tmp_path / "parts", data=batches()[:2])
    recalibrate_checkpoint(file, tmp_path / "one.pt", model=build(), data=batches()[:2])
    bntool.merge_statistics(file, paths, tmp_path / "out.pt")
    assert (tmp_path / "out.pt").read_bytes() == (tmp_path / "one.pt").read_bytes()


def misfit_checkpoint(file, parts):
    other = file.with_name("other.pt")
    state = torch.load(file, weights_only=True)
    next(iter(state.values()))[0] += 1
    torch.save(state, other)
    measure(other, "2/3", parts[1], force=True)


def misfit_twice(_file, parts):
    (parts[1].parent / "copy").write_bytes(parts[2].read_bytes())
    parts.append(parts[1].parent / "copy")


MISFITS = {
    "of another checkpoint": (misfit_checkpoint, "shard 2/3 was measured with another checkpoint than"),
    "missing": (lambda _file, parts: parts.pop(1), "^shard 2 is missing, of 3$"),
    "two missing": (lambda _file, parts: parts.__delitem__(slice(1, 3)), "^shards 2 to 3 are missing, of 3$"),
    "twice": (misfit_twice, "shard 3/3 is there twice: the other is"),
    "of another count": (lambda f, parts: measure(f, "2/4", parts[1], force=True), "shard 2/4 has 4 shards, which"),
    "of another method": (
        lambda f, parts: measure(f, "2/3", parts[1], method="paper", force=True),
        "has the method paper",
    ),
    "of another seed": (lambda f, parts: measure(f, "2/3", parts[1], seed=1, force=True), "has the seed 1"),
    "of other layers": (lambda f, parts: measure(f, "2/3", parts[1], layers=["1"], force=True), "other layers"),
    "of fewer batches": (
        lambda f, parts: measure(f, "2/3", parts[1], data=batches()[1:], force=True),
        "has a list of 66 batches",
    ),
    "of another model": (
        lambda f, parts: measure(f, "2/3", parts[1], model=change_eps(build()), force=True),
        "another model",
    ),
}


def change_eps(model):
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eps = 1e-3
    return model


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_refused_by_number(misfit, file, tmp_path):
    paths = measure_all(file, 3, tmp_path / "parts")
    spoil, message = MISFITS[misfit]
    spoil(file, paths)
    with pytest.raises(RefusedError, match=message):
        bntool.merge_statistics(file, paths, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_the_file_is_what_the_documentation_says(file, tmp_path):
    (path,) = measure_all(file, 1, tmp_path / "parts", data=batches()[:5])
    with safe_open(path, framework="np") as opened:
        facts = json.loads(opened.metadata()["bntool_partial"])
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 it is no mapping
    assert facts["shard"] == [1, 1]
    assert facts["data"]["batches"] == 5
    assert list(facts["platform"]) == ["bntool", "torch", "processor", "threads", "device"]
    assert list(zip(arrays["level"].tolist(), arrays["index"].tolist(), strict=True)) == [(2, 0), (0, 4)]
    assert arrays["samples"].tolist() == [8, 2]
    layers = [module for module in build().modules() if isinstance(module, nn.BatchNorm2d)]
    assert [layer["channels"] for layer in facts["layers"]] == [layer.num_features for layer in layers]
    # the first layer sees what the convolution before it gives: by torch, in float64
    first = build().double()[0](torch.cat(batches()[:4]).double()).transpose(0, 1).flatten(1).detach().numpy()
    channels = layers[0].num_features
    assert arrays["positions"][0, 0] == first.shape[1]
    np.testing.assert_allclose(arrays["mean"][0, :channels], first.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(arrays["squares"][0, :channels], first.var(1) * first.shape[1], rtol=1e-5)


def test_inspect_shows_a_partial_as_what_it_is(file, tmp_path, capsys):
    (path,) = measure_all(file, 1, tmp_path / "parts", data=batches()[:5])
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "a partial of bntool recalibrate, no model (shard 1 of 1, " in shown
    assert "no BatchNorm" not in shown
    assert main(["recalibrate", str(path), "--from-partials", str(path), "-o", str(tmp_path / "out")]) == 4
    assert "this file is a partial" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"method": "exact"}, RefusedError, "needs all batches at each layer"),
        ({"partial": None}, UsageError, "--partial FILE"),
        ({"output": "out.pt"}, UsageError, "writes no checkpoint"),
        ({"keep_if_better": True}, UsageError, "judges nothing"),
        ({"prior": 1.0}, UsageError, "act where the partials are merged"),
        ({"shard": "0/4"}, UsageError, "count from 1"),
        ({"shard": "5/4"}, UsageError, "count from 1"),
        ({"shard": "1/0"}, UsageError, "count from 1"),
        ({"shard": "1:4"}, UsageError, "which of how many"),
    ],
)
def test_options_that_a_shard_cannot_have(options, kind, message, file, tmp_path):
    options = {"model": build(), "data": batches(), "shard": "1/4", "partial": tmp_path / "part"} | options
    with pytest.raises(kind, match=message):
        recalibrate_checkpoint(file, **options)
    assert not (tmp_path / "part").exists()


def test_no_file_that_is_read_is_written_to(file, tmp_path):
    np.savez(tmp_path / "images.npz", images=images(count=12).numpy())
    data, model = tmp_path / "images.npz", copy_user_code("small_net", tmp_path)
    paths = measure_all(file, 2, tmp_path / "parts")
    before = {path: path.read_bytes() for path in (file, data, model, *paths)}
    (tmp_path / "link").symlink_to(data)
    given = {"model": f"{model}:build", "data": str(data), "force": True}
    for options in (
        {"output": data},
        {"output": model},
        {"output": tmp_path / "link"},
        {"partial": data, "shard": "1/2"},
        {"output": tmp_path / "out.pt", "resume": data},
    ):
        with pytest.raises(UsageError, match="the file is read, too"):
            recalibrate_checkpoint(file, **given, **options)
    for options in ({"output": tmp_path / "one"}, {"partial": tmp_path / "one", "shard": "1/2"}):
        with pytest.raises(UsageError, match="two files to write have this name"):
            recalibrate_checkpoint(file, **given, **options, resume=tmp_path / "parts" / ".." / "one")
    with pytest.raises(UsageError, match="the file is read, too"):
        bntool.merge_statistics(file, paths, paths[1], force=True)
    assert {path: path.read_bytes() for path in before} == before
    assert not (tmp_path / "out.pt").exists()


def test_versions_that_are_mixed_are_told(file, tmp_path, monkeypatch):
    paths = measure_all(file, 2, tmp_path / "parts")
    monkeypatch.setattr("bntool.recalibration.resumable_measurement.__version__", "9.9.9")
    measure(file, "2/2", paths[1], force=True)
    (warning,) = bntool.merge_statistics(file, paths, tmp_path / "out.pt").warnings
    assert "measured in different ways, so last bits may differ" in warning
    assert "bntool 9.9.9" in warning


def test_what_the_command_line_merges(file, tmp_path, capsys, monkeypatch):
    """Files whose names are globs by accident; options that act elsewhere."""
    monkeypatch.chdir(tmp_path)
    paths = measure_all(file, 2, tmp_path / "parts")
    paths[0].rename("part-[1]")
    paths[1].rename("part-2")
    merging = ["recalibrate", str(file), "-o", "out.pt", "--quiet"]
    assert main([*merging, "--from-partials", "part-[1]", "--from-partials", "part-2"]) == 0
    for options in (["--keep-if-better"], ["--method", "paper"], ["--seed", "3"], ["--model", "x.py:y", "--data", "z"]):
        assert main([*merging, "--force", "--from-partials", "part-*", *options]) == 2
        named = " and ".join(option for option in options if option.startswith("--")) if len(options) < 3 else "--data"
        assert named in capsys.readouterr().err
