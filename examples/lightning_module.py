"""Train a CNN on FashionMNIST with NGOptimizer as the optimizer of a Lightning module.

pip install -e ".[frameworks]"
python examples/lightning_module.py
"""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from l2o_graph import NGOptimizer
from l2o_graph.datasets.images import load_images


class Classifier(lightning.LightningModule):
    """Small CNN; only ``configure_optimizers`` is specific to NGOptimizer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the cross-entropy of a batch."""
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Compute the training loss."""
        return self.loss(*batch)

    def configure_optimizers(self) -> NGOptimizer:
        """Create the optimizer."""
        return NGOptimizer(self.parameters())


def main(steps: int = 100) -> tuple[float, float]:
    torch.manual_seed(0)
    images = load_images("fmnist_sample")
    train = TensorDataset(images.normalise(images.train_x), images.train_y)
    test = images.normalise(images.test_x), images.test_y
    classifier = Classifier()
    trainer = lightning.Trainer(max_steps=steps, logger=False, enable_checkpointing=False)

    with torch.no_grad():
        before = classifier.loss(*test).item()
    trainer.fit(classifier, DataLoader(train, batch_size=128, shuffle=True))
    with torch.no_grad():
        after = classifier.loss(*test).item()
    print(f"test loss {before:.3f} before, {after:.3f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main()
