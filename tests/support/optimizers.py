"""What the tests of the optimizer share: networks, gradients, a checkpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from l2o_graph.optim.checkpoints import save_controller
from l2o_graph.optim.controller import Controller, ControllerConfig, Reader
from l2o_graph.paper.checkpoints import save_checkpoint
from l2o_graph.paper.rule import Model, RuleConfig
from support.rules import random_rule

MODELS: tuple[Model, ...] = get_args(Model)
READERS: tuple[Reader, ...] = get_args(Reader)


def random_checkpoint(folder: Path, seed: int = 0, model: Model = "ng_gnn") -> Path:
    """A small rule that answers something, in a file."""
    path = folder / f"random{seed}.safetensors"
    rule = random_rule(RuleConfig(hidden=8, layers=2, inner=8, model=model), seed)
    save_checkpoint(path, rule, {"made": "by a test"})
    return path


def tame_controller(seed: int = 0, reader: Reader = "messages") -> Controller:
    """A small controller that answers something, and nothing wild."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        controller = Controller(ControllerConfig(reader, channels=3))
        for p in controller.parameters():
            p.data += 0.3 * torch.randn(p.shape) / max(p.shape[-1], 1) ** 0.5
    return controller


def controller_file(folder: Path, seed: int = 0, reader: Reader = "messages") -> Path:
    """The same in a file."""
    path = folder / f"random{seed}.safetensors"
    save_controller(path, tame_controller(seed, reader), {"made": "by a test"})
    return path


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def give_gradients(parameters: Iterable[Tensor], seed: int) -> None:
    """Gradients that depend on nothing but the seed, so that two runs get the same."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def drop_rounding(parameters: Iterable[Tensor]) -> None:
    """Take away gradients that are 0 but for rounding: no length is free of their noise.

    As those of a bias before a batch norm, or of the keys' in attention.
    """
    parameters = list(parameters)
    sizes = [p.grad.abs().max().item() for p in parameters]
    for p, size in zip(parameters, sizes, strict=True):
        if size < 1e-12 * max(sizes):
            p.grad = None


def run(optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps with seeded gradients, one for each number."""
    for seed in steps:
        give_gradients((p for g in optimizer.param_groups for p in g["params"]), seed)
        optimizer.step()


def copies(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def equal(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Whether two lists of tensors agree bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that is remembered, in order."""
    of_each = optimizer.state_dict()["state"]
    return [t for key in sorted(of_each) for t in of_each[key].values()]
