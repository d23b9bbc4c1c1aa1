"""Train a CNN on FashionMNIST with NGOptimizer in a training loop of Hugging Face accelerate.

pip install -e ".[frameworks]"
python examples/accelerate_loop.py             # or, on several devices or machines:
accelerate launch examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from l2o_graph import NGOptimizer
from l2o_graph.datasets.images import load_images


def main(steps: int = 100) -> tuple[float, float]:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    images = load_images("fmnist_sample")
    data = TensorDataset(images.normalise(images.train_x), images.train_y)
    # Gradients of two batches of 64 are accumulated for each step.
    sampler = RandomSampler(data, num_samples=2 * 64 * steps)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    optimizer = NGOptimizer(model.parameters())
    model, optimizer, batches, scheduler = accelerator.prepare(
        model,
        optimizer,
        DataLoader(data, batch_size=64, sampler=sampler),
        LinearLR(optimizer, 1.0, 0.1, total_iters=steps),
    )

    def test_loss() -> float:
        with torch.no_grad():
            x = images.normalise(images.test_x).to(accelerator.device)
            y = images.test_y.to(accelerator.device)
            return nn.functional.cross_entropy(model(x), y).item()

    before = test_loss()
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    after = test_loss()
    accelerator.print(f"test loss {before:.3f} before, {after:.3f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main()
