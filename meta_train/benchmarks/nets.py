"""Networks on which the cost of a step is measured."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from meta_train.benchmarks.strangers.networks import GPT, mlp
from meta_train.tasks.image_classification import cnn


@dataclass(frozen=True, slots=True)
class Net:
    """Network to measure on."""

    label: str  # title in tables
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]  # function that draws a mini-batch
    classes: int = 10
    repeats: int = 1  # number of measurements in a round; short times need more


def gpt2(words: int = 50257, tokens: int = 1024, width: int = 768, blocks: int = 12) -> GPT:
    """Build GPT-2 small by default, 124 M parameters, with a head tied to the embedding."""
    net = GPT(words, tokens, width, blocks, width // 64)
    net.head.weight = net.word.weight
    return net


WORDS = 2048
TIMED = {
    "gpt": Net(
        "GPT, 5.3 M, 8 x 128 tokens", lambda: gpt2(WORDS, 128, 256, 6),
        lambda: torch.randint(0, WORDS, (8, 128)), WORDS,
    ),
    "resnet18": Net(
        "resnet18, 16 images of 64 x 64", resnet18, lambda: torch.randn(16, 3, 64, 64), 1000
    ),
    "mlp": Net(
        "MLP 784-1024-1024-10, batch 128", lambda: mlp(784, 1024, 1024, 10),
        lambda: torch.randn(128, 784), repeats=3,
    ),
    "cifar10": Net(
        "CIFAR-10 CNN, batch 128", lambda: cnn(3, 32, 32), lambda: torch.randn(128, 3, 32, 32),
        repeats=5,
    ),
    "fmnist": Net(
        "FashionMNIST CNN, batch 128", lambda: cnn(1, 28, 16),
        lambda: torch.randn(128, 1, 28, 28), repeats=9,
    ),
    "small": Net(
        "MLP 64-128-64-10, batch 64", lambda: mlp(64, 128, 64, 10), lambda: torch.randn(64, 64),
        repeats=9,
    ),
}  # fmt: skip


def _cnn(width: int) -> Net:
    """Define a CNN; width 32 is the CIFAR-10 network of Kofinas et al. 2024."""
    return Net(f"CNN, width {width}", lambda: cnn(3, 32, width), lambda: torch.randn(4, 3, 32, 32))


GROWING = {
    **{f"cnn-{width}": _cnn(width) for width in (16, 32, 64, 128, 256, 512, 1024)},
    "mlp-1024": Net(
        "MLP, width 1024", lambda: mlp(784, 1024, 1024, 1024, 10), lambda: torch.randn(4, 784)
    ),
    "resnet18": TIMED["resnet18"],
    "gpt2": Net("GPT-2 small", gpt2, lambda: torch.randint(0, 50257, (1, 8)), 50257),
}
NETS = TIMED | GROWING
