"""Messages against a twin of one neuron and one weight at a time, and whose they are."""

import math

import pytest
import torch
from support.networks import NETWORKS
from support.optimizers import READERS
from torch import Tensor, nn

from l2o_graph.layout.spec import NetSpec
from l2o_graph.optim.blocks import MATRICES, blocks_of
from l2o_graph.optim.controller import ControllerConfig, Learned, weights_from
from l2o_graph.optim.memory import Memory, arrange, gathered, scattered
from l2o_graph.optim.messages import heard
from l2o_graph.optim.signals import NUM_SIGNALS
from l2o_graph.optim.step import advance
from l2o_graph.tracing import spec_of_computation
from l2o_graph.tracing.by_order import spec_of_module

CHANNELS, SETS = 2, 2
TALKING = [reader for reader in READERS if reader != "none"]


def small_cnn() -> nn.Module:
    """Kernels with positions, groups, a norm, a flattened map."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(),
        nn.Conv2d(4, 4, (1, 2), groups=2, bias=False), nn.Tanh(),
        nn.Conv2d(4, 4, 1, groups=4), nn.Flatten(), nn.Linear(4 * 3 * 2, 3),
    )  # fmt: skip


def spec_of(name: str) -> NetSpec:
    if name == "mlp":
        layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)
        return spec_of_module(nn.Sequential(*layers))
    if name == "cnn":
        return spec_of_computation(small_cnn(), (torch.zeros(1, 2, 3, 3),))
    case = NETWORKS[name]
    return spec_of_computation(case.make(), (case.batch()[0],))


def controllers(reader: str) -> dict[str, Tensor]:
    """Weights of SETS of them, none of which is 0."""
    config = ControllerConfig(reader, channels=CHANNELS)
    torch.manual_seed(1)
    return weights_from(config, 0.5 * torch.randn(SETS, config.size, dtype=torch.float64))


class Case:
    """A network, what its rows see, and its squared weights."""

    def __init__(self, spec: NetSpec):
        torch.manual_seed(0)
        self.spec = spec
        self.memory: Memory = arrange(spec, blocks_of(spec), SETS, like=torch.zeros(()).double())
        rows = len(self.memory.constants.tensor_of_row)
        self.signals = torch.randn(SETS, rows, NUM_SIGNALS, dtype=torch.float64)
        sizes = [torch.Size(shape).numel() for shape in spec.shapes]
        flat = [torch.randn(SETS, size, dtype=torch.float64) for size in sizes]
        self.stacks = gathered(self.memory, flat)

    def heard(self, reader: str, weights: dict[str, Tensor]) -> Tensor:
        squares = {
            s: x.square().unflatten(0, (SETS, -1))
            for s, (stack, x) in enumerate(zip(self.memory.stacks, self.stacks, strict=True))
            if stack.is_matrix
        }
        return heard(reader, weights, self.memory, squares, self.signals)


@pytest.fixture(scope="module", params=["mlp", "cnn", "gpt", "lstm", "gated"])
def case(request):
    return Case(spec_of(request.param))


# The slow twin ---------------------------------------------------------------------------------


class Row:
    """A row of a block: the neuron that it writes, and the weights by which it reads others."""

    def __init__(self, node, reads, matrix):
        self.node, self.reads, self.matrix = node, reads, matrix


def rows_of(case: Case, n: int) -> list[Row]:
    """All rows of one network, in the order of the memory. A weight is its square, over positions.

    Neurons are (set, number in it); what has none is None.
    """
    answer, matrix = [], 0
    for stack, numbers in zip(case.memory.stacks, case.stacks, strict=True):
        at = numbers.unflatten(0, (SETS, -1))[n]
        group_of_stack = 0
        for block in stack.blocks:
            groups, rows, columns = block.matrix
            for g in range(groups):
                for r in range(rows):
                    node, reads = None, []
                    if block.target is not None and block.kind not in ("table", "vector"):
                        node = block.target[0], block.target[1] + g * rows + r
                    if block.kind in MATRICES:
                        positions = block.stored[3]
                        neurons = columns // positions
                        for c in range(neurons):
                            weight = sum(
                                at[group_of_stack, r, c * positions + k].item() ** 2
                                for k in range(positions)
                            )
                            source = None
                            if block.source is not None:
                                source = block.source[0], block.source[1] + g * neurons + c
                            reads.append((source, weight))
                    answer.append(Row(node, reads, matrix))
                matrix += 1
                group_of_stack += 1
    return answer


def mean_by_node(rows: list[Row], vectors: list[Tensor]) -> dict:
    """The mean of what the rows that write a neuron have; without a neuron nothing is put in."""
    by_node: dict = {}
    for row, vector in zip(rows, vectors, strict=True):
        by_node.setdefault(row.node, []).append(vector)
    return {node: sum(found) / len(found) for node, found in by_node.items()}


def slow_neighbours(reader: str, case: Case, weights: dict[str, Tensor], n: int) -> Tensor:
    w = {name: tensor[n] for name, tensor in weights.items()}
    rows, signals = rows_of(case, n), case.signals[n]
    words = [torch.tanh(w["say.weight"] @ s + w["say.bias"]) for s in signals]
    words_at = mean_by_node(rows, words)
    signals_at = mean_by_node(rows, list(signals))
    nothing = torch.zeros(CHANNELS, dtype=torch.float64)
    blind = torch.zeros(NUM_SIGNALS, dtype=torch.float64)
    totals: dict[int, list[float]] = {}
    for row in rows:
        totals.setdefault(row.matrix, []).extend(weight for _, weight in row.reads)

    def share(row: Row, r: int, source, weight: float, way: int) -> float:
        if reader == "mean":
            return 1.0
        if reader == "messages":
            return weight
        target, there = signals[r], signals_at.get(source, blind)
        asks, shows = (target, there) if way == 0 else (there, target)
        ask, show = w["ask.weight"][way] @ asks, w["show.weight"][way] @ shows
        of_all = totals[row.matrix]
        relative = math.log(weight / (sum(of_all) / len(of_all)) + 1e-6)
        logit = min(max((ask @ show).item(), -8), 8)
        total = logit + (1 + w["strength"][way].item()) * relative
        return math.exp(min(max(total, -20), 20))

    along, told = [], {}
    for r, row in enumerate(rows):
        shares = [share(row, r, source, weight, 0) for source, weight in row.reads]
        said = [words_at.get(source, nothing) for source, _ in row.reads]
        mean = sum((s * x for s, x in zip(shares, said, strict=True)), nothing)
        along.append(mean / sum(shares) if shares else nothing)
        for source, weight in row.reads:
            of_matrix = told.setdefault(source, {}).setdefault(row.matrix, [])
            of_matrix.append((share(row, r, source, weight, 1), words[r]))
    back = {}
    for source, matrices in told.items():
        means = [sum(s * x for s, x in m) / sum(s for s, _ in m) for m in matrices.values()]
        back[source] = sum(means) / len(means)
    return torch.stack(
        [
            torch.cat([a, nothing if row.node is None else back.get(row.node, nothing)])
            for row, a in zip(rows, along, strict=True)
        ]
    )


def slow_sequence(case: Case, weights: dict[str, Tensor], n: int) -> Tensor:
    w = {name: tensor[n] for name, tensor in weights.items()}
    rows = rows_of(case, n)
    words = [torch.tanh(w["say.weight"] @ s + w["say.bias"]) for s in case.signals[n]]
    hidden = cell = torch.zeros(2 * CHANNELS, dtype=torch.float64)
    states = []
    for matrix in range(rows[-1].matrix + 1):
        own = [word for row, word in zip(rows, words, strict=True) if row.matrix == matrix]
        mean = sum(own) / len(own)
        gates = w["cell.input"] @ mean + w["cell.state"] @ hidden + w["cell.bias"]
        read, forget, new, show = gates.chunk(4)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(read) * torch.tanh(new)
        hidden = torch.sigmoid(show) * torch.tanh(cell)
        states.append(hidden)
    return torch.stack([states[row.matrix] for row in rows])


@pytest.mark.parametrize("reader", ["messages", "mean", "attention"])
def test_what_neighbours_say_is_that_of_a_loop_over_neurons(reader, case):
    weights = controllers(reader)
    found = case.heard(reader, weights)
    for n in range(SETS):
        expected = slow_neighbours(reader, case, weights, n)
        torch.testing.assert_close(found[n], expected, rtol=1e-8, atol=1e-10)
    assert found.abs().max() > 0.1


def test_an_lstm_reads_matrix_by_matrix(case):
    weights = controllers("sequence")
    found = case.heard("sequence", weights)
    for n in range(SETS):
        torch.testing.assert_close(found[n], slow_sequence(case, weights, n))


# Whose they are ---------------------------------------------------------------------------------


def mlp_case() -> Case:
    return Case(spec_of("mlp"))


def permuted(case: Case, order: list[int], kernels: tuple[bool, bool]) -> Case:
    """The second hidden set in another order, in one or both of its kernels; and what it sees."""
    other = Case(case.spec)
    flat = scattered(case.memory, case.stacks)
    written, read = flat[2].view(SETS, 4, 4), flat[4].view(SETS, 2, 4)
    if kernels[0]:
        flat[2] = written[:, order].flatten(1)
    if kernels[1]:
        flat[4] = read[:, :, order].flatten(1)
    other.stacks = gathered(other.memory, flat)
    other.signals = in_order(case, case.signals, order)
    return other


def in_order(case: Case, of_rows: Tensor, order: list[int]) -> Tensor:
    """What rows have, those of the second hidden set in another order."""
    rows = [r for r, row in enumerate(rows_of(case, 0)) if row.node and row.node[0] == 2]
    answer = of_rows.clone()
    answer[:, rows] = of_rows[:, [rows[i] for i in order]]
    return answer


@pytest.mark.parametrize("reader", TALKING)
def test_neurons_in_another_order_hear_the_same(reader):
    case, order, weights = mlp_case(), [2, 0, 3, 1], controllers(reader)
    expected = in_order(case, case.heard(reader, weights), order)
    found = permuted(case, order, (True, True)).heard(reader, weights)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reader", ["messages", "attention"])
@pytest.mark.parametrize("kernels", [(True, False), (False, True)])
def test_half_of_that_is_another_network(reader, kernels):
    case, order, weights = mlp_case(), [2, 0, 3, 1], controllers(reader)
    expected = in_order(case, case.heard(reader, weights), order)
    found = permuted(case, order, kernels).heard(reader, weights)
    assert (found - expected).abs().max() > 1e-2


def first_update(reader: str, scales: list[float]) -> Tensor:
    """Of the first kernel, when the second one has other weights, of the same norm."""
    spec = spec_of("mlp")
    config = ControllerConfig(reader, channels=CHANNELS)
    weights = {name: w[:1] for name, w in controllers(reader).items()}
    memory = arrange(spec, blocks_of(spec), 1, like=torch.zeros(()).double())
    generator = torch.Generator().manual_seed(0)
    parameters, gradients = (
        [
            torch.randn(1, torch.Size(shape).numel(), generator=generator, dtype=torch.float64)
            for shape in spec.shapes
        ]
        for _ in range(2)
    )
    second = parameters[2].view(4, 4) * torch.tensor(scales)
    parameters[2] = (second / second.norm()).view(1, -1)
    flat = gathered(memory, gradients), gathered(memory, parameters)
    updates, _ = advance(Learned.of(config, weights), memory, *flat)
    return scattered(memory, updates)[0].clone()


@pytest.mark.parametrize("reader", READERS)
def test_weights_of_other_layers_matter_to_those_who_read_them(reader):
    one, other = (first_update(reader, scales) for scales in ([1.0] * 4, [1.0, 0.1, 3.0, 0.5]))
    far = ((one - other).abs().max() / one.abs().max()).item()
    if reader in ("messages", "attention"):
        assert far > 1e-6
    elif reader == "none":
        assert far < 1e-12
