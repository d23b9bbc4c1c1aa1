"""Predict the test accuracy of a CNN while it is trained.

    python examples/predict_accuracy.py --data-root DATA

An ordinary training loop trains a CNN on CIFAR-10 at half resolution. At several steps the packaged
predictor estimates the test accuracy without any image of the dataset, with a 90 % interval, and
the measured accuracy is printed beside it. If CIFAR-10 cannot be found or downloaded, the sample of
FashionMNIST in the package is used instead. The predictor was not trained on networks of that
dataset, so only the order of its predictions is meaningful.
"""

import argparse

import torch
from torch import Tensor, nn

from l2o_graph import predict_accuracy
from l2o_graph.datasets.images import DatasetNotFoundError, load_images

CHANNELS = 3


def network() -> nn.Sequential:
    """Build a CNN of three convolutions, global average pooling and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 16, 3, padding=1),
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
    """Halve the resolution of images; repeat a single channel three times."""
    return nn.functional.avg_pool2d(x, 2).expand(-1, CHANNELS, -1, -1)


def main(steps: int = 600, data_root: str | None = None) -> list[tuple[float, float]]:
    """Train and predict; return predicted and measured accuracies."""
    torch.manual_seed(0)
    try:
        images = load_images("cifar10", data_root)
    except DatasetNotFoundError:
        images = load_images("fmnist_sample")
        print("the predictor is for networks on CIFAR-10: here only the order is meaningful")
    print(f"{images.name}: {len(images.train_x)} training images")
    some = torch.randperm(len(images.test_y))[:2500]  # datasets may be sorted by class
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
            interval = f"{low:.1%} to {high:.1%}"
            print(f"step {step:4}: predicted {expected:.1%}, {interval}, measured {accuracy:.1%}")
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
    parser.add_argument("--data-root", metavar="FOLDER", help="folder of datasets")
    main(data_root=parser.parse_args().data_root)
