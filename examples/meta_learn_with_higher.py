"""Meta-train the paper's learned optimizer with the package ``higher``.

    pip install "l2o_graph[higher]"
    python examples/meta_learn_with_higher.py

The learned update rule is a module. A loss of the network after training is differentiable with
respect to the weights of the rule.
"""

import higher
import torch
from torch import Tensor, nn

from l2o_graph import PaperOptimizer
from l2o_graph.rule import RuleConfig, UpdateRule, untrained

INNER_STEPS = 10
HELD_OUT = range(1000, 1004)


def wave(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Create a network, and inputs and targets [32, 1] of a sine wave."""
    torch.manual_seed(seed)
    x = torch.linspace(-2, 2, 32)[:, None]
    y = torch.sin(2 * x + 6 * torch.rand(()))
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)), x, y


def loss_after_training(rule: UpdateRule, seed: int, differentiable: bool = True) -> Tensor:
    """Train a network with the rule for ten steps, and compute its loss."""
    model, x, y = wave(seed)
    optimizer = PaperOptimizer(model.parameters(), checkpoint=rule)
    with higher.innerloop_ctx(model, optimizer, track_higher_grads=differentiable) as (net, inner):
        for _ in range(INNER_STEPS):
            inner.step(nn.functional.mse_loss(net(x), y))
        return nn.functional.mse_loss(net(x), y)


def held_out_loss(rule: UpdateRule) -> float:
    """Compute the mean loss after training on held-out waves."""
    losses = [loss_after_training(rule, seed, False).item() for seed in HELD_OUT]
    return sum(losses) / len(losses)


def main(steps: int = 50) -> tuple[float, float]:
    """Meta-train; return the loss after training on held-out waves, before and after."""
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
