"""Thresholds from which on a number is a finding; docs/thresholds.md lists them, and a configuration can set each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeAlias


class Thresholds(NamedTuple):
    """The thresholds of findings, each documented in docs/thresholds.md and tested on the samples.

    Attributes:
        dead_scale: of the largest abs(scale) of the layer, which counts as exploding_scale at most; below it a channel
            carries nothing that float32 can keep.
        dead_share: of the channels, from which on dead ones are a warning.
        exploding_scale: abs(scale) above this amplifies rounding errors of float32 into visible ones.
        outlying_variance: times the next smaller running_var of the layer; of trained layers the largest seen is 3.6.
        outlying_variance_error: from which on it is an error.
        outlying_mean: times the next smaller abs(running_mean), and the largest sigma, of the rest; of trained layers
            7.2 is the largest.
        outlying_mean_error: from which on it is an error.
        outlying_bias: times the next smaller abs(bias), and the largest abs(weight), of the layer.
        outlying_layer_variance: times the largest running_var of all layers below, that every channel of a layer has.
        outlying_layer_mean: sigmas from 0, in the channel in the middle.
        constant_variance: at most this running_var, a channel is as good as constant and nothing to compare with.
        vanishing_variance: at most this running_var, the input was constant for long: 0.9 ** 262 = 1e-12.
        vanishing_scale: abs(scale) above this amplifies what comes into such a channel.
        initial_share: of the channels that have mean 0 and variance 1, from which on they are told of.
        few_updates: below it the statistics rest on few batches: 0.9 ** 22 = 0.1, with momentum 0.1 a tenth of the
            initial values is left.
        many_updates: after which a parameter that is exactly as it was created did not train.
        high_momentum: share of the new batch; above it is rather the share kept, as other frameworks count.
        variance_jump: times that running_var grows from one file to the next, over all channels; raw pixels give some
            1e3.
        average_initial_share: of the initial values, in the statistics of an average.
        average_lag: of an average, in sigmas or the log of the factor of variances, in the layer in the middle.
        average_weight_distance: relative distance of the weights of BatchNorms, from which on statistics differ, too.
        average_counter_share: of the model's num_batches_tracked; an average that has fewer was given its buffers once.
        steps_left_out: share of the optimizer's steps that a GradScaler may have skipped.
        forwards_per_step: more updates for a step of the optimizer are rather those of a training before.
    """

    dead_scale: float = 1e-6
    dead_share: float = 0.1
    exploding_scale: float = 1e3
    outlying_variance: float = 1e3
    outlying_variance_error: float = 1e6
    outlying_mean: float = 1e2
    outlying_mean_error: float = 1e4
    outlying_bias: float = 1e3
    outlying_layer_variance: float = 1e4
    outlying_layer_mean: float = 1e3
    constant_variance: float = 1e-5
    vanishing_variance: float = 1e-12
    vanishing_scale: float = 1.0
    initial_share: float = 0.5
    few_updates: float = 22
    many_updates: float = 100
    high_momentum: float = 0.5
    variance_jump: float = 1e4
    average_initial_share: float = 0.1
    average_lag: float = 0.5
    average_weight_distance: float = 0.01
    average_counter_share: float = 0.5
    steps_left_out: float = 0.02
    forwards_per_step: float = 64


DEFAULTS = Thresholds()
OF_FILES = Thresholds._fields[Thresholds._fields.index("average_initial_share") :]  # which no single layer has
ThresholdsOf: TypeAlias = Callable[[str], Thresholds]  # by the name of the layer; "" for the file


def use_defaults(_layer: str) -> Thresholds:
    """Return the thresholds of each layer where none is set."""
    return DEFAULTS


class ThresholdRule(NamedTuple):
    """A threshold that a configuration sets.

    Attributes:
        field: of :class:`Thresholds`.
        layers, files: globs of layer names and of paths; empty for all.
        reason: why; the report shows it.
    """

    field: str
    value: float
    layers: tuple[str, ...]
    files: tuple[str, ...]
    reason: str

    @property
    def name(self) -> str:
        """The name as configurations spell it."""
        return self.field.replace("_", "-")

    @property
    def default(self) -> float:
        """The value where it is not set."""
        return float(getattr(DEFAULTS, self.field))


def matches(globs: Sequence[str], *names: str) -> bool:
    """Return whether one of the globs of a rule matches one of the names."""
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def combine(rules: Sequence[ThresholdRule]) -> ThresholdsOf:
    """Return the thresholds of each layer under these rules; of several for one threshold the last that fits counts."""
    if not rules:
        return use_defaults

    def find(layer: str) -> Thresholds:
        fitting = {rule.field: rule.value for rule in rules if not rule.layers or matches(rule.layers, layer)}
        return DEFAULTS._replace(**fitting)

    return find
