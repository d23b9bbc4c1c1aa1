"""The optimizer Muon, which torch has from 2.9 on, here also for convolution kernels."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Newton-Schulz coefficients of K. Jordan, "Muon: an optimizer for hidden layers in neural
# networks" (2024): fast rather than exact, singular values end in about 0.7 to 1.2.
QUINTIC, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class Muon(Optimizer):
    """Nesterov momentum with orthogonalised updates.

    Kernels are viewed as matrices of out x (in * height * width). Updates are scaled by
    sqrt(max(1, rows / columns)).

    Args:
        params: Parameters of at least two dimensions.
        lr: Length of a step along each singular direction.
        momentum: Decay of the Nesterov momentum.

    Raises:
        ValueError: For a parameter of fewer than two dimensions.

    Source:
        K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024; without
        weight decay, in the parameters' own dtype rather than in bfloat16.
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
                nesterov = (p.grad + beta * momentum).flatten(1)
                scale = max(1.0, nesterov.shape[0] / nesterov.shape[1]) ** 0.5
                update = orthogonalised(nesterov)
                p.sub_(update.view_as(p), alpha=group["lr"] * scale)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Move the singular values of a matrix to about 1, by Newton-Schulz iterations."""
    a, b, c = QUINTIC
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]  # the smaller of the two Gram matrices is cheaper
    if tall:
        x = x.T
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def split_parameters(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split the trainable parameters for Muon and for AdamW.

    Muon trains kernels and matrices, except embeddings and the last layer; AdamW all others.
    """
    embeddings = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in net.parameters() if p.requires_grad]
    kernels = [p for p in parameters if p.dim() >= 2 and id(p) not in embeddings][:-1]
    chosen = {id(p) for p in kernels}
    return kernels, [p for p in parameters if id(p) not in chosen]
