"""Freezing in files that say themselves which layers train, as Keras's do: a whole layer, or nothing of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bntool.batchnorm import BatchNorm
from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.errors import RefusedError
from bntool.plan import SetAttribute, Skip, SkipReason


def check_whole_layers(
    checkpoint: Checkpoint, *, norm_eval: bool, requires_grad: bool | None, frozen_stages: int | None, for_file: bool
) -> None:
    """Refuse switches of freezing that ``trainable`` cannot say.

    Raises:
        RefusedError: it cannot, or the switches are for PyTorch code.
    """
    if not for_file:
        message = "--emit prints code for PyTorch models; in Keras it is layer.trainable = False"
    elif not norm_eval or requires_grad:
        message = (
            "Keras has one switch for a layer, trainable: with it off statistics, weight and bias all stay; leave out "
            "--no-norm-eval and --requires-grad"
        )
    elif frozen_stages is not None:
        message = "--frozen-stages knows backbones of PyTorch; select the layers with --layers"
    else:
        return
    raise RefusedError(message, path=checkpoint.path)


def find_trainable(
    checkpoint: Checkpoint, state_dict: StateDict, layers: Sequence[BatchNorm]
) -> Iterator[SetAttribute | Skip]:
    """Yield a step for each layer that trains, a skip for each that does not.

    Raises:
        RefusedError: the file holds weights only.
    """
    for layer in layers:
        module = state_dict.modules.get(layer.name)
        if module is None or "trainable" not in module.attributes:
            raise RefusedError(
                "the file holds weights only, nothing in it says which layers train: give the configuration of the "
                "model with --keras-config FILE, or set layer.trainable = False in Keras",
                path=checkpoint.path,
            )
        if module.attributes.get("moves_untrained"):
            raise RefusedError(
                "Keras 1 moves the statistics of a BatchNorm also where it is told not to train: nothing in its files "
                "keeps them; load the model in Keras 2 and save it from there",
                path=checkpoint.path,
                tensor=layer.name,
            )
        if module.attributes["trainable"]:
            yield SetAttribute(layer.name, "trainable", value=False)
        else:
            yield Skip(layer.name, SkipReason.FROZEN, "trainable is false already")
