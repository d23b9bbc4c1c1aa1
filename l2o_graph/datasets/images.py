"""Image datasets as tensors: FashionMNIST, MNIST, CIFAR-10, and the packaged sample."""

import os
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from l2o_graph.storage.files import expecting, write_atomically

DATA_VARIABLE = "L2O_GRAPH_DATA"

# Mean and standard deviation of each channel. FashionMNIST has those of MNIST, as in the paper.
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "fmnist": ((0.1307,), (0.3081,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "fmnist_sample": ((0.1307,), (0.3081,)),
}


class DatasetNotFoundError(FileNotFoundError):
    """Error for a dataset that is not found and cannot be downloaded."""


@dataclass(frozen=True, slots=True)
class Images:
    """Labelled image dataset with a training and a test set."""

    name: str  # name of the dataset and its source, for people
    train_x: Tensor  # (n, channels, height, width) uint8
    train_y: Tensor  # (n,) int64
    test_x: Tensor
    test_y: Tensor
    mean: tuple[float, ...]  # mean of each channel, for pixels from 0 to 1
    std: tuple[float, ...]  # standard deviation of each channel

    def normalise(self, pixels: Tensor) -> Tensor:
        """Convert uint8 pixels to float32, with mean 0 and standard deviation 1 per channel."""
        mean = torch.tensor(self.mean, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(-1, 1, 1)
        return (pixels.float() / 255 - mean) / std


def data_root(given: str | Path | None = None) -> Path:
    """Return the given folder, or else that of L2O_GRAPH_DATA, or else ``data``."""
    return Path(given or os.environ.get(DATA_VARIABLE) or "data")


def load_images(name: str, root: str | Path | None = None) -> Images:
    """Load a dataset, and download it if needed.

    Args:
        name: "fmnist", "mnist", "cifar10" or "fmnist_sample".
        root: Folder of datasets; see :func:`data_root`.

    Raises:
        ValueError: For an unknown name.
        DatasetNotFoundError: If the dataset is not found and cannot be downloaded.
    """
    if name not in NORMALISATION:
        raise ValueError(f"unknown dataset '{name}', expected one of {sorted(NORMALISATION)}")
    folder = data_root(root)
    try:
        label, tensors = _read(name, folder)
    except Exception as error:
        raise DatasetNotFoundError(
            f"dataset '{name}' is not in {folder.resolve()} and could not be downloaded "
            f"({type(error).__name__}: {error}). Set its folder by --data-root or "
            f"{DATA_VARIABLE}, or use fmnist_sample, which is part of the package."
        ) from error
    mean, std = NORMALISATION[name]
    return Images(label, *tensors, mean=mean, std=std)


def _read(name: str, folder: Path) -> tuple[str, list[Tensor]]:
    """Return the name of a dataset for people; images and labels for training, then the test."""
    if name == "fmnist_sample":
        return "FashionMNIST, the packaged sample", _sample()
    if name == "cifar10" and (archive := folder / "cifar10.zip").exists():
        return "CIFAR-10, JPEG re-encoded", _cached_cifar10(archive)
    from torchvision.datasets import CIFAR10, MNIST, FashionMNIST

    kind = {"fmnist": FashionMNIST, "mnist": MNIST, "cifar10": CIFAR10}[name]
    tensors: list[Tensor] = []
    for train in (True, False):
        dataset = kind(folder, train=train, download=True)  # only if it is not there in full
        x = torch.as_tensor(dataset.data)  # (n, height, width), or with channels last
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
        tensors += [x, torch.as_tensor(dataset.targets).long()]
    return "CIFAR-10" if name == "cifar10" else kind.__name__, tensors


def _sample() -> list[Tensor]:
    """Load the first 6,000 training and 1,000 test images of FashionMNIST (MIT, Zalando SE)."""
    path = resources.files("l2o_graph.datasets") / "fmnist_sample.npz"
    with resources.as_file(path) as file, np.load(file, allow_pickle=False) as arrays:
        x, y, tx, ty = (torch.from_numpy(arrays[k]) for k in ("x", "y", "test_x", "test_y"))
    return [x[:, None], y.long(), tx[:, None], ty.long()]


def _cached_cifar10(archive: Path) -> list[Tensor]:
    """Decode an archive of cifar10/{train,test}/<class>/*.jpg, and cache the tensors in a file."""
    status = archive.stat()
    cache = Path.home() / ".cache" / "l2o_graph" / f"cifar10_{status.st_size}.safetensors"
    keys = ("train_x", "train_y", "test_x", "test_y")
    if not cache.exists():
        decoded = [*_decode(archive, "train"), *_decode(archive, "test")]
        write_atomically(cache, save(dict(zip(keys, decoded, strict=True))))
    with expecting(f"'{cache}': expected decoded images (remove the file to decode them again)"):
        tensors = load_file(cache)
        return [tensors[k] for k in keys]


def _decode(archive: Path, split: str) -> tuple[Tensor, Tensor]:
    from torchvision.io import ImageReadMode, decode_image

    with zipfile.ZipFile(archive) as files:
        names = sorted(n for n in files.namelist() if f"/{split}/" in n and n.endswith(".jpg"))
        classes = sorted({Path(n).parent.name for n in names})
        x = torch.empty(len(names), 3, 32, 32, dtype=torch.uint8)
        for i, name in enumerate(names):
            data = torch.frombuffer(bytearray(files.read(name)), dtype=torch.uint8)
            x[i] = decode_image(data, ImageReadMode.RGB)
    return x, torch.tensor([classes.index(Path(n).parent.name) for n in names])
