"""FashionMNIST, MNIST and CIFAR-10 as tensors, from wherever they are; and the packaged sample."""

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

# Channel mean and deviation. FashionMNIST takes MNIST's, as the paper's tasks do.
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "fmnist": ((0.1307,), (0.3081,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "fmnist_sample": ((0.1307,), (0.3081,)),
}


class DatasetNotFoundError(FileNotFoundError):
    """A dataset is neither at hand nor can it be downloaded."""


@dataclass(frozen=True, slots=True)
class Images:
    """A labelled image dataset, split into training and test."""

    name: str  # which dataset, and in words where it came from
    train_x: Tensor  # (n, channels, height, width) uint8
    train_y: Tensor  # (n,) int64
    test_x: Tensor
    test_y: Tensor
    mean: tuple[float, ...]  # of each channel, in [0, 1]
    std: tuple[float, ...]

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 pixels -> float32, of mean 0 and standard deviation 1 a channel."""
        mean = torch.tensor(self.mean, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(-1, 1, 1)
        return (pixels.float() / 255 - mean) / std


def data_root(given: str | Path | None = None) -> Path:
    """The folder given, or the one that L2O_GRAPH_DATA names, or ``data`` here."""
    return Path(given or os.environ.get(DATA_VARIABLE) or "data")


def load_images(name: str, root: str | Path | None = None) -> Images:
    """Load a dataset, downloading it where it is not found.

    Args:
        name: "fmnist", "mnist", "cifar10" or "fmnist_sample".
        root: Folder where datasets lie; see :func:`data_root`.

    Raises:
        ValueError: For a name that is not known.
        DatasetNotFoundError: When it is not there and cannot be downloaded.
    """
    if name not in NORMALISATION:
        raise ValueError(f"unknown dataset '{name}', expected one of {sorted(NORMALISATION)}")
    folder = data_root(root)
    try:
        label, tensors = _read(name, folder)
    except Exception as error:
        raise DatasetNotFoundError(
            f"dataset '{name}' is not in {folder.resolve()} and could not be downloaded "
            f"({type(error).__name__}: {error}). Give its folder with --data-root or "
            f"{DATA_VARIABLE}, or use the task fmnist_sample, which needs no data."
        ) from error
    mean, std = NORMALISATION[name]
    return Images(label, *tensors, mean=mean, std=std)


def _read(name: str, folder: Path) -> tuple[str, list[Tensor]]:
    """Where a dataset came from, in words; images and labels for training, and for the test."""
    if name == "fmnist_sample":
        return "FashionMNIST, the packaged sample", _sample()
    if name == "cifar10" and (archive := folder / "cifar10.zip").exists():
        return "CIFAR-10, JPEG re-encoded", _cached_cifar10(archive)
    from torchvision.datasets import CIFAR10, MNIST, FashionMNIST

    kind = {"fmnist": FashionMNIST, "mnist": MNIST, "cifar10": CIFAR10}[name]
    answer: list[Tensor] = []
    for train in (True, False):
        dataset = kind(folder, train=train, download=True)  # where it is not there in full
        x = torch.as_tensor(dataset.data)  # (n, height, width), or with channels last
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
        answer += [x, torch.as_tensor(dataset.targets).long()]
    return "CIFAR-10" if name == "cifar10" else kind.__name__, answer


def _sample() -> list[Tensor]:
    """The first 6,000 training and 1,000 test images of FashionMNIST (MIT, Zalando SE)."""
    path = resources.files("l2o_graph.datasets") / "fmnist_sample.npz"
    with resources.as_file(path) as file, np.load(file, allow_pickle=False) as arrays:
        x, y, tx, ty = (torch.from_numpy(arrays[k]) for k in ("x", "y", "test_x", "test_y"))
    return [x[:, None], y.long(), tx[:, None], ty.long()]


def _cached_cifar10(archive: Path) -> list[Tensor]:
    """Decode an archive of cifar10/{train,test}/<class>/*.jpg once, and keep the tensors."""
    status = archive.stat()
    cache = Path.home() / ".cache" / "l2o_graph" / f"cifar10_{status.st_size}.safetensors"
    keys = ("train_x", "train_y", "test_x", "test_y")
    if not cache.exists():
        decoded = [*_decode(archive, "train"), *_decode(archive, "test")]
        write_atomically(cache, save(dict(zip(keys, decoded, strict=True))))
    with expecting(f"'{cache}': expected decoded images (remove it to have them decoded anew)"):
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
