"""Blocks in stacks: which share one, and that it makes no difference to a step."""

import pytest
import torch
from torch import Tensor, nn

from l2o_graph import NGOptimizer
from l2o_graph.optim import memory
from l2o_graph.optim.blocks import blocks_of
from l2o_graph.optim.memory import arrange, gathered, scattered
from l2o_graph.tracing import spec_of_computation

WIDTH = 256  # a projection of as many neurons to as many is just large


class Attention(nn.Module):
    """Two projections and attention between them."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.project = nn.Linear(width, width)
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)
        self.last = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x).relu()
        return self.last(self.attend(x, x, x, need_weights=False)[0])


def flat(net: nn.Module) -> list[Tensor]:
    return [p.detach().reshape(1, -1) for p in net.parameters()]


def storages(tensors: list[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def stacks_of(net: Attention) -> memory.Memory:
    spec = spec_of_computation(net, (torch.randn(2, 3, net.project.in_features),))
    return arrange(spec, blocks_of(spec), 1)


def test_large_kernels_are_views_of_their_parameters_also_fused_ones():
    net = Attention()
    found = stacks_of(net)
    of_parameters, of_stacks = flat(net), gathered(found, flat(net))
    kernels = [x for s, x in zip(found.stacks, of_stacks, strict=True) if s.is_matrix]
    assert sorted(len(x) for x in kernels) == [1, 1, 1, 3]  # queries, keys and values are one view
    assert storages(kernels) <= storages(of_parameters)
    back = scattered(found, of_stacks)
    for i, expected in enumerate(of_parameters):
        torch.testing.assert_close(back[i], expected)
    assert storages([back[i] for i, p in enumerate(net.parameters()) if p.dim() > 1]) <= storages(
        of_stacks
    )


def test_small_kernels_of_one_shape_share_a_stack():
    found = stacks_of(Attention(16))
    assert sorted(s.shape for s in found.stacks if s.is_matrix) == [(1, 48, 16), (5, 16, 16)]


def test_stacks_of_their_own_make_the_same_steps(monkeypatch: pytest.MonkeyPatch):
    def trained(large: int) -> list[Tensor]:
        monkeypatch.setattr(memory, "LARGE", large)
        torch.manual_seed(0)
        net = Attention(24).double()
        optimizer = NGOptimizer(net.parameters(), model=net)
        for _ in range(30):
            x = torch.randn(4, 3, 24, dtype=torch.float64)
            optimizer.zero_grad()
            (net(x) - x.repeat(1, 1, 3).sin()).square().mean().backward()
            optimizer.step()
        return list(net.parameters())

    for one, other in zip(trained(1), trained(1 << 40), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
