"""Random networks: symmetries of the graph are the network's own, and half of one is not."""

import copy

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.automorphisms import moved, random_symmetry
from support.optimizers import drop_rounding, tame_controller
from torch import Tensor, nn
from torch.func import functional_call

from l2o_graph.optim.optimizer import NGOptimizer
from l2o_graph.tracing import spec_of_computation

INPUTS, OUTPUTS, TOKENS, STEPS = 3, 2, 4, 4
CONTROLLER = tame_controller()
KINDS = (
    "mlp", "gated", "fused", "interleaved", "tokens", "two matrices", "attention", "split", "conv",
)  # fmt: skip
ACTIVATIONS = (torch.tanh, F.gelu, torch.sigmoid)


class Block(nn.Module):
    """Block of one of several kinds: (batch, tokens, width) to (batch, tokens, other width)."""

    def __init__(self, kind: str, width: int, to: int, groups: int, act: int, residual: bool):
        super().__init__()
        self.kind, self.groups, self.act = kind, groups, ACTIVATIONS[act]
        self.residual = residual and width == to
        inner = groups * max(width // groups, 1)
        if kind == "mlp":
            self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, inner + 1)
            self.down = nn.Linear(inner + 1, to)
        elif kind == "gated":
            self.value, self.gate = nn.Linear(width, inner), nn.Linear(width, inner, bias=False)
            self.down = nn.Linear(inner, to)
        elif kind == "fused":
            self.both, self.down = nn.Linear(width, 2 * inner), nn.Linear(inner, to)
        elif kind == "interleaved":
            self.up, self.down = nn.Linear(width, 2 * inner), nn.Linear(2 * inner, to)
        elif kind == "tokens":
            self.up, self.down = nn.Linear(width, 2 * inner), nn.Linear(inner, to)
        elif kind == "two matrices":
            self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, to)
            self.scale = nn.Parameter(torch.randn(inner, 1))
            self.other = nn.Parameter(torch.randn(inner, width))
        elif kind == "attention":
            self.qkv, self.down = nn.Linear(width, 3 * inner), nn.Linear(inner, to)
        elif kind == "split":
            self.up, self.part = nn.Linear(width, inner + 2), nn.Linear(2, 3)
            self.down = nn.Linear(inner + 3, to)
        else:
            self.up = nn.Conv1d(width, inner, 1)
            self.conv = nn.Conv1d(inner, inner, 3, padding=1, groups=groups)
            self.down = nn.Linear(inner, to)

    def body(self, x: Tensor) -> Tensor:
        if self.kind == "mlp":
            return self.act(self.up(self.norm(x)))
        if self.kind == "gated":
            return self.value(x) * self.act(self.gate(x))
        if self.kind == "fused":
            value, gate = self.both(x).chunk(2, -1)
            return value * self.act(gate)
        if self.kind == "interleaved":
            one, two = self.up(x).chunk(2, -1)
            return torch.stack([one, self.act(two)], -1).flatten(-2)
        if self.kind == "tokens":
            one, two = self.up(x).chunk(2, -1)
            return torch.cat([self.act(one), two], 1)[:, 2:6]
        if self.kind == "two matrices":
            return self.act(F.linear(x, self.up.weight * self.scale + self.other, self.up.bias))
        if self.kind == "attention":
            q, k, v = (
                t.unflatten(-1, (self.groups, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
            )
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.kind == "split":
            one, two = self.up(x).split([self.up.out_features - 2, 2], dim=-1)
            return torch.cat([self.act(one), self.part(self.act(two))], dim=-1)
        return self.act(self.conv(self.act(self.up(x.transpose(1, 2))))).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.body(x))
        return x + y if self.residual else y


blocks = st.tuples(
    st.sampled_from(KINDS),
    st.integers(3, 5),  # width of the output; a norm of two entries keeps only signs
    st.integers(1, 3),  # heads, or groups
    st.integers(0, len(ACTIVATIONS) - 1),
    st.booleans(),
)


def network(first: int, plan: list[tuple], seed: int) -> nn.Sequential:
    """Return a network in float64, without zeros and ones as parameters."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(INPUTS, first)]
    for kind, to, groups, act, residual in plan:
        to = first if residual else to
        layers.append(Block(kind, first, to, groups, act, residual))
        first = to
    net = nn.Sequential(*layers, nn.Linear(first, OUTPUTS)).double()
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return net


def output(net: nn.Module, parameters: list[Tensor], x: Tensor) -> Tensor:
    names = [name for name, _ in net.named_parameters()]
    return functional_call(net, dict(zip(names, parameters, strict=True)), (x,))


def stepped(net: nn.Module, parameters: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the parameters after some steps."""
    net = copy.deepcopy(net)
    for p, value in zip(net.parameters(), parameters, strict=True):
        p.data.copy_(value)
    optimizer = NGOptimizer(net.parameters(), checkpoint=CONTROLLER, model=net)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        drop_rounding(net.parameters())
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@settings(max_examples=12, deadline=None)
@given(st.integers(3, 5), st.lists(blocks, min_size=1, max_size=3), st.integers(0, 2**16))
def test_symmetries_of_a_random_network(first, plan, seed):
    net = network(first, plan, seed)
    x, y = torch.randn(6, TOKENS, INPUTS).double(), torch.randn(6, TOKENS, OUTPUTS).double()
    spec = spec_of_computation(net, (x,))
    assert spec.loose == ()
    before = [p.detach().clone() for p in net.parameters()]
    symmetry = random_symmetry(spec, seed)
    after = moved(spec, before, symmetry)
    expected = output(net, before, x)
    torch.testing.assert_close(output(net, after, x), expected, rtol=0, atol=1e-9)

    stepped_before = stepped(net, before, x, y)
    there, here = stepped(net, after, x, y), moved(spec, stepped_before, symmetry)
    for a, b in zip(there, here, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()

    # Rows of neurons are permuted, but not their readers: not a symmetry.
    half = [before[0].roll(1, 0), before[1].roll(1, 0), *before[2:]]
    assert (output(net, half, x) - expected).abs().max() > 1e-6
    stepped_half = stepped(net, half, x, y)
    moved_half = [*(p.roll(1, 0) for p in stepped_before[:2]), *stepped_before[2:]]
    assert max((a - b).abs().max() for a, b in zip(stepped_half, moved_half, strict=True)) > 1e-6
