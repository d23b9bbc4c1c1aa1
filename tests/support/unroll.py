"""What the tests of whole inner loops share: a problem that takes a millisecond a step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from l2o_graph.layout.spec import NetSpec
from l2o_graph.tracing.by_order import spec_of_module


class TinyProblem:
    """Three functions of 4 random numbers; every step has a batch of its own.

    Their gradients are of full rank: a softmax's, whose sum is 0, leave a kernel's direction to
    rounding errors, which no finite difference gets past.
    """

    def __init__(self, module: nn.Module, spec: NetSpec | None = None):
        self.module = module
        self.spec = spec_of_module(module) if spec is None else spec
        self._names = [name for name, _ in module.named_parameters()]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        numbers = torch.randn(8, 7, generator=generator, dtype=torch.float64)
        x, y = numbers.to(next(self.module.parameters())).split((4, 3), dim=1)
        return x, (x[:, :3] * x[:, 1:]).tanh() + 0.1 * y

    def loss(self, parameters: Sequence[Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        named = dict(zip(self._names, parameters, strict=True))
        return (functional_call(self.module, named, (x,)) - y).square().mean()

    def accuracy(self, parameters: Sequence[Tensor]) -> float:
        raise NotImplementedError

    def start(self) -> list[Tensor]:
        """The initial parameters, to be differentiated in."""
        return [p.detach().clone().requires_grad_() for p in self.module.parameters()]


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """All in a row; None counts as zeros."""
    pairs = zip(tensors, like, strict=True)
    return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in pairs])
