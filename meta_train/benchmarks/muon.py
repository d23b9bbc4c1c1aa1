"""Muon, for torch releases that have none, and of any kernel."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Newton-Schulz coefficients of K. Jordan, "Muon: an optimizer for hidden layers in neural
# networks" (2024): fast rather than exact, singular values end in about 0.7 to 1.2.
QUINTIC, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class Muon(Optimizer):
    """Momentum whose update is made orthogonal, for kernels and matrices.

    A kernel counts as a matrix of out x (in * height * width); its update is scaled by
    sqrt(max(1, rows / columns)).

    Args:
        params: Parameters of at least two dimensions.
        lr: Length of a step along each singular direction.
        momentum: Decay of the Nesterov momentum.

    Raises:
        ValueError: For a parameter of fewer than two dimensions.

    Source:
        K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024; without
        weight decay, in the parameters' own type rather than in bfloat16.
    """

    def __init__(self, params: Any, lr: float = 0.02, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() < 2:
                    raise ValueError(f"Muon: expected kernels or matrices, found {list(p.shape)}")

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            beta = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].mul_(beta).add_(p.grad)
                ahead = (p.grad + beta * momentum).flatten(1)
                scale = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
                update = orthogonalised(ahead)
                p.sub_(update.view_as(p), alpha=group["lr"] * scale)


def orthogonalised(matrix: Tensor) -> Tensor:
    """A matrix with the same singular vectors, its singular values driven to about 1."""
    a, b, c = QUINTIC
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]  # the smaller of the two Gram matrices is the cheaper one
    if tall:
        x = x.T
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def split(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What Muon takes: kernels and matrices but embeddings and the last layer; and the rest."""
    embeddings = [m.weight for m in net.modules() if isinstance(m, nn.Embedding)]
    parameters = [p for p in net.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2 and all(p is not e for e in embeddings)]
    matrices = matrices[:-1]
    return matrices, [p for p in parameters if all(p is not m for m in matrices)]
