"""Networks of the CNN Wild Park's kind: each its own architecture, trained one by one.

Kofinas et al. 2024, appendix C.3, and the sampler of mkofinas/neural-graphs: 2 to 5 convolutions
of stride 1, each of 4, 8, 16 or 32 channels, a kernel of side 3, 5 or 7 and one of six
activations; into all but the first two a skip from a hidden layer before the one that is read, or
none. AdamW without decay.

Its rate is 1e-3 there, for 200 epochs and more in batches of 512. Runs here are a hundred times
shorter: batches are smaller, and the rate is drawn from 1e-3 to 1e-2 and falls to 0 on a straight
line. In 2,200 steps of 32 images that took one network of three layers to 49 % on CIFAR-10, where
a rate that stays took it to 44 %.

Others than the paper's widths, strides and lengths can be drawn from: see ``Recipe``. A stride
makes all that follows four times cheaper, and networks see more of the image, so that in the same
time they come to know more.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.datasets.cnn.architecture import NO_SKIP, CNNArchitecture, cnn_module
from l2o_graph.datasets.cnn.files import Run, run_of
from l2o_graph.datasets.cnn.recipe import Recipe, log_uniform, one_of, shares_right
from l2o_graph.datasets.images import Images

DEPTHS = (2, 3, 4, 5)
CHANNELS = (4, 8, 16, 32)
KERNELS = (3, 5, 7)
ACTIVATIONS = ("relu", "gelu", "tanh", "sigmoid", "leaky_relu", "")
STRIDES = (1,)
RATES = (1e-3, 1e-2)

MOST_STRIDE = 4  # of all strides together: of 16 pixels four are left


def draw_architecture(
    generator: torch.Generator,
    image_channels: int,
    channels: Sequence[int] = CHANNELS,
    strides: Sequence[int] = STRIDES,
) -> CNNArchitecture:
    """Draw an architecture, every choice evenly, its widths and strides from those given.

    A stride that would make ``MOST_STRIDE`` of all together more is 1 instead, and no skip goes
    past one.
    """
    depth = one_of(DEPTHS, generator)
    widths = (image_channels, *(one_of(channels, generator) for _ in range(depth)))
    kernels = tuple(one_of(KERNELS, generator) for _ in range(depth))
    activations = tuple(one_of(ACTIVATIONS, generator) for _ in range(depth))
    # Of one stride nothing is drawn: architectures of a seed are those that they always were.
    drawn = [one_of(strides, generator) if len(strides) > 1 else strides[0] for _ in range(depth)]
    kept: list[int] = []
    for stride in drawn:
        kept.append(stride if math.prod(kept) * stride <= MOST_STRIDE else 1)
    skips = tuple(one_of(_sources(i, kept), generator) for i in range(depth))
    return CNNArchitecture(widths, kernels, activations, skips, tuple(kept))


def _sources(i: int, strides: Sequence[int]) -> tuple[int, ...]:
    """Where a skip to convolution i may come from, none among them: hidden layers of its size."""
    return (NO_SKIP, *(k for k in range(1, i) if math.prod(strides[k : i + 1]) == 1))


def multiplications(architecture: CNNArchitecture, size: Sequence[int]) -> int:
    """Count those of all convolutions for an image of a height and a width."""
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
    """Train networks, one after another: see ``recipe.Train``."""
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
        # A tenth faster than channel after channel, on average over architectures.
        module = cnn_module(architecture).to(memory_format=torch.channels_last)

    def answers(x: Float[Tensor, "B C height width"]) -> Float[Tensor, "B classes"]:
        return module(x.to(memory_format=torch.channels_last))

    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=0, fused=True)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, recipe.steps)
    done, kept = 0, []
    for stop in recipe.checkpoint_steps:
        for _ in range(done, stop):
            index = torch.randint(len(images.train_x), (recipe.batch,), generator=generator)
            logits = answers(images.normalise(images.train_x[index]))
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, images.train_y[index]).backward()
            optimizer.step()
            falling.step()
        done = stop
        row = torch.cat([p.detach().flatten() for p in module.parameters()])
        if not bool(row.isfinite().all()):
            break
        kept.append((done, float(shares_right(lambda x: answers(x)[:, None], images)), row))
    return run_of(number, architecture, {"optimizer": "adamw", "rate": rate}, kept)
