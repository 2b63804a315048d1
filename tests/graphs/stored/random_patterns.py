"""Random ONNX graphs: streams with several readers, shared constants, movements, activations, pads and gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.graphs.stored.onnx_patterns import Pattern


@dataclass
class Drawing:
    """A graph that grows by one operation at a time.

    Attributes:
        seed: of everything that is drawn.
        tensors: (name, channels, extent) of the values with four axes so far.
    """

    seed: int
    tensors: list[tuple[str, int, int]] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.pattern = Pattern(shape=(2, 4, 8, 8), random=self.random)
        self.tensors.append(("x", 4, 8))
        self.weights: list[tuple[str, str, int, int]] = []  # that another convolution may share
        self.norms: list[tuple[str, int]] = []
        self.positive = bool(self.random.random() < 0.5)

    def draw(self) -> Pattern:
        """A graph of six to sixteen operations, of which the last ones and some others are results."""
        steps: list[Callable[[], None]] = [getattr(self, name) for name in dir(self) if name.startswith("add_")]
        self.add_conv()
        for _ in range(int(self.random.integers(6, 17))):
            steps[int(self.random.integers(len(steps)))]()
            if self.random.random() < 0.45:
                self.add_norm()
        read = {name for node in self.pattern.nodes for name in node.input}
        last = [name for name, _, _ in self.tensors if name not in read and name != "x"]
        others = [name for name, _, _ in self.tensors[1:] if name in read and self.random.random() < 0.06]
        self.pattern.outputs = last + others
        return self.pattern

    def name(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def pick(self) -> tuple[str, int, int]:
        """One of the latest values, mostly."""
        newest = len(self.tensors) - 1
        back = int(self.random.geometric(0.6)) - 1
        return self.tensors[max(newest - back, 0)]

    def like(self, channels: int, extent: int, but: str) -> str | None:
        found = [n for n, c, e in self.tensors if (c, e) == (channels, extent) and n != but]
        return str(self.random.choice(found)) if found else None

    def keep(self, name: str, channels: int, extent: int) -> None:
        self.tensors.append((name, channels, extent))

    def add_conv(self) -> None:
        """A convolution, with a weight of its own or of another one."""
        read, channels, extent = self.pick()
        output, given = self.name(), int(self.random.choice([2, 4, 6]))
        padded = bool(self.random.random() < 0.4)
        attributes = {"pads": [1] * 4} if padded else {}
        size = 3 if padded else 1
        fitting = [one for one in self.weights if one[2:] == (channels, size)]
        if fitting and self.random.random() < 0.4:
            weight, bias, _, _ = fitting[int(self.random.integers(len(fitting)))]
            given = next(one.dims[0] for one in self.pattern.tensors if one.name == weight)
        else:
            weight = self.pattern.put(f"{output}.weight", given, channels, size, size)
            bias = self.pattern.put(f"{output}.bias", given) if self.random.random() < 0.5 else ""
            self.weights.append((weight, bias, channels, size))
        self.pattern.add("Conv", f"{read} {weight} {bias}".strip(), output, **attributes)
        self.keep(output, given, extent)

    def add_norm(self) -> None:
        """A BatchNormalization, now and then with the parameters of another one."""
        read, channels, extent = self.pick()
        output = self.name()
        fitting = [name for name, count in self.norms if count == channels]
        if fitting and self.random.random() < 0.2:
            other = str(self.random.choice(fitting))
            parameters = " ".join(f"{other}.{role}" for role in "gbmv")
            self.pattern.norm(read, output, channels, parameters=parameters)
        else:
            self.pattern.norm(read, output, channels, positive=self.positive)
            self.norms.append((output, channels))
        self.keep(output, channels, extent)

    def add_elementwise(self) -> None:
        read, channels, extent = self.pick()
        operators = ["Relu", "Sigmoid", "LeakyRelu", "Identity", "Neg", "Dropout", "Relu", "Abs", "Tanh"]
        output = self.pattern.add(str(self.random.choice(operators)), read, self.name())
        self.keep(output, channels, extent)

    def add_constant(self) -> None:
        read, channels, extent = self.pick()
        shapes = [(channels, 1, 1), (1, channels, 1, 1), (1,), (), (1, 1, extent, 1)]
        shape = shapes[int(self.random.integers(len(shapes)))]
        output = self.name()
        constant = self.pattern.put(f"{output}.k", *shape, low=0.4)
        operator = str(self.random.choice(["Add", "Sub", "Mul", "Div"]))
        order = f"{constant} {read}" if operator != "Div" and self.random.random() < 0.3 else f"{read} {constant}"
        self.keep(self.pattern.add(operator, order, output), channels, extent)

    def add_joint(self) -> None:
        read, channels, extent = self.pick()
        other = self.like(channels, extent, read)
        if other is None:
            return
        operator = str(self.random.choice(["Add", "Add", "Sub", "Mul", "Sum"]))
        self.keep(self.pattern.add(operator, f"{read} {other}", self.name()), channels, extent)

    def add_gate(self) -> None:
        read, channels, extent = self.pick()
        pooled = self.pattern.add("GlobalAveragePool", read, self.name())
        gate = self.pattern.add("Sigmoid", pooled, self.name())
        self.keep(self.pattern.add("Mul", f"{gate} {read}", self.name()), channels, extent)

    def add_concat(self) -> None:
        read, channels, extent = self.pick()
        found = [(n, c) for n, c, e in self.tensors if e == extent]
        other, more = found[int(self.random.integers(len(found)))]
        if channels + more > 12:
            return
        self.keep(self.pattern.add("Concat", f"{read} {other}", self.name(), axis=1), channels + more, extent)

    def add_split(self) -> None:
        read, channels, extent = self.pick()
        if channels < 2:
            return
        sizes = [channels // 2, channels - channels // 2]
        first, second = self.name(), self.name()
        self.pattern.give(f"{first}.sizes", sizes, "i8")
        self.pattern.add("Split", f"{read} {first}.sizes", f"{first} {second}", axis=1)
        self.keep(first, sizes[0], extent)
        self.keep(second, sizes[1], extent)

    def add_shuffle(self) -> None:
        read, channels, extent = self.pick()
        if channels % 2:
            return
        output = self.name()
        self.pattern.give(f"{output}.apart", [2, 2, channels // 2, extent, extent], "i8")
        self.pattern.give(f"{output}.together", [2, channels, extent, extent], "i8")
        self.pattern.add("Reshape", f"{read} {output}.apart", f"{output}a")
        self.pattern.add("Transpose", f"{output}a", f"{output}b", perm=[0, 2, 1, 3, 4])
        self.keep(self.pattern.add("Reshape", f"{output}b {output}.together", output), channels, extent)

    def add_turned(self) -> None:
        """A matrix product along the last axis, with channels there and back."""
        read, channels, extent = self.pick()
        output, given = self.name(), int(self.random.choice([2, 4]))
        last = self.pattern.add("Transpose", read, f"{output}a", perm=[0, 2, 3, 1])
        weight = self.pattern.put(f"{output}.w", channels, given)
        product = self.pattern.add("MatMul", f"{last} {weight}", f"{output}b")
        if self.random.random() < 0.5:
            bias = self.pattern.put(f"{output}.bias", given)
            product = self.pattern.add("Add", f"{product} {bias}", f"{output}c")
        self.keep(self.pattern.add("Transpose", product, output, perm=[0, 3, 1, 2]), given, extent)

    def add_pool(self) -> None:
        read, channels, extent = self.pick()
        attributes = {"kernel_shape": [3, 3], "pads": [1] * 4}
        operator = str(self.random.choice(["MaxPool", "AveragePool"]))
        if operator == "AveragePool" and self.random.random() < 0.5:
            attributes["count_include_pad"] = 1
        self.keep(self.pattern.add(operator, read, self.name(), **attributes), channels, extent)

    def add_space(self) -> None:
        read, channels, extent = self.pick()
        if channels % 4 == 0 and extent <= 8:
            output = self.pattern.add("DepthToSpace", read, self.name(), blocksize=2)
            self.keep(output, channels // 4, extent * 2)
