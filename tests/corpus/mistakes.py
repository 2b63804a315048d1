"""Mistakes of training and saving: each really trains a network and writes the file that comes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

from bntool.inspection.findings import FindingCode
from tests.corpus.networks import Data, Network, batch_norms

Optimizer = Callable[[Any], torch.optim.Optimizer]
STEPS = 104  # a few more than the updates from which on layers that did not train are found


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-4)


class Training:
    """One training of a network.

    Attributes:
        model: what is trained.
        optimizer: what trains it.
    """

    def __init__(self, network: Network, *, model: nn.Module | None = None, optimizer: Optimizer = sgd) -> None:
        torch.manual_seed(0)
        self.network, self.data = network, Data()
        self.model = network.build() if model is None else model
        self.optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.steps = 0

    def step(self, images: torch.Tensor, labels: torch.Tensor, model: nn.Module | None = None) -> None:
        """One step of the optimizer."""
        self.optimizer.zero_grad()
        self.network.loss(model or self.model, images, labels).backward()
        self.optimizer.step()
        self.steps += 1

    def run(self, count: int, *, after: Callable[[], object] = lambda: None, model: nn.Module | None = None) -> None:
        """So many steps."""
        for images, labels in self.data.batches(count, seed=self.steps):
            self.step(images, labels, model)
            after()


def trained(network: Network, steps: int = STEPS, **options: Any) -> Training:
    """A training as it should be."""
    if not options and steps == STEPS:
        return copy.deepcopy(_usual_training(network))
    training = Training(network, **options)
    training.run(steps)
    return training


@cache
def _usual_training(network: Network) -> Training:
    training = Training(network)
    training.run(STEPS)
    return training


def average_of(training: Training, decay: float, *, buffers: bool = True) -> AveragedModel:
    """An average that begins with the first model, as most implementations do."""
    average = AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=buffers)
    average.n_averaged.fill_(1)
    return average


# mistakes: each writes a file


def buffers_not_averaged(network: Network, path: Path) -> None:
    training = Training(network)
    shadow = copy.deepcopy(training.model)

    def average() -> None:
        with torch.no_grad():
            for own, other in zip(shadow.parameters(), training.model.parameters(), strict=True):
                own.lerp_(other, 0.1)

    training.run(STEPS, after=average)
    torch.save({"model": training.model.state_dict(), "model_ema": shadow.state_dict()}, path)


def buffers_not_averaged_in_one_dict(network: Network, path: Path) -> None:
    training = Training(network)
    shadow = copy.deepcopy(training.model)
    training.run(STEPS)
    parts = {"net.": training.model, "ema.module.": shadow}
    torch.save({prefix + name: t for prefix, m in parts.items() for name, t in m.state_dict().items()}, path)


def decay_too_slow(network: Network, path: Path) -> None:
    training = Training(network)
    average = average_of(training, 0.999)
    training.run(STEPS, after=lambda: average.update_parameters(training.model))
    torch.save({"model": training.model.state_dict(), "ema": average.module.state_dict()}, path)


def average_without_update_bn(network: Network, path: Path) -> None:
    training = Training(network)
    average = AveragedModel(training.model)
    for _ in range(4):
        training.run(STEPS // 4)
        average.update_parameters(training.model)
    torch.save(average.state_dict(), path)


def average_without_update_bn_beside_its_model(network: Network, path: Path) -> None:
    training = Training(network)
    average = AveragedModel(training.model)
    for _ in range(4):
        training.run(STEPS // 4)
        average.update_parameters(training.model)
    torch.save({"model": training.model.state_dict(), "swa": average.state_dict()}, path)


def named_parameters(network: Network, path: Path) -> None:
    torch.save(dict(trained(network).model.named_parameters()), path)


def shadow_of_parameters(network: Network, path: Path) -> None:
    model = trained(network).model
    shadow = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.save({"state_dict": model.state_dict(), "ema_state_dict": shadow}, path)


def trained_in_eval_mode(network: Network, path: Path) -> None:
    training = Training(network)
    training.model.eval()
    training.run(STEPS)
    torch.save(training.model.state_dict(), path)


def statistics_reset(network: Network, path: Path) -> None:
    model = trained(network).model
    for layer in batch_norms(model):
        layer.reset_running_stats()
    torch.save(model.state_dict(), path)


def recomputed_on_three_batches(network: Network, path: Path) -> None:
    training = trained(network)
    update_bn((images for images, _ in training.data.batches(3, size=8)), training.model)
    torch.save(training.model.state_dict(), path)


def average_in_buffers_of_the_model(network: Network, path: Path) -> None:
    training = Training(network)
    average = average_of(training, 0.999)
    training.run(STEPS, after=lambda: average.update_parameters(training.model))
    torch.save({"state_dict": as_mmcv(average.module, training.model)}, path)


def as_mmcv(model: nn.Module, average: nn.Module) -> dict[str, torch.Tensor]:
    """With the average in buffers of the model, as EMAHook of mmcv keeps it; it has exchanged the two by then."""
    flat = {f"ema_{name}".replace(".", "_"): tensor for name, tensor in average.state_dict().items()}
    return model.state_dict() | flat


def momentum_too_small(network: Network, path: Path) -> None:
    torch.manual_seed(0)
    model = network.build()
    for layer in batch_norms(model):
        layer.momentum = 0.003
    torch.save(trained(network, model=model).model, path)


def means_not_converted(network: Network, path: Path) -> None:
    state = trained(network).model.state_dict()
    foreign = {name.replace("running_mean", "moving_mean"): tensor for name, tensor in state.items()}
    model = network.build()
    model.load_state_dict(foreign, strict=False)
    torch.save(model.state_dict(), path)


def variances_not_converted(network: Network, path: Path) -> None:
    state = trained(network).model.state_dict()
    foreign = {name.replace("running_var", "moving_variance"): tensor for name, tensor in state.items()}
    model = network.build()
    model.load_state_dict(foreign, strict=False)
    torch.save(model.state_dict(), path)


def batch_of_nan(network: Network, path: Path) -> None:
    training = trained(network)
    images, _ = next(training.data.batches(1))
    images[3, :, 2, 5] = torch.nan
    training.model(images)  # a validation in train mode: nothing but the statistics moves
    torch.save(training.model.state_dict(), path)


def exploding_filter(network: Network, path: Path) -> None:
    training = trained(network)
    convolutions = [m for m in training.model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d)]
    with torch.no_grad():
        convolutions[-3].weight[2] *= 1e4  # what one bad gradient leaves
    training.run(10)
    torch.save(training.model.state_dict(), path)


def one_wild_channel(network: Network, path: Path) -> None:
    training = trained(network)
    wild = batch_norms(training.model)[2]
    kept = wild.register_forward_pre_hook(
        lambda _, inputs: (inputs[0].index_add(1, torch.tensor([3]), 1e5 * inputs[0][:, 3:4]),)
    )
    training.run(3)
    kept.remove()
    torch.save(training.model.state_dict(), path)


def whole_model_in_half(network: Network, path: Path) -> None:
    torch.save(trained(network).model.half().state_dict(), path)


def every_tensor_in_half(network: Network, path: Path) -> None:
    torch.save({name: tensor.half() for name, tensor in trained(network).model.state_dict().items()}, path)


def clients_averaged(network: Network, path: Path) -> None:
    start = Training(network).model
    clients = [trained(network, model=copy.deepcopy(start)).model.state_dict() for _ in range(2)]
    torch.save({name: sum(client[name] for client in clients) / len(clients) for name in clients[0]}, path)


def server_step_too_long(network: Network, path: Path) -> None:
    start = Training(network).model
    client = trained(network, model=copy.deepcopy(start)).model.state_dict()
    server = start.state_dict()
    step = {
        name: tensor + 4.0 * (client[name] - tensor) if tensor.dtype.is_floating_point else client[name]
        for name, tensor in server.items()
    }
    torch.save(step, path)


def frozen_by_accident(network: Network, path: Path) -> None:
    torch.manual_seed(0)
    model = network.build()
    for layer in batch_norms(model)[:2]:
        layer.requires_grad_(False)
    torch.save(trained(network, model=model).model.state_dict(), path)


def output_not_used(network: Network, path: Path) -> None:
    class WithAuxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main = network.build()
            self.auxiliary = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.auxiliary(x)  # the loss forgets it
            y: torch.Tensor = self.main(x)
            return y

    torch.save(trained(network, model=WithAuxiliary()).model.state_dict(), path)


def checkpointing(network: Network, path: Path) -> None:
    training = Training(network, optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3))

    class Checkpointed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = checkpoint(training.model, x.requires_grad_(), use_reentrant=False)
            return y

    training.run(STEPS, model=Checkpointed())
    torch.save({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, path)


def evaluated_in_train_mode(network: Network, path: Path) -> None:
    training = Training(network, optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3))

    @torch.no_grad()
    def evaluate() -> None:
        training.model(next(training.data.batches(1, seed=1))[0])

    training.run(STEPS, after=evaluate)
    torch.save({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, path)


def momentum_of_another_framework(network: Network, path: Path) -> None:
    torch.manual_seed(0)
    model = network.build()
    for layer in batch_norms(model):
        layer.momentum = 0.99
    torch.save(trained(network, model=model).model, path)


def layer_replaced_after_eval(network: Network, path: Path) -> None:
    model = trained(network).model.eval()
    old = batch_norms(model)[1]
    new = copy.deepcopy(old).train()
    owner = next(module for module in model.modules() if old in module.children())
    setattr(owner, next(name for name, child in owner.named_children() if child is old), new)
    torch.save(model, path)


def layers_frozen_half_way(network: Network, path: Path) -> None:
    training = trained(network, STEPS // 2)
    for layer in batch_norms(training.model)[:2]:
        layer.eval()
    training.run(STEPS // 2)
    torch.save(training.model.state_dict(), path)


def mean_and_variance_swapped(network: Network, path: Path) -> None:
    state = trained(network).model.state_dict()
    swap = {"running_mean": "running_var", "running_var": "running_mean"}
    torch.save(
        {
            f"{n.rpartition('.')[0]}.{swap[n.rpartition('.')[2]]}" if n.rpartition(".")[2] in swap else n: t
            for n, t in state.items()
        },
        path,
    )


def pruned(network: Network, path: Path) -> None:
    training = trained(network)
    layer = batch_norms(training.model)[3]
    prune.l1_unstructured(layer, "weight", amount=0.5)
    training.optimizer = sgd(training.model.parameters())
    training.run(STEPS // 4)
    prune.remove(layer, "weight")
    torch.save(training.model.state_dict(), path)


def variance_of_one_sample(network: Network, path: Path) -> None:
    training = trained(network)
    for layer in batch_norms(training.model):
        layer.momentum = 1.0
    image = training.data.images[:1].mean((2, 3), keepdim=True).expand(-1, -1, 8, 8)
    training.model(torch.zeros_like(image).expand(4, -1, -1, -1))  # a batch of black images, to warm up
    torch.save(training.model.state_dict(), path)


def parts_of_two_models(network: Network, path: Path) -> None:
    state = trained(network).model.state_dict()
    names = [name.rpartition(".")[0] for name in state if name.endswith("running_var")]
    width = len(state[f"{names[1]}.running_var"])
    other = next(name for name in names if len(state[f"{name}.running_var"]) % width)
    for role in ("running_mean", "running_var"):
        state[f"{names[1]}.{role}"] = state[f"{other}.{role}"]
    torch.save(state, path)


def without_tracking(network: Network, path: Path) -> None:
    torch.manual_seed(0)
    model = network.build()
    for layer in batch_norms(model):
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    torch.save(trained(network, model=model).model, path)


def exploding_bias(network: Network, path: Path) -> None:
    training = trained(network)
    with torch.no_grad():
        batch_norms(training.model)[2].bias[3] = -1e5  # what one bad gradient leaves
    training.run(10)
    torch.save(training.model.state_dict(), path)


def every_tensor_in_eight_bits(network: Network, path: Path) -> None:
    state = trained(network).model.state_dict()
    torch.save({n: t.to(torch.float8_e4m3fn) if t.is_floating_point() else t for n, t in state.items()}, path)


def statistics_as_images(network: Network, path: Path) -> None:
    """As code keeps them that subtracts and divides without a module."""
    state = trained(network).model.state_dict()
    torch.save({n: t.view(1, -1, 1, 1) if n.endswith(("_mean", "_var")) else t for n, t in state.items()}, path)


def bias_filtered_out(network: Network, path: Path) -> None:
    """By a filter of names that was to leave out the bias of another layer."""
    model = trained(network).model
    layer = batch_norms(model)[3]
    left_out = next(name for name, module in model.named_modules() if module is layer)
    torch.save({n: t for n, t in model.state_dict().items() if n != f"{left_out}.bias"}, path)


def counter_reset_in_training(network: Network, path: Path) -> None:
    training = trained(network)
    for layer in batch_norms(training.model):
        layer.num_batches_tracked.zero_()  # as tools do that mean to reset the statistics
    training.run(5)
    torch.save(training.model, path)


def pruning_not_removed(network: Network, path: Path) -> None:
    training = trained(network)
    prune.l1_unstructured(batch_norms(training.model)[3], "weight", amount=0.5)
    training.optimizer = sgd(training.model.parameters())
    training.run(STEPS // 4)
    torch.save(training.model.state_dict(), path)


@dataclass(frozen=True)
class Mistake:
    """A mistake.

    Attributes:
        title: for the table.
        make: trains, and writes a file.
        codes: any of these names it.
    """

    title: str
    make: Callable[[Network, Path], None]
    codes: tuple[FindingCode, ...]


MISTAKES = (
    Mistake("EMA without buffers", buffers_not_averaged, (FindingCode.EMA_STATISTICS_INITIAL,)),
    Mistake(
        "the same, `net.` and `ema.` in one dict",
        buffers_not_averaged_in_one_dict,
        (FindingCode.EMA_STATISTICS_INITIAL,),
    ),
    Mistake("EMA with decay 0.999 over 104 steps", decay_too_slow, (FindingCode.EMA_STATISTICS_LAG,)),
    Mistake("SWA without update_bn", average_without_update_bn, (FindingCode.AVERAGE_NOT_RECOMPUTED,)),
    Mistake(
        "the same, beside its model",
        average_without_update_bn_beside_its_model,
        (FindingCode.AVERAGE_NOT_RECOMPUTED,),
    ),
    Mistake("named_parameters() saved", named_parameters, (FindingCode.STATISTICS_MISSING,)),
    Mistake("EMA of parameters only", shadow_of_parameters, (FindingCode.STATISTICS_MISSING,)),
    Mistake("trained in eval mode", trained_in_eval_mode, (FindingCode.NEVER_UPDATED,)),
    Mistake("reset_running_stats() before saving", statistics_reset, (FindingCode.NEVER_UPDATED,)),
    Mistake("update_bn on three batches", recomputed_on_three_batches, (FindingCode.COUNTER_LOW,)),
    Mistake(
        "EMA of decay 0.999 in buffers `ema_...` of the model",
        average_in_buffers_of_the_model,
        (FindingCode.EMA_STATISTICS_LAG,),
    ),
    Mistake("momentum 0.003 over 104 steps", momentum_too_small, (FindingCode.COUNTER_LOW,)),
    Mistake("running_mean lost in a conversion", means_not_converted, (FindingCode.PARTLY_INITIAL,)),
    Mistake("running_var lost in a conversion", variances_not_converted, (FindingCode.PARTLY_INITIAL,)),
    Mistake("a batch with NaN in train mode", batch_of_nan, (FindingCode.NON_FINITE,)),
    Mistake("a filter exploded by one gradient", exploding_filter, (FindingCode.OUTLYING_VARIANCE,)),
    Mistake("a channel of 1e5 times its input for three batches", one_wild_channel, (FindingCode.OUTLYING_VARIANCE,)),
    Mistake("model.half() before saving", whole_model_in_half, (FindingCode.HALF_STATISTICS,)),
    Mistake("every tensor cast to half", every_tensor_in_half, (FindingCode.COUNTER_DTYPE,)),
    Mistake("state dicts of two clients averaged", clients_averaged, (FindingCode.COUNTER_DTYPE,)),
    Mistake("a server step of 4 times the clients' change", server_step_too_long, (FindingCode.NEGATIVE_VARIANCE,)),
    Mistake("requires_grad=False by accident", frozen_by_accident, (FindingCode.AFFINE_INITIAL,)),
    Mistake("an output that the loss forgets", output_not_used, (FindingCode.AFFINE_INITIAL,)),
    Mistake("gradient checkpointing", checkpointing, (FindingCode.COUNTER_AGAINST_STEPS,)),
    Mistake("evaluated in train mode", evaluated_in_train_mode, (FindingCode.COUNTER_AGAINST_STEPS,)),
    Mistake("momentum 0.99", momentum_of_another_framework, (FindingCode.MOMENTUM,)),
    Mistake("a layer replaced after eval()", layer_replaced_after_eval, (FindingCode.LEFT_IN_TRAIN_MODE,)),
    Mistake("layers frozen half way", layers_frozen_half_way, (FindingCode.COUNTER_DISAGREES,)),
    Mistake("mean and variance swapped", mean_and_variance_swapped, (FindingCode.NEGATIVE_VARIANCE,)),
    Mistake("half of a layer pruned", pruned, (FindingCode.DEAD_CHANNELS,)),
    Mistake("black images with momentum 1", variance_of_one_sample, (FindingCode.ZERO_VARIANCE,)),
    Mistake("statistics of another layer", parts_of_two_models, (FindingCode.SHAPE_MISMATCH,)),
    Mistake("a bias exploded by one gradient", exploding_bias, (FindingCode.OUTLYING_BIAS,)),
    Mistake("every floating tensor cast to float8", every_tensor_in_eight_bits, (FindingCode.HALF_STATISTICS,)),
    Mistake("statistics as [1, C, 1, 1]", statistics_as_images, (FindingCode.SHAPE_MISMATCH,)),
    Mistake("a bias left out by a filter of names", bias_filtered_out, (FindingCode.AFFINE_MISSING,)),
    Mistake("num_batches_tracked set to 0 in training", counter_reset_in_training, (FindingCode.COUNTER_RESET,)),
    Mistake("pruned, and saved without prune.remove", pruning_not_removed, (FindingCode.AFFINE_COMPUTED,)),
    Mistake("track_running_stats=False", without_tracking, (FindingCode.BATCH_STATISTICS,)),
)


# files as they should be


def sound_state_dict(network: Network, path: Path) -> None:
    torch.save(trained(network).model.state_dict(), path)


def sound_longer(network: Network, path: Path) -> None:
    torch.save(trained(network, 2 * STEPS).model.state_dict(), path)


def sound_early(network: Network, path: Path) -> None:
    torch.save(trained(network, 40).model.state_dict(), path)


def sound_module(network: Network, path: Path) -> None:
    torch.save(trained(network).model.eval(), path)


def sound_checkpoint(network: Network, path: Path) -> None:
    training = trained(network, optimizer=lambda parameters: torch.optim.AdamW(parameters, 3e-3))
    torch.save({"epoch": 3, "model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, path)


def sound_average(network: Network, path: Path) -> None:
    training = Training(network)
    average = average_of(training, 0.95)
    training.run(STEPS, after=lambda: average.update_parameters(training.model))
    torch.save({"model": training.model.state_dict(), "model_ema": average.module.state_dict()}, path)


def sound_average_in_one_dict(network: Network, path: Path) -> None:
    training = Training(network)
    average = average_of(training, 0.95)
    training.run(STEPS, after=lambda: average.update_parameters(training.model))
    parts = {"net.": training.model, "ema.": average.module}
    torch.save({prefix + name: t for prefix, m in parts.items() for name, t in m.state_dict().items()}, path)


def sound_average_in_buffers(network: Network, path: Path) -> None:
    training = Training(network)
    average = average_of(training, 0.95)
    training.run(STEPS, after=lambda: average.update_parameters(training.model))
    torch.save({"state_dict": as_mmcv(average.module, training.model)}, path)


def sound_small_momentum(network: Network, path: Path) -> None:
    torch.manual_seed(0)
    model = network.build()
    for layer in batch_norms(model):
        layer.momentum = 0.02
    torch.save(trained(network, 2 * STEPS, model=model).model, path)


def sound_swa(network: Network, path: Path) -> None:
    training = Training(network)
    average = AveragedModel(training.model)
    for _ in range(4):
        training.run(STEPS // 4)
        average.update_parameters(training.model)
    update_bn((images for images, _ in training.data.batches(45)), average)
    torch.save({"model": training.model.state_dict(), "swa": average.state_dict()}, path)


def sound_fine_tuning(network: Network, path: Path) -> None:
    """With norm_eval and frozen weights, of a pretrained model."""
    model = trained(network).model
    for layer in batch_norms(model):
        layer.requires_grad_(False)
    training = Training(network, model=model.eval())
    training.run(STEPS // 2)
    torch.save({"model": model.state_dict(), "optimizer": training.optimizer.state_dict()}, path)


def sound_strong_decay(network: Network, path: Path) -> None:
    training = trained(network, 2 * STEPS, optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-3))
    torch.save(training.model.state_dict(), path)


def sound_raw_pixels(network: Network, path: Path) -> None:
    training = Training(network, optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3))
    training.data.images = (training.data.images - training.data.images.min()) * 97.0
    training.run(STEPS)
    torch.save(training.model.state_dict(), path)


def sound_accumulation(network: Network, path: Path) -> None:
    training = Training(network, optimizer=lambda parameters: torch.optim.AdamW(parameters, 3e-3))
    for step, (images, labels) in enumerate(training.data.batches(2 * STEPS), start=1):
        F.relu(network.loss(training.model, images, labels)).backward()
        if step % 2 == 0:
            training.optimizer.step()
            training.optimizer.zero_grad()
    torch.save({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, path)


SOUND = (
    sound_state_dict,
    sound_longer,
    sound_early,
    sound_module,
    sound_checkpoint,
    sound_average,
    sound_average_in_one_dict,
    sound_average_in_buffers,
    sound_small_momentum,
    sound_swa,
    sound_fine_tuning,
    sound_strong_decay,
    sound_raw_pixels,
    sound_accumulation,
)
