"""The meaning of a freeze, as a value that a file can keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bntool.errors import CorruptFileError
from bntool.freezing.stages import Family, FrozenStages
from bntool.plan import Skip
from bntool.representation import html_repr, short_repr


@dataclass(frozen=True)
class FreezePolicy:
    """A freeze policy: which BatchNorm layers keep what while the model trains.

    Attributes:
        norm_eval: the layers stay in eval mode: they normalise by their statistics, and these do not move.
        requires_grad: whether weight and bias of the layers get gradients; None leaves them as they are.
        layers: the BatchNorm layers that the two switches are for.
        stages: what is frozen as a whole beside them.
        skips: what was left alone and may be a BatchNorm, where the policy is that of a live model; no part of what it
            means.
    """

    norm_eval: bool = True
    requires_grad: bool | None = None
    layers: tuple[str, ...] = ()
    stages: FrozenStages | None = None
    skips: tuple[Skip, ...] = field(default=(), compare=False)

    __repr__ = short_repr
    _repr_html_ = html_repr

    @cached_property
    def layer_names(self) -> frozenset[str]:
        """The layers as a set, to look names up in."""
        return frozenset(self.layers)

    def to_record(self) -> dict[str, Any]:
        """Return the policy as JSON data."""
        stages = self.stages
        return {
            "norm_eval": self.norm_eval,
            "requires_grad": self.requires_grad,
            "layers": list(self.layers),
            "stages": None
            if stages is None
            else {
                "family": stages.family.value,
                "frozen_stages": stages.frozen_stages,
                "root": stages.root,
                "without_gradient": list(stages.without_gradient),
                "in_eval": list(stages.in_eval),
            },
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> FreezePolicy:
        """Return the policy that :meth:`to_record` wrote.

        Raises:
            CorruptFileError: it is no such data.
        """
        try:
            stages = record["stages"]
            return cls(
                norm_eval=_boolean(record["norm_eval"]),
                requires_grad=None if record["requires_grad"] is None else _boolean(record["requires_grad"]),
                layers=_names(record["layers"]),
                stages=None
                if stages is None
                else FrozenStages(
                    family=Family(stages["family"]),
                    frozen_stages=int(stages["frozen_stages"]),
                    root=str(stages["root"]),
                    without_gradient=_names(stages["without_gradient"]),
                    in_eval=_names(stages["in_eval"]),
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(f"the freeze policy recorded in the file cannot be understood: {error!r}") from error


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{values!r} is no list of names")
    return tuple(values)
