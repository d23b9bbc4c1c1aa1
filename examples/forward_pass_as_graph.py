"""Simulation of the forward pass of MLPs by NG-GNN, from their graphs alone.

    python examples/forward_pass_as_graph.py

With the right weights, a graph network can compute the outputs of the MLPs that it reads (Kofinas
et al. 2024, appendix B), because messages are products of weights and activations. Here the weights
of the package's model are set by hand, once for each layout and activation. Nothing is trained.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from l2o_graph.inr import stack_networks
from l2o_graph.paper.expressivity import (
    IDENTITY,
    RELU,
    SILU,
    ForwardPass,
    interpolated,
    leaky_relu,
)

ACTIVATIONS = {
    "none": (nn.Identity(), IDENTITY),
    "SiLU": (nn.SiLU(), SILU),
    "ReLU": (nn.ReLU(), RELU),
    "LeakyReLU": (nn.LeakyReLU(), leaky_relu()),
    "tanh, 129 knots": (nn.Tanh(), interpolated(torch.tanh, torch.linspace(-8, 8, 129))),
}


def mlp(layout: list[int], activation: nn.Module) -> nn.Sequential:
    """Build an MLP of these widths in double precision."""
    layers = []
    for source, target in pairwise(layout):
        layers += [nn.Linear(source, target), activation]
    return nn.Sequential(*layers[:-1]).double()


def difference(networks: list[nn.Sequential], model: ForwardPass, x: Tensor) -> float:
    """Compute the largest difference of outputs at inputs x, [networks, Q, inputs]."""
    with torch.no_grad():
        simulated = model(*stack_networks(networks), x)
        outputs = torch.stack([network(own) for network, own in zip(networks, x, strict=True)])
    return (simulated - outputs).abs().max().item()


def main(layouts: int = 3) -> dict[str, float]:
    """Simulate random MLPs; return the largest difference for each activation."""
    torch.manual_seed(0)
    found = {}
    for name, (activation, as_silus) in ACTIVATIONS.items():
        for _ in range(layouts):
            depth = torch.randint(2, 6, ()).item()
            layout = torch.randint(1, 20, (depth + 1,)).tolist()
            networks = [mlp(layout, activation) for _ in range(4)]
            x = torch.randn(4, 8, layout[0], dtype=torch.float64)
            error = difference(networks, ForwardPass(layout, as_silus), x)
            print(f"{name}: {'-'.join(map(str, layout))}, {depth} rounds: difference {error:.0e}")
            found[name] = max(error, found.get(name, 0.0))
    return found


if __name__ == "__main__":
    main()
