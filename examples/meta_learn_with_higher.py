"""Meta-train the paper's learned optimizer in an inner loop of the package ``higher``.

    pip install "l2o_graph[higher]"
    python examples/meta_learn_with_higher.py

The rule that computes the updates is a module like any other: whatever is differentiable in the
network that it trained has a gradient for its weights.
"""

import higher
import torch
from torch import Tensor, nn

from l2o_graph import PaperOptimizer
from l2o_graph.rule import RuleConfig, UpdateRule, untrained

INNER_STEPS = 10
HELD_OUT = range(1000, 1004)


def wave(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A fresh network, and a sine wave for it to learn."""
    torch.manual_seed(seed)
    x = torch.linspace(-2, 2, 32)[:, None]
    y = torch.sin(2 * x + 6 * torch.rand(()))
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)), x, y


def loss_after_training(rule: UpdateRule, seed: int, differentiable: bool = True) -> Tensor:
    model, x, y = wave(seed)
    optimizer = PaperOptimizer(model.parameters(), checkpoint=rule)
    with higher.innerloop_ctx(model, optimizer, track_higher_grads=differentiable) as (net, inner):
        for _ in range(INNER_STEPS):
            inner.step(nn.functional.mse_loss(net(x), y))
        return nn.functional.mse_loss(net(x), y)


def held_out_loss(rule: UpdateRule) -> float:
    losses = [loss_after_training(rule, seed, False).item() for seed in HELD_OUT]
    return sum(losses) / len(losses)


def main(steps: int = 50) -> tuple[float, float]:
    """Returns the loss after training on waves never meta-trained on, before and after."""
    rule = untrained(RuleConfig(hidden=8, layers=1, inner=8), seed=0)
    outer = torch.optim.Adam(rule.parameters(), lr=1e-2)
    before = held_out_loss(rule)
    for step in range(steps):
        outer.zero_grad()
        loss = loss_after_training(rule, seed=step)
        loss.backward()
        nn.utils.clip_grad_norm_(rule.parameters(), 1.0)
        outer.step()
        if step % 10 == 0:
            print(f"outer step {step:3}: loss {loss.item():.4f}")
    after = held_out_loss(rule)
    print(f"held-out waves after {INNER_STEPS} steps: loss {before:.4f} -> {after:.4f}")
    return before, after


if __name__ == "__main__":
    main()
