"""Image classification by small CNNs and MLPs (Kofinas et al. 2024, appendix)."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from l2o_graph.datasets.images import NORMALISATION, Images, data_root, load_images
from l2o_graph.ranges import COUNT
from l2o_graph.tracing.by_order import spec_of_module

CLASSES = 10
BATCH = 128
TEST_BATCH = 1000
SAMPLE = "sample"  # data root that replaces all image datasets by the packaged sample


def cnn(channels: int, size: int, width: int, depth: int = 3) -> nn.Module:
    """Build a CNN with global average pooling and a linear layer, the optimizee of the paper.

    It has 14,378 parameters for one channel and width 16, 56,970 for three channels and width 32.

    Args:
        channels: Number of channels of the images.
        size: Side of the images, which is not used.
        width: Number of channels after the first convolution, which has stride 2; later ones have
            twice as many.
        depth: Number of convolutions.
    """
    layers: list[nn.Module] = []
    for i in range(depth):
        source, target = (channels, width, 2 * width)[min(i, 2)], width if i == 0 else 2 * width
        stride, padding = (2, 0) if i == 0 else (1, 1)
        layers += [nn.Conv2d(source, target, 3, stride=stride, padding=padding), nn.ReLU()]
    last = width if depth == 1 else 2 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, CLASSES)]
    return nn.Sequential(*layers)


def mlp(channels: int, size: int, width: int) -> nn.Module:
    """Build an MLP with two hidden layers for flattened images."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * size * size, 2 * width),
        nn.ReLU(),
        nn.Linear(2 * width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def images_of(dataset: str, root: str | Path | None) -> Images:
    """Load a dataset by ``load_images``, cached.

    For the root "sample", the packaged sample of FashionMNIST replaces it.

    Raises:
        ValueError: For an unknown name.
        DatasetNotFoundError: If the dataset is not found and cannot be downloaded.
    """
    return _stand_in(dataset) if root == SAMPLE else _loaded(dataset, data_root(root).resolve())


_loaded = cache(load_images)


@cache
def _stand_in(dataset: str) -> Images:
    """Return the packaged sample; for CIFAR-10 with its size and three channels."""
    grey = _loaded("fmnist_sample")
    if dataset != "cifar10":
        return grey
    x, test_x = (
        torch.cat([padded, padded // 2, 255 - padded], 1)
        for padded in (F.pad(pixels, (2, 2, 2, 2)) for pixels in (grey.train_x, grey.test_x))
    )
    label = f"{grey.name}, in colour"
    return Images(label, x, grey.train_y, test_x, grey.test_y, *NORMALISATION[dataset])


class ImageProblem:
    """Network and image dataset, with batches from shuffled epochs."""

    def __init__(self, module: nn.Module, images: Images, batch: int, seed: int):
        self.module = module
        self.spec = spec_of_module(module)
        self._device = next(module.parameters()).device
        self._names = [name for name, _ in module.named_parameters()]
        self._images, self._batch, self._seed = images, batch, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the batch of a step: images (B, channels, height, width) and labels (B,)."""
        steps = len(self._images.train_y) // self._batch
        epoch, at = divmod(step, steps)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 10_007 + epoch)
            self._epoch = epoch
            self._order = torch.randperm(len(self._images.train_y), generator=generator)
        index = self._order[at * self._batch : (at + 1) * self._batch]
        return self._on_device(self._images.train_x[index], self._images.train_y[index])

    def loss(self, parameters: Sequence[Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the cross-entropy in nats."""
        x, y = batch
        return F.cross_entropy(self._logits(parameters, x), y)

    @torch.no_grad()
    def accuracy(self, parameters: Sequence[Tensor]) -> float:
        """Compute the test accuracy, from 0 to 1."""
        right, images = 0, self._images
        self.module.eval()
        for index in torch.arange(len(images.test_y)).split(TEST_BATCH):
            x, y = self._on_device(images.test_x[index], images.test_y[index])
            right += int((self._logits(parameters, x).argmax(1) == y).sum())
        self.module.train()
        return right / len(images.test_y)

    def _on_device(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self._images.normalise(pixels.to(self._device)), labels.to(self._device)

    def _logits(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        named = dict(zip(self._names, parameters, strict=True))
        return functional_call(self.module, named, (x,))


class ImageTask:
    """Task of a network and an image dataset.

    Args:
        dataset: Name of the dataset for ``load_images``.
        build: Function (channels, size, width) -> network.
        width: Width of the network.
        batch: Number of images in a batch.
        shape: Further arguments of ``build``.
    """

    def __init__(
        self,
        dataset: str,
        build: Callable[..., nn.Module],
        width: int,
        batch: int = BATCH,
        **shape: int,
    ):
        self.dataset, self.build, self.width = dataset, build, width
        self.batch, self.shape = batch, shape
        self._images: Images | None = None

    def variant(self, **settings: int) -> "ImageTask":
        """Return the task with another ``batch``, ``width`` or shape of the network.

        Raises:
            ValueError: For an argument that ``build`` does not have, and values below 1.
        """
        known = ["batch", *list(inspect.signature(self.build).parameters)[2:]]
        for key, value in settings.items():
            if key not in known:
                raise ValueError(f"expected one of {known}, found '{key}'")
            COUNT.check(key, value)
        changed = {"width": self.width, "batch": self.batch, **self.shape, **settings}
        return ImageTask(self.dataset, self.build, **changed)

    def load(self, root: str | Path | None) -> str:
        """Load the images, see ``images_of``; return a description of them."""
        self._images = images_of(self.dataset, root)
        return self._images.name

    def problem(self, seed: int, device: torch.device) -> ImageProblem:
        """Create a network and its batches, with a seed for both; requires ``load``."""
        if self._images is None:
            raise RuntimeError("expected a call of load() before problem()")
        images = self._images
        channels, size = images.train_x.shape[1:3]
        # torch's default initialisation only draws from the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.build(channels, size, self.width, **self.shape).to(device)
        return ImageProblem(module, images, self.batch, seed)
