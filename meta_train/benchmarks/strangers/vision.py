"""Images: classification, denoising and contrastive learning."""

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
    Merit,
    Problem,
    Task,
    accuracy,
    cross_entropy,
    generator,
    mse,
    random_indices,
    seeded,
)
from meta_train.tasks.image_classification import cnn

TESTED = 2000  # number of test images for accuracies
NOISE = 0.5  # standard deviation of the noise to remove; that of images is 1
WRONG = 0.3  # fraction of random labels


def classification(
    dataset: str, build: Callable[[], nn.Module], batch: int, wrong: float = 0.0
) -> Make:
    """Define a task of image classification, with a fraction ``wrong`` of random labels."""

    def make(seed: int, root: str | None) -> Problem:
        data = images(dataset, root)
        labels = data.train_y.clone()
        draws = generator(seed)
        where = torch.rand(len(labels), generator=draws) < wrong
        labels[where] = torch.randint(10, (int(where.sum()),), generator=draws)

        def of_step(step: int) -> Batch:
            chosen = random_indices(len(labels), batch, seed, step)
            return data.normalise(data.train_x[chosen]), labels[chosen]

        test = data.normalise(data.test_x[:TESTED]), data.test_y[:TESTED]
        net = seeded(seed, build)
        return Problem(net, cross_entropy, of_step, lambda net: accuracy(net, *test))

    return make


def denoising(seed: int, root: str | None) -> Problem:
    """Denoise images of CIFAR-10 with a U-Net."""
    data = images("cifar10", root)

    def noisy(pixels: Tensor, draws: torch.Generator) -> Batch:
        clean = data.normalise(pixels)
        return clean + NOISE * torch.randn(clean.shape, generator=draws), clean

    def of_step(step: int) -> Batch:
        chosen = random_indices(len(data.train_x), 16, seed, step)
        return noisy(data.train_x[chosen], generator(seed, -2 - step))

    test = noisy(data.test_x[:400], generator(0))
    return Problem(seeded(seed, UNet), mse, of_step, lambda net: mse(net, test))


class Encoder(nn.Module):
    """CNN with normalised embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Embed images on the unit sphere, [B, 1, 28, 28] -> [B, 32]."""
        return F.normalize(self.head(self.body(x)), dim=1)


def contrastive(seed: int, root: str | None) -> Problem:
    """Learn embeddings of images without labels, by SimCLR (Chen et al. 2020).

    The figure of merit is the accuracy of the 10 nearest neighbours among 2,000 training images,
    with features before the last layer.
    """
    data = images("fmnist", root)

    def view(pixels: Tensor, draws: torch.Generator) -> Tensor:
        """Crop, flip, brighten and add noise, at random."""
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
        index = random_indices(len(data.train_x), 64, seed, step)
        chosen = data.normalise(data.train_x[index])
        draws = generator(seed, -2 - step)
        return (torch.cat([view(chosen, draws), view(chosen, draws)]),)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        points = net(batch[0])
        logits = points @ points.T / 0.2  # cosines over the temperature
        logits = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool), -1e9)
        return F.cross_entropy(logits, torch.arange(len(logits)).roll(len(logits) // 2))

    train, test = (data.normalise(x[:TESTED]) for x in (data.train_x, data.test_x))

    def evaluate(net: nn.Module) -> float:
        assert isinstance(net, Encoder)
        known, asked = (F.normalize(net.body(x), dim=1) for x in (train, test))
        votes = F.one_hot(data.train_y[:TESTED], 10)[(asked @ known.T).topk(10).indices].sum(1)
        return 100 * float((votes.argmax(1) == data.test_y[:TESTED]).float().mean())

    return Problem(seeded(seed, Encoder), loss, of_step, evaluate)


TASKS = (
    Task("vit", "ViT, CIFAR-10", ACCURACY, 400, classification("cifar10", ViT, 32)),
    Task("resnet", "ResNet-8 with BatchNorm, CIFAR-10", ACCURACY, 300,
         classification("cifar10", ResNet8, 32)),
    Task("mixer", "MLP-Mixer, CIFAR-10", ACCURACY, 400, classification("cifar10", Mixer, 32)),
    Task("noisy_labels", "CNN, batches of 8, 30 % wrong labels", ACCURACY, 1200,
         classification("fmnist", lambda: cnn(1, 28, 16), 8, WRONG)),
    Task("unet", "U-Net that denoises CIFAR-10", Merit("mean square"), 200, denoising),
    Task("contrastive", "SimCLR, FashionMNIST, neighbours' labels", ACCURACY, 300, contrastive),
)  # fmt: skip
