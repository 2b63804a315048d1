"""The user's own datasets and loaders."""

import gc
import multiprocessing
import signal
import sys

import pytest
import torch

from bntool.data.batches import as_batches, split_batch
from bntool.data.loading import load_data
from bntool.errors import UsageError, UserCodeError
from tests.programs import copy_user_code

MORE = (
    "mixed",
    "samples",
    "sample_stream",
    "arrays",
    "named_arrays",
    "named_tuples",
    "foreign",
    "working_loader",
    "Rows",
)


@pytest.fixture
def spec(tmp_path):
    path = copy_user_code("user_data", tmp_path)
    yield lambda name: f"{path}:{name}"
    sys.modules.pop("user_data", None)


@pytest.mark.parametrize("name", ["dataset", "loader", "generator", "Stream", "Mapped", "batches", *MORE])
def test_every_kind_gives_all_samples_as_often_as_asked(spec, name):
    data = load_data(spec(name), batch_size=4)
    for _ in range(2):
        batches = list(data)
        given = [batch.inputs_for(torch.nn.Flatten()) for batch in batches]
        assert torch.cat(given).flatten().tolist() == list(range(10))
        if name != "batches":
            labels = [torch.as_tensor(batch.labels) for batch in batches]
            assert torch.cat(labels).tolist() == list(range(10))


@pytest.mark.parametrize("name", ["dataset", "loader", "generator"])
def test_no_more_samples_than_asked_for(spec, name):
    batches = list(load_data(spec(name), batch_size=4, samples=6))
    assert sum(batch.samples for batch in batches) == 6
    assert sum(len(batch.inputs) for batch in batches) == 6


def test_what_an_iterator_raises_is_named(spec):
    iterator = iter(load_data(spec("raising"), batch_size=4))
    next(iterator)
    with pytest.raises(UserCodeError, match=r"follows sample 4 .*OSError: disk gone .*user_data\.py:\d+"):
        next(iterator)


def test_samples_of_datasets_keep_their_numbers_when_shuffled(spec):
    (batch,) = load_data(spec("dataset"), batch_size=4, samples=3, seed=0)
    assert [f"sample {int(label)} of {spec('dataset')}" for label in batch.labels] == list(batch.names)
    (batch,) = load_data(spec("arrays"), batch_size=4, samples=3, seed=0)
    assert [f"row {int(label)} of {spec('arrays')}" for label in batch.labels] == list(batch.names)


def test_an_iterator_is_no_data_that_can_be_read_again(spec):
    data = load_data(spec("once"), batch_size=4)
    assert len(list(data)) == 2
    with pytest.raises(UsageError, match="read once only; name the function"):
        list(data)


@pytest.mark.parametrize("name", ["Rotten", "rotten_loader"])
def test_what_a_worker_raises_is_named_with_its_line(spec, name):
    with pytest.raises(UserCodeError, match=r"raised ValueError: sample 5 is rotten \(.*user_data\.py:\d+\)$"):
        list(load_data(spec(name), batch_size=4, workers=1))


@pytest.mark.parametrize("name", ["Deadly", "deadly_loader"])
def test_a_killed_worker_is_one_sentence_and_leaves_no_process(spec, name, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(UserCodeError, match="a process that reads the data was lost") as caught:
        list(load_data(spec(name), batch_size=4, workers=2))
    assert "Traceback" not in str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) is handler
    del caught
    gc.collect()
    assert multiprocessing.active_children() == []


def test_what_is_no_data(spec):
    with pytest.raises(UsageError, match="gives int"):
        load_data(spec("number"), batch_size=4)
    assert list(load_data(spec("empty"), batch_size=4)) == []
    with pytest.raises(UsageError, match="holds no tensor but NoneType"):
        list(load_data(spec("nones"), batch_size=4))


def test_batches_of_every_form():
    x, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    split = lambda item: split_batch(item, source="test", position=5)  # noqa: E731
    assert split(x).inputs is x
    assert split((x, y)).labels is y
    assert split([x, y]).inputs is x
    assert split(((x, x), y)).inputs == (x, x)
    assert split({"image": x, "label": y}).inputs_for(torch.nn.Flatten()) is x
    assert list(split({"a": x, "b": x, "labels": y}).inputs) == ["a", "b"]
    assert split([[x[0], x[1]], None]).samples == 2
    assert split(x).description == "samples 5 to 7 of test"
    with pytest.raises(UsageError, match="holds no tensor but str"):
        split("text")


def test_calling_the_model():
    class Model(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return args, kwargs

    x = torch.zeros(3, 2)
    run = lambda inputs: split_batch((inputs, None), source="", position=0).run(Model())  # noqa: E731
    assert len(run(x)[0]) == 1
    assert len(run((x, x))[0]) == 2
    assert isinstance(run([x, x])[0][0], list)
    assert set(run({"a": x, "b": x})[1]) == {"a", "b"}


def test_an_iterable_of_the_library_call():
    batches = as_batches([torch.zeros(2, 3), torch.zeros(1, 3)])
    assert [batch.description for batch in batches] == [
        "samples 0 to 1 of the batches given",
        "sample 2 of the batches given",
    ]
