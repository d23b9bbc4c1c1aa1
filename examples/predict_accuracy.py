"""Ask a network how accurate it is, while it is trained.

    python examples/predict_accuracy.py --data-root DATA

A CNN learns CIFAR-10 at half its size by an ordinary training loop. From time to time the packaged
predictor says without any image of the dataset which test accuracy it expects, and between which
ends it lies in nine of ten cases; what is measured stands beside it. Where CIFAR-10 is not and
cannot be downloaded, it is the sample of FashionMNIST in the package, in three equal colours: the
predictor has seen no network of that, so that only the order of what it says can be right.
"""

import argparse

import torch
from torch import Tensor, nn

from l2o_graph import predict_accuracy
from l2o_graph.datasets.images import DatasetNotFoundError, load_images

COLOURS = 3


def network() -> nn.Sequential:
    """Three convolutions, a mean over the image, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(COLOURS, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def halved(x: Tensor) -> Tensor:
    """Means of four pixels each, in three colours."""
    return nn.functional.avg_pool2d(x, 2).expand(-1, COLOURS, -1, -1)


def main(steps: int = 600, data_root: str | None = None) -> list[tuple[float, float]]:
    """Train and ask; returns what was predicted and what was measured, each time."""
    torch.manual_seed(0)
    try:
        images = load_images("cifar10", data_root)
    except DatasetNotFoundError:
        images = load_images("fmnist_sample")
        print("the predictor knows networks on CIFAR-10: of these only the order can be right")
    print(f"{images.name}: {len(images.train_x)} images to train on")
    some = torch.randperm(len(images.test_y))[:2500]  # a file may have one class after another
    test_x, test_y = halved(images.normalise(images.test_x[some])), images.test_y[some]
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / steps)

    found = []
    stops = {round(steps * (k / 6) ** 2) for k in range(7)}
    for step in range(steps + 1):
        if step in stops:
            expected, low, high = predict_accuracy(model, test_x[:1], interval=0.9)
            with torch.no_grad():
                accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
            ends = f"{low:.1%} to {high:.1%}"
            print(f"step {step:4}: predicted {expected:.1%}, {ends}, measured {accuracy:.1%}")
            found.append((expected, accuracy))
        if step == steps:
            break
        index = torch.randint(len(images.train_y), (32,))
        x, y = halved(images.normalise(images.train_x[index])), images.train_y[index]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", metavar="FOLDER", help="where datasets lie")
    main(data_root=parser.parse_args().data_root)
