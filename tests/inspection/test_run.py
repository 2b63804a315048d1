"""Several files of one model as a run: their order, what broke where, and what changed between them."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bntool
from bntool.cli.main import main
from bntool.inspection.verdict import Health


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    for layer in (model[1], model[3]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.num_batches_tracked.fill_(900)
    return model


def save(model: nn.Module, path: Path, **others: Any) -> Path:
    torch.save({"state_dict": model.state_dict(), **others} if others else model.state_dict(), path)
    return path


def names(run: Any) -> list[str]:
    return [Path(file.path).name for file in run.files]


def test_files_are_ordered_by_epoch_where_all_say_it(tmp_path: Path) -> None:
    for name, epoch in (("a", 2), ("b", 0), ("c", 1)):
        save(make_model(), tmp_path / f"{name}.pt", epoch=epoch, global_step=epoch * 100)
    run = bntool.inspect_run(tmp_path.glob("*.pt"))
    assert names(run) == ["b.pt", "c.pt", "a.pt"]
    assert run.ordered_by == "epoch"
    assert [file.progress for file in run.files] == [{"epoch": e, "step": e * 100} for e in (0, 1, 2)]


def test_files_are_ordered_by_numbers_in_their_names_where_one_does_not_say_it(tmp_path: Path) -> None:
    for epoch in (1, 2, 9, 10):
        save(make_model(), tmp_path / f"epoch_{epoch}.pt", **({"epoch": 20 - epoch} if epoch != 9 else {}))
    run = bntool.inspect_run(tmp_path.glob("*.pt"))
    assert names(run) == ["epoch_1.pt", "epoch_2.pt", "epoch_9.pt", "epoch_10.pt"]
    assert run.ordered_by == "name"


def test_what_changed_is_measured_against_the_file_before_in_that_order(tmp_path: Path) -> None:
    model = make_model()
    for epoch, name in enumerate("cab"):  # the names say another order
        model[3].running_mean += 3 * epoch * (model[3].running_var + 1e-5).sqrt()
        save(model, tmp_path / f"{name}.pt", epoch=epoch)
    run = bntool.inspect_run(sorted(tmp_path.glob("*.pt")))
    assert names(run) == ["c.pt", "a.pt", "b.pt"]
    changes = [file.layers["3"].change for file in run.files]
    assert changes[0] is None
    assert [change.worst_mean_shift for change in changes[1:]] == pytest.approx([3, 6], rel=1e-4)
    assert [file.layers["1"].change.worst_mean_shift for file in run.files[1:]] == [0, 0]
    assert [file.change.mean_shift for file in run.files[1:]] == pytest.approx([3, 6], rel=1e-4)
    assert [file.moved_most for file in run.files] == [None, "3", "3"]
    assert run.list_moved(5) == ["3"]


def test_the_first_sick_file_is_named_and_one_that_cannot_be_read_is_a_row(tmp_path: Path) -> None:
    for epoch in range(6):
        model = make_model()
        if epoch >= 4:
            model[1].running_mean[[2, 5]] = math.nan
        save(model, tmp_path / f"{epoch}.pt", epoch=epoch)
    (tmp_path / "2.pt").write_bytes(b"not a checkpoint")
    run = bntool.inspect_run(tmp_path.glob("*.pt"))
    assert names(run) == [f"{epoch}.pt" for epoch in range(6)]
    assert run.ordered_by == "epoch"
    assert run.find_broken() == 4
    assert run.count() == {"failed": 1, "sick": 2, "healthy": 3}
    failed, sick = run.files[2], run.files[4]
    assert failed.verdict is None
    assert failed.error is not None
    assert failed.error.code == "unknown-format"
    (found,) = sick.findings
    assert found.layers == ("1",)
    assert found.finding.channels == (2, 5)
    assert sick.layers["1"].nonfinite == 2
    assert run.files[3].moved_most is not None  # against file 1: the one before it could not be read


def test_a_run_that_is_suspicious_from_the_first_file_on_did_not_break(tmp_path: Path) -> None:
    for epoch in range(3):
        model = make_model()
        model[1].num_batches_tracked.fill_(3)
        save(model, tmp_path / f"{epoch}.pt")
    run = bntool.inspect_run(tmp_path.glob("*.pt"))
    assert {file.verdict.health for file in run.files} == {Health.SUSPICIOUS}
    assert run.find_broken() is None


def test_the_channel_that_exploded_is_known(tmp_path: Path) -> None:
    for epoch in range(4):
        model = make_model()
        if epoch == 2:
            model[1].running_var[6] = 1e6
        save(model, tmp_path / f"{epoch}.pt")
    run = bntool.inspect_run(tmp_path.glob("*.pt"))
    state = run.files[2].layers["1"]
    assert state.largest_channel == 6
    assert state.largest_variance == 1e6
    assert state.change.worst_variance_ratio == pytest.approx(1e6 / float(make_model()[1].running_var[6]), rel=1e-4)
    assert run.list_moved(1) == ["1"]


def test_files_of_other_models_are_not_compared(tmp_path: Path) -> None:
    save(make_model(), tmp_path / "1.pt")
    save(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), tmp_path / "2.pt")
    run = bntool.inspect_run(tmp_path.glob("*.pt"))
    assert run.files[1].layers["1"].change is None
    assert run.files[1].moved_most is None


def test_what_is_kept_of_a_file_is_small(tmp_path: Path) -> None:
    paths = [save(make_model(), tmp_path / f"{epoch}.pt") for epoch in range(3)]
    seen = []
    run = bntool.inspect_run(paths, on_file=lambda path, inspection: seen.append((path, len(inspection.state_dicts))))
    assert seen == [(str(path), 1) for path in paths]
    assert len(repr(run)) < 1000
    # a number or two for each layer, not one for each channel
    sizes = [len(pickle.dumps(bntool.inspect_run([save(make(width), tmp_path / "w.pt")] * 3))) for width in (16, 1024)]
    assert sizes[1] < sizes[0] + 200


def make(width: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    model[1].running_mean.normal_()
    model[1].num_batches_tracked.fill_(900)
    return model


def test_a_layer_whose_variances_explode_all_at_once_is_where_a_run_broke(tmp_path: Path, capsys: Any) -> None:
    """Beside each other the channels look sound: only the file before tells."""
    model = make_model()
    for epoch in range(5):
        if epoch == 3:
            model[3].running_var *= 1e6
        save(model, tmp_path / f"{epoch}.pt", epoch=epoch)
    run = bntool.inspect_run(tmp_path.glob("*.pt"))
    assert run.find_broken() == 3
    assert [file.verdict.health for file in run.files] == [*[Health.HEALTHY] * 3, Health.SUSPICIOUS, Health.HEALTHY]
    (found,) = run.files[3].findings
    assert (found.finding.code.value, found.layers) == ("statistics-jumped", ("3",))
    assert found.finding.facts["ratio"] == pytest.approx(1e6, rel=1e-3)
    paths = [str(path) for path in sorted(tmp_path.glob("*.pt"))]
    assert main(["inspect", *paths, "--fail-on", "warning", "--quiet"]) == 1
    assert "3.pt: 3: statistics-jumped" in capsys.readouterr().err
    assert main(["inspect", *paths, "--fail-on", "error", "--quiet"]) == 0
    capsys.readouterr()
    for form in ("github", "sarif", "junit", "json"):  # whatever is printed says why
        assert main(["inspect", *paths, "--fail-on", "warning", "--report", form]) == 1
        assert "statistics-jumped" in "".join(capsys.readouterr())


def test_the_first_statistics_after_the_initial_ones_are_no_jump(tmp_path: Path) -> None:
    model = make_model()
    model[1].reset_running_stats()
    save(model, tmp_path / "0.pt")
    model[1].running_var.fill_(3e5)
    model[1].num_batches_tracked.fill_(100)
    save(model, tmp_path / "1.pt")
    run = bntool.inspect_run(tmp_path.glob("*.pt"))
    assert "statistics-jumped" not in [found.finding.code.value for file in run.files for found in file.findings]


def test_a_layer_that_came_back_is_shown_where_it_broke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Coming back is the larger step where the break took two."""
    for epoch, factor in enumerate((1.0, 1.0, 1e6, 1e8, 1.0)):
        model = make_model()
        model[3].running_var[2] *= factor
        save(model, tmp_path / f"epoch_{epoch}.pt", epoch=epoch)
    main(["inspect", *map(str, sorted(tmp_path.glob("*.pt")))])
    moved = capsys.readouterr().out.partition("moved most  ")[2].splitlines()
    assert moved[1].split()[0] == "3"
    assert moved[1].endswith("x 1.00e6  epoch 2") or moved[1].endswith("x 1e6  epoch 2")
