import pytest
import torch
from support.rules import paper_cnn
from torch import nn
from torch.func import stack_module_state

from l2o_graph.layout.spec import NetSpec
from l2o_graph.tracing.by_order import spec_of_module, spec_of_parameters


def by_parameters(network: nn.Module) -> NetSpec:
    return spec_of_parameters(network.parameters())


def by_names(network: nn.Module) -> NetSpec:
    names, parameters = zip(*network.named_parameters(), strict=True)
    return spec_of_parameters(parameters, names)


def joins(spec: NetSpec) -> tuple:
    """Return a specification without its names."""
    sets = [(n.size, n.role, n.depth) for n in spec.neurons]
    return spec.shapes, sets, spec.kernels, spec.biases, spec.loose


READERS = [spec_of_module, by_parameters, by_names]

NETWORKS = {
    "linear": nn.Sequential(nn.Linear(4, 3)),
    "mlp": nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)),
    "without biases": nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 2, bias=False)),
    "some biases": nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 2)),
    "pooled": paper_cnn(1, 4),
    "flattened": nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10)),
    "flattened, not square": nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 6, 10)),
    "norm behind a bias": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
    "norm": nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False)
    ),
    "1d": nn.Sequential(nn.Conv1d(2, 3, 5), nn.Flatten(), nn.Linear(3 * 7, 2)),
    "3d": nn.Sequential(nn.Conv3d(1, 2, 3), nn.Conv3d(2, 4, (1, 3, 3))),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_module_parameters_and_names_agree(name):
    network = NETWORKS[name]
    expected = joins(spec_of_module(network))
    assert joins(by_parameters(network)) == expected
    assert joins(by_names(network)) == expected


@pytest.mark.parametrize("read", READERS)
def test_mlp_is_a_chain_of_sets(read):
    spec = read(NETWORKS["mlp"])
    assert [(n.size, n.role, n.depth) for n in spec.neurons] == [
        (4, "input", 0),
        (5, "hidden", 0),
        (5, "hidden", 1),
        (2, "output", 0),
    ]
    assert [(k.parameter, k.source, k.target) for k in spec.kernels] == [
        (0, 0, 1),
        (2, 1, 2),
        (4, 2, 3),
    ]
    assert [(b.parameter, b.neurons) for b in spec.biases] == [(1, 1), (3, 2), (5, 3)]
    assert spec.loose == ()
    assert (spec.num_nodes, spec.num_edges, spec.num_parameters) == (16, 55, 67)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("inputs, hidden, counts", [(1, 16, (91, 14_378)), (3, 32, (173, 56_970))])
def test_sizes_of_the_paper_networks(read, inputs, hidden, counts):
    spec = read(paper_cnn(inputs, hidden))
    assert (spec.num_nodes, spec.num_parameters) == counts


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name, gamma", [("norm", 1), ("norm behind a bias", 2)])
def test_a_norm_is_a_diagonal_to_neurons_of_its_own(read, name, gamma):
    spec = read(NETWORKS[name])
    assert spec.loose == ()
    assert [n.size for n in spec.neurons] == [3, 4, 4, 2]
    assert [n.depth for n in spec.neurons] == [0, 0, 0, 0]
    scale = spec.kernels[1]
    assert (scale.parameter, scale.source, scale.target) == (gamma, 1, 2)
    assert scale.grid == (4, 1, 1)
    assert (gamma + 1, 2) in [(b.parameter, b.neurons) for b in spec.biases]


@pytest.mark.parametrize("read", READERS)
def test_a_flattened_map_is_a_kernel_with_a_position_for_each_pixel(read):
    assert read(NETWORKS["flattened"]).kernels[1].positions == (6, 6)
    assert read(NETWORKS["flattened, not square"]).kernels[1].positions == (6,)
    assert read(NETWORKS["flattened"]).neurons[1].size == 4


@pytest.mark.parametrize("read", READERS)
def test_a_kernel_that_does_not_fit_starts_a_hidden_set(read):
    # An operation without parameters, such as a concatenation, turned 5 neurons into 7.
    spec = read(nn.ModuleDict({"a": nn.Linear(4, 5), "b": nn.Linear(7, 2)}))
    assert [(n.size, n.role) for n in spec.neurons] == [
        (4, "input"),
        (5, "hidden"),
        (7, "hidden"),
        (2, "output"),
    ]
    assert [(k.source, k.target) for k in spec.kernels] == [(0, 1), (2, 3)]
    assert [b.neurons for b in spec.biases] == [1, 3]


def test_a_multiple_of_a_linear_layer_is_not_a_flattened_map():
    spec = spec_of_module(nn.ModuleList([nn.Linear(4, 5), nn.Linear(10, 2)]))
    assert [k.positions for k in spec.kernels] == [(), ()]
    assert len(spec.neurons) == 4


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.PReLU(4),
        nn.Embedding(9, 4),
        nn.Bilinear(4, 4, 4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_is_no_kernel_is_loose_in_a_module(layer):
    spec = spec_of_module(nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 2, 1)))
    behind = 2 + len(list(layer.parameters()))
    assert spec.loose == tuple(range(2, behind))
    assert [k.parameter for k in spec.kernels] == [0, behind]
    assert [n.size for n in spec.neurons] == [3, 4, 2]


def test_tied_weights_are_one_parameter():
    shared = nn.Linear(3, 3)
    spec = spec_of_module(nn.Sequential(shared, shared))
    assert len(spec.kernels) == len(spec.biases) == 1


@pytest.mark.parametrize("read", READERS)
def test_a_single_number_is_loose(read):
    network = nn.Linear(3, 2)
    network.temperature = nn.Parameter(torch.tensor(1.0))
    spec = read(network)
    # A module's own parameters are in the order of registration.
    assert (spec.shapes[2], spec.loose, spec.num_parameters) == ((), (2,), 9)


def test_without_names_an_odd_run_of_vectors_starts_with_the_bias():
    kernel, vector = torch.zeros(4, 3), torch.zeros(4)
    biases = {1: (0,), 2: (1,), 3: (0, 2), 4: (1, 3), 5: (0, 2, 4)}  # the others are scales
    for length, expected in biases.items():
        spec = spec_of_parameters([kernel, *[vector] * length])
        assert tuple(b.parameter - 1 for b in spec.biases) == expected
        assert len(spec.kernels) == 1 + length - len(expected)
        assert spec.loose == ()


def test_a_vector_of_another_length_or_before_any_kernel_is_loose():
    kernel, other, fitting = torch.zeros(4, 3), torch.zeros(5), torch.zeros(4)
    assert spec_of_parameters([kernel, other]).loose == (1,)
    assert spec_of_parameters([fitting, kernel]).loose == (0,)
    assert spec_of_parameters([kernel, other], ["a.weight", "a.bias"]).loose == (1,)
    assert spec_of_parameters([kernel, fitting], ["a.weight", "b.scale"]).loose == (1,)


def test_no_parameters_are_refused():
    with pytest.raises(ValueError, match="expected at least one parameter, found an empty list"):
        spec_of_parameters([])


def test_equal_networks_have_equal_hashable_specs():
    assert hash(spec_of_module(paper_cnn(1, 4))) == hash(spec_of_module(paper_cnn(1, 4)))
    assert spec_of_module(paper_cnn(1, 4)) != spec_of_module(paper_cnn(1, 5))


def test_printing_says_what_was_understood():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10, bias=False)
    )
    network.temperature = nn.Parameter(torch.tensor(1.0))
    assert str(spec_of_module(network)) == "\n".join(
        [
            "19 neurons, 48 edges, 1489 parameters",
            "  temperature []: loose: updated without the graph",
            "  0.weight [4, 1, 3, 3]: input [1] -> 0 [4], 3x3 positions",
            "  0.bias [4]: bias of 0",
            "  1.weight [4]: 0 [4] -> 1 [4], one by one (norm)",
            "  1.bias [4]: bias of 1",
            "  3.weight [10, 144]: 1 [4] -> output [10], 6x6 positions",
        ]
    )


def test_named_biases_find_their_kernels_in_groups_of_another_order():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    named = list(net.named_parameters())
    kernels_first = [n for n in named if n[1].dim() > 1] + [n for n in named if n[1].dim() == 1]
    spec = spec_of_parameters([p for _, p in kernels_first], [name for name, _ in kernels_first])
    found = {spec.names[b.parameter]: spec.neurons[b.neurons].name for b in spec.biases}
    assert found == {"0.bias": "0", "2.bias": "2", "4.bias": "output"}
    assert spec.loose == ()


def test_stacked_members_are_networks_side_by_side():
    members = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)) for _ in range(5)]
    stacked, _ = stack_module_state(members)
    one, spec = spec_of_parameters(members[0].parameters()), spec_of_parameters(stacked.values())
    assert [n.size for n in spec.neurons] == [5 * n.size for n in one.neurons]
    assert [k.grid for k in spec.kernels] == [(5, 6, 4), (5, 3, 6)]
    assert spec.loose == () and [n.role for n in spec.neurons] == ["input", "hidden", "output"]
    on_first = [(b.start, b.neurons_start, b.size) for b in spec.biases if b.parameter == 1]
    assert on_first == [(6 * i, 6 * i, 6) for i in range(5)]


def test_a_convolution_before_a_matrix_is_no_ensemble():
    shapes = [(5, 8, 4), (5,), (3, 5), (3,)]
    spec = spec_of_parameters([torch.zeros(shape) for shape in shapes])
    assert spec.kernels[0].grid == (1, 5, 8) and spec.kernels[0].positions == (4,)
