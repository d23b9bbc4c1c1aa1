"""CNNs of random architectures, in the manner of the CNN Wild Park.

Kofinas et al. 2024, appendix C.3, and the sampler of mkofinas/neural-graphs: 2 to 5 convolutions
of stride 1, each with 4, 8, 16 or 32 channels, a kernel of side 3, 5 or 7 and one of six
activations. Each but the first two may have a skip connection from a hidden layer before its
input. The optimizer is AdamW without weight decay.

The paper trains for 200 epochs and more with a learning rate of 1e-3 and batches of 512. Runs here
are a hundred times shorter: batches are smaller, and the learning rate is drawn from 1e-3 to 1e-2,
with linear decay to 0. In 2,200 steps of 32 images, one network of three layers reached 49 % on
CIFAR-10, and 44 % with a constant learning rate.

``Recipe`` also allows other widths, strides and numbers of steps. A stride of 2 makes all later
layers four times cheaper and enlarges their receptive field, so accuracies are higher after the
same time.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from l2o_graph.datasets.cnn.architecture import NO_SKIP, CNNArchitecture, cnn_module
from l2o_graph.datasets.cnn.files import Run, run_of
from l2o_graph.datasets.cnn.recipe import Recipe, accuracies_of, log_uniform, one_of
from l2o_graph.datasets.images import Images

DEPTHS = (2, 3, 4, 5)
CHANNELS = (4, 8, 16, 32)
KERNELS = (3, 5, 7)
ACTIVATIONS = ("relu", "gelu", "tanh", "sigmoid", "leaky_relu", "")
STRIDES = (1,)
RATES = (1e-3, 1e-2)

MOST_STRIDE = 4  # largest product of all strides; it reduces 16 pixels to 4


def draw_architecture(
    generator: torch.Generator,
    image_channels: int,
    channels: Sequence[int] = CHANNELS,
    strides: Sequence[int] = STRIDES,
) -> CNNArchitecture:
    """Draw an architecture, each choice uniformly, from these numbers of channels and strides.

    A stride is 1 where the product of all would exceed ``MOST_STRIDE``. Skip connections only join
    layers of equal height and width.
    """
    depth = one_of(DEPTHS, generator)
    widths = (image_channels, *(one_of(channels, generator) for _ in range(depth)))
    kernels = tuple(one_of(KERNELS, generator) for _ in range(depth))
    activations = tuple(one_of(ACTIVATIONS, generator) for _ in range(depth))
    # A single stride takes no random number, so that seeds give the same architectures as before
    # strides were added.
    drawn = [one_of(strides, generator) if len(strides) > 1 else strides[0] for _ in range(depth)]
    kept: list[int] = []
    for stride in drawn:
        kept.append(stride if math.prod(kept) * stride <= MOST_STRIDE else 1)
    skips: list[int] = []
    for i in range(depth):
        sources = (k for k in range(1, i) if math.prod(kept[k : i + 1]) == 1)
        skips.append(one_of((NO_SKIP, *sources), generator))
    return CNNArchitecture(widths, kernels, activations, tuple(skips), tuple(kept))


def multiplications(architecture: CNNArchitecture, size: Sequence[int]) -> int:
    """Count the multiplications of all convolutions for an image of size (height, width)."""
    total, a = 0, architecture
    for i, (fan_in, fan_out) in enumerate(pairwise(a.channels)):
        size = [-(-side // a.strides[i]) for side in size]
        total += fan_in * fan_out * a.kernels[i] ** 2 * math.prod(size)
    return total


def train_park(
    numbers: Sequence[int],
    generators: Sequence[torch.Generator],
    images: Images,
    recipe: Recipe,
) -> list[Run]:
    """Train networks of random architectures one by one; see ``recipe.Train``."""
    pairs = zip(numbers, generators, strict=True)
    return [_train(number, generator, images, recipe) for number, generator in pairs]


def _train(number: int, generator: torch.Generator, images: Images, recipe: Recipe) -> Run:
    _, image_channels, *size = images.train_x.shape
    while True:
        architecture = draw_architecture(
            generator,
            image_channels,
            channels=recipe.channels or CHANNELS,
            strides=recipe.strides or STRIDES,
        )
        if not recipe.cost or multiplications(architecture, size) <= 1e6 * recipe.cost:
            break
    rate, recipe = log_uniform(*RATES, generator), recipe.drawn(generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        # Channels last is 10 % faster, on average over architectures.
        module = cnn_module(architecture).to(memory_format=torch.channels_last)

    def logits(x: Float[Tensor, "B C height width"]) -> Float[Tensor, "B classes"]:
        return module(x.to(memory_format=torch.channels_last))

    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, recipe.steps)
    done, kept = 0, []
    for stop in recipe.checkpoint_steps:
        for _ in range(done, stop):
            index = torch.randint(len(images.train_x), (recipe.batch,), generator=generator)
            answers = logits(images.normalise(images.train_x[index]))
            optimizer.zero_grad()
            F.cross_entropy(answers, images.train_y[index]).backward()
            optimizer.step()
            schedule.step()
        done = stop
        row = torch.cat([p.detach().flatten() for p in module.parameters()])
        if not bool(row.isfinite().all()):
            break
        kept.append((done, float(accuracies_of(lambda x: logits(x)[:, None], images)), row))
    return run_of(number, architecture, {"optimizer": "adamw", "rate": rate}, kept)
