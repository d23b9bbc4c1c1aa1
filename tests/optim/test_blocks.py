"""Blocks: every scalar in one, rows that are the neurons written, and back again."""

import pytest
import torch
from support.networks import NETWORKS
from torch import Tensor, nn

from l2o_graph.layout.spec import NetSpec
from l2o_graph.optim.blocks import Block, blocks_of
from l2o_graph.tracing import spec_of_computation
from l2o_graph.tracing.by_order import spec_of_module, spec_of_parameters


class Over(nn.Module):
    """A layer between two linear maps."""

    def __init__(self, first: nn.Module, middle: nn.Module, last: nn.Module):
        super().__init__()
        self.first, self.middle, self.last = first, middle, last

    def forward(self, x: Tensor) -> Tensor:
        found = self.middle(self.first(x).tanh())
        return self.last((found[0] if isinstance(found, tuple) else found).tanh())


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.word, self.mix = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.word(x)
        return self.last(x + self.mix(x, x, x, need_weights=False)[0])


def between_convolutions(middle: nn.Module) -> Over:
    return Over(nn.Conv2d(2, 6, 1), middle, nn.Conv2d(middle.out_channels, 3, 1))


IMAGE = torch.zeros(1, 2, 7, 7)
OWN = {
    "mlp": (Over(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2)), torch.zeros(1, 4)),
    "conv": (between_convolutions(nn.Conv2d(6, 4, (3, 2))), IMAGE),
    "grouped": (between_convolutions(nn.Conv2d(6, 4, 3, groups=2)), IMAGE),
    "depthwise": (between_convolutions(nn.Conv2d(6, 6, 3, groups=6)), IMAGE),
    "transposed": (between_convolutions(nn.ConvTranspose2d(6, 4, (3, 2))), IMAGE),
    "transposed, grouped": (between_convolutions(nn.ConvTranspose2d(6, 4, 3, groups=2)), IMAGE),
    "lstm": (
        Over(nn.Linear(4, 5), nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 2)),
        torch.zeros(1, 3, 4),
    ),
    "attention": (Attending(), torch.zeros(1, 3, dtype=torch.long)),
}
SPECS = {name: spec_of_computation(net, (x,)) for name, (net, x) in OWN.items()}


def spec_of(name: str) -> NetSpec:
    if name in SPECS:
        return SPECS[name]
    case = NETWORKS[name]
    return spec_of_computation(case.make(), (case.batch()[0],))


def of_parameter(spec: NetSpec, name: str) -> list[Block]:
    index = spec.names.index(name)
    return [block for block in blocks_of(spec) if block.parameter == index]


def scalars(spec: NetSpec, index: int, sets: int = 2) -> Tensor:
    """Numbers that are all different, one set after the other."""
    size = torch.Size(spec.shapes[index]).numel()
    return torch.arange(sets * size, dtype=torch.float64).view(sets, size)


# Every scalar, there and back -------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OWN, *NETWORKS])
def test_every_scalar_is_in_one_block(name):
    spec = spec_of(name)
    for i, shape in enumerate(spec.shapes):
        seen = [0] * torch.Size(shape).numel()
        for block in blocks_of(spec):
            if block.parameter == i:
                for at in range(block.start, block.start + block.size):
                    seen[at] += 1
        assert set(seen) <= {1}


@pytest.mark.parametrize("name", [*OWN, *NETWORKS])
def test_put_is_the_inverse_of_take(name):
    spec = spec_of(name)
    for block in blocks_of(spec):
        whole = scalars(spec, block.parameter)
        matrices = block.take(whole)
        assert matrices.shape == (2, *block.matrix)
        own = whole[:, block.start : block.start + block.size]
        assert torch.equal(block.put(matrices), own)
        assert torch.equal(block.take(whole[0]), matrices[0])
        again = torch.zeros_like(whole)
        again[:, block.start : block.start + block.size] = block.put(matrices)
        assert torch.equal(block.take(again), matrices)


@pytest.mark.parametrize("name", [*OWN, *NETWORKS])
def test_ends_are_neurons_of_the_network(name):
    spec = spec_of(name)
    for block in blocks_of(spec):
        groups, rows, columns = block.matrix
        assert (block.target is None) == (block.source is None)
        if block.target is not None:
            written, start = block.target
            assert start + groups * rows <= spec.neurons[written].size
            read, start = block.source
            assert start + groups * columns // block.stored[3] <= spec.neurons[read].size


# What rows and columns are ----------------------------------------------------------------------


def matrices_of(name: str, parameter: str = "middle.weight") -> tuple[Tensor, Tensor, list[Block]]:
    """A parameter, in its own shape and as matrices, block by block."""
    spec = SPECS[name]
    index = spec.names.index(parameter)
    blocks = of_parameter(spec, parameter)
    flat = scalars(spec, index, sets=1)[0]
    return flat.view(spec.shapes[index]), blocks[0].take(flat), blocks


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_rows_of_a_kernel_are_what_it_writes(name):
    weight, matrices, (block,) = matrices_of(name)
    assert torch.equal(matrices, weight.flatten(1)[None])
    assert block.kind == "hidden"


def test_a_group_is_a_matrix():
    weight, matrices, (block,) = matrices_of("grouped")
    assert matrices.shape == (2, 2, 27) and block.kind == "hidden"
    for group in range(2):
        for row in range(2):
            assert torch.equal(matrices[group, row], weight[2 * group + row].flatten())


def test_rows_of_a_transposed_convolution_are_what_it_writes_all_the_same():
    weight, matrices, _ = matrices_of("transposed")
    assert matrices.shape == (1, 4, 6 * 6)
    for out in range(4):
        assert torch.equal(matrices[0, out], weight[:, out].flatten())


def test_so_are_those_of_each_group():
    weight, matrices, _ = matrices_of("transposed, grouped")
    assert matrices.shape == (2, 2, 3 * 9)
    for group in range(2):
        for out in range(2):
            read = weight[3 * group : 3 * group + 3, out]
            assert torch.equal(matrices[group, out], read.flatten())


def test_of_a_depthwise_kernel_each_neuron_has_a_row_and_none_are_mixed():
    weight, matrices, (block,) = matrices_of("depthwise")
    assert block.kind == "diagonal"
    assert torch.equal(matrices, weight.flatten(1)[None])


@pytest.mark.parametrize(
    "parameter, columns", [("middle.weight_ih_l0", 5), ("middle.weight_hh_l0", 6)]
)
def test_gates_are_matrices_of_their_own(parameter, columns):
    blocks = of_parameter(SPECS["lstm"], parameter)
    assert [block.start for block in blocks] == [6 * columns * gate for gate in range(4)]
    assert all(block.matrix == (1, 6, columns) for block in blocks)


def test_so_are_queries_keys_and_values():
    blocks = of_parameter(SPECS["attention"], "mix.in_proj_weight")
    assert [block.start for block in blocks] == [0, 64, 128]
    assert all(block.matrix == (1, 8, 8) and block.kind == "hidden" for block in blocks)


def test_tables_and_vectors_are_one_row():
    (table,) = of_parameter(SPECS["attention"], "word.weight")
    assert (table.kind, table.matrix, table.target) == ("table", (1, 1, 72), None)
    (bias,) = of_parameter(SPECS["mlp"], "middle.bias")
    assert (bias.kind, bias.matrix, bias.target) == ("vector", (1, 1, 6), None)


def test_first_and_last_kernels_are_known():
    kinds = {
        spec.names[block.parameter]: block.kind
        for spec in [SPECS["mlp"]]
        for block in blocks_of(spec)
    }
    assert kinds == {
        "first.weight": "first", "first.bias": "vector", "middle.weight": "hidden",
        "middle.bias": "vector", "last.weight": "last", "last.bias": "vector",
    }  # fmt: skip


def test_what_fits_nowhere_has_torchs_rows_and_no_neurons():
    spec = spec_of_module(nn.Bilinear(5, 4, 6))
    block, bias = blocks_of(spec)
    assert spec.loose == (0, 1)
    assert block.matrix == (1, 6, 20) and block.kind == "hidden"
    assert block.target is None and bias.kind == "vector"


def test_parameters_without_scalars_have_no_block():
    spec = spec_of_parameters([torch.zeros(4, 3), torch.zeros(0, 4)])
    assert {block.parameter for block in blocks_of(spec)} == {0}
