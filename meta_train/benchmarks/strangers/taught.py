"""Transfer and bootstrapping: fine-tuning, distillation and temporal differences."""

import copy
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_graph.datasets.images import Images
from meta_train.benchmarks.strangers.networks import mlp
from meta_train.benchmarks.strangers.sources import images
from meta_train.benchmarks.strangers.task import (
    ACCURACY,
    Batch,
    Merit,
    Problem,
    Task,
    accuracy,
    cross_entropy,
    generator,
    linear_decay,
    random_batches,
    random_indices,
    seeded,
)
from meta_train.benchmarks.strangers.vision import TESTED, classification
from meta_train.tasks.image_classification import cnn

FEW = 500  # number of images for fine-tuning
PRETRAINING = 800  # number of steps
TEMPERATURE = 3.0  # of distillation
DISCOUNT, TARGET_AGE = 0.9, 50  # of temporal differences: discount, steps between target updates


@cache
def pretrained(root: str | None) -> nn.Module:
    """Train a CNN on FashionMNIST, the same for all seeds, by AdamW; return it frozen."""
    problem = classification("fmnist", lambda: cnn(1, 28, 16), 64)(0, root)
    optimizer = torch.optim.AdamW(problem.net.parameters(), lr=1e-2)
    decay = linear_decay(optimizer, PRETRAINING)
    for step in range(PRETRAINING):
        optimizer.zero_grad()
        problem.loss(problem.net, problem.batch(step)).backward()
        optimizer.step()
        decay.step()
    return problem.net.requires_grad_(False)


def fine_tuning(
    net: nn.Module,
    data: Images,
    seed: int,
    corrupt: Callable[[Tensor, torch.Generator], Tensor] = lambda x, draws: x,
) -> Problem:
    """Fine-tune a network on 500 images, after a change of the normalised images."""
    draws = generator(seed)
    chosen = torch.randperm(len(data.train_x), generator=draws)[:FEW]
    x = corrupt(data.normalise(data.train_x[chosen]), draws)
    test = corrupt(data.normalise(data.test_x[:TESTED]), generator(0)), data.test_y[:TESTED]
    batches = random_batches((x, data.train_y[chosen]), 32, seed)
    return Problem(net, cross_entropy, batches, lambda net: accuracy(net, *test))


def adaptation(seed: int, root: str | None) -> Problem:
    """Adapt a trained CNN to noisy, rotated images."""

    def corrupt(x: Tensor, draws: torch.Generator) -> Tensor:
        x = x.rot90(1, (2, 3))
        return x + 0.8 * torch.randn(x.shape, generator=draws)

    net = copy.deepcopy(pretrained(root)).requires_grad_(True)
    return fine_tuning(net, images("fmnist", root), seed, corrupt)


def new_head(seed: int, root: str | None) -> Problem:
    """Fine-tune a trained CNN with a new last layer on MNIST."""
    net = copy.deepcopy(pretrained(root)).requires_grad_(True)
    assert isinstance(net, nn.Sequential)
    net[-1] = seeded(seed, lambda: nn.Linear(32, 10))
    return fine_tuning(net, images("mnist", root), seed)


def distillation(seed: int, root: str | None) -> Problem:
    """Distil a CNN into an MLP; the figure of merit is how often both predict the same class."""
    data = images("fmnist", root)
    teacher = pretrained(root)

    @torch.no_grad()
    def of_step(step: int) -> Batch:
        x = data.normalise(data.train_x[random_indices(len(data.train_x), 64, seed, step)])
        return x, (teacher(x) / TEMPERATURE).log_softmax(1)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        predicted = (net(batch[0]) / TEMPERATURE).log_softmax(1)
        divergence = F.kl_div(predicted, batch[1], reduction="batchmean", log_target=True)
        return TEMPERATURE**2 * divergence

    test = data.normalise(data.test_x[:TESTED])
    labels = teacher(test).argmax(1)
    net = seeded(seed, lambda: nn.Sequential(nn.Flatten(), *mlp(784, 64, 64, 10)))
    return Problem(net, loss, of_step, lambda net: accuracy(net, test, labels))


def value_function(seed: int, root: str | None) -> Problem:
    """Estimate the value function of a linear system by temporal differences.

    Costs are quadratic and noisy, so the true value function is known. Targets come from a copy of
    the network that is up to 50 steps old.
    """
    system = torch.tensor([[0.9, 0.4, 0.0], [-0.2, 0.8, 0.2], [0.0, -0.3, 0.7]])
    noise = 0.3
    weight = torch.eye(3)  # V(x) = x^T weight x + constant
    for _ in range(500):
        weight = torch.eye(3) + DISCOUNT * system.T @ weight @ system
    constant = DISCOUNT / (1 - DISCOUNT) * noise**2 * weight.trace()

    def of_step(step: int) -> Batch:
        draws = generator(seed, step)
        x = torch.randn(128, 3, generator=draws)
        cost = x.square().sum(1) + 0.5 * torch.randn(128, generator=draws)
        after = x @ system.T + noise * torch.randn(128, 3, generator=draws)
        return x, cost, after, step

    net = seeded(seed, lambda: mlp(3, 64, 64, 1))
    target = copy.deepcopy(net).requires_grad_(False)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        x, cost, after, step = batch
        if step % TARGET_AGE == 0:
            target.load_state_dict(net.state_dict())
        return F.mse_loss(net(x)[:, 0], cost + DISCOUNT * target(after)[:, 0])

    test = torch.randn(2000, 3, generator=generator(0))
    value = ((test @ weight) * test).sum(1) + constant

    def evaluate(net: nn.Module) -> Tensor:
        return (net(test)[:, 0] - value).square().mean() / value.var()

    return Problem(net, loss, of_step, evaluate)


TASKS = (
    Task("adapt", "trained CNN adapted to noise, 500 images", ACCURACY, 400, adaptation),
    Task("new_head", "trained CNN, new head, 500 of MNIST", ACCURACY, 400, new_head),
    Task("distil", "MLP distilled from a CNN", ACCURACY, 600, distillation),
    Task("value", "temporal differences, target network", Merit("relative mean square"), 1500,
         value_function),
)  # fmt: skip
