"""Pictures of graphs: the lines drawn are the edges, where there are few enough to draw all."""

import pytest
import torch
from support.networks import NETWORKS
from torch import Tensor, nn

from l2o_graph import neural_graph
from l2o_graph.graph.neural import NeuralGraph
from l2o_graph.graph.picture import MOST_SHOWN, NEGATIVE, POSITIVE, picture


def lines(graph: NeuralGraph) -> list[list[tuple[tuple, tuple, str]]]:
    """Of each kernel, the ends of each line and its colour."""
    from matplotlib.colors import to_hex

    (axes,) = picture(graph).axes
    return [
        [
            (tuple(path.vertices[0].tolist()), tuple(path.vertices[-1].tolist()), to_hex(colour))
            for path, colour in zip(one.get_paths(), one.get_edgecolors(), strict=True)
        ]
        for one in axes.collections
        if not hasattr(one, "get_sizes")  # which dots have
    ]


def dots(graph: NeuralGraph) -> list[list[tuple]]:
    """Of each set of neurons, where its dots are."""
    (axes,) = picture(graph).axes
    return [
        [tuple(at) for at in one.get_offsets().tolist()]
        for one in axes.collections
        if hasattr(one, "get_sizes")
    ]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_every_edge_of_a_small_network_is_a_line_of_its_sign():
    net = mlp()
    graph = neural_graph(net, torch.zeros(1, 3))
    places = dots(graph)
    for k, layer in enumerate((net[0], net[2])):
        found = {(a, b): colour for a, b, colour in lines(graph)[k]}
        assert len(found) == layer.weight.numel()
        for i, row in enumerate(layer.weight.tolist()):
            for j, weight in enumerate(row):
                colour = found[places[k][j], places[k + 1][i]]
                assert colour == (POSITIVE if weight > 0 else NEGATIVE).lower()


def test_names_sizes_and_activations_are_written():
    (axes,) = picture(neural_graph(mlp(), torch.zeros(1, 3))).axes
    assert [text.get_text() for text in axes.texts] == ["input of 0\n[3]", "0\n[4] relu", "2\n[2]"]


def test_groups_join_only_their_own():
    graph = neural_graph(nn.Conv2d(4, 6, 3, groups=2), torch.zeros(1, 4, 5, 5))
    sources, targets = dots(graph)
    (found,) = lines(graph)
    joined = {(sources.index(a), targets.index(b)) for a, b, _ in found}
    assert joined == {(i, o) for i in range(4) for o in range(6) if i // 2 == o // 3}


def test_a_skip_joins_equal_neurons():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x) + x

    graph = neural_graph(Skip(), torch.zeros(1, 3))
    number = next(
        i for i, k in enumerate(graph.spec.kernels) if graph.spec.is_constant(k.parameter)
    )
    kernel = graph.spec.kernels[number]
    places = dots(graph)
    expected = set(zip(places[kernel.source], places[kernel.target], strict=True))
    assert {(a, b) for a, b, _ in lines(graph)[number]} == expected


def test_large_networks_stay_drawable():
    graph = neural_graph(nn.Sequential(nn.Linear(3000, 500), nn.ReLU(), nn.Linear(500, 4)))
    assert [len(one) for one in lines(graph)] == [MOST_SHOWN**2, MOST_SHOWN * 4]
    assert [len(one) for one in dots(graph)] == [MOST_SHOWN, MOST_SHOWN, 4]


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_all_kinds_of_networks_are_drawn(name, tmp_path):
    case = NETWORKS[name]
    x, _ = case.batch()
    neural_graph(case.make(), x).draw(tmp_path / "net.svg")
    assert (tmp_path / "net.svg").read_text().count("<path") > 20


def test_the_ending_says_what_is_written(tmp_path):
    graph = neural_graph(mlp())
    graph.draw(tmp_path / "net.png")
    assert (tmp_path / "net.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="'xyz' is not supported"):
        graph.draw(tmp_path / "net.xyz")
