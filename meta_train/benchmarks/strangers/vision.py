"""Images: classified, denoised, told apart without labels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.benchmarks.strangers.networks import Mixer, ResNet8, UNet, ViT
from meta_train.benchmarks.strangers.sources import images
from meta_train.benchmarks.strangers.task import (
    ACCURACY,
    Batch,
    Make,
    Problem,
    Task,
    cross_entropy,
    generator,
    lower,
    percent_right,
    pick,
    seeded,
    squared,
)
from meta_train.tasks.image_classification import cnn

TESTED = 2000  # images held out that accuracy is measured on
NOISE = 0.5  # standard deviation of what a U-Net takes away; that of images is 1
WRONG = 0.3  # fraction of labels that are drawn at random


def classified(
    dataset: str, build: Callable[[], nn.Module], batch: int, wrong: float = 0.0
) -> Make:
    """Images of a dataset to classes; a share ``wrong`` of training labels is drawn at random."""

    def make(seed: int, root: str | None) -> Problem:
        data = images(dataset, root)
        labels = data.train_y.clone()
        draws = generator(seed)
        where = torch.rand(len(labels), generator=draws) < wrong
        labels[where] = torch.randint(10, (int(where.sum()),), generator=draws)

        def of_step(step: int) -> Batch:
            chosen = pick(len(labels), batch, seed, step)
            return data.normalise(data.train_x[chosen]), labels[chosen]

        tested = data.normalise(data.test_x[:TESTED])
        return Problem(
            seeded(seed, build),
            cross_entropy,
            of_step,
            lambda net: percent_right(net, tested, data.test_y[:TESTED]),
        )

    return make


def denoised(seed: int, root: str | None) -> Problem:
    """A U-Net tells the noise from the image."""
    data = images("cifar10", root)

    def noisy(pixels: Tensor, draws: torch.Generator) -> Batch:
        clean = data.normalise(pixels)
        return clean + NOISE * torch.randn(clean.shape, generator=draws), clean

    def of_step(step: int) -> Batch:
        chosen = pick(len(data.train_x), 16, seed, step)
        return noisy(data.train_x[chosen], generator(seed, -2 - step))

    tested = noisy(data.test_x[:400], generator(0))
    return Problem(seeded(seed, UNet), squared, of_step, lambda net: float(squared(net, tested)))


class Encoder(nn.Module):
    """Images to points on a sphere."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        """(images, 32), of length 1."""
        return F.normalize(self.head(self.body(x)), dim=1)


def contrasted(seed: int, root: str | None) -> Problem:
    """Two views of an image are near each other, all others far away (SimCLR).

    Judged by the labels of the nearest of 2,000 images in what lies before the last layer.
    """
    data = images("fmnist", root)

    def view(pixels: Tensor, draws: torch.Generator) -> Tensor:
        count = len(pixels)
        scale = 0.7 + 0.3 * torch.rand(count, generator=draws)
        flip = 1 - 2 * torch.randint(2, (count,), generator=draws)
        shift = 0.3 * (2 * torch.rand(count, 2, generator=draws) - 1)
        place = torch.zeros(count, 2, 3)
        place[:, 0, 0], place[:, 1, 1], place[:, :, 2] = scale * flip, scale, shift
        grid = F.affine_grid(place, [count, 1, 28, 28], align_corners=False)
        moved = F.grid_sample(pixels, grid, align_corners=False, padding_mode="border")
        bright = 0.6 + 0.8 * torch.rand(count, 1, 1, 1, generator=draws)
        return bright * moved + 0.1 * torch.randn(moved.shape, generator=draws)

    def of_step(step: int) -> Batch:
        chosen = data.normalise(data.train_x[pick(len(data.train_x), 64, seed, step)])
        draws = generator(seed, -2 - step)
        return (torch.cat([view(chosen, draws), view(chosen, draws)]),)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        points = net(batch[0])
        near = points @ points.T / 0.2
        near = near.masked_fill(torch.eye(len(near), dtype=torch.bool), -1e9)
        return F.cross_entropy(near, torch.arange(len(near)).roll(len(near) // 2))

    shown, tested = (data.normalise(x[:TESTED]) for x in (data.train_x, data.test_x))

    def evaluate(net: nn.Module) -> float:
        assert isinstance(net, Encoder)
        known, asked = (F.normalize(net.body(x), dim=1) for x in (shown, tested))
        votes = F.one_hot(data.train_y[:TESTED], 10)[(asked @ known.T).topk(10).indices].sum(1)
        return 100 * float((votes.argmax(1) == data.test_y[:TESTED]).float().mean())

    return Problem(seeded(seed, Encoder), loss, of_step, evaluate)


TASKS = (
    Task("vit", "ViT, CIFAR-10", ACCURACY, 400, classified("cifar10", ViT, 32)),
    Task("resnet", "ResNet-8 with BatchNorm, CIFAR-10", ACCURACY, 300,
         classified("cifar10", ResNet8, 32)),
    Task("mixer", "MLP-Mixer, CIFAR-10", ACCURACY, 400, classified("cifar10", Mixer, 32)),
    Task("noisy_labels", "CNN, batches of 8, 30 % wrong labels", ACCURACY, 1200,
         classified("fmnist", lambda: cnn(1, 28, 16), 8, WRONG)),
    Task("unet", "U-Net that denoises CIFAR-10", lower("mean square"), 200, denoised),
    Task("contrastive", "SimCLR, FashionMNIST, neighbours' labels", ACCURACY, 300, contrasted),
)  # fmt: skip
