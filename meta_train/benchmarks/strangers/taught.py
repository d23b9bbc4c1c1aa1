"""Networks that start from, or are taught by, another: adapted, distilled, bootstrapped."""

import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.benchmarks.strangers.networks import mlp
from meta_train.benchmarks.strangers.sources import images
from meta_train.benchmarks.strangers.task import (
    ACCURACY,
    Batch,
    Problem,
    Task,
    batches_of,
    cross_entropy,
    falling,
    generator,
    lower,
    percent_right,
    pick,
    seeded,
)
from meta_train.benchmarks.strangers.vision import TESTED, classified
from meta_train.tasks.image_classification import cnn

FEW = 500  # images of the new kind
PRETRAINING = 800  # steps
SOFTENING = 3.0  # of a teacher's answers
DISCOUNT, TARGET_AGE = 0.9, 50


@cache
def _trained(root: str | None) -> nn.Module:
    """A CNN that knows FashionMNIST, the same for all seeds; AdamW with linear decay."""
    problem = classified("fmnist", lambda: cnn(1, 28, 16), 64)(0, root)
    optimizer = torch.optim.AdamW(problem.net.parameters(), lr=1e-2)
    decay = falling(optimizer, PRETRAINING)
    for step in range(PRETRAINING):
        optimizer.zero_grad()
        problem.loss(problem.net, problem.batch(step)).backward()
        optimizer.step()
        decay.step()
    return problem.net.requires_grad_(False)


def trained(root: str | None) -> nn.Module:
    """A copy of it, to be trained further."""
    return copy.deepcopy(_trained(root)).requires_grad_(True)


def adapted(seed: int, root: str | None) -> Problem:
    """A trained CNN gets used to noise and a quarter turn, on 500 images."""
    data = images("fmnist", root)

    def spoiled(pixels: Tensor, draws: torch.Generator) -> Tensor:
        x = data.normalise(pixels).rot90(1, (2, 3))
        return x + 0.8 * torch.randn(x.shape, generator=draws)

    draws = generator(seed)
    chosen = torch.randperm(len(data.train_x), generator=draws)[:FEW]
    x, y = spoiled(data.train_x[chosen], draws), data.train_y[chosen]
    tested = spoiled(data.test_x[:TESTED], generator(0)), data.test_y[:TESTED]
    batches = batches_of((x, y), 32, seed)
    return Problem(trained(root), cross_entropy, batches, lambda net: percent_right(net, *tested))


def new_head(seed: int, root: str | None) -> Problem:
    """A trained CNN with a new last layer learns MNIST, from 500 images."""
    data = images("mnist", root)
    net = trained(root)
    assert isinstance(net, nn.Sequential)
    net[-1] = seeded(seed, lambda: nn.Linear(32, 10))
    chosen = torch.randperm(len(data.train_x), generator=generator(seed))[:FEW]
    x, y = data.normalise(data.train_x[chosen]), data.train_y[chosen]
    tested = data.normalise(data.test_x[:TESTED]), data.test_y[:TESTED]
    batches = batches_of((x, y), 32, seed)
    return Problem(net, cross_entropy, batches, lambda net: percent_right(net, *tested))


def distilled(seed: int, root: str | None) -> Problem:
    """An MLP says what a CNN says; judged by how often both name the same class."""
    data = images("fmnist", root)
    teacher = _trained(root)

    @torch.no_grad()
    def of_step(step: int) -> Batch:
        x = data.normalise(data.train_x[pick(len(data.train_x), 64, seed, step)])
        return x, (teacher(x) / SOFTENING).log_softmax(1)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        said = (net(batch[0]) / SOFTENING).log_softmax(1)
        return SOFTENING**2 * F.kl_div(said, batch[1], reduction="batchmean", log_target=True)

    tested = data.normalise(data.test_x[:TESTED])
    named = teacher(tested).argmax(1)
    net = seeded(seed, lambda: nn.Sequential(nn.Flatten(), *mlp(784, 64, 64, 10)))
    return Problem(net, loss, of_step, lambda net: percent_right(net, tested, named))


def valued(seed: int, root: str | None) -> Problem:
    """What a controlled pendulum will cost, by temporal differences with a target network.

    The costs are noisy, the targets are the network's own of up to 50 steps ago, and the true
    value is known: a linear system with quadratic costs.
    """
    system = torch.tensor([[0.9, 0.4, 0.0], [-0.2, 0.8, 0.2], [0.0, -0.3, 0.7]])
    shake = 0.3
    weight = torch.eye(3)
    for _ in range(500):
        weight = torch.eye(3) + DISCOUNT * system.T @ weight @ system
    constant = DISCOUNT / (1 - DISCOUNT) * shake**2 * weight.trace()

    def true(x: Tensor) -> Tensor:
        return ((x @ weight) * x).sum(1) + constant

    def of_step(step: int) -> Batch:
        draws = generator(seed, step)
        x = torch.randn(128, 3, generator=draws)
        cost = x.square().sum(1) + 0.5 * torch.randn(128, generator=draws)
        after = x @ system.T + shake * torch.randn(128, 3, generator=draws)
        return x, cost, after, step

    net = seeded(seed, lambda: mlp(3, 64, 64, 1))
    target = copy.deepcopy(net).requires_grad_(False)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        x, cost, after, step = batch
        if step % TARGET_AGE == 0:
            target.load_state_dict(net.state_dict())
        return F.mse_loss(net(x)[:, 0], cost + DISCOUNT * target(after)[:, 0])

    tested = torch.randn(2000, 3, generator=generator(0))
    value = true(tested)

    def evaluate(net: nn.Module) -> float:
        return float((net(tested)[:, 0] - value).square().mean() / value.var())

    return Problem(net, loss, of_step, evaluate)


TASKS = (
    Task("adapt", "trained CNN adapted to noise, 500 images", ACCURACY, 400, adapted),
    Task("new_head", "trained CNN, new head, 500 of MNIST", ACCURACY, 400, new_head),
    Task("distil", "MLP distilled from a CNN", ACCURACY, 600, distilled),
    Task("value", "temporal differences, target network", lower("relative mean square"), 1500,
         valued),
)  # fmt: skip
