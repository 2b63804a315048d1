"""What users' models do while they run: the library call is right, or refuses, and gives them back as they were."""

import contextlib
import contextvars
import copy
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from bntool.errors import BntoolError, RefusedError, UsageError, UserCodeError
from bntool.folding.live import fold
from bntool.recalibration.exact.paused_forwards import PausedForward
from bntool.recalibration.live import recalibrate

METHODS = pytest.mark.parametrize("method", ["pooled", "exact"])


def make_batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 6, 6, generator=generator) * (i + 1) + i for i in range(count)]


def assert_stores(norm, values):
    """That a layer stores the moments of activations, channels in dimension 1."""
    values = torch.cat([v.transpose(0, 1).flatten(1) for v in values], 1).double()
    torch.testing.assert_close(norm.running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), values.var(1), rtol=1e-5, atol=1e-6)


class WithEma(nn.Module):
    """Runs with other weights than its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.ema = {"0.weight": torch.randn(4, 3, 3, 3)}

    def forward(self, x):
        return torch.func.functional_call(self.net, self.ema, (x,))


@METHODS
def test_weights_that_a_forward_swaps_are_given_back(method):
    model, batches = WithEma(), make_batches()
    weight, elements = model.net[0].weight, model.net[0].weight.detach().clone()
    recalibrate(model, batches, method=method)
    assert model.net[0].weight is weight
    assert torch.equal(weight, elements)
    assert_stores(model.net[1], [nn.functional.conv2d(x, model.ema["0.weight"]) for x in batches])


class WithOtherBuffers(WithEma):
    def __init__(self):
        super().__init__()
        self.ema = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}


@METHODS
def test_statistics_that_are_not_the_models_are_not_written_to(method):
    model = WithOtherBuffers()
    before = {name: tensor.clone() for name, tensor in model.ema.items()}
    with pytest.raises(RefusedError, match="other statistics than its own"):
        recalibrate(model, make_batches(), method=method)
    assert all(torch.equal(model.ema[name], tensor) for name, tensor in before.items())


class Skip(nn.Module):
    """Keeps an activation on itself until it is needed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        self.skip = x
        x = self.first(x)
        return self.second(x + self.skip)


class Doubling(nn.Module):
    """Changes an attribute while it runs."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.scale = nn.BatchNorm2d(3), nn.BatchNorm2d(3), 1.0

    def forward(self, x):
        before, self.scale = self.scale, self.scale * 2
        try:
            return self.second(self.first(x) * self.scale)
        finally:
            self.scale = before


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x + torch.randn_like(x))


class InThread(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.local = nn.BatchNorm2d(3), threading.local()
        self.local.shift = 7.0

    def forward(self, x):
        return self.norm(x + getattr(self.local, "shift", 0.0))


@pytest.mark.parametrize("build", [Skip, Doubling, Random, InThread])
def test_exact_refuses_models_whose_batches_cannot_be_on_their_way_together(build):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name for name in vars(model) if not name.startswith("_")}
    with pytest.raises(RefusedError, match=r"run by itself samples \d+ to \d+.*use --method pooled"):
        recalibrate(model, make_batches(), method="exact")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name for name in vars(model) if not name.startswith("_")} == attributes
    assert getattr(model, "scale", 1.0) == 1.0
    recalibrate(model, make_batches())


SHIFT = contextvars.ContextVar("SHIFT", default=0.0)


class InContext(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x + SHIFT.get())


class Adding(torch.overrides.TorchFunctionMode):
    """Adds seven to the result of every relu."""

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result + 7 if function is torch.relu else result


class Relu(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(torch.relu(x))


@METHODS
def test_what_is_set_around_the_call_holds_inside(method):
    model, batches = InContext(), make_batches()
    token = SHIFT.set(7.0)
    try:
        recalibrate(model, batches, method=method)
    finally:
        SHIFT.reset(token)
    assert_stores(model.norm, [x + 7 for x in batches])
    model = Relu()
    with Adding():
        recalibrate(model, batches, method=method)
    assert_stores(model.norm, [torch.relu(x) + 7 for x in batches])


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x.sub_(5).div_(3))


@METHODS
def test_inputs_that_the_model_changes_are_changed_once(method):
    model, batches = InPlace(), make_batches()
    expected = [(x - 5) / 3 for x in batches]
    recalibrate(model, batches, method=method)
    assert_stores(model.norm, expected)


class Merging(nn.Module):
    """As LoRA: eval() merges the update into a weight of a layer inside, train() takes it out again."""

    def __init__(self):
        super().__init__()
        self.linear, self.update, self.norm = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4)), nn.BatchNorm1d(4)

    def train(self, mode=True):
        if mode != self.training:
            self.linear.weight.data += -self.update.data if mode else self.update.data
        return super().train(mode)

    def forward(self, x):
        weight = self.linear.weight + self.update if self.training else self.linear.weight
        return self.norm(nn.functional.linear(x, weight, self.linear.bias))


@METHODS
@pytest.mark.parametrize("training", [True, False])
def test_weights_that_train_and_eval_merge(method, training):
    model = Merging().train(training)
    before = model.linear.weight.detach().clone()
    merged = before + model.update.detach() if training else before
    batches = [torch.randn(16, 4) for _ in range(2)]
    recalibrate(model, batches, method=method)
    assert model.training is training
    assert torch.equal(model.linear.weight, before)
    assert_stores(model.norm, [nn.functional.linear(x, merged, model.linear.bias).detach() for x in batches])
    with contextlib.suppress(BntoolError):  # right or refused
        fold(model, batches[0])
    assert model.training is training
    assert torch.equal(model.linear.weight, before)


class Grouped(nn.Module):
    """Wants batches of eight, as temporal shifts do."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x.view(len(x) // 8, 8, *x.shape[1:]).roll(1, 1).flatten(0, 1))


@METHODS
def test_models_that_want_whole_batches(method):
    model, batches = Grouped(), make_batches()
    recalibrate(model, batches, method=method)
    assert_stores(model.norm, batches)


class Pooling(nn.Module):
    """A branch with one value for each channel, as that of ASPP for one image."""

    def __init__(self):
        super().__init__()
        self.pooled, self.after = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.after(x + self.pooled(x.mean((2, 3), keepdim=True)))


def test_what_follows_a_layer_with_too_few_values_sees_its_old_statistics():
    model, x = Pooling(), torch.randn(1, 3, 6, 6) * 2 + 1
    model.pooled.running_mean.fill_(0.5)
    with torch.no_grad():
        expected = x + model.eval().pooled(x.mean((2, 3), keepdim=True))
    result = recalibrate(model, [x], method="exact")
    assert [(skip.layer, skip.reason.value) for skip in result.plan.skips] == [("pooled", "too few samples")]
    assert_stores(model.after, [expected])


@METHODS
def test_batches_without_samples_are_no_batches(method):
    model, batches = nn.BatchNorm2d(3), make_batches()
    result = recalibrate(model, [batches[0], torch.empty(0, 3, 6, 6), *batches[1:]], method=method)
    assert (result.batches, result.samples) == (3, 24)
    assert_stores(model, batches)


def test_data_that_raise_are_the_users():
    def read():
        yield torch.zeros(2, 3, 4, 4)
        raise OSError("disk gone")

    with pytest.raises(UserCodeError, match="disk gone"):
        recalibrate(nn.BatchNorm2d(3), read())
    with pytest.raises(UserCodeError, match="not iterable"):
        recalibrate(nn.BatchNorm2d(3), None)


def test_a_text_is_one_glob():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    recalibrate(net, make_batches(), layers="0*")
    assert not torch.equal(net[0].running_mean, torch.zeros(3))
    assert torch.equal(net[1].running_mean, torch.zeros(3))
    with pytest.raises(UsageError, match="'absent' selects none of the 2 BatchNorm layers; there are: 0, 1"):
        recalibrate(net, make_batches(), layers="absent")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "foo"}, "method is 'foo', which is none of 'pooled', 'exact', 'paper'"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"on_bad_data": "x"}, "on_bad_data is 'x', which is none of 'stop', 'skip'"),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(UsageError, match=message):
        recalibrate(nn.BatchNorm2d(3), make_batches(), **options)


def test_layouts_are_named_or_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert isinstance(fold(model, torch.randn(2, 3, 6, 6), layout="same-keys").model[1], nn.BatchNorm2d)
    with pytest.raises(UsageError, match="layout is 'x'"):
        fold(model, torch.randn(2, 3, 6, 6), layout="x")


class NotForOne(nn.Module):
    """Leaves the BatchNorm out for a single sample."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x):
        x = self.linear(x)
        return self.norm(x) if len(x) > 1 else x


def test_a_model_that_goes_another_way_for_one_sample_is_not_folded():
    plan = fold(NotForOne(), torch.randn(8, 4)).plan
    assert not plan.steps
    assert [(skip.layer, skip.detail.partition(":")[0]) for skip in plan.skips] == [("norm", "with 1x4 as input")]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_models_with_a_compiled_part():
    class Relu(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu()

    model, batches = nn.Sequential(nn.BatchNorm2d(3), torch.jit.script(Relu())), make_batches()
    recalibrate(model, batches)
    assert_stores(model[0], batches)
    with pytest.raises(RefusedError, match="TorchScript program"):
        fold(torch.jit.trace(model.eval(), batches[0]), batches[0])


class ReadingMemory(nn.Module):
    """Takes for granted that its activations are contiguous."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        nn.init.dirac_(self.conv.weight)

    def forward(self, x):
        x = self.conv(x)
        n, c, h, w = x.shape
        return self.norm(torch.as_strided(x, (n, c, h, w), (c * h * w, h * w, w, 1)))


@torch.library.custom_op("bntool_tests::reread", mutates_args=())
def reread(x: torch.Tensor) -> torch.Tensor:
    return torch.as_strided(x, x.shape, torch.empty(x.shape).stride()).clone()


class ForeignKernel(ReadingMemory):
    def forward(self, x):
        return self.norm(reread(self.conv(x)))


@METHODS
@pytest.mark.parametrize("build", [ReadingMemory, ForeignKernel])
def test_models_that_read_memory_get_images_as_they_are(build, method):
    model, batches = build(), make_batches()
    recalibrate(model, batches, method=method)
    assert_stores(model.norm, batches)


class Branches(nn.Module):
    """Runs its branches in threads."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        with ThreadPoolExecutor(2) as pool:
            left, right = pool.submit(self.left, x), pool.submit(self.right, x * 2)
            return left.result() + right.result()


QUEUES = []


class InQueue(nn.Module):
    """A thread of its own hands over what it has done."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        results = queue.Queue()
        thread = threading.Thread(target=lambda: results.put(self.norm(x)), daemon=True)
        QUEUES.append((results, thread))
        thread.start()
        return results.get()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_hands_over_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("bntool.recalibration.exact.paused_forwards._ENDING_SECONDS", 0.1)
    monkeypatch.setattr("bntool.recalibration.exact.paused_forwards._LOOKS", 1000)
    model, batches = InQueue(), make_batches()
    with pytest.raises(RefusedError, match="the model calls this layer in a thread of its own"):
        recalibrate(model, batches, method="exact")
    for results, thread in QUEUES:  # let go what still waits
        results.put(None)
        thread.join()  # what it raised is told within this test
    recalibrate(model, batches)
    assert_stores(model.norm, batches)


@pytest.mark.parametrize("late", [False, True])
def test_layers_that_a_model_calls_in_threads(late, monkeypatch):
    if late:  # whoever waits for a forward looks at it only when what failed in a thread has ended all of it
        wait = PausedForward._wait_for_return

        def wait_for_the_end(self):
            wait(self)
            self._thread.join(timeout=600)

        monkeypatch.setattr(PausedForward, "_wait_for_return", wait_for_the_end)
    model, batches = Branches(), make_batches()
    recalibrate(model, batches)
    assert_stores(model.left, batches)
    assert_stores(model.right, [2 * x for x in batches])
    with pytest.raises(RefusedError, match=r"(left|right): the model calls this layer in a thread of its own"):
        recalibrate(model, batches, method="exact")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_defaults_of_the_process_change_nothing(dtype):
    given = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    batches = make_batches()

    def compute():
        found = []
        for method in ("pooled", "exact", "paper"):
            model = copy.deepcopy(given)
            recalibrate(model, batches, method=method)
            found += [model[1].running_mean, model[1].running_var]
        return [*found, fold(copy.deepcopy(model), batches[0]).model[0].weight]

    expected, default = compute(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = compute()
    finally:
        torch.set_default_dtype(default)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class Scaled(nn.Module):
    """Its first parameter is a scalar of another dtype than its weights."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


@METHODS
def test_inputs_get_the_dtype_of_the_weights(method):
    model, batches = Scaled(), make_batches()
    recalibrate(model, batches, method=method)
    assert_stores(model.norm, [model.conv(x).detach() for x in batches])


class Scripted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


@METHODS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_modes_of_scripted_parts_are_given_back(method, training):
    model = nn.Sequential(torch.jit.script(nn.Sequential(Scripted(), nn.Dropout())), nn.BatchNorm2d(3), nn.Dropout())
    model.train(training)
    recalibrate(model, make_batches(), method=method)
    assert all(module.training is training for module in model.modules())
    assert_stores(model[1], [x.relu() for x in make_batches()])


class WritingAndReading(ReadingMemory):
    """Changes its input, and asks for strides."""

    def forward(self, x):
        x.stride()
        return self.norm(x.sub_(10))


class WritingTwice(nn.Module):
    """Changes its input, and calls a layer twice."""

    def __init__(self):
        super().__init__()
        self.norm, self.after = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        x.sub_(10)
        return self.after(self.norm(x) + self.norm(x * 2))


@METHODS
@pytest.mark.parametrize("build", [WritingAndReading, WritingTwice])
@pytest.mark.parametrize("flat", [True, False])
def test_a_batch_that_the_model_writes_to_is_run_once(build, method, flat):
    model = build()
    batches = [x.flatten(2) if flat else x for x in make_batches()]
    if flat:
        model.norm, model.after = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    given = [x.clone() for x in batches]
    recalibrate(model, given, method=method)
    inputs = [x - 10 for x in batches]
    assert_stores(model.norm, inputs + [x * 2 for x in inputs] if build is WritingTwice else inputs)
    for one, other in zip(given, batches, strict=True):
        assert torch.equal(one, other) or torch.equal(one, other - 10)  # what the model itself does, at most


@METHODS
def test_bad_batches_of_a_model_that_writes_to_its_input(method):
    model, batches = nn.Sequential(InPlace(), nn.BatchNorm2d(3)), [x.clone() for x in make_batches()]
    bad = torch.full((8, 3, 6, 6), 3e38)
    result = recalibrate(model[0], [batches[0].clone(), bad * 2, *batches[1:]], method=method, on_bad_data="skip")
    assert (result.samples, len(result.left_out)) == (24, 1)
    assert_stores(model[0].norm, [(x - 5) / 3 for x in make_batches()])


def test_memory_reads_are_looked_for_in_the_first_good_batch():
    model, batches = ReadingMemory(), make_batches()
    bad = torch.full((8, 3, 6, 6), float("nan"))
    recalibrate(model, [bad, *batches], on_bad_data="skip")
    assert_stores(model.norm, batches)


class OperatorOfAten(ReadingMemory):
    def forward(self, x):
        x = self.conv(x)
        n, c, h, w = x.shape
        return self.norm(torch.ops.aten.as_strided(x, (n, c, h, w), (c * h * w, h * w, w, 1)))


class Branching(ReadingMemory):
    def forward(self, x):
        x = self.conv(x)
        return self.norm(x if x.is_contiguous() else x + 3)


@METHODS
@pytest.mark.parametrize("build", [OperatorOfAten, Branching])
def test_other_ways_to_read_memory(build, method):
    model, batches = build(), make_batches()
    recalibrate(model, batches, method=method)
    assert_stores(model.norm, batches)


class Differentiating(nn.Module):
    """Takes a gradient in its forward, as networks of energies do."""

    def __init__(self):
        super().__init__()
        self.norm, self.after = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.norm(x).pow(3).sum(), x)
        return self.after(gradient)


@METHODS
def test_gradients_inside_of_a_forward(method):
    model, batches = Differentiating(), [torch.randn(64, 4) * 2 + 1 for _ in range(3)]
    recalibrate(model, batches, method=method)
    assert_stores(model.norm, batches)


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)))


@METHODS
def test_higher_order_operators(method):
    model, batches = Conditional(), make_batches()
    recalibrate(model, batches, method=method)
    assert_stores(model.norm, [x + 1 if x.sum() > 0 else x - 1 for x in batches])


class Untidy(nn.Module):
    """Keeps what it has seen under names of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self._steps = nn.BatchNorm2d(3), 0

    def forward(self, x):
        self._steps += 1
        self._cache = x
        self.register_buffer("late", x.mean())
        self.add_module("later", nn.ReLU())
        return self.norm(x)


def test_what_a_forward_leaves_on_a_module_is_taken_off():
    model = Untidy()
    keys = list(model.state_dict())
    recalibrate(model, make_batches())
    assert model._steps == 0
    assert not hasattr(model, "_cache")
    assert list(model.state_dict()) == keys
    assert "later" not in model._modules


def share_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[1]._buffers["running_mean"] = model[0].running_mean
    return model


def expand_statistics():
    model = nn.BatchNorm2d(3)
    model.running_mean = torch.zeros(1).expand(3)
    return model


def build_in_inference_mode():
    with torch.inference_mode():
        return nn.BatchNorm2d(3)


@METHODS
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (share_statistics, "^1: it shares its statistics with 0"),
        (expand_statistics, "one number for all channels"),
        (build_in_inference_mode, "made in inference mode"),
        (lambda: nn.BatchNorm2d(3, device="meta"), "meta device"),
        (lambda: nn.Sequential(nn.LazyConv2d(3, 1), nn.BatchNorm2d(3)), "^0: this lazy layer has no weights yet"),
    ],
)
def test_models_that_cannot_be_recalibrated(build, message, method):
    with pytest.raises(RefusedError, match=message):
        recalibrate(build(), make_batches(), method=method)


class OnGraph(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x, adjacency):
        return self.norm(adjacency @ x)


@METHODS
def test_sparse_inputs(method):
    model, x, adjacency = OnGraph(), torch.randn(16, 4), (torch.rand(16, 16) > 0.8).float()
    recalibrate(model, [((x, adjacency.to_sparse()), None)], method=method)
    assert_stores(model.norm, [adjacency @ x])


class Boxes(list):
    def __init__(self, items, kind):
        super().__init__(items)
        self.kind = kind


def test_batches_of_a_class_of_their_own_are_taken_apart():
    model, (images, *others) = nn.BatchNorm2d(3), make_batches()
    recalibrate(model, [Boxes([images, *others], "boxes")])
    assert_stores(model, [images])


def test_a_replicating_model_runs_on_one_device():
    model, batches = nn.DataParallel(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))), make_batches()
    model.device_ids = [0, 1]  # as it has them where there are two GPUs
    recalibrate(model, batches)
    assert model.device_ids == [0, 1]
    assert_stores(model.module[1], [model.module[0](x).detach() for x in batches])


class WithAdjacency(nn.Module):
    """Keeps the graph that it works on."""

    def __init__(self, adjacency):
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.adjacency @ x)


@METHODS
def test_sparse_buffers(method):
    adjacency, x = (torch.rand(16, 16) > 0.8).float(), torch.randn(16, 4)
    model = WithAdjacency(adjacency.to_sparse())
    recalibrate(model, [x], method=method)
    assert_stores(model.norm, [adjacency @ x])
    assert torch.equal(model.adjacency.to_dense(), adjacency)


class Detector(nn.Module):
    """A head for what is large, of which some batches have none."""

    def __init__(self):
        super().__init__()
        self.norm, self.head, self.after = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        large = x[x[:, 0] > 1.0]
        x = self.norm(x)
        return self.after(x), self.head(large)


@METHODS
def test_a_batch_that_gives_a_layer_nothing(method):
    model, batches = Detector(), [torch.randn(64, 4), -torch.rand(64, 4) * 0.1 - 3, torch.randn(64, 4)]
    result = recalibrate(model, batches, method=method)
    assert set(result.statistics) == {"norm", "head", "after"}
    assert_stores(model.norm, batches)
    assert_stores(model.head, [x[x[:, 0] > 1.0] for x in batches])
    assert result.statistics["head"].calls == 2


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_model_in_eval_mode_in_a_fresh_wrapper(wrap):
    model, batches = nn.Sequential(nn.BatchNorm2d(3)).eval(), make_batches()
    wrapped = wrap(model)
    recalibrate(wrapped, batches)
    assert_stores(wrapped.module[0], batches)
    assert not wrapped.module.training
    with pytest.raises(RefusedError, match=r"0\.0: frozen .*layers=\['\*'\] selects frozen ones, too"):
        recalibrate(nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)).eval(), nn.Softmax(1)), batches)
