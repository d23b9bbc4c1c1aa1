"""FashionMNIST in small, for problems that take a millisecond."""

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
SAMPLE = 1000  # images that mean and deviation are taken of
VALIDATION = 6  # one of so many training images is shown in validation alone: 10,000 of 60,000
UNSEEN = 5  # one of so many images is never an example to train on, but one to be judged by


class Pictures:
    """Training images of FashionMNIST, or of the packaged sample where they are not at hand.

    The sample holds 6,000 of the 60,000; nothing is downloaded. The last sixth, 10,000 images,
    is shown in validation alone, and the rest in training alone.
    """

    def __init__(self, pixels: Tensor, labels: Tensor):
        self._labels, self._pixels = labels, pixels
        self._sizes: dict[int, tuple[Tensor, float, float]] = {}

    @staticmethod
    def load(root: str | Path | None = None, validation: bool = False) -> "Pictures":
        """The images of a folder, by default that of L2O_GRAPH_DATA; loaded once in a process."""
        folder = data_root(root)
        return _loaded(folder if (folder / "FashionMNIST").exists() else None)[validation]

    def draw(
        self, dice: Dice, count: int, size: int = 7, seen: bool | None = None, raw: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Draw images for each pair: [P, count, size, size] pixels and [P, count] labels.

        Args:
            dice: To draw with.
            count: Images for each pair.
            size: Size of an image, a divisor of 28: averages over squares of pixels.
            seen: True for images to train on, False for others, to be judged by; None for any.
            raw: Whether pixels are in [0, 1]; they have mean 0 and standard deviation 1 otherwise.
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
        """What draws batches of images with their labels.

        An image has 1 axis for all pixels in a row, 2 for rows of them, 3 for a channel in front.
        ``noise`` is the (P,) fractions of labels that are drawn at random.
        """

        def make(dice: Dice) -> Batch:
            x, y = self.draw(dice, count, size)
            x = {1: x.flatten(2), 2: x, 3: x[:, :, None]}[axes]
            return x, y if noise is None else noisy_labels(dice, y, noise)

        return make

    def _at(self, size: int) -> tuple[Tensor, float, float]:
        """All images in a size, uint8, with mean and deviation of their pixels in [0, 1]."""
        if size not in self._sizes:
            pixels = torch.cat([_smaller(x, size) for x in self._pixels.split(4096)])
            sample = pixels[:SAMPLE].float() / 255
            self._sizes[size] = pixels, float(sample.mean()), float(sample.std())
        return self._sizes[size]


def _smaller(x: Tensor, size: int) -> Tensor:
    """[n, 1, 28, 28] -> [n, size, size], rounded: as bytes all sizes fit into a small memory."""
    return F.avg_pool2d(x.float(), FULL // size)[:, 0].round().to(torch.uint8)


@cache
def _loaded(folder: Path | None) -> tuple[Pictures, Pictures]:
    """The images of training, and those of validation."""
    images = load_images("fmnist", folder) if folder else load_images("fmnist_sample")
    x, y = images.train_x, images.train_y
    bound = len(y) - len(y) // VALIDATION
    return Pictures(x[:bound], y[:bound]), Pictures(x[bound:], y[bound:])
