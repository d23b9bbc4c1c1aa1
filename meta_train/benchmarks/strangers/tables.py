"""Tables of a few hundred rows, ratings, a small graph."""

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
    Problem,
    Task,
    batches_of,
    cross_entropy,
    generator,
    lower,
    percent_right,
    seeded,
)

SHOWN = 0.75  # fraction of the rows to train on
USERS, ITEMS, RATINGS = 400, 300, 15_000
NODES, CLASSES, LABELLED = 1000, 4, 80


def of_table(
    name: str, widths: tuple[int, ...], batch: int, loss: Loss,
    judge: Callable[[nn.Module, Batch], float],
) -> Make:  # fmt: skip
    """An MLP on the rows of a table, judged by those that it is not trained on."""

    def make(seed: int, root: str | None) -> Problem:
        x, y = table(name)
        order = torch.randperm(len(x), generator=generator(seed))
        shown, hidden = order.tensor_split([round(SHOWN * len(x))])
        batches, tested = batches_of((x[shown], y[shown]), batch, seed), (x[hidden], y[hidden])
        net = seeded(seed, lambda: mlp(*widths))
        return Problem(net, loss, batches, lambda net: judge(net, tested))

    return make


def regression(net: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of one number a row."""
    return F.mse_loss(net(batch[0])[:, 0], batch[1])


def relative(net: nn.Module, batch: Batch) -> float:
    """Mean squared error over the variance of the targets."""
    return float(regression(net, batch) / batch[1].var())


class Factors(nn.Module):
    """A rating is a product of factors, and what user and item add to all ratings."""

    def __init__(self, mean: float, width: int = 8):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([mean]))
        self.user, self.item = nn.Embedding(USERS, width), nn.Embedding(ITEMS, width)
        self.of_user, self.of_item = nn.Embedding(USERS, 1), nn.Embedding(ITEMS, 1)
        for embedding in (self.user, self.item, self.of_user, self.of_item):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Ratings of pairs."""
        both = (self.user(user) * self.item(item)).sum(1)
        return both + self.of_user(user)[:, 0] + self.of_item(item)[:, 0] + self.mean


def ratings(seed: int, root: str | None) -> Problem:
    """What users think of items that they have not rated yet; 1 to 5, four true factors."""
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

    examples = user[shown], item[shown], rated[shown]
    tested = user[hidden], item[hidden], rated[hidden]
    mean = float(rated[shown].mean())
    net = seeded(seed, lambda: Factors(mean))
    of_step = batches_of(examples, 128, seed)
    return Problem(net, loss, of_step, lambda net: float(loss(net, tested)))


class GraphNet(nn.Module):
    """Two rounds over the neighbours of every node (a GCN)."""

    def __init__(self, neighbours: Tensor, features: int, width: int = 32):
        super().__init__()
        self.register_buffer("neighbours", neighbours, persistent=False)
        self.first, self.last = nn.Linear(features, width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (nodes, classes) of features (nodes, features)."""
        return self.neighbours @ self.last(F.relu(self.neighbours @ self.first(x)))


def nodes(seed: int, root: str | None) -> Problem:
    """Classes of a graph's nodes, of which eighty are known; every step sees all of them."""
    draws = generator(seed)
    label = torch.randint(CLASSES, (NODES,), generator=draws)
    alike = label[:, None] == label
    chance = torch.where(alike, 0.010, 0.004)
    edges = (torch.rand(NODES, NODES, generator=draws) < chance).triu(1)
    joined = (edges | edges.T).float() + torch.eye(NODES)
    scale = joined.sum(1).rsqrt()
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
    # Targets of the first, 25 to 346, stay as they are; three quarters of the rows are trained on.
    Task("diabetes", "MLP, 332 rows, raw targets", lower("relative mean square"), 1000,
         of_table("diabetes", (10, 64, 64, 1), 32, regression, relative), SKLEARN),
    Task("cancer", "MLP, breast cancer, 427 rows", lower("nats"), 500,
         of_table("breast_cancer", (30, 32, 32, 2), 32, cross_entropy,
                  lambda net, batch: float(cross_entropy(net, batch))), SKLEARN),
    Task("digits", "MLP, digits of scikit-learn", ACCURACY, 600,
         of_table("digits", (64, 64, 64, 10), 64, cross_entropy,
                  lambda net, batch: percent_right(net, *batch)), SKLEARN),
    Task("recommender", "ratings from embeddings", lower("mean square"), 1500, ratings),
    Task("graph", "GCN, classes of nodes, 80 known", ACCURACY, 300, nodes),
)  # fmt: skip
