"""Accuracy and other metrics."""

import math
import sys

import pytest
import torch
from torch import nn

from bntool.data.batches import as_batches
from bntool.errors import RefusedError, UsageError, UserCodeError
from bntool.recalibration.checkpoint import recalibrate_checkpoint
from bntool.recalibration.evaluation import (
    Evaluation,
    count_flipped,
    evaluate,
    find_other_data,
    is_better,
    measure_top,
    parse_metric,
)
from tests.programs import copy_user_code
from tests.recalibration.test_resuming import Classifier


def test_top_k_against_sorting_by_hand():
    generator = torch.Generator().manual_seed(0)
    outputs, labels = torch.randn(200, 10, generator=generator), torch.randint(10, (200,), generator=generator)
    for k in (1, 5):
        expected = sum(
            int(label) in sorted(range(10), key=lambda c, row=row: -row[c])[:k]
            for row, label in zip(outputs, labels, strict=True)
        )
        assert measure_top(outputs, labels, k=k) == expected / 200
    assert measure_top(outputs, labels, k=50) == 1.0


def test_outputs_that_are_not_finite_are_wrong():
    outputs = torch.tensor([[float("nan"), 0.0], [1.0, 0.0]])
    assert measure_top(outputs, torch.tensor([0, 0]), k=1) == 0.5


def batches(labels=True):
    x = torch.eye(4)
    return as_batches([(x[:3], torch.tensor([0, 1, 0])), (x[3:], torch.tensor([3]))] if labels else [x[:3], x[3:]])


def test_evaluating_in_eval_mode_and_giving_the_model_back():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    nn.init.eye_(model[1].weight)
    result = evaluate(model, batches(), metric=parse_metric("top1"))
    assert result.value == 0.75
    assert result.samples == 4
    assert result.predictions.tolist() == [0, 1, 2, 3]
    assert all(m.training for m in model.modules())
    assert int(model[2].num_batches_tracked) == 0


def test_data_without_labels_has_predictions_only():
    result = evaluate(nn.Identity(), batches(labels=False), metric=parse_metric("top1"))
    assert result.value is None
    assert result.predictions.tolist() == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="needs labels"):
        is_better(result, result)


def test_the_users_metric(tmp_path):
    metrics = copy_user_code("user_metrics", tmp_path)
    result = evaluate(nn.Identity(), batches(), metric=parse_metric(f"{metrics}:error"))
    assert (result.metric, result.value) == ("error", -2.0)
    with pytest.raises(UserCodeError, match=r"user_metrics\.py:9"):
        evaluate(nn.Identity(), batches(), metric=parse_metric(f"{metrics}:broken"))
    sys.modules.pop("user_metrics")
    with pytest.raises(UsageError, match="top1, top5"):
        parse_metric("accuracy")


def test_what_cannot_be_evaluated():
    top = parse_metric("top1")
    with pytest.raises(UsageError, match="no batch"):
        evaluate(nn.Identity(), [], metric=top)
    with pytest.raises(RefusedError, match="only some batches"):
        evaluate(nn.Identity(), as_batches([(torch.eye(2), torch.zeros(2).long()), torch.eye(2)]), metric=top)
    with pytest.raises(UsageError, match=r"outputs are \[2, 2, 3, 3\]"):
        evaluate(nn.Identity(), as_batches([(torch.zeros(2, 2, 3, 3), torch.zeros(2).long())]), metric=top)


def evaluation(value, predictions=(0, 1), labels=None):
    return Evaluation("top1", value, len(predictions), torch.tensor(predictions), labels)


def test_better_and_flipped():
    assert is_better(evaluation(0.5), evaluation(0.6))
    assert not is_better(evaluation(0.5), evaluation(0.5))
    assert is_better(evaluation(math.nan), evaluation(0.1))
    assert not is_better(evaluation(0.5), evaluation(math.nan))
    assert count_flipped(evaluation(1), evaluation(1, (0, 2))) == 0.5
    # a loader that shuffles by itself: the samples are not the same ones
    assert count_flipped(evaluation(1, labels=torch.tensor([0, 1])), evaluation(1, labels=torch.tensor([1, 0]))) is None


def test_labels_that_are_no_outputs_stop_at_the_first_batch():
    outputs = torch.eye(3)
    for wrong in (3, -1, 255):
        seen = []

        def read(wrong=wrong, seen=seen):
            for label in (wrong, 0):
                seen.append(label)
                yield outputs, torch.tensor([0, 1, label])

        with pytest.raises(UsageError, match=f"a label {wrong}, but the model has 3 outputs"):
            evaluate(nn.Identity(), read(), metric=parse_metric(None))
        assert seen == [wrong]


class Returning(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, _):
        return self.value


BOXES = [{"boxes": torch.ones(2, 4), "labels": torch.ones(2)}, {"boxes": torch.ones(0, 4), "labels": torch.ones(0)}]


@pytest.mark.parametrize(
    ("output", "labels"),
    [
        (BOXES, [{"boxes": torch.ones(1, 4)}] * 2),
        (BOXES, torch.zeros(2).long()),
        (torch.ones(2, 3, 4, 4), torch.zeros(2, 4, 4).long()),
        (torch.ones(2, 3), torch.ones(2, 3)),
        (torch.ones(2), torch.ones(2)),
    ],
    ids=["detection", "detection with classes", "segmentation", "several labels", "regression"],
)
def test_what_is_no_classification_is_said_and_not_measured(output, labels):
    data = [(torch.ones(2, 3), labels)] * 2
    result = evaluate(Returning(output), data, metric=parse_metric(None))
    assert (result.value, result.predictions is None or result.outputs == 3) == (None, True)
    assert "top-1 needs outputs (samples, classes)" in result.note
    with pytest.raises(UsageError, match=r"the outputs are .*, the labels .*; give --metric FILE\.py:function"):
        evaluate(Returning(output), data, metric=parse_metric("top1"))


def test_a_metric_of_the_user_is_given_structures_by_batch(tmp_path):
    metrics = copy_user_code("user_metrics", tmp_path)
    data = [(torch.ones(2, 3), [{"boxes": torch.ones(1, 4)}] * 2)] * 2
    assert evaluate(Returning(BOXES), data, metric=parse_metric(f"{metrics}:count")).value == 4
    with pytest.raises(UsageError, match="returned NoneType; one number is needed"):
        evaluate(Returning(BOXES), data, metric=parse_metric(f"{metrics}:nothing"))
    sys.modules.pop("user_metrics")


def test_labels_in_lists_and_columns_and_logits_among_outputs():
    logits, x = torch.eye(3), torch.ones(3, 1)
    for labels in ([0, 1, 0], torch.tensor([[0], [1], [0]])):
        for output in (logits, (logits, x), {"logits": logits, "aux": x}):
            assert evaluate(Returning(output), [(x, labels)], metric=parse_metric("top1")).value == pytest.approx(2 / 3)


def test_other_data_the_second_time_are_told():
    def judge(labels, value):
        return Evaluation("top1", value, len(labels), None, torch.tensor(labels))

    before = judge([0, 1, 2, 2], 0.5)
    assert find_other_data(before, judge([2, 0, 2, 1], 0.75)) is None  # shuffled anew
    assert is_better(before, judge([2, 0, 2, 1], 0.75))
    for after, words in (
        (judge([0, 1, 2], 1.0), "gave 4 samples before, and 3 after"),
        (judge([0, 1, 1, 2], 1.0), "other labels before than after"),
    ):
        assert words in find_other_data(before, after)
        with pytest.raises(RefusedError, match=words):
            is_better(before, after)


class Shrinking:
    """Data that are fewer each time."""

    def __init__(self):
        self.batches = list(zip(torch.randn(40, 3, 9, 9).split(4), torch.arange(40).remainder(4).split(4), strict=True))

    def __iter__(self):
        self.batches.pop()
        return iter(list(self.batches))


def test_accuracies_of_other_data_are_not_compared(tmp_path):
    torch.save(Classifier().state_dict(), tmp_path / "net.pt")
    result = recalibrate_checkpoint(tmp_path / "net.pt", tmp_path / "out.pt", model=Classifier(), data=Shrinking())
    (warning,) = [one for one in result.warnings if "do not compare" in one]
    assert f"{result.before.samples} samples before, and {result.after.samples} after" in warning
    assert result.after.samples < result.before.samples
    with pytest.raises(RefusedError, match="compares on the same data"):
        recalibrate_checkpoint(
            tmp_path / "net.pt", tmp_path / "kept.pt", model=Classifier(), data=Shrinking(), keep_if_better=True
        )
    assert not (tmp_path / "kept.pt").exists()
