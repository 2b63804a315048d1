"""What one forward tells, and that the model is given back as it came."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bntool.errors import UsageError, UserCodeError
from bntool.graphs.declared import declare, parse_pairs
from bntool.graphs.graph import Evidence, NodeKind, Owner
from bntool.graphs.traced.inputs import find_input, parse_shape
from bntool.graphs.traced.tracing import trace
from bntool.modules.application import read_state
from tests.folding.folding_networks import Functional


def test_nodes_carry_names_and_arguments_of_the_calls() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4, eps=1e-3))
    graph = trace(model, torch.randn(2, 4, 5, 5))
    conv, norm = (node for node in graph.nodes if node.parameters)
    assert (conv.kind, conv.groups, conv.padded, conv.has_bias_slot) == (NodeKind.CONVOLUTION, 2, True, True)
    assert (norm.kind, norm.eps, norm.owner, norm.layer) == (NodeKind.BATCH_NORM, 1e-3, Owner.WHOLE, "1")
    (edge,) = graph.inputs(norm)
    assert (edge.source, tuple(edge.sources), tuple(edge.targets or ())) == (conv.index, (0, 1, 2, 3), (0, 1, 2, 3))
    assert edge.evidence is Evidence.TRACED


def test_dict_list_and_object_outputs_are_readers() -> None:
    class Instances:
        def __init__(self, boxes):
            self.boxes = boxes

    for wrap in (lambda y: {"a": [y]}, lambda y: (y, y), Instances):
        model = Functional(lambda self, x, wrap=wrap: wrap(self.conv(x)), conv=nn.Conv2d(3, 4, 1))
        graph = trace(model, torch.randn(1, 3, 4, 4))
        conv = next(node for node in graph.nodes if node.kind is NodeKind.CONVOLUTION)
        assert [graph.nodes[edge.target].kind for edge in graph.outputs(conv)] == [NodeKind.OUTPUT]


def test_hooks_are_readers_and_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(float(output.mean())))
    graph = trace(model, torch.randn(1, 3, 4, 4))
    conv = next(node for node in graph.nodes if node.kind is NodeKind.CONVOLUTION)
    readers = {graph.nodes[edge.target].kind for edge in graph.outputs(conv)}
    assert len(readers) == 2
    assert NodeKind.BATCH_NORM in readers
    assert len(seen) == 1
    assert len(model[0]._forward_hooks) == 1


def test_the_model_is_given_back_as_it_came() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(64, 2)).train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    inputs = torch.randn(2, 3, 4, 4)
    random = torch.get_rng_state()
    kept = inputs.clone()
    trace(model, inputs)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(inputs, kept)
    from torch.nn.modules import module as hooks

    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks


def test_a_forward_that_raises_is_the_users_error_and_leaves_nothing_behind() -> None:
    def fail(self, x):
        self.conv(x)
        raise ValueError("no such head")

    model = Functional(fail, conv=nn.Conv2d(3, 4, 1)).train()
    with pytest.raises(UserCodeError, match="no such head"):
        trace(model, torch.randn(1, 3, 4, 4))
    assert model.training
    from torch.nn.modules import module as hooks

    assert not hooks._global_forward_hooks


def test_a_buffer_filled_piece_by_piece_is_computed() -> None:
    def fill(self, x):
        out = x.new_empty(x.shape[0], 4, *x.shape[2:])
        out[:, :2], out[:, 2:] = self.a(x), self.b(x)
        return self.norm(out)

    model = Functional(fill, a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 2, 1), norm=nn.BatchNorm2d(4))
    graph = trace(model, torch.randn(1, 3, 4, 4))
    (norm,) = graph.batchnorms["norm"]
    assert {graph.nodes[edge.source].kind for edge in graph.inputs(norm)} == {NodeKind.OTHER}


def test_weights_that_go_through_a_buffer_count_as_used() -> None:
    def fill(self, x):
        weight = torch.empty_like(self.conv.weight)
        weight.copy_(self.conv.weight)
        return F.conv2d(self.conv(x), weight[:, :3])

    model = Functional(fill, conv=nn.Conv2d(3, 3, 1))
    graph = trace(model, torch.randn(1, 3, 4, 4))
    assert len(graph.uses["conv.weight"]) > 1


LIBRARY = torch.library.Library("bntool_tests", "FRAGMENT")
for name in ("relu", "clone"):
    LIBRARY.define(f"{name}(Tensor input) -> Tensor")
    LIBRARY.impl(name, lambda data: data.clamp(0, 100), "CPU")


@pytest.mark.parametrize("name", ["relu", "clone"])
def test_what_another_library_calls_as_torch_does_may_be_anything(name: str) -> None:
    operator = getattr(torch.ops.bntool_tests, name)
    model = Functional(lambda self, x: self.bn(operator(self.conv(x))), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    graph = trace(model, torch.randn(1, 3, 4, 4))
    (node,) = (node for node in graph.nodes if node.operator.startswith("bntool_tests."))
    assert node.kind is NodeKind.OTHER


@pytest.mark.parametrize("arithmetic", [torch.mul, torch.add])
def test_a_single_number_that_is_computed_meets_every_channel_of_a_parameter(arithmetic) -> None:
    model = Functional(lambda self, x: arithmetic(self.conv.weight, x.mean()), conv=nn.Conv2d(3, 4, 1))
    graph = trace(model, torch.randn(1, 3, 4, 4))
    assert graph.uses["conv.weight"]


def test_names_are_without_wrappers() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    graph = trace(Wrapper(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))), torch.randn(1, 3, 4, 4))
    assert list(graph.batchnorms) == ["module.1"]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 2)), (2, 1, 28, 28)),
        (nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4)), (2, 7)),
        (nn.Sequential(nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4)), (2, 5, 224)),
        (nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2)), (2, 1, 16, 32, 32)),
        (  # video networks that end in a pool of their own size, as S3D does
            nn.Sequential(nn.Conv3d(3, 2, 3, (8, 32, 32), 1), nn.BatchNorm3d(2), nn.AvgPool3d((2, 7, 7))),
            (2, 3, 16, 224, 224),
        ),
    ],
)
def test_inputs_are_guessed(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert tuple(find_input(model).shape) == shape


def test_where_no_guess_runs_the_error_says_what_to_give() -> None:
    with pytest.raises(UsageError, match="--input-shape"):
        find_input(Functional(lambda self, x: x["image"]))
    with pytest.raises(UsageError, match="1,3,224,224"):
        parse_shape("3,large")


def test_declared_pairs_are_held_against_shapes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1))
    state = read_state(model)
    graph = declare(state, parse_pairs(["0=1"]))
    assert graph.evidence is Evidence.DECLARED
    assert not graph.complete
    with pytest.raises(Exception, match="gives 5 channels"):
        declare(state, parse_pairs(["2=1"]))
    with pytest.raises(UsageError, match="no BatchNorm"):
        declare(state, parse_pairs(["0=2"]))
    with pytest.raises(UsageError, match="PRODUCER=BATCHNORM"):
        parse_pairs(["0"])
    with pytest.raises(UsageError, match="another pair"):
        parse_pairs(["0=1", "2=1"])


def test_later_branches_read_what_no_earlier_one_did() -> None:
    """A detector has hundreds of them, and as many tensors that are alive: all pairs would take minutes."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            scores = [self.norm(self.conv(x)).mean((2, 3))]
            for _ in range(20):
                scores.append(scores[-1] * 0.5 + 1 if scores[-1].sum() > 0 else scores[-1] * 0.5 - 1)
            return scores

    graph = trace(Detector(), torch.randn(1, 3, 4, 4))
    branches = [node for node in graph.nodes if node.operator == "code that looks at values"]
    assert (len(branches), graph.branches_at) == (20, branches[0].index)
    read = [edge.source for node in branches for edge in graph.inputs(node)]
    assert len(set(read)) > 20
    assert len(read) == len(set(read))
