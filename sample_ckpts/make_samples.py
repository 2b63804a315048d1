"""Make every data file and checkpoint of this folder: train the digits network once, then write its variants.

Run ``python make_samples.py`` (torch, numpy, scikit-learn and safetensors needed). Everything is seeded, so a
second run on the same machine writes the same files. Ends by reloading each file and printing its accuracy.
"""

import argparse
import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits_net import build
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

HERE = Path(__file__).resolve().parent
TEST_SIZE = 360
# The shifted domain: low contrast on a grey background, pixel * GAIN + OFFSET with pixels in 0..1.
GAIN, OFFSET = 0.35, 0.45

HYPERPARAMETERS = {
    "arch": "digits_net",
    "epochs": 30,
    "batch_size": 64,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "ema_decay": 0.99,
    "seed": 0,
}

Split = tuple[Tensor, Tensor]


# --- data ---------------------------------------------------------------------------------------------


def normalize(pixels: np.ndarray) -> np.ndarray:
    """Turn pixels in 0..1, shape (N, 8, 8), into model input: float32 of shape (N, 1, 8, 8)."""
    return ((pixels - 0.3) / 0.38).astype(np.float32)[:, None]


def write_data(seed: int) -> dict[str, Split]:
    """Write the four .npz files; return the same images and labels by file stem."""
    digits = load_digits()
    pixels, labels = digits.images / 16.0, digits.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    # Sorted, so that each split keeps the order of the original.
    parts = {"test": np.sort(order[:TEST_SIZE]), "train": np.sort(order[TEST_SIZE:])}

    splits: dict[str, Split] = {}
    for part, index in parts.items():
        for domain, values in (("digits", pixels), ("digits_contrast", pixels * GAIN + OFFSET)):
            images = normalize(values[index])
            np.savez_compressed(HERE / f"{domain}_{part}.npz", images=images, labels=labels[index])
            splits[f"{domain}_{part}"] = (torch.from_numpy(images), torch.from_numpy(labels[index]))
    return splits


# --- model --------------------------------------------------------------------------------------------


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the Batch Normalization layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Return the top-1 accuracy in percent, evaluation mode; the model's own mode is left as it was."""
    images, labels = split
    was_training = model.training
    correct = (model.eval()(images).argmax(1) == labels).sum().item()
    model.train(was_training)
    return 100.0 * correct / len(labels)


@torch.no_grad()
def recalibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy whose BN statistics are those of ``images``, taken as one batch.

    One pass over the whole set pools exactly: no average over batches, and no decay.
    """
    model = copy.deepcopy(model).train()
    layers = batch_norms(model).values()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = 1.0
    model(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return model


def train(train_split: Split, test_split: Split, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """Train from scratch; return the last model, in train mode, and a full training checkpoint."""
    torch.manual_seed(args.seed)
    images, labels = train_split
    model = build()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay), use_buffers=True)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=True
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    criterion = nn.CrossEntropyLoss()

    best_acc1 = 0.0
    for _ in range(args.epochs):
        model.train()
        for index in torch.randperm(len(labels)).split(args.batch_size):
            optimizer.zero_grad()
            criterion(model(images[index]), labels[index]).backward()
            optimizer.step()
            ema.update_parameters(model)
        scheduler.step()
        best_acc1 = max(best_acc1, accuracy(model, test_split))

    checkpoint = {
        "epoch": args.epochs,
        # DataParallel and AveragedModel both prefix every key with "module."; the latter adds "n_averaged".
        "state_dict": nn.DataParallel(model).state_dict(),
        "ema_state_dict": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "best_acc1": best_acc1,
        "args": args,
    }
    return model, checkpoint


# --- damaged variants ---------------------------------------------------------------------------------


def never_updated(model: nn.Module) -> nn.Module:
    """Return a copy with trained weights and the BN statistics of a fresh model."""
    model = copy.deepcopy(model)
    for layer in batch_norms(model).values():
        layer.reset_running_stats()
    return model


def nan_variance(model: nn.Module) -> nn.Module:
    """Return a copy with a single NaN among the running variances."""
    model = copy.deepcopy(model)
    batch_norms(model)["layer2.0.bn1"].running_var[5] = torch.nan
    return model


@torch.no_grad()
def dead_channels(model: nn.Module) -> nn.Module:
    """Return a copy with half the channels of layer1.0.bn1 switched off.

    The weakest channels go: half of their scales become exactly 0, the others about 1e-9, their biases 0.
    """
    model = copy.deepcopy(model)
    layer = batch_norms(model)["layer1.0.bn1"]
    weakest = layer.weight.abs().argsort()[: layer.num_features // 2]
    exact, tiny = weakest.chunk(2)
    layer.weight[exact] = 0.0
    layer.weight[tiny] = torch.linspace(1e-9, 3e-9, len(tiny))
    layer.bias[weakest] = 0.0
    return model


# --- files --------------------------------------------------------------------------------------------


def save_legacy(state: Mapping[str, Tensor], path: Path) -> None:
    """Save in the format from before torch 1.6, unless the file already holds exactly these tensors.

    That format names storages by memory address, so each run would give other bytes for the same content.
    """
    if path.exists():
        old = torch.load(path, weights_only=True)
        if list(old) == list(state) and all(torch.equal(old[key], state[key]) for key in state):
            return
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(buffer.getvalue())


def write_checkpoints(model: nn.Module, checkpoint: dict[str, Any], shifted_images: Tensor) -> None:
    """Write every checkpoint."""
    state = model.state_dict()
    torch.save(state, HERE / "digits.pt")
    save_file(state, HERE / "digits.safetensors", metadata={"format": "pt"})
    save_legacy(state, HERE / "digits_legacy.pth")
    torch.save(model, HERE / "digits_module.pt")
    torch.save(checkpoint, HERE / "digits_training.pt")

    variants = {
        "broken_never_updated": never_updated(model),
        "broken_nan_variance": nan_variance(model),
        "dead_channels": dead_channels(model),
        "drifted": recalibrated(model, shifted_images),
    }
    for name, variant in variants.items():
        torch.save(variant.state_dict(), HERE / f"{name}.pt")


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of a wrapped model's state_dict, without their "module." prefix."""
    return {key.removeprefix("module."): value for key, value in state.items() if key.startswith("module.")}


def from_state(state: Mapping[str, Tensor]) -> nn.Module:
    """Return a network that holds ``state``."""
    model = build()
    model.load_state_dict(state)
    return model


def models_in(path: Path) -> dict[str, nn.Module]:
    """Return the models held by one of our own files, by the label to print."""
    if path.suffix == ".safetensors":
        return {path.name: from_state(load_file(path))}
    content = torch.load(path, weights_only=False)
    if isinstance(content, nn.Module):
        return {path.name: content}
    if "optimizer" in content:
        return {f"{path.name}[{key}]": from_state(unwrapped(content[key])) for key in ("state_dict", "ema_state_dict")}
    return {path.name: from_state(content)}


def report(splits: dict[str, Split]) -> None:
    """Reload every checkpoint from disk and print sizes and accuracies."""
    normal, shifted = splits["digits_test"], splits["digits_contrast_test"]
    model = build()
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    print(f"BN layers: {', '.join(batch_norms(model))}\n")

    print(f"{'checkpoint':<36} {'bytes':>8} {'digits':>8} {'contrast':>9}")
    loaded: dict[str, nn.Module] = {}
    files = (path for path in HERE.iterdir() if path.suffix in {".pt", ".pth", ".safetensors"})
    for path in sorted(files):
        for label, model in models_in(path).items():
            loaded[label] = model
            size = path.stat().st_size
            print(f"{label:<36} {size:>8} {accuracy(model, normal):>7.2f}% {accuracy(model, shifted):>8.2f}%")

    print("\nAccuracy before and after recomputing the BN statistics")
    for name, domain in (
        ("digits.pt", "digits_contrast"),
        ("drifted.pt", "digits"),
        ("broken_never_updated.pt", "digits"),
        ("broken_nan_variance.pt", "digits"),
    ):
        test = splits[f"{domain}_test"]
        before = accuracy(loaded[name], test)
        after = accuracy(recalibrated(loaded[name], splits[f"{domain}_train"][0]), test)
        print(f"{name:<36} {before:>7.2f}% -> {after:>6.2f}%  ({domain}_train -> {domain}_test)")

    print()
    for path in sorted(HERE.glob("*.npz")):
        print(f"{path.name:<36} {path.stat().st_size:>8}  {len(splits[path.stem][1])} images")


def main() -> None:
    """Write the data and the checkpoints, then report on them."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    args = argparse.Namespace(**HYPERPARAMETERS)
    splits = write_data(args.seed)
    model, checkpoint = train(splits["digits_train"], splits["digits_test"], args)
    write_checkpoints(model, checkpoint, splits["digits_contrast_train"][0])
    report(splits)


if __name__ == "__main__":
    main()
