"""Small tabular data, matrix factorisation, and node classification."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.benchmarks.strangers.networks import mlp
from meta_train.benchmarks.strangers.sources import table
from meta_train.benchmarks.strangers.task import (
    ACCURACY,
    Batch,
    Loss,
    Make,
    Merit,
    Problem,
    Task,
    accuracy,
    cross_entropy,
    generator,
    random_batches,
    seeded,
)

SHOWN = 0.75  # fraction of the rows for training
USERS, ITEMS, RATINGS = 400, 300, 15_000
NODES, CLASSES, LABELLED = 1000, 4, 80


def tabular(
    name: str, widths: tuple[int, ...], batch: int, loss: Loss,
    evaluate: Callable[[nn.Module, Batch], float | Tensor],
) -> Make:  # fmt: skip
    """Define a task of an MLP on a table of scikit-learn, evaluated on held-out rows."""

    def make(seed: int, root: str | None) -> Problem:
        x, y = table(name)
        order = torch.randperm(len(x), generator=generator(seed))
        shown, hidden = order.tensor_split([round(SHOWN * len(x))])
        batches, test = random_batches((x[shown], y[shown]), batch, seed), (x[hidden], y[hidden])
        net = seeded(seed, lambda: mlp(*widths))
        return Problem(net, loss, batches, lambda net: evaluate(net, test))

    return make


def regression(net: nn.Module, batch: Batch) -> Tensor:
    """Compute the mean squared error of (inputs, targets [B]), for a network with one output."""
    return F.mse_loss(net(batch[0])[:, 0], batch[1])


def relative(net: nn.Module, batch: Batch) -> Tensor:
    """Compute the mean squared error over the variance of the targets."""
    return regression(net, batch) / batch[1].var()


class Factors(nn.Module):
    """Matrix factorisation of ratings, with biases of users and items."""

    def __init__(self, mean: float, width: int = 8):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([mean]))
        self.user, self.item = nn.Embedding(USERS, width), nn.Embedding(ITEMS, width)
        self.of_user, self.of_item = nn.Embedding(USERS, 1), nn.Embedding(ITEMS, 1)  # biases
        for embedding in (self.user, self.item, self.of_user, self.of_item):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Predict the ratings [B] of pairs of a user [B] and an item [B]."""
        both = (self.user(user) * self.item(item)).sum(1)
        return both + self.of_user(user)[:, 0] + self.of_item(item)[:, 0] + self.mean


def ratings(seed: int, root: str | None) -> Problem:
    """Predict held-out ratings between 1 and 5, drawn from a model with four factors."""
    draws = generator(0)
    tastes, traits = (torch.randn(n, 4, generator=draws) for n in (USERS, ITEMS))
    user = torch.randint(USERS, (RATINGS,), generator=draws)
    item = torch.randint(ITEMS, (RATINGS,), generator=draws)
    popular = 0.5 * torch.randn(ITEMS, generator=draws)
    true = 3.5 + 0.5 * (tastes[user] * traits[item]).sum(1) + popular[item]
    rated = (true + 0.4 * torch.randn(RATINGS, generator=draws)).clamp(1, 5)
    order = torch.randperm(RATINGS, generator=generator(seed))
    shown, hidden = order.tensor_split([int(0.8 * RATINGS)])

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(net(batch[0], batch[1]), batch[2])

    batches = random_batches((user[shown], item[shown], rated[shown]), 128, seed)
    test = user[hidden], item[hidden], rated[hidden]
    mean = float(rated[shown].mean())
    net = seeded(seed, lambda: Factors(mean))
    return Problem(net, loss, batches, lambda net: loss(net, test))


class GraphNet(nn.Module):
    """Graph convolutional network of two layers (Kipf and Welling 2017)."""

    def __init__(self, neighbours: Tensor, features: int, width: int = 32):
        super().__init__()
        self.register_buffer("neighbours", neighbours, persistent=False)
        self.first, self.last = nn.Linear(features, width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Compute class logits of nodes, [nodes, features] -> [nodes, classes]."""
        return self.neighbours @ self.last(F.relu(self.neighbours @ self.first(x)))


def nodes(seed: int, root: str | None) -> Problem:
    """Classify the nodes of a random graph, with 80 labels; every batch is the whole graph."""
    draws = generator(seed)
    label = torch.randint(CLASSES, (NODES,), generator=draws)
    alike = label[:, None] == label
    chance = torch.where(alike, 0.010, 0.004)
    edges = (torch.rand(NODES, NODES, generator=draws) < chance).triu(1)
    joined = (edges | edges.T).float() + torch.eye(NODES)
    scale = joined.sum(1).rsqrt()  # D^(-1/2); the layers use D^(-1/2) (A + I) D^(-1/2)
    centres = torch.randn(CLASSES, 32, generator=draws)
    x = 0.35 * centres[label] + torch.randn(NODES, 32, generator=draws)
    net = seeded(seed, lambda: GraphNet(scale[:, None] * joined * scale, 32))

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(net(batch[0])[:LABELLED], label[:LABELLED])

    def evaluate(net: nn.Module) -> float:
        right = net(x)[LABELLED:].argmax(1) == label[LABELLED:]
        return 100 * float(right.float().mean())

    return Problem(net, loss, lambda step: (x,), evaluate)


SKLEARN = "sklearn"
TASKS = (
    # Targets of the first are raw, 25 to 346.
    Task("diabetes", "MLP, 332 rows, raw targets", Merit("relative mean square"), 1000,
         tabular("diabetes", (10, 64, 64, 1), 32, regression, relative), SKLEARN),
    Task("cancer", "MLP, breast cancer, 427 rows", Merit("nats"), 500,
         tabular("breast_cancer", (30, 32, 32, 2), 32, cross_entropy, cross_entropy), SKLEARN),
    Task("digits", "MLP, digits of scikit-learn", ACCURACY, 600,
         tabular("digits", (64, 64, 64, 10), 64, cross_entropy,
                 lambda net, batch: accuracy(net, *batch)), SKLEARN),
    Task("recommender", "ratings from embeddings", Merit("mean square"), 1500, ratings),
    Task("graph", "GCN, classes of nodes, 80 known", ACCURACY, 300, nodes),
)  # fmt: skip
