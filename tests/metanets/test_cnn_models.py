"""GeneralizationPredictor: published sizes, slow twins, symmetry, what it has not seen, files."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from support import one_by_one
from support.graphs import assert_same_with_gradients, route_of
from support.one_by_one import cnns, graph_of
from support.slow_ng_t import noisy
from torch import Tensor, nn

from l2o_graph import GeneralizationPredictor, predict_accuracy
from l2o_graph.cnn import (
    CNNArchitecture,
    CNNModelConfig,
    chosen,
    cnn_config,
    cnn_module,
    list_cnn_models,
)
from l2o_graph.cnn import save_cnn_model as save_model
from l2o_graph.datasets.cnn.files import unflattened
from l2o_graph.datasets.cnn.park import draw_architecture
from l2o_graph.datasets.cnn.small import ARCHITECTURE
from l2o_graph.layout.blocks import topology_of
from l2o_graph.layout.segments import KernelTable, directed_edges
from l2o_graph.layout.tables import ArchitectureTables, Capacity, layout_of
from l2o_graph.metanets.cnn_body import layouts_of
from l2o_graph.metanets.descriptors import out_of_range, ranges_of
from l2o_graph.metanets.predictor import FORMAT
from l2o_graph.metanets.structure import structure_of, structure_of_module
from l2o_graph.models.ng_gnn import pna
from l2o_graph.models.ng_t import NGT
from l2o_graph.models.stat_nn import layer_statistics
from l2o_graph.storage.files import parse

MODELS = {
    "ng_gnn": {"model": "ng_gnn", "hidden": 8, "layers": 3},
    "ng_gnn, both ways": {"model": "ng_gnn", "hidden": 8, "layers": 3, "reverse": True},
    "ng_t": {"model": "ng_t", "hidden": 8, "layers": 3, "heads": 2},
    "ordered": {"model": "ordered", "hidden": 8},  # against its twin in test_cnn_ordered.py
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def architecture(channels, kernels, activations, skips, classes=3) -> CNNArchitecture:
    depth = len(channels) - 1
    return CNNArchitecture(
        tuple(channels), tuple(kernels), tuple(activations), tuple(skips), (1,) * depth, classes
    )


# Of several depths and widths, skips into fewer and into more channels, from the image too.
MIXED = [
    architecture((2, 4), (3,), ("relu",), (-1,)),
    architecture((2, 3, 5, 2), (5, 1, 3), ("tanh", "", "gelu"), (-1, 0, 1)),
    architecture((1, 4, 2, 4, 3), (3, 3, 1, 5), ("silu", "sigmoid", "", "relu"), (-1, -1, 1, 0)),
    architecture((2, 3, 5, 2), (5, 1, 3), ("tanh", "", "gelu"), (-1, -1, -1)),
]


def made(name: str, **changes) -> GeneralizationPredictor:
    """A small float64 model without dropout, with noise on every weight."""
    room = {"inputs": 2, "depth": 4, "classes": 3, "max_kernel": 5, "dropout": 0.0}
    torch.manual_seed(1)
    return noisy(GeneralizationPredictor(cnn_config(**{**room, **MODELS[name], **changes})))


def mixed(seed: int = 0, dtype=torch.float64):
    """Networks of all of these, two of them equal."""
    networks = cnns([*MIXED, MIXED[1]], seed, dtype)
    return replace(networks, values=(*networks.values[:4], networks.values[1]))


# Sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "zoo", "count"),
    [
        ("ng_gnn", "park", 369_025),
        ("ng_gnn", "small", 5_587_969),
        ("ng_t", "park", 92_705),
        ("ng_t", "small", 1_807_873),
        ("stat_nn", "park", 1_087_001),
        ("stat_nn", "small", 1_087_001),
    ],
)
def test_models_have_the_parameters_of_the_published_ones(model, zoo, count):
    with torch.device("meta"):
        found = GeneralizationPredictor(cnn_config(model, zoo))
    assert sum(p.numel() for p in found.parameters()) == count


def test_ng_gnn_amplifies_by_the_mean_degree_of_what_it_is_made_for():
    deltas = {z: cnn_config("ng_gnn", z).delta for z in ("park", "small")}
    assert deltas == {"park": 2.1321, "small": 2.2048}  # the published ones
    topology = topology_of(structure_of(ARCHITECTURE))
    for reverse in (False, True):
        degree = route_of(topology, both=reverse).all.arrivals.degree
        mean = (degree + 1).log().mean().item()
        assert cnn_config("ng_gnn", "small", reverse=reverse).delta == pytest.approx(mean, abs=1e-3)


# Slow twins -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reverse": True, "linear_as_conv": False, "fourier": 1.0},
        {"linear_as_conv": False, "activations": False, "fourier": 0.0},
        {"layers": 1, "depth": 2},
        {"scaled": True},
    ],
    ids=["as it is", "reverse", "bare", "one layer", "scaled"],
)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "ordered"])
def test_mixed_batches_equal_neural_graphs_kernel_by_kernel(name, changes):
    model, networks = made(name, **changes), mixed()
    found = model.logits(networks)
    graphs = [graph_of(networks, i) for i in range(len(networks))]
    expected = one_by_one.logits(model, graphs)
    used = [p for n, p in model.named_parameters() if changes.get("layers") != 1 or "table" in n]
    assert_same_with_gradients([found], [expected], used)
    torch.testing.assert_close(found[1], found[4], rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [0, 12])
def test_ng_t_on_networks_too_large_for_all_pairs(side):
    model, networks = made("ng_t"), mixed()
    model.body.backbone.most_pairs = side**2
    sizes = [structure_of(a).num_nodes for a in networks.architectures]
    assert side == 0 or min(sizes) <= side < max(sizes)
    found = model.logits(networks)
    expected = one_by_one.logits(model, [graph_of(networks, i) for i in range(len(networks))])
    assert_same_with_gradients([found], [expected], list(model.parameters()))


def test_ng_t_with_scores_of_any_size_is_finite():
    model = made("ng_t")
    for layer in model.body.backbone.layers:
        layer.node.of_node.weight.data *= 1e3  # scores in the millions
    found = model.logits(mixed())
    found.sum().backward()
    assert found.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"axial": True}], ids=["released", "axial"])
def test_ng_t_of_other_kinds_in_mixed_batches(options):
    model, networks = made("ng_t"), mixed()
    model.body.backbone = noisy(NGT(8, 3, 2, edge=4, last_edges=False, **options))
    found = model.logits(networks)
    expected = one_by_one.logits(model, [graph_of(networks, i) for i in range(len(networks))])
    assert_same_with_gradients([found], [expected], list(model.body.backbone.parameters()))


def test_fan_in_counts_what_leads_to_one_neuron():
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, (1, 3), groups=2), nn.ReLU(),
        nn.ConvTranspose2d(6, 3, 2), nn.Flatten(), nn.Linear(3 * 5 * 3, 2),
    )  # fmt: skip
    room = Capacity(kernel=15, inputs=2, depth=4, classes=2)
    spec = structure_of_module(module, torch.zeros(1, 2, 6, 6))
    batch = ArchitectureTables([layout_of(spec, room)], room).batch(
        torch.zeros(1, dtype=torch.long), False
    )
    counts = [(2 * 9, 2 * 4 * 9), (2 * 3, 6 * 2 * 3), (6 * 4, 6 * 3 * 4), (3 * 15, 2 * 3 * 15)]
    assert batch.fan_in.tolist() == [fan_in for fan_in, scalars in counts for _ in range(scalars)]
    ones = torch.ones(spec.num_parameters)
    found = [batch.kernels(ones, scaled).square().sum().item() for scaled in (False, True)]
    assert found == pytest.approx(
        [sum(n for _, n in counts), sum(f * n for f, n in counts)], rel=1e-5
    )


def test_weights_show_beside_positions_from_the_first_step_on():
    """Deviations of first states over edges, of which positions have 1."""
    torch.manual_seed(0)
    networks, deviations = cnns([ARCHITECTURE] * 4), {}
    for scaled in (False, True):
        body = GeneralizationPredictor(
            cnn_config("ng_gnn", "small", fourier=0.0, hidden=32, scaled=scaled)
        ).body
        batch = body.batch(layouts_of(networks.architectures, body.room), networks.which)
        kernels = batch.kernels(torch.cat(list(networks.values)), scaled)
        deviations[scaled] = body.edges(batch, kernels).std(0).mean().item()
    assert deviations[True] > 0.5 > 0.3 > deviations[False]


@st.composite
def kernels(draw):
    """Some kernels between nodes of which some have no edge."""
    count = draw(st.integers(1, 4))
    size = st.integers(1, 3)
    columns = {
        "groups": [draw(size) for _ in range(count)],
        "rows": [draw(size) for _ in range(count)],
        "columns": [draw(size) for _ in range(count)],
        "from_rows": [draw(st.booleans()) for _ in range(count)],
    }
    # Kernel i leads from nodes 20 i and on to nodes of the next tens, which others lead to, too.
    at = [20 * i for i in range(count)], [10 + 20 * draw(st.integers(0, 1)) for _ in range(count)]
    return columns, at


@settings(max_examples=25)
@given(kernels(), st.booleans(), st.sets(st.integers(0, 7)))
def test_segments_equal_a_loop_over_edges(drawn, both, tens):
    columns, (row, column) = drawn
    nodes = 100
    # What is read are sets of neurons: a kernel leads to all of one or to none.
    read = torch.isin(torch.arange(nodes) // 10, torch.tensor(sorted(tens), dtype=torch.long))
    grids = KernelTable(
        *(torch.tensor(columns[key]) for key in ("groups", "rows", "columns")),
        torch.tensor(row), torch.tensor(column), torch.tensor(columns["from_rows"]),
    )  # fmt: skip
    pairs = []
    for i, (groups, rows, cols) in enumerate(
        zip(columns["groups"], columns["rows"], columns["columns"], strict=True)
    ):
        for g in range(groups):
            for r in range(rows):
                for c in range(cols):
                    ends = row[i] + g * rows + r, column[i] + g * cols + c
                    pairs.append(ends if columns["from_rows"][i] else ends[::-1])
    found = directed_edges(grids, torch.tensor([nodes]), read, both)
    assert len(found.edge) == len(pairs) * (2 if both else 1)
    torch.manual_seed(0)
    messages = torch.randn(len(found.edge), 2, dtype=torch.float64, requires_grad=True)
    into: list[list[Tensor]] = [[] for _ in range(nodes)]
    for place, edge in enumerate(found.edge.tolist()):
        against = both and place < len(pairs)
        source, target = pairs[edge][:: -1 if against else 1]
        assert found.all.source[place] == source
        if both:
            assert found.edge[found.partner[place]] == edge and found.partner[place] != place
        into[target].append(messages[place])
    every = pna(found.all.arrivals, *found.all.tallied([messages]))
    gathered = [torch.stack(m or [torch.zeros(2, dtype=torch.float64)]) for m in into]
    deviations = [m.var(0, correction=0).clamp(min=1e-5).sqrt() for m in gathered]
    expected = torch.cat(
        [
            torch.stack([m.mean(0) for m in gathered]),
            torch.stack([m.amin(0) for m in gathered]),
            torch.stack([m.amax(0) for m in gathered]),
            torch.stack([d * (d > 1.0001e-5**0.5) for d in deviations]),
        ],
        dim=1,
    )
    assert_same_with_gradients([every], [expected], [messages])
    last = pna(found.last.arrivals, *found.last.tallied(found.kept([messages])))
    assert torch.equal(found.last.nodes, read.nonzero().flatten())
    torch.testing.assert_close(last, expected[read])


def test_equal_messages_share_the_gradient_of_an_extreme():
    one = torch.ones(1, dtype=torch.long)
    grids = KernelTable(one, one, 3 * one, 0 * one, one, one < 0)
    read = torch.tensor([True, False, False, False])
    found = directed_edges(grids, torch.tensor([4]), read, both=True)
    messages = torch.tensor([[1.0], [2.0], [1.0]], requires_grad=True)
    _, low, _ = found.last.tallied([messages])
    low.sum().backward()
    assert messages.grad is not None
    assert messages.grad.flatten().tolist() == [0.5, 0, 0.5]


def test_the_measurement_of_throughput_runs(capsys):
    one_by_one.main(["--hidden", "4", "--count", "2", "--batch", "2", "--rounds", "1"])
    assert "as a NeuralGraph" in capsys.readouterr().out


# Structure --------------------------------------------------------------------------------------


def test_a_skip_into_more_channels_is_an_edge_to_each_of_the_first():
    spec = structure_of(MIXED[1])
    assert [n.size for n in spec.neurons] == [2, 3, 5, 2, 3]
    skips = [(k.source, k.target, k.grid) for k in spec.kernels if spec.is_constant(k.parameter)]
    assert skips == [(0, 2, (2, 1, 1)), (1, 3, (2, 1, 1))]
    assert [n.activation for n in spec.neurons[1:4]] == ["tanh", "", "gelu"]


@pytest.mark.parametrize("what", ["skips", "activations"])
@EVERY_MODEL
def test_architecture_is_seen_beside_weights(name, what):
    model = made(name)
    own, other = MIXED[1], replace(
        MIXED[1], **{"skips": (-1, -1, -1)} if what == "skips" else {"activations": ("relu",) * 3}
    )  # fmt: skip
    values = cnns([own], dtype=torch.float64).values[0]
    pair = replace(cnns([own, other], dtype=torch.float64), values=(values, values))
    first, second = model(pair)
    assert (first - second).abs() > 1e-6
    if what == "activations":
        blind = made(name, activations=False)
        first, second = blind(pair)
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


# Symmetry ---------------------------------------------------------------------------------------


def permuted(values: Tensor, a: CNNArchitecture, orders: list[Tensor]) -> Tensor:
    """A network with the neurons of every layer, image and classes among them, in another order."""
    tensors, moved = unflattened(values, a), []
    for i in range(0, len(tensors), 2):
        of, to = orders[i // 2], orders[i // 2 + 1]
        moved += [tensors[i][to][:, of], tensors[i + 1][to]]
    return torch.cat([t.flatten() for t in moved])


def in_order(a: CNNArchitecture) -> list[Tensor]:
    return [torch.arange(size) for size in (*a.channels, a.classes)]


@EVERY_MODEL
@settings(max_examples=10)
@given(st.sampled_from(MIXED), st.data())
def test_the_order_of_hidden_neurons_means_nothing(name, a, data):
    """Layers that a skip joins keep the order of the channels that it adds."""
    model, orders = made(name), in_order(a)
    joined = {i + 1 for i, skip in enumerate(a.skips) if skip >= 0} | set(a.skips)
    for layer in range(1, len(a.channels)):
        fixed = max((min(a.channels[layer], a.channels[other]) for other in joined), default=0)
        fixed = fixed if layer in joined else 0
        rest = data.draw(st.permutations(range(fixed, a.channels[layer])))
        orders[layer] = torch.tensor([*range(fixed), *rest])
    networks = cnns([a], dtype=torch.float64)
    moved = replace(networks, values=(permuted(networks.values[0], a, orders),))
    torch.testing.assert_close(model(moved), model(networks), rtol=0, atol=1e-9)


@EVERY_MODEL
def test_neurons_of_layers_that_a_skip_joins_move_together(name):
    a = architecture((2, 4, 3, 4), (3, 3, 3), ("relu", "tanh", "gelu"), (-1, -1, 1))
    model, networks, orders = made(name), cnns([a], dtype=torch.float64), in_order(a)
    orders[1] = torch.tensor([2, 0, 3, 1])
    alone = replace(networks, values=(permuted(networks.values[0], a, orders),))
    orders[3] = orders[1]
    together = replace(networks, values=(permuted(networks.values[0], a, orders),))
    torch.testing.assert_close(model(together), model(networks), rtol=0, atol=1e-9)
    assert (model(alone) - model(networks)).abs() > 1e-6


@pytest.mark.parametrize("layer", [0, -1], ids=["inputs", "outputs"])
@EVERY_MODEL
def test_the_order_of_inputs_and_outputs_means_something(name, layer):
    a = MIXED[0]
    model, networks, orders = made(name), cnns([a], dtype=torch.float64), in_order(a)
    orders[layer] = orders[layer].flip(0)
    moved = replace(networks, values=(permuted(networks.values[0], a, orders),))
    assert (model(moved) - model(networks)).abs() > 1e-4


@EVERY_MODEL
def test_moving_one_side_of_a_layer_is_no_symmetry(name):
    a = MIXED[3]
    model, networks = made(name), cnns([a], dtype=torch.float64)
    tensors = unflattened(networks.values[0], a)
    tensors[0] = tensors[0][[1, 2, 0]]  # the filters without their biases and what reads them
    moved = replace(networks, values=(torch.cat([t.flatten() for t in tensors]),))
    assert (model(moved) - model(networks)).abs() > 1e-6


@EVERY_MODEL
def test_a_prediction_does_not_depend_on_the_batch(name):
    model = made(name).float()
    wide = architecture((2, 12, 12, 12), (5, 5, 5), ("relu",) * 3, (-1, 0, 1))
    own = cnns([MIXED[2]], seed=9)
    others = cnns([wide, *MIXED])
    others = replace(others, values=tuple(3 * row for row in others.values))
    for place in (0, 2, 5):
        batch = cnns([*[wide, *MIXED][:place], MIXED[2], *[wide, *MIXED][place:]])
        values = (*others.values[:place], own.values[0], *others.values[place:])
        found = model(replace(batch, values=values))[place]
        torch.testing.assert_close(found, model(own)[0], rtol=0, atol=1e-6)


# Training, baselines ----------------------------------------------------------------------------


@EVERY_MODEL
def test_gradient_reaches_every_weight(name):
    model = made(name, linear_as_conv=False)
    answer = model.logits(mixed())
    (torch.randn_like(answer) * answer).sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-9, key


def test_dropout_is_for_training_alone():
    model, networks = made("ng_t", dropout=0.3), mixed()
    assert not torch.equal(model(networks), model(networks))
    model.eval()
    assert torch.equal(model(networks), model(networks))


def test_stat_nn_reads_networks_of_any_depth():
    torch.manual_seed(0)
    model = GeneralizationPredictor(cnn_config("stat_nn", hidden=8)).double()
    networks = mixed()
    for i, found in enumerate(model.logits(networks)):
        tensors = [t[None] for t in networks.parameters(i)]
        row = layer_statistics(tensors[::2], tensors[1::2], 6)
        torch.testing.assert_close(found, model.body.net.head(row)[0, 0])


def test_nfn_reads_networks_of_its_architecture_alone():
    a = MIXED[3]
    config = cnn_config("nfn", "small", architecture=a, hidden=4, layers=2, dropout=0.0)
    torch.manual_seed(0)
    model = GeneralizationPredictor(config).double()
    networks, orders = cnns([a, a], dtype=torch.float64), in_order(a)
    orders[1], orders[2] = torch.tensor([1, 2, 0]), torch.tensor([4, 2, 0, 1, 3])
    moved = [permuted(row, a, orders) for row in networks.values]
    answer = model(networks)
    torch.testing.assert_close(model(replace(networks, values=tuple(moved))), answer)
    assert (answer[0] - answer[1]).abs() > 1e-6
    with pytest.raises(ValueError, match=r"NFN: expected only networks of the .*, found 4"):
        model(mixed())
    with pytest.raises(ValueError, match=r"only for 'nfn', which reads networks of a single"):
        cnn_config("nfn")


# What is refused --------------------------------------------------------------------------------


def test_what_there_is_no_room_for_is_refused():
    model = made("ng_gnn")
    large = architecture((2, 3), (7,), ("relu",), (-1,))
    expected = "parameter 'convolutions.0.weight': kernel 7x7 exceeds max_kernel 5x5"
    with pytest.raises(ValueError, match=expected):
        model(cnns([large], dtype=torch.float64))
    with pytest.raises(ValueError, match="expected 1 to 2 inputs, found 3"):
        model(cnns([architecture((3, 3), (3,), ("",), (-1,))], dtype=torch.float64))
    with pytest.raises(ValueError, match="expected 1 to 3 outputs, found 4"):
        model(cnns([architecture((2, 3), (3,), ("",), (-1,), 4)], dtype=torch.float64))
    with pytest.raises(ValueError, match="expected one network or more, found none"):
        model(chosen(mixed(), torch.arange(0)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_with_the_numbers_of_the_networks(value):
    networks = mixed()
    networks.values[1][3] = value
    networks.values[3][0] = -value
    with pytest.raises(ValueError, match="others in 3 of 5 networks: 1, 3, 4"):
        made("ng_gnn")(networks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth: expected at least 1, found 0"),
        ({"dropout": 1.0}, "dropout: expected at least 0, less than 1, found 1.0"),
        ({"fourier": -1.0}, "fourier: expected at least 0, found -1.0"),
        ({"model": "ng_t", "heads": 3}, "multiple of 3 heads in 64 channels .*, found 64"),
    ],
)
def test_configs_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CNNModelConfig(**{"model": "ng_gnn", **changes})


# Any module, and files --------------------------------------------------------------------------


class Residual(nn.Module):
    """Not a ``CNNArchitecture``: a norm, a stride, a pool, a skip past two convolutions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.second, self.third = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.norm(self.first(x)).relu(), 2)
        x = (x + self.third(nn.functional.softplus(self.second(x)))).relu()
        return self.last(x.mean((2, 3)))


@pytest.fixture
def path(tmp_path):
    """A checkpoint that has seen the mixed architectures."""
    model = made("ng_t").float()
    seen = {"seen": ranges_of(structure_of(a) for a in MIXED)}
    save_model(tmp_path / "deep" / "predictor.safetensors", model, seen)
    return tmp_path / "deep" / "predictor.safetensors"


def test_the_accuracy_of_a_module_is_that_of_its_weights(path):
    model = GeneralizationPredictor.from_checkpoint(path)
    torch.manual_seed(3)
    module = cnn_module(MIXED[1])
    row = torch.cat([p.detach().flatten() for p in module.parameters()])
    expected = model(replace(cnns([MIXED[1]]), values=(row,))).item()
    found = predict_accuracy(module, torch.zeros(1, 2, 9, 9), path)
    assert isinstance(found, float) and found == pytest.approx(expected, abs=1e-6)
    with torch.no_grad():
        module.linear.weight += 1
    assert predict_accuracy(module, torch.zeros(1, 2, 9, 9), path) != pytest.approx(found, abs=1e-6)


def test_a_network_in_training_is_read_through_a_batch_of_one_and_stays_in_training(path):
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4))
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), pool, nn.Linear(4, 3)).train()
    pool[1].eval()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.zeros(1, 2, 9, 9))
    with pytest.warns(UserWarning, match="operation norm"):
        assert 0 < predict_accuracy(module, torch.zeros(1, 2, 9, 9), path) < 1
    assert [part for part in module.modules() if not part.training] == [pool[1]]


@pytest.mark.parametrize(
    "options", [{"reverse": True}, {"activations": False}, {"fourier": 1.0}, {"scaled": True}]
)
def test_baselines_take_no_options_of_graphs(options):
    (name,) = options
    with pytest.raises(
        ValueError, match=f"{name}: expected model 'ng_gnn' or 'ng_t'.*, found 'stat"
    ):
        cnn_config("stat_nn", **options)


def test_kernels_are_padded_to_a_square_with_a_centre():
    with pytest.raises(ValueError, match=r"max_kernel: expected an odd number.*, found 4"):
        cnn_config("ng_gnn", max_kernel=4)


def test_a_module_of_any_kind_is_read_with_a_warning_of_what_is_new(path):
    module = Residual().train()
    before = [t.clone() for t in module.state_dict().values()]
    expected = r"'.*predictor.*' was trained on: activation softplus \(seen: .*\); operation norm"
    with pytest.warns(UserWarning, match=expected):
        found = predict_accuracy(module, torch.randn(2, 2, 16, 16), path)
    assert 0 < found < 1
    after = module.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_unfamiliar_networks_are_told_by_what_is_unlike():
    seen = ranges_of(structure_of(a) for a in MIXED)
    assert all(not out_of_range(structure_of(a), seen) for a in MIXED)
    assert seen["depth"] == [1, 4] and seen["kernel"] == [1, 5] and seen["inputs"] == [1, 2]
    deep = architecture((3, *[9] * 5), (7, *[3] * 4), ("leaky_relu",) * 5, (-1,) * 5, 2)
    assert out_of_range(structure_of(deep), seen) == [
        "depth 5 (seen: 1 to 4)", "width 9 (seen: 2 to 5)", "kernel 7 (seen: 1 to 5)",
        "inputs 3 (seen: 1 to 2)", "classes 2 (seen: 3)",
        "activation leaky_relu (seen: gelu, none, relu, sigmoid, silu, tanh)",
    ]  # fmt: skip


def test_fewer_classes_and_more_layers_are_read_with_a_warning(path):
    few = architecture((2, *[3] * 5), (3,) * 5, ("relu",) * 5, (-1,) * 5, 2)
    with pytest.warns(UserWarning, match=r"depth 5 \(seen: 1 to 4\); classes 2 \(seen: 3\)"):
        assert 0 < predict_accuracy(cnn_module(few), torch.zeros(1, 2, 9, 9), path) < 1


def test_no_warning_of_what_was_seen(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict_accuracy(cnn_module(MIXED[0]), torch.zeros(1, 2, 9, 9), path)


def test_modules_and_checkpoints_that_do_not_serve_are_refused(path, tmp_path):
    images = torch.zeros(1, 2, 9, 9)
    with pytest.raises(ValueError, match="unknown checkpoint 'park', expected one of"):
        predict_accuracy(cnn_module(MIXED[0]), images, "park")
    large = cnn_module(architecture((2, 3), (7,), ("relu",), (-1,)))
    with pytest.raises(ValueError, match=r"'convolutions.0.weight': kernel 7x7 exceeds"):
        predict_accuracy(large, images, path)
    flat = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(3 * 81, 3))
    with pytest.raises(ValueError, match=r"'2\.weight': a linear layer on 81 positions of each"):
        predict_accuracy(flat, images, path)
    broken = cnn_module(MIXED[0])
    with torch.no_grad():
        broken.linear.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"expected finite weights, .* \['linear.bias'\]"):
        predict_accuracy(broken, images, path)
    other = tmp_path / "statistics.safetensors"
    save_model(other, GeneralizationPredictor(cnn_config("stat_nn", hidden=4)), {})
    with pytest.raises(
        ValueError, match="expected a model that reads any network, found 'stat_nn'"
    ):
        predict_accuracy(cnn_module(MIXED[0]), images, other)


@pytest.mark.parametrize("name", [*MODELS, "stat_nn", "nfn"])
def test_a_model_comes_back_as_it_was_saved(name, tmp_path):
    networks = cnns([MIXED[3]] * 2)
    if name in MODELS:
        model = made(name, dropout=0.2).float().eval()
    else:
        own = {"architecture": MIXED[3]} if name == "nfn" else {}
        model = GeneralizationPredictor(cnn_config(name, "small", hidden=4, **own)).eval()
    save_model(tmp_path / "model.safetensors", model, {"epochs": 3})
    before = torch.get_rng_state()
    again = GeneralizationPredictor.from_checkpoint(tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert again.config == model.config and again.provenance == {"epochs": 3}
    torch.testing.assert_close(again(networks), model(networks), rtol=0, atol=1e-6)
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_packaged_predictors_are_there_and_say_how_they_were_made():
    assert list_cnn_models() == ["cnn-park"]
    model = GeneralizationPredictor.from_checkpoint("cnn-park")
    assert {"commit", "config", "val_tau", "test_tau", "seen"} <= model.provenance.keys()
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    drawn = [draw_architecture(g, 3, channels=(8, 32), strides=(1, 2)) for g in generators]
    networks = cnns(drawn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all of the kind that it has seen
        for i, expected in enumerate(model(networks).tolist()):
            module = cnn_module(networks.architecture(i))
            nn.utils.vector_to_parameters(networks.values[i], module.parameters())
            found = predict_accuracy(module, torch.zeros(1, 3, 16, 16))
            assert 0 < found < 1 and found == pytest.approx(expected, abs=1e-6)
            accuracy, low, high = predict_accuracy(module, torch.zeros(1, 3, 16, 16), interval=0.9)
            assert low < accuracy < high and accuracy == found


def test_the_packaged_predictor_says_how_often_its_intervals_held():
    told = GeneralizationPredictor.from_checkpoint("cnn-park").provenance
    assert told["residuals"]["runs"] >= 18
    assert told["test_cover_80"] >= 0.75 and told["test_cover_90"] >= 0.85
    assert "/" not in told["config"]["data"], "no path of a machine"


def test_files_of_another_kind_are_refused(path):
    content = path.read_bytes()
    tensors = load(content)
    _, metadata = parse(content, "", FORMAT, "")
    path.write_bytes(save(tensors, {**metadata, "config": '{"model": "gnn"}'}))
    with pytest.raises(ValueError, match=r"expected a CNNModelConfig .*gnn"):
        GeneralizationPredictor.from_checkpoint(path)
    for other in ("l2o_graph INR model, version 2", "l2o_graph predictor of accuracy"):
        path.write_bytes(save(tensors, {**metadata, "format": other}))
        with pytest.raises(
            ValueError, match=f"accuracy, version 3' in its header, found '{other}'"
        ):
            GeneralizationPredictor.from_checkpoint(path)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        GeneralizationPredictor.from_checkpoint(path)
