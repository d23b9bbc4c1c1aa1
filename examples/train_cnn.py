"""Train a CNN on FashionMNIST with NGOptimizer, in an ordinary training loop.

    python examples/train_cnn.py

Nothing is downloaded: the images are the sample in the package.
"""

import torch
from torch import nn

from l2o_graph import NGOptimizer
from l2o_graph.datasets.images import load_images


def main(steps: int = 200) -> float:
    torch.manual_seed(0)
    images = load_images("fmnist_sample")
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    optimizer = NGOptimizer(model.parameters())  # was torch.optim.AdamW(...)

    for step in range(steps):
        index = torch.randint(len(images.train_y), (128,))
        x, y = images.normalise(images.train_x[index]), images.train_y[index]
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:4}: loss {loss.item():.3f}")

    def accuracy() -> float:
        with torch.no_grad():
            predicted = model(images.normalise(images.test_x)).argmax(1)
        return (predicted == images.test_y).float().mean().item()

    print(f"test accuracy: {accuracy():.1%}")
    with optimizer.averaged():  # weights averaged over about the last tenth of the steps
        averaged = accuracy()
    print(f"test accuracy of averaged weights: {averaged:.1%}")
    return averaged


if __name__ == "__main__":
    main()
