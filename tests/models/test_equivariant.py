import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rules import random_like
from torch import Tensor, nn

from l2o_graph.layout.spec import Kernel, NetSpec, Neurons
from l2o_graph.models.equivariant import (
    HNP,
    NP,
    Axis,
    EquivariantLinear,
    TensorSpec,
    ways_to_tie,
    weight_space,
)
from l2o_graph.tracing.by_order import spec_of_module, spec_of_parameters

Space = tuple[TensorSpec, ...]
MODES = {"np": NP, "hnp": HNP}


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes)])


def space_of(network: nn.Module, mode: str) -> Space:
    return weight_space(spec_of_module(network), MODES[mode])


def layer_of(space: Space, channels: tuple[int, int] = (2, 3)) -> EquivariantLinear:
    torch.manual_seed(0)
    return EquivariantLinear(space, *channels).double()


def features_of(space: Space, channels: int, seed: int = 0) -> list[Tensor]:
    return random_like([torch.empty(2, channels, *spec.shape) for spec in space], seed)


def permuted(space: Space, tensors: list[Tensor], orders: dict[Axis, Tensor]) -> list[Tensor]:
    answer = []
    for spec, x in zip(space, tensors, strict=True):
        for a, axis in enumerate(spec.axes, start=x.dim() - len(spec.axes)):
            x = x.index_select(a, orders[axis]) if axis in orders else x
        answer.append(x)
    return answer


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def error(space: Space, orders: dict[Axis, Tensor]) -> float:
    """How far the layer's answer to permuted tensors is from its permuted answer."""
    layer, x = layer_of(space), features_of(space, 2)
    return apart(layer(permuted(space, x, orders)), permuted(space, layer(x), orders))


# Counts ---------------------------------------------------------------------------------------


def basis(space: Space) -> list[tuple[TensorSpec, TensorSpec, tuple[Axis, ...]]]:
    """Every map between two tensors of a space: from which, to which, and the axes tied."""
    pairs = itertools.product(space, repeat=2)
    return [(s, t, tied) for s, t in pairs for tied in ways_to_tie(s, t)]


def formula(source: TensorSpec, target: TensorSpec, tied: tuple[Axis, ...]) -> str:
    """As of an einsum."""
    letters = iter("ijkl")
    writes = {axis: next(letters) for axis in target.free}
    reads = [writes[axis] if axis in tied else next(letters) for axis in source.free]
    return f"{''.join(reads)}->{''.join(writes.values())}"


def dimension(space: Space) -> int:
    """Maps of one channel to one channel."""
    return sum(math.prod((*s.fixed_shape, *t.fixed_shape)) for s, t, _ in basis(space))


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_np_has_as_many_maps_as_published(layers):
    """Zhou et al. 2023: full means between all 2L tensors; rows and columns where they share a set.

    The two outer sets have 1 and 2 tensors, the others 3, and a kernel maps to itself once more.
    """
    full, shared, own = (2 * layers) ** 2, 1 + 9 * (layers - 1) + 4, layers
    assert full + shared + own == 4 * layers**2 + 10 * layers - 4
    space = space_of(mlp(*range(3, 4 + layers)), "np")
    assert len(basis(space)) == dimension(space) == 4 * layers**2 + 10 * layers - 4


def test_np_without_biases_has_as_many_maps_as_published():
    layers = 4
    assert len(basis(space_of(mlp(2, 3, 4, 5, 6, bias=False), "np"))) == layers**2 + 5 * layers - 2


@pytest.mark.parametrize("layers", [3, 4, 6])
def test_hnp_has_as_many_maps_as_published(layers):
    """Fixed inputs n and outputs m count as many tensors: full means grow as (L + n + m)^2."""
    n, m = 2, 3
    full = (2 * layers - 3 + n + 2 * m) ** 2
    shared = (n + 2) ** 2 + 9 * (layers - 3) + (2 + m) ** 2
    own = layers - 2
    assert dimension(space_of(mlp(n, *range(4, 3 + layers), m), "hnp")) == full + shared + own


def test_a_middle_kernel_reads_its_neighbours():
    space = space_of(mlp(2, 3, 4, 5), "np")
    read = {
        (source.name, formula(source, target, tied))
        for source, target, tied in basis(space)
        if target.name == "1.weight"
    }
    far = {("2.bias", "k->ij")}
    assert read - far == {
        *(("1.weight", ways) for ways in ("ij->ij", "ik->ij", "kj->ij", "kl->ij")),
        *(("2.weight", ways) for ways in ("ki->ij", "kl->ij")),
        *(("0.weight", ways) for ways in ("jk->ij", "kl->ij")),
        *(("1.bias", ways) for ways in ("i->ij", "k->ij")),
        *(("0.bias", ways) for ways in ("j->ij", "k->ij")),
    }
    assert far < read


# Completeness: the maps are all there are, and none too many. ---------------------------------


def orders_that_generate(space: Space) -> list[dict[Axis, Tensor]]:
    """A swap and a rotation of each set of neurons generate all its permutations."""
    free = dict.fromkeys(axis for spec in space for axis in spec.free)
    answer = []
    for axis in free:
        swap = torch.arange(axis.size)
        swap[:2] = swap[:2].flip(0)
        answer += [{axis: swap}, {axis: torch.arange(axis.size).roll(1)}]
    return answer


def as_matrix(space: Space, orders: dict[Axis, Tensor]) -> Tensor:
    """What a permutation does to all entries of the space in a row."""
    total = sum(math.prod(spec.shape) for spec in space)
    split = torch.eye(total, dtype=torch.float64).split([math.prod(s.shape) for s in space], dim=1)
    tensors = [x.reshape(total, *spec.shape) for spec, x in zip(space, split, strict=True)]
    return torch.cat([x.flatten(1) for x in permuted(space, tensors, orders)], dim=1).T.contiguous()


def solutions(space: Space) -> int:
    """Dimension of the affine maps [A b] with A P = P A and P b = b, from the constraints alone."""
    constraints = []
    for orders in orders_that_generate(space):
        p = as_matrix(space, orders)
        with_one = torch.block_diag(p, torch.ones(1, 1, dtype=p.dtype))
        eye = [torch.eye(len(q), dtype=p.dtype) for q in (p, with_one)]
        # Row by row, vec(X Q) = (1 x Q^T) vec X and vec(P X) = (P x 1) vec X.
        constraints.append(torch.kron(eye[0], with_one.T.contiguous()) - torch.kron(p, eye[1]))
    unknowns = constraints[0].shape[1]
    gram = sum(c.T @ c for c in constraints)
    return unknowns - int(torch.linalg.matrix_rank(gram, hermitian=True))


def rank_of_layer(space: Space) -> tuple[int, int]:
    """How many weights the layer has for one channel, and how many independent maps they give."""
    layer = layer_of(space, (1, 1))
    total = sum(math.prod(spec.shape) for spec in space)
    # All unit vectors and zero: together they tell an affine map.
    points = torch.cat([torch.eye(total), torch.zeros(1, total)]).double()
    split = points.split([math.prod(spec.shape) for spec in space], dim=1)
    tensors = [x.reshape(-1, 1, *spec.shape) for spec, x in zip(space, split, strict=True)]
    parameters = dict(layer.named_parameters())

    def answer(weights: dict[str, Tensor]) -> Tensor:
        found = torch.func.functional_call(layer, weights, (tensors,))
        return torch.cat([x.flatten() for x in found])

    jacobian = torch.func.jacrev(answer)(parameters)
    columns = torch.cat([j.flatten(1) for j in jacobian.values()], dim=1)
    return columns.shape[1], int(torch.linalg.matrix_rank(columns))


TINY = {
    "np": space_of(mlp(2, 3, 2), "np"),
    "hnp": space_of(mlp(2, 3, 2), "hnp"),
    "hnp, two hidden": space_of(mlp(1, 2, 3, 2, bias=False), "hnp"),
    "np, single neurons": space_of(mlp(1, 2, 1), "np"),
    "np, one layer": space_of(mlp(3, 4), "np"),
    "np, convolutions": space_of(
        nn.Sequential(nn.Conv1d(2, 2, 2), nn.Conv1d(2, 2, 1, bias=False)), "np"
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_the_layer_has_every_equivariant_map_once(name):
    space = TINY[name]
    weights, rank = rank_of_layer(space)
    assert weights == rank == solutions(space)
    assert weights == dimension(space) + sum(math.prod(s.fixed_shape) for s in space)


# Symmetry --------------------------------------------------------------------------------------


@st.composite
def shapes(draw) -> list[tuple[int, ...]]:
    """The parameters of an MLP, a CNN or a flattened CNN, some without biases."""
    channels = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    kind, answer = draw(st.sampled_from(["mlp", "cnn", "flattened"])), []
    for source, target in itertools.pairwise(channels):
        positions = () if kind == "mlp" else draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
        answer += [(target, source, *positions), (target,)][: draw(st.integers(1, 2))]
    return [*answer, (3, channels[-1] * 6)] if kind == "flattened" else answer


def random_orders(data, space: Space) -> dict[Axis, Tensor]:
    free = dict.fromkeys(axis for spec in space for axis in spec.free)
    return {axis: torch.tensor(data.draw(st.permutations(range(axis.size)))) for axis in free}


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=20)
@given(shapes=shapes(), data=st.data())
def test_permuted_tensors_give_the_permuted_answer(mode, shapes, data):
    spec = spec_of_parameters([torch.empty(shape) for shape in shapes])
    space = weight_space(spec, MODES[mode])
    assert error(space, random_orders(data, space)) < 1e-12


@pytest.mark.parametrize("of", [0, -1], ids=["inputs", "outputs"])
def test_inputs_and_outputs_have_an_order_under_hnp_alone(of):
    spaces = {mode: space_of(mlp(4, 5, 4), mode) for mode in MODES}
    errors = {}
    for mode, space in spaces.items():
        axis = (space[0].axes[1], space[-1].axes[0])[of]
        errors[mode] = error(space, {axis: torch.arange(4).flip(0)})
    assert errors["np"] < 1e-12
    assert errors["hnp"] > 1e-2


def test_outputs_are_more_than_reordered_under_hnp():
    """No order of the old answer is the new one."""
    space = space_of(mlp(4, 5, 3), "hnp")
    layer, x = layer_of(space), features_of(space, 2)
    outputs = space[-1].axes[0]
    found = layer(permuted(space, x, {outputs: torch.tensor([1, 0, 2])}))
    answers = [
        permuted(space, layer(x), {outputs: torch.tensor(order)})
        for order in itertools.permutations(range(3))
    ]
    assert min(apart(found, answer) for answer in answers) > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_permuting_one_of_two_adjacent_kernels_is_no_symmetry(mode):
    space = space_of(mlp(3, 5, 3, bias=False), mode)
    layer, x = layer_of(space), features_of(space, 2)
    order = torch.arange(5).roll(1)

    def half(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0][..., order, :], tensors[1]]

    assert apart(layer(half(x)), half(layer(x))) > 1e-2


def test_positions_of_a_kernel_have_an_order():
    space = space_of(nn.Sequential(nn.Conv1d(2, 3, 3), nn.Conv1d(3, 2, 3)), "np")
    layer, x = layer_of(space), features_of(space, 2)

    def mirrored(tensors: list[Tensor]) -> list[Tensor]:
        return [
            t.flip(-1) if len(spec.axes) == 3 else t for spec, t in zip(space, tensors, strict=True)
        ]

    assert apart(layer(mirrored(x)), mirrored(layer(x))) > 1e-2


# The sum itself --------------------------------------------------------------------------------


def slow(layer: EquivariantLinear, tensors: list[Tensor]) -> list[Tensor]:
    """Every map of the basis, one entry of output and input at a time."""
    space, c_in, c_out = layer.space, layer.in_channels, layer.out_channels
    answer = [x.new_zeros(len(x), c_out, *s.shape) for s, x in zip(space, tensors, strict=True)]
    fixed = [[a for a, axis in enumerate(spec.axes) if not axis.permutable] for spec in space]
    for landing, weight in zip(layer.landings, layer.weights, strict=True):
        target = space[landing.target]
        for entry in itertools.product(*map(range, target.shape)):
            value = dict(zip(target.axes, entry, strict=True))
            rows = weight.unflatten(0, (c_out, *target.fixed_shape))
            rows = rows[(slice(None), *(entry[a] for a in fixed[landing.target]))]
            column = 0
            for s in landing.sources[: -1 if not landing.tied else None]:
                source, x = space[s], tensors[s]
                block = rows[:, column : column + c_in * math.prod(source.fixed_shape)]
                block = block.unflatten(1, (c_in, *source.fixed_shape))
                column += c_in * math.prod(source.fixed_shape)
                read = []
                for other in itertools.product(*map(range, source.shape)):
                    seen = dict(zip(source.axes, other, strict=True))
                    if any(seen[axis] != value[axis] for axis in landing.tied):
                        continue  # of other neurons
                    of_entry = block[(..., *(other[a] for a in fixed[s]))]
                    read.append(x[(..., *other)] @ of_entry.T)
                # Fixed entries have weights of their own and are added: the mean is of the rest.
                count = len(read) / math.prod(source.fixed_shape)
                answer[landing.target][(..., *entry)] += torch.stack(read).sum(0) / count
            if not landing.tied:
                answer[landing.target][(..., *entry)] += rows[:, column]  # reads the constant
    return answer


@pytest.mark.parametrize(
    "space",
    [
        space_of(mlp(2, 3, 2), "np"),
        space_of(mlp(2, 3, 2), "hnp"),
        space_of(nn.Sequential(nn.Conv2d(2, 2, (1, 2)), nn.Flatten(), nn.Linear(8, 2)), "hnp"),
    ],
    ids=["np", "hnp", "flattened"],
)
def test_layer_equals_the_loop_over_entries(space):
    layer, x = layer_of(space), features_of(space, 2)
    with torch.no_grad():
        for a, b in zip(layer(x), slow(layer, x), strict=True):
            torch.testing.assert_close(a, b)


def test_a_batch_is_one_by_one():
    space = space_of(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Conv2d(3, 2, 1)), "hnp")
    layer, x = layer_of(space), features_of(space, 2)
    together = layer(x)
    for n in range(2):
        for a, b in zip(layer([t[n : n + 1] for t in x]), together, strict=True):
            torch.testing.assert_close(a[0], b[n])


def test_a_flattened_map_has_a_position_for_each_pixel():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 9, 3))
    space = space_of(network, "hnp")
    assert [spec.shape for spec in space] == [(2, 1, 3, 3), (2,), (3, 2, 3, 3), (3,)]


@pytest.mark.parametrize("mode", MODES)
def test_every_weight_gets_a_gradient(mode):
    space = space_of(
        nn.Sequential(nn.Conv1d(2, 3, 2), nn.Conv1d(3, 4, 1), nn.Conv1d(4, 2, 2)), mode
    )
    layer = layer_of(space)
    sum(x.square().sum() for x in layer(features_of(space, 2))).backward()
    for p in layer.parameters():
        assert p.grad is not None and (p.grad != 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("agreeing", [False, True])
def test_first_answers_are_of_unit_order(mode, agreeing):
    """Whether all means vanish, as of independent entries, or none does."""
    space = space_of(mlp(20, 30, 30, 20), mode)
    layer = layer_of(space, (16, 64))
    x = [torch.ones_like(t) if agreeing else t for t in features_of(space, 16)]
    for y in layer(x):
        assert 0.1 < y.square().mean() < 2


# Refusals --------------------------------------------------------------------------------------


def test_a_loose_parameter_is_refused_by_name():
    with pytest.raises(ValueError, match=r"found loose parameters '1.weight'$"):
        space_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.PReLU(2)), "np")


def test_a_kernel_that_is_no_matrix_is_refused_by_name():
    with pytest.raises(ValueError, match=r"expected only whole kernels .*, found '1.weight'$"):
        space_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "np")


def test_a_kernel_of_a_set_to_itself_is_refused_by_name():
    sets = NetSpec(
        ("recurrent",), ((3, 3),), (Neurons("a", 3, "hidden", 0),), (Kernel(0, 0, 0, (1, 3, 3)),),
        (), (),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"between two sets of neurons, found 'recurrent'$"):
        weight_space(sets, NP)
