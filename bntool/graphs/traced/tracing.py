"""Tracing one real forward of the live model for who feeds whom; it is proof for that forward only.

A dispatch mode sees every operation below modules, functional calls and operators alike. Parameters are recognised by
identity or as views of all their elements; what is computed from parameters alone stays constant and is remembered by
the names it came from. Every other tensor carries labels (see :mod:`bntool.graphs.traced.labels`) that say which
node computed each of its elements. Writing into a tensor changes all tensors that share its storage, so those are
labelled anew as the results of that write; storages that outlive the forward (outputs, whatever a hook or a module
keeps) count as read.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bntool.errors import BntoolError, RefusedError
from bntool.graphs.graph import ModelGraph, Node, NodeKind
from bntool.graphs.traced import operators
from bntool.graphs.traced.alternatives import find_alternatives, find_idle
from bntool.graphs.traced.calls import Affine, CallFacts, call_facts, describe_affine, find_frozen_eps, late_bias
from bntool.graphs.traced.labels import fresh_labels, meet, replay, varying_axis
from bntool.graphs.traced.parameters import Parameter, ParameterIndex
from bntool.graphs.traced.reads import Reads
from bntool.graphs.traced.tracked_tensors import TrackedTensors
from bntool.models.user_code import describe_exception, find_calling_line
from bntool.modules import calling
from bntool.modules.borrowing import borrow
from bntool.modules.calling import call, calling_before, copy_tensors, map_leaves, tensors_in
from bntool.modules.finding import find_wrapper_prefix, has_other_statistics, walk_modules

_TORCH = str(Path(torch.__file__).parent)
_ARITHMETIC = (NodeKind.OTHER, NodeKind.CHANNELWISE, NodeKind.BIAS, NodeKind.CONSTANT_SUM)  # with constants
_INSTANCE_NORMS = (torch.instance_norm, nn.functional.instance_norm)


def trace(model: nn.Module, inputs: Any, *, prefix: str | None = None) -> ModelGraph:
    """Run one forward in eval mode and record which operation fed which; the model is given back as it was.

    Args:
        model: the live model, with the tensors that it shall be traced with.
        inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a
            :class:`~bntool.modules.calling.SecondCall`, of which the second is recorded; not changed.
        prefix: what names go without; None for that of wrappers.

    Raises:
        UserCodeError: the model's forward raised.
        RefusedError: a part of the model is a TorchScript program, or the forward does what cannot be followed.
    """
    for path, module in walk_modules(model):
        if isinstance(module, torch.jit.ScriptModule):
            raise RefusedError(
                "this part of the model is a TorchScript program, in which what feeds what cannot be followed; give "
                "its code instead, or declare the pairs",
                tensor=path,
            )
    prefix = find_wrapper_prefix(model) if prefix is None else prefix
    with borrow(model), torch.no_grad():
        model.eval()
        with calling_before(model, inputs) as plain:
            recorder = _Recorder(ParameterIndex(model, prefix))
            copies = copy_tensors(plain)
            with recorder.observe(copies):
                outputs = call(model, copies)
            recorder.close(outputs, copies)
            return recorder.finish()


# what hands elements to Python or another library, or lets them change them: no operations that a dispatch mode sees
_ELEMENT_READS = frozenset(
    (
        Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.__reduce_ex__, Tensor.apply_,
        Tensor.map_, Tensor.map2_, Tensor.storage, Tensor.untyped_storage,
    )
)  # fmt: skip
# what hands sizes to Python, which matters where values decide them
_SHAPE: Any = Tensor.shape
_SIZE_READS = frozenset((_SHAPE.__get__, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.__iter__))
_DEEP_COPY: Any = Tensor.__deepcopy__


class _PythonCalls(TorchFunctionMode):
    """Notices what a dispatch mode cannot see: elements read by Python, and the function that operations belong to."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _ELEMENT_READS and not self._recorder.is_recording:
            with _disable_current_modes():
                self._recorder.record_elements_read(args[0], function.__name__)
        if function in _SIZE_READS:
            self._recorder.record_size_read(args[0])
        if function is _DEEP_COPY:
            with _disable_current_modes():
                result = function(*args, **(kwargs or {}))
                self._recorder.record_copy(args[0], result)
                return result
        wrapped = _find_wrapped(function, args, kwargs or {})
        if wrapped is not None:
            with _disable_current_modes():
                result = function(*args, **(kwargs or {}))
                self._recorder.record_circular_padding(wrapped, result)
                return result
        if function not in _INSTANCE_NORMS:
            return function(*args, **(kwargs or {}))
        self._recorder.in_instance_norm = True
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self._recorder.in_instance_norm = False


def _find_wrapped(function: Any, arguments: Any, keywords: Any) -> Tensor | None:
    """Find the tensor that a call pads circularly; torch writes such padding piece by piece into new memory."""
    mode = arguments[2] if len(arguments) > 2 else keywords.get("mode")
    data = arguments[0] if arguments else keywords.get("input")
    return data if function is nn.functional.pad and mode == "circular" and isinstance(data, Tensor) else None


@contextlib.contextmanager
def _noticing_threads(notice: Callable[[], None]) -> Iterator[None]:
    """Call a function inside the context when this thread starts another one or gives it work."""
    own = threading.get_ident()

    def noticing(original: Callable[..., Any]) -> Callable[..., Any]:
        def noticed(*arguments: Any, **keywords: Any) -> Any:
            if threading.get_ident() == own:
                notice()
            return original(*arguments, **keywords)

        return noticed

    with contextlib.ExitStack() as undo:
        for owner, name in ((threading.Thread, "start"), (ThreadPoolExecutor, "submit")):
            original = getattr(owner, name)
            undo.callback(setattr, owner, name, original)
            setattr(owner, name, noticing(original))
        yield


@dataclass
class _ModuleCall:
    module: nn.Module
    labels: Tensor | None  # of its input
    first_node: int


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True  # they are refused by name, instead of by torch

    def __init__(self, index: ParameterIndex) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.nodes: list[Node] = []
        self.reads = Reads()
        self.known = TrackedTensors()
        self.affines: dict[int, Affine] = {}  # products with constants, by node
        self.completed: dict[int, int] = {}  # from a product to the sum that makes it a linear or a frozen BatchNorm
        self.branches_at: int | None = None
        self.branches_in = ""
        self.read_by_branches: dict[int, Tensor] = {}
        self.composite = ""  # what the operations that are recorded are parts of
        self.called: set[int] = set()  # modules, by identity
        self.in_instance_norm = False  # which torch computes by its BatchNorm
        self.is_recording = False  # what asks for storages is this class, and not the forward
        self.stack: list[_ModuleCall] = []
        self.thread = threading.get_ident()
        self.results: dict[int, Tensor] = {}  # labels that a BatchNorm node gave its output
        self.sliced: set[int] = set()  # BatchNorm nodes that use some channels of their module alone

    @contextlib.contextmanager
    def observe(self, inputs: Any) -> Iterator[None]:
        _check_layouts("an input of the model", tensors_in(inputs))
        for tensor in tensors_in(inputs):
            self.give_fresh_labels(self.add_node(NodeKind.INPUT, "input"), [tensor], axis=1)
        handles = [hooks.register_module_forward_pre_hook(self.enter), hooks.register_module_forward_hook(self.leave)]
        try:
            with self.index.noticing_biases(), _noticing_threads(self.record_thread), self, _PythonCalls(self):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            raise RefusedError(
                f"the forward calls {func}, which runs functions of its own: what feeds what cannot be followed "
                "through it; declare the pairs instead"
            )
        if torch.is_inference_mode_enabled():  # which alone lets operations come here before torch takes them apart
            with self:
                parts = func.decompose(*args, **keywords)
            if parts is not NotImplemented:
                return parts
        keeps_places = operators.keeps_places(func, args, keywords)
        result = func(*args, **keywords)
        self.is_recording = True
        try:
            if keeps_places:
                self.record_copy(args[0], result)
            else:
                self.record(func, args, keywords, result)
        except BntoolError:
            raise
        except Exception as error:  # else it would be called the model's
            raise RefusedError(
                f"{func} in the forward is used in a way that cannot be followed ({describe_exception(error)}): "
                "declare what is adjacent with --pair"
            ) from error
        finally:
            self.is_recording = False
        return result

    # modules: where in the model something ran, and whether a module does anything beside its BatchNorm

    def enter(self, module: nn.Module, arguments: Any) -> None:
        self.called.add(id(module))
        if threading.get_ident() != self.thread:
            return
        first = arguments[0] if arguments else None
        labels = self.known.labels(first)
        self.stack.append(_ModuleCall(module, labels, len(self.nodes)))

    def leave(self, module: nn.Module, _arguments: Any, output: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        while self.stack and self.stack[-1].module is not module:
            self.stack.pop()  # left by an exception that the model caught
        if not self.stack:
            return
        entered = self.stack.pop()
        inside = self.nodes[entered.first_node :]
        path = self.index.module_names.get(id(module), "")
        for node in inside:
            if node.index in self.sliced:
                continue
            if node.kind is NodeKind.BATCH_NORM and node.layer == path and id(module) in self.index.module_names:
                last = self.results.get(node.index)
                whole = last is not None and self.known.labels(output) is last
                reads_input = self.reads.first(inside[0].index) is entered.labels
                parts = self.find_parts(node.index)
                apart = [other for other in inside if other.index not in parts]
                owner = self.index.judge_owner(module, path, node, apart, reads_input=reads_input, whole=whole)
                self.nodes[node.index] = replace(node, owner=owner)

    def find_parts(self, total: int) -> set[int]:
        """Return the nodes that one completes."""
        parts = {number for number, following in self.completed.items() if following == total}
        return parts.union(*map(self.find_parts, parts))

    # tensors

    def labels_of(self, tensor: Tensor) -> Tensor | None:
        """Return the labels of a computed tensor; None for a constant."""
        labels = self.known.labels(tensor)
        if labels is not None or self.known.origin(tensor) is not None:
            return labels
        hidden = self.known.hidden_labels(tensor)
        if not hidden:
            return None
        # another view of a known storage, made out of sight: it may show anything that is in there
        node = self.add_node(NodeKind.OTHER, "alias")
        for port, seen in enumerate(hidden):
            self.reads.add(node.index, port, meet(seen, axis=None))
        return self.give_fresh_labels(node, [tensor], axis=1)

    def names_of(self, tensor: Tensor) -> frozenset[str]:
        """Return names of the parameters that a constant shows or was computed from."""
        origin = self.known.origin(tensor)
        return (self.known.hidden_origin(tensor) if origin is None else origin) | self.index.touching(tensor)

    def give_fresh_labels(
        self, node: Node, tensors: Sequence[Tensor], *, axis: int, place: tuple[int, int] | None = None
    ) -> Tensor | None:
        """Give the output of a node labels of its own.

        Args:
            place: the first channel that there is, and how many the node has, where its output holds not all.
        """
        axes = [min(axis, max(tensor.dim() - 1, 0)) for tensor in tensors]
        channels = max((t.shape[a] if t.dim() else 1 for t, a in zip(tensors, axes, strict=True)), default=1)
        first, channels = (0, channels) if place is None else place
        base = self.reads.allocate(node.index, channels) + first
        self.nodes[node.index] = replace(node, channels=channels, elements=sum(t.numel() for t in tensors[:1]))
        for tensor, own_axis in zip(tensors, axes, strict=True):
            self.known.set_labels(tensor, fresh_labels(tensor.shape, axis=own_axis, base=base))
        return self.known.labels(tensors[0]) if tensors else None

    def add_node(self, kind: NodeKind, operator: str, **facts: Any) -> Node:
        if "layer" not in facts:
            facts["layer"] = self.index.module_names.get(id(self.stack[-1].module), "") if self.stack else ""
        node = Node(len(self.nodes), kind, operator, **facts)
        self.nodes.append(node)
        return node

    # operations

    def record(self, function: Any, arguments: Any, keywords: Any, result: Any) -> None:
        parts = operators.decompose(function, arguments, keywords, result, is_plain=self.is_plain)
        self.composite = str(function.overloadpacket) if parts else ""
        for part in parts or [operators.Part(function, arguments, keywords, result)]:
            self.record_part(*part)
        self.composite = ""

    def is_plain(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a constant that comes from no parameter."""
        return self.labels_of(tensor) is None and not self.names_of(tensor)

    def record_part(self, function: Any, arguments: Any, keywords: Any, result: Any) -> None:
        name, outputs = operators.name_of(function), tensors_in(result)
        _check_layouts(f"{function.overloadpacket} in the forward", outputs)
        self.note_sizes(function, arguments, keywords, outputs)
        if name in operators.SHAPE_ONLY:
            for tensor in outputs:
                self.known.set_constant(tensor, frozenset())
            return
        given = tensors_in((arguments, keywords))
        mutated = tensors_in(operators.written_arguments(function, arguments, keywords))
        labels = {id(tensor): self.labels_of(tensor) for tensor in given}
        if all(found is None for found in labels.values()):
            self.record_constant(function, given, outputs, mutated)
        elif name in operators.VALUE_READS:
            self.record_branch()
        elif mutated or not self.record_movement(function, arguments, keywords, outputs, labels):
            self.record_node(function, arguments, keywords, outputs, labels, mutated)

    def note_sizes(self, function: Any, arguments: Any, keywords: Any, outputs: list[Tensor]) -> None:
        """Note which results have a shape that values of the data decide, at once or by way of others."""
        sizing = operators.find_sizing(function, arguments, keywords)
        given = tensors_in((arguments, keywords))
        if not any(map(self.known.is_sized_by_values, given)) and all(self.labels_of(one) is None for one in sizing):
            return
        if operators.gives_a_list(function):
            self.record_branch("Tensor.shape")
        for tensor in outputs:
            self.known.set_sized_by_values(tensor)

    def record_branch(self, how: str = "") -> None:
        """Note that Python has looked at a value that depends on the data, so another input may take another path.

        Args:
            how: by which method of a tensor.

        That path may read whatever is still alive, and all that follows here is proven for this input only. What an
        earlier branch reads is not read again: a detector has hundreds of branches.
        """
        node = self.add_node(NodeKind.OTHER, "code that looks at values")
        new = [labels for labels in self.known.alive() if id(labels) not in self.read_by_branches]
        for port, labels in enumerate(new):
            self.read_by_branches[id(labels)] = labels
            self.reads.add(node.index, port, meet(labels, axis=None))
        if self.branches_at is None:
            self.branches_at = node.index
            place = find_calling_line(outside=_TORCH, until=calling.__file__)
            self.branches_in = f"{how} in {place}" if how and place else how or place

    def record_thread(self) -> None:
        """Note that another thread, whose operations no mode sees, may do anything from here on."""
        with _disable_current_modes():
            self.record_branch("another thread")

    def record_circular_padding(self, data: Tensor, result: Tensor) -> None:
        """Record circular padding: every new element belongs to a channel that is already there."""
        labels = self.labels_of(data)
        if labels is None:
            self.known.set_constant(result, self.names_of(data))
            return
        axis = varying_axis(labels, default=1)
        same = result.shape[axis] == data.shape[axis]
        node = self.add_node(NodeKind.AVERAGE if same else NodeKind.OTHER, "aten.pad")
        self.reads.add(node.index, 0, meet(labels, axis=axis if same else None), labels)
        self.give_fresh_labels(node, [result], axis=axis)

    def record_elements_read(self, tensor: Tensor, how: str) -> None:
        """Note that elements of a tensor leave torch by one of its methods."""
        if self.labels_of(tensor) is not None:
            self.record_branch(f"Tensor.{how}")
        elif names := self.names_of(tensor):
            self.reads.use(self.add_node(NodeKind.OTHER, f"Tensor.{how}").index, names)

    def record_size_read(self, tensor: Tensor) -> None:
        """Note that Python has looked at the size of a tensor."""
        if self.known.is_sized_by_values(tensor):
            with _disable_current_modes():
                self.record_branch("Tensor.shape")

    def record_copy(self, tensor: Tensor, result: Tensor) -> None:
        """Record a copy that torch makes below its operations."""
        labels = self.labels_of(tensor)
        if labels is None:
            self.known.set_constant(result, self.names_of(tensor))
        else:
            self.known.set_labels(result, labels)

    def record_constant(self, function: Any, given: list[Tensor], outputs: list[Tensor], mutated: list[Tensor]) -> None:
        """Record a call that does not depend on the input."""
        names = frozenset().union(*map(self.names_of, given))
        changed = frozenset().union(*map(self.index.touching, mutated))
        looks = operators.name_of(function) in operators.VALUE_READS
        if (mutated or looks) and (names or changed):  # a parameter is written, or to where its tracks end
            self.reads.use(self.add_node(NodeKind.OTHER, str(function.overloadpacket)).index, names | changed)
        for tensor in (*outputs, *mutated):
            self.known.set_constant(tensor, names)

    def record_movement(
        self, function: Any, arguments: Any, keywords: Any, outputs: list[Tensor], labels: dict[int, Tensor | None]
    ) -> bool:
        """Replay an operation that only moves elements; returns whether it was one."""
        is_movement = operators.is_movement(function, arguments, keywords)
        if not is_movement or not all(tensor.is_floating_point() for tensor in outputs):
            return False
        if any(labels[id(one)] is not None for one in operators.find_indices(function, arguments, keywords)):
            return False  # other inputs move other elements
        joins = operators.name_of(function) in ("cat", "stack")

        def substitute(item: Any) -> Any:
            if not isinstance(item, Tensor):
                return item
            found = labels[id(item)]
            return self.label_constant(item) if found is None and joins else item if found is None else found

        moved = replay(function, map_leaves(substitute, arguments), map_leaves(substitute, keywords))
        if moved is None or [m.shape for m in moved] != [o.shape for o in outputs]:
            return False
        for tensor, its_labels in zip(outputs, moved, strict=True):
            self.known.set_labels(tensor, its_labels)
        return True

    def label_constant(self, tensor: Tensor) -> Tensor:
        """Give labels to a constant that is concatenated with computed elements."""
        node = self.add_node(NodeKind.OTHER, "constant")
        self.reads.use(node.index, self.names_of(tensor))
        base = self.reads.allocate(node.index, 1)
        return torch.full((), base, dtype=torch.int32, device="cpu").expand(tensor.shape)

    def record_node(
        self,
        function: Any,
        arguments: Any,
        keywords: Any,
        outputs: list[Tensor],
        labels: dict[int, Tensor | None],
        mutated: list[Tensor],
    ) -> None:
        facts = call_facts(function, arguments, keywords, index=self.index, labels=labels, names_of=self.names_of)
        if facts.kind is NodeKind.BATCH_NORM and self.in_instance_norm:
            facts = CallFacts(NodeKind.OTHER)
        given = {id(tensor): tensor for tensor in tensors_in((arguments, keywords))}
        targets = outputs[:1] if facts.kind is NodeKind.BATCH_NORM or facts.kind.is_producer else outputs
        others = self.known.sharing(mutated)
        writes_parameter = facts.kind in _ARITHMETIC and any(map(self.index.touching, mutated))
        if (others or writes_parameter) and facts.kind is not NodeKind.OTHER:
            facts = replace(facts, kind=NodeKind.OTHER, inputs=(), axis=None)
        operator = self.composite or str(function.overloadpacket)
        node = self.add_node(facts.kind, operator, **facts.node_facts())
        product = self.find_product(function, given, labels) if facts.kind in _ARITHMETIC and not others else None
        if product is not None:
            linear, bias, axis = product
            self.completed[linear.index] = node.index
            facts = replace(facts, output_axis=axis)
            node = replace(linear, index=node.index, parameters={**linear.parameters, "bias": bias.name})
            self.nodes[node.index] = node
        self.record_reads(node, facts, given, labels, shape=outputs[0].shape if outputs else None)
        for port, tensor in enumerate(others, start=len(given)):  # what is not written stays in what they hold
            seen = self.known.labels(tensor)
            if seen is not None:
                self.reads.add(node.index, port, meet(seen, axis=None))
        self.known.forget_storages(mutated)
        if facts.place is not None:
            self.sliced.add(node.index)
        out = self.give_fresh_labels(node, [*targets, *mutated, *others], axis=facts.output_axis, place=facts.place)
        if out is None:
            return  # a number, not a tensor
        if facts.kind is NodeKind.BATCH_NORM:
            self.results[node.index] = out
        elif facts.kind in _ARITHMETIC and not others:
            self.recognise_affine(self.nodes[node.index], function, arguments, keywords, labels, out)

    def record_reads(
        self,
        node: Node,
        facts: CallFacts,
        given: dict[int, Tensor],
        labels: dict[int, Tensor | None],
        *,
        shape: torch.Size | None,
    ) -> None:
        """Record what a node reads: data inputs channel by channel, all other tensors as a whole."""
        for port, tensor in enumerate(facts.inputs):
            found = labels[id(tensor)]
            assert found is not None
            broadcast = found.expand(shape) if facts.elementwise and shape is not None else found
            first = 0 if facts.place is None else facts.place[0]
            self.reads.add(node.index, port, meet(broadcast, axis=facts.axis).from_channel(first), broadcast)
        listed = {id(tensor) for tensor in facts.inputs}
        for port, (identity, tensor) in enumerate(given.items(), start=len(facts.inputs)):
            found = labels[identity]
            if found is None:
                self.reads.use(node.index, self.names_of(tensor))
            elif identity not in listed:
                self.reads.add(node.index, port, meet(found, axis=None))

    def recognise_affine(
        self, node: Node, function: Any, arguments: Any, keywords: Any, labels: dict[int, Tensor | None], out: Tensor
    ) -> None:
        """Recognise products and sums with constants of one module, which may be a FrozenBatchNorm."""

        def given(name: str) -> Any:
            return operators.argument(function, arguments, keywords, name)

        affine = describe_affine(
            function, given, labels, node=node.index, names_of=self.names_of, index=self.index, out=out
        )
        if affine is None:
            return
        same = (a for a in self.affines.values() if a.result is affine.source and a.owner == affine.owner)
        before = next(same, None)
        if before is None:
            if node.kind is not NodeKind.OTHER:
                self.affines[node.index] = affine
                axis = varying_axis(affine.source, default=1)
                self.reads.replace(node.index, 0, meet(affine.source, axis=axis), affine.source)
            return
        whole = affine.after(before)
        if whole is None:
            return
        eps = find_frozen_eps(whole, self.index)
        if eps is None:
            self.affines[node.index] = whole
        elif node.kind is not NodeKind.OTHER or varying_axis(affine.source, default=1) == 1:
            for number, following in itertools.pairwise(whole.nodes):
                self.completed[number] = following
                if self.nodes[number].kind is not NodeKind.CHANNELWISE:
                    self.nodes[number] = replace(self.nodes[number], kind=NodeKind.OTHER, parameters={}, factors=())
            self.results[node.index] = out
            facts = replace(whole, eps=eps).node_facts(self.index)
            self.nodes[node.index] = replace(self.nodes[node.index], factors=(), **facts)

    def find_product(
        self, function: Any, given: dict[int, Tensor], labels: dict[int, Tensor | None]
    ) -> tuple[Node, Parameter, int] | None:
        """Find the linear to whose product a call adds a bias, with the bias and the axis of its channels."""
        found = late_bias(function, given, labels, index=self.index)
        if found is None:
            return None
        source, bias = found
        seen = meet(source, axis=source.dim() - 1)
        product = self.reads.node_of(seen.labels)
        if product is None:
            return None
        linear = self.nodes[product]
        whole = len(seen.labels) == linear.channels and linear.index not in self.completed
        same = linear.kind is NodeKind.LINEAR and linear.layer == bias.module and "bias" not in linear.parameters
        if not (same and whole):
            return None
        return linear, bias, source.dim() - 1

    # the end

    def close(self, outputs: Any, inputs: Any) -> None:
        """Mark all that outlives the forward as read by somebody: the caller, a hook, or a module that keeps it."""
        node = self.add_node(NodeKind.OUTPUT, "output", layer="")
        for port, labels in enumerate(self.known.outliving(outputs, inputs)):
            self.reads.add(node.index, port, meet(labels, axis=None))
        for tensor in tensors_in(outputs):  # a parameter, or what is computed from parameters alone
            if self.labels_of(tensor) is None:
                self.reads.use(node.index, self.names_of(tensor))

    def finish(self) -> ModelGraph:
        feeds = dict(self.add_alternatives())
        nodes, edges, uses = self.reads.join(self.nodes, self.completed)
        edges += tuple(
            replace(edge, source=alternative)
            for alternative, relatives in feeds.items()
            for edge in edges
            if edge.source in relatives and nodes[edge.target].ran
        )
        index = self.index
        ran = frozenset(path for path, module in index.modules.items() if id(module) in self.called)
        used = {name for one in uses for name in (one, *index.aliases.get(one, ()))}
        return ModelGraph(
            nodes,
            edges,
            uses=uses,
            aliases=index.aliases,
            tied=index.tied,
            branches_at=self.branches_at,
            branches_in=self.branches_in,
            ran=ran,
            modules=frozenset(index.modules),
            idle=find_idle(index.modules, ran, used),
            other_norms=frozenset(path for path, module in index.modules.items() if has_other_statistics(module)),
        )

    def add_alternatives(self) -> Iterator[tuple[int, set[int]]]:
        """Add edges to modules that did not run but may take the place of others that did.

        Returns:
            The node of each, and those whose readers it may feed.
        """
        products = {total: product for product, total in self.completed.items()}
        ran = {path for path, module in self.index.modules.items() if id(module) in self.called}
        for alternative in find_alternatives(self.index.modules, self.nodes, ran, skipped=products.values()):
            node = self.add_node(
                NodeKind.OTHER, type(alternative.module).__name__, layer=alternative.path, channels=1, ran=False
            )
            for port, relative in enumerate(alternative.relatives):
                meeting = self.reads.of(products.get(relative.index, relative.index))
                if meeting is not None:
                    self.reads.add(node.index, port, meeting)
            yield node.index, {self.completed.get(fed.index, fed.index) for fed in alternative.feeds}


def _check_layouts(what: str, tensors: Iterable[Tensor]) -> None:
    """Refuse tensors whose elements do not lie in memory one after the other, since labels cannot follow them.

    Raises:
        RefusedError: a tensor is sparse or nested.
    """
    for tensor in tensors:
        if tensor.is_nested or tensor.is_sparse or tensor.is_sparse_csr:
            kind = "nested" if tensor.is_nested else "sparse"
            raise RefusedError(
                f"{what} gives a {kind} tensor: what feeds what cannot be followed through it; declare the pairs "
                "instead, or give the part of the model before it"
            )
