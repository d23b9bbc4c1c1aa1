"""Downscaled FashionMNIST, for problems that take a millisecond per step."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from l2o_graph.datasets.images import data_root, load_images
from meta_train.families.dice import Dice
from meta_train.families.examples import Batch, noisy_labels

HALF, FULL = 14, 28  # sizes
SAMPLE = 1000  # number of images for mean and standard deviation
VALIDATION = 6  # one sixth of the training images is for validation only: 10,000 of 60,000
UNSEEN = 5  # one fifth of the images is only for evaluation, in families that hold examples out


class Pictures:
    """Training images of FashionMNIST, or of the packaged sample if they are not available.

    The sample has 6,000 of the 60,000; nothing is downloaded. The last sixth, 10,000 images, is for
    validation only, and the rest for training only.
    """

    def __init__(self, pixels: Tensor, labels: Tensor):
        self._labels, self._pixels = labels, pixels
        self._sizes: dict[int, tuple[Tensor, float, float]] = {}

    @staticmethod
    def load(root: str | Path | None = None, validation: bool = False) -> "Pictures":
        """Load the images of a folder, by default that of L2O_GRAPH_DATA; cached."""
        folder = data_root(root)
        return _loaded(folder if (folder / "FashionMNIST").exists() else None)[validation]

    def draw(
        self, dice: Dice, count: int, size: int = 7, seen: bool | None = None, raw: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Draw images for each pair: [P, count, size, size] pixels and [P, count] labels.

        Args:
            dice: Random numbers.
            count: Number of images for each pair.
            size: Size of an image, a divisor of 28; images are average-pooled.
            seen: True for training examples, False for held-out ones, None for any.
            raw: Whether pixels are in [0, 1]; otherwise they have mean 0 and standard deviation 1.
        """
        total = len(self._labels)
        bound = total - total // UNSEEN
        first, last = (bound if seen is False else 0), (bound if seen else total)
        index = first + dice.integers(last - first, count)
        pixels, mean, std = self._at(size)
        x = pixels[index].float() / 255
        return (x if raw else (x - mean) / std), self._labels[index]

    def batches(
        self, count: int, size: int = 7, axes: int = 1, noise: Tensor | None = None
    ) -> Callable[[Dice], Batch]:
        """Create a function that draws batches of images with their labels.

        An image has 1 axis for flattened pixels, 2 for rows of pixels, or 3 with a channel in
        front. ``noise`` are the (P,) fractions of random labels.
        """

        def make(dice: Dice) -> Batch:
            x, y = self.draw(dice, count, size)
            x = {1: x.flatten(2), 2: x, 3: x[:, :, None]}[axes]
            return x, y if noise is None else noisy_labels(dice, y, noise)

        return make

    def _at(self, size: int) -> tuple[Tensor, float, float]:
        """Resize all images, uint8; also return mean and standard deviation of pixels in [0, 1]."""
        if size not in self._sizes:
            pixels = torch.cat([_smaller(x, size) for x in self._pixels.split(4096)])
            sample = pixels[:SAMPLE].float() / 255
            self._sizes[size] = pixels, float(sample.mean()), float(sample.std())
        return self._sizes[size]


def _smaller(x: Tensor, size: int) -> Tensor:
    """Average-pool images, [n, 1, 28, 28] -> [n, size, size], as bytes to save memory."""
    return F.avg_pool2d(x.float(), FULL // size)[:, 0].round().to(torch.uint8)


@cache
def _loaded(folder: Path | None) -> tuple[Pictures, Pictures]:
    """Load the training images and the validation images."""
    images = load_images("fmnist", folder) if folder else load_images("fmnist_sample")
    x, y = images.train_x, images.train_y
    bound = len(y) - len(y) // VALIDATION
    return Pictures(x[:bound], y[:bound]), Pictures(x[bound:], y[bound:])
