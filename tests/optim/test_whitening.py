"""Directions: matrices whitened on both sides, powers against scipy's, work that is spread."""

import math

import pytest
import torch
from scipy.linalg import fractional_matrix_power
from torch import Tensor

from l2o_graph.optim.whitening import (
    DAMPING,
    FIRST_ROOTS,
    GRAM_DECAY,
    LENGTH_PER_STEP,
    LONG_FIRST_ROOTS,
    LONG_SIDE,
    LONGEST_BLOCK,
    ROOT_PERIOD,
    SPREAD,
    Side,
    due,
    relative,
    root,
    sides,
    take_in,
    weight_of,
    whitened_left,
    whitened_right,
)

LONG = LONG_SIDE + 44


def grams(side: int, rank: int, count: int = 3) -> Tensor:
    x = torch.randn(count, side, rank, dtype=torch.float64)
    return x @ x.mT


# Powers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [12, 3, 1])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_root_is_the_power_of_the_damped_matrix(rank, scale):
    average, powers = scale * grams(7, rank), torch.tensor([0.2, 0.45, 0.6], dtype=torch.float64)
    found = root(average, powers)
    for one, matrix, power in zip(found, average, powers.tolist(), strict=True):
        damped = matrix / matrix.diagonal().mean() + DAMPING * torch.eye(7)
        expected = torch.from_numpy(fractional_matrix_power(damped.numpy(), -power).real)
        torch.testing.assert_close(one, expected, rtol=1e-7, atol=1e-9)


def test_a_root_in_single_precision_has_the_small_eigenvalues_right():
    """Squares of gradients from 1 to 1e-4: eigenvalues that float32 cannot tell from 0."""
    basis, _ = torch.linalg.qr(torch.randn(1, 6, 6, dtype=torch.float64))
    spectrum = torch.logspace(0, -8, 6, dtype=torch.float64)
    average, power = (basis * spectrum) @ basis.mT, torch.tensor([0.5])
    expected = root(average, power)
    torch.testing.assert_close(
        root(average.float(), power).double(), expected, rtol=1e-3, atol=1e-3
    )


def test_of_no_gradient_a_root_is_finite_and_the_identity_up_to_its_length():
    found = root(torch.zeros(2, 4, 4), torch.tensor([0.25, 0.5]))
    for one, power in zip(found, (0.25, 0.5), strict=True):
        torch.testing.assert_close(one, DAMPING**-power * torch.eye(4))


# Grams ------------------------------------------------------------------------------------------


def slow_gram(gradient: Tensor, right: bool, side: int) -> Tensor:
    """G G' or G' G of one matrix, entry by entry; positions of a neuron add up."""
    rows, columns = gradient.shape
    answer = torch.zeros(side, side, dtype=gradient.dtype)
    if not right:
        for i in range(rows):
            for j in range(rows):
                answer[i, j] = sum(gradient[i, c] * gradient[j, c] for c in range(columns))
        return answer
    positions = columns // side
    for i in range(side):
        for j in range(side):
            answer[i, j] = sum(
                gradient[r, i * positions + k] * gradient[r, j * positions + k]
                for r in range(rows)
                for k in range(positions)
            )
    return answer


@pytest.mark.parametrize(
    "right, side",
    [
        (False, Side(6)),
        (False, Side(2, blocks=3)),
        (True, Side(8)),
        (True, Side(4, positions=2)),
        (True, Side(2, positions=4)),
        (True, Side(4, blocks=2)),
        (True, Side(2, blocks=2, positions=2)),
    ],
)
def test_averages_take_in_products_of_gradients(right, side):
    gradient = torch.randn(2, 6, 8, dtype=torch.float64)
    average = grams(side.length, 2, count=2 * side.blocks).unflatten(0, (2, -1))
    expected = average.clone()
    for b in range(2):
        gram = slow_gram(gradient[b], right, side.length * side.blocks)
        for k in range(side.blocks):
            own = slice(k * side.length, (k + 1) * side.length)
            expected[b, k] = 0.7 * average[b, k] + 0.3 * gram[own, own]
    take_in(average, gradient, side, right, 0.3)
    torch.testing.assert_close(average, expected)


def test_averages_begin_as_plain_means_and_then_forget():
    averages: list[float] = []
    for age in range(400):
        averages = [a * (1 - weight_of(age)) for a in averages] + [weight_of(age)]
        assert sum(averages) == pytest.approx(1)
        if age < 1 / (1 - GRAM_DECAY) - 1:
            assert averages == pytest.approx([1 / (age + 1)] * (age + 1))
    assert averages[-2] / averages[-1] == pytest.approx(GRAM_DECAY)


def test_four_steps_at_once_forget_as_much_as_four():
    assert weight_of(0, 4) == 1
    assert weight_of(10**6, 4) == pytest.approx(1 - GRAM_DECAY**4)
    assert weight_of(4, 4) == pytest.approx(1 / 2)


# Directions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_rows_are_multiplied_by_the_root_of_their_block(blocks):
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    root = torch.randn(2, blocks, 6 // blocks, 6 // blocks, dtype=torch.float64)
    found = whitened_left(x, root, Side(6 // blocks, blocks))
    for b in range(2):
        torch.testing.assert_close(found[b], torch.block_diag(*root[b]) @ x[b])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("positions", [1, 2, 3])
def test_columns_are_multiplied_by_the_root_of_their_block_and_positions_stay_apart(
    batch, blocks, positions
):
    neurons = 4
    x = torch.randn(batch, 3, neurons * positions, dtype=torch.float64)
    length = neurons // blocks
    root = torch.randn(batch, blocks, length, length, dtype=torch.float64)
    found = whitened_right(x, root, Side(length, blocks, positions))
    out = torch.empty_like(x)
    assert whitened_right(x, root, Side(length, blocks, positions), out) is out
    assert torch.equal(out, found)
    for b in range(batch):
        for k in range(positions):
            expected = x[b, :, k::positions] @ torch.block_diag(*root[b])
            torch.testing.assert_close(found[b, :, k::positions], expected)


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
def test_of_one_gradient_a_quarter_on_both_sides_leaves_singular_values_alike(shape):
    """(G G')^-1/4 G (G' G)^-1/4 is U V' but for damping: the step of Muon."""
    u, _ = torch.linalg.qr(torch.randn(shape[0], shape[0], dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64))
    rank = min(shape)
    gradient = ((u[:, :rank] * torch.linspace(1, 4, rank)) @ v[:rank])[None]
    quarter = torch.tensor([0.25], dtype=torch.float64)
    grams = gradient @ gradient.mT, gradient.mT @ gradient
    left, right = (root(gram, quarter)[:, None] for gram in grams)
    one_side = whitened_left(gradient, left, Side(shape[0]))
    values = torch.linalg.svdvals(whitened_right(one_side, right, Side(shape[1])))[0]
    assert values.max() / values.min() < 1.02
    one_side = torch.linalg.svdvals(one_side)[0]
    assert 1.9 < one_side.max() / one_side.min() < 2.05


def test_entry_by_entry_the_small_stay_small():
    mixture, square = torch.randn(2, 3, 4, dtype=torch.float64), torch.rand(2, 3, 4).double()
    square[0, 0] = 1e-12
    mean = torch.full((2, 1, 1), 12**-0.5, dtype=torch.float64)
    found = relative(mixture.clone(), square.clone(), mean)
    for b in range(2):
        typical = math.sqrt(sum(square[b].flatten().tolist()) / 12)
        for r in range(3):
            for c in range(4):
                expected = mixture[b, r, c] / (math.sqrt(square[b, r, c]) + typical)
                assert found[b, r, c].item() == pytest.approx(expected.item())
    assert (found[0, 0].abs() <= mixture[0, 0].abs() / typical * 10).all()


def test_without_a_gradient_there_is_no_direction():
    zero = torch.zeros(1, 2, 3)
    assert not relative(zero, zero.clone(), torch.full((1, 1, 1), 6**-0.5)).any()


# Which sides, and when --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, columns, positions, expected",
    [
        (4, 6, 1, (Side(4), Side(6))),
        (1, 6, 1, (None, Side(6))),
        (4, 1, 1, (Side(4), None)),
        (16, 27, 9, (Side(16), Side(27))),
        (16, 576, 9, (Side(16), Side(576))),
        (16, 9 * 128, 9, (Side(16), Side(128, positions=9))),  # apart, as all are too many
        (16, 9 * 1024, 9, (Side(16), Side(512, 2, positions=9))),
        (LONGEST_BLOCK, 2, 1, (Side(LONGEST_BLOCK), Side(2))),
        (1024, 784, 1, (Side(512, 2), Side(392, 2))),
        (768, 3072, 1, (Side(384, 2), Side(512, 6))),
        (16 * LONGEST_BLOCK, 2, 1, (Side(LONGEST_BLOCK, 16), Side(2))),
        (50_304, 2, 1, (None, Side(2))),  # too many
        (641, 2, 1, (None, Side(2))),  # a prime
        (2 * 641, 2, 1, (None, Side(2))),  # or nearly
        (4, 9 * 641, 9, (Side(4), None)),
        (4, 1031, 1031, (Side(4), None)),  # of one neuron
    ],
)
def test_sides_that_are_whitened(rows, columns, positions, expected):
    assert sides(rows, columns, positions) == expected


def turns(side: int, matrices: int, ages: range, first: int = 0) -> list[int]:
    """How often each matrix's turn comes."""
    found = [0] * matrices
    for age in ages:
        for i in due(side, age, matrices, first):
            found[i] += 1
    return found


def at_most(side: int, matrices: int, ages: range, first: int = 0) -> int:
    return max(len(due(side, age, matrices, first)) for age in ages)


@pytest.mark.parametrize("first", [0, 5, 31])
@pytest.mark.parametrize("matrices", [1, 3, 50])
@pytest.mark.parametrize("side", [8, LONG_SIDE - 1, LONG, LONGEST_BLOCK])
def test_each_period_has_the_turn_of_every_matrix_and_no_step_all_of_them(side, matrices, first):
    period = max(ROOT_PERIOD, side // LENGTH_PER_STEP)
    begin = LONG_FIRST_ROOTS[-1] + SPREAD
    for start in (begin, begin + 7, begin + 5 * period):
        ages = range(start, start + period)
        assert turns(side, matrices, ages, first) == [1] * matrices
        assert at_most(side, matrices, ages, first) == math.ceil(matrices / period)


def test_short_sides_begin_with_all_at_once():
    for age in range(FIRST_ROOTS[-1] + 1):
        expected = 5 if age in FIRST_ROOTS else at_most(8, 5, range(100, 100 + ROOT_PERIOD))
        assert len(due(8, age, 5, 0)) in ({5} if age in FIRST_ROOTS else range(expected + 1))


@pytest.mark.parametrize("matrices", [1, 5, 30])
def test_long_sides_begin_a_few_at_a_time(matrices):
    for base in LONG_FIRST_ROOTS:
        ages = range(base, base + SPREAD)
        assert turns(LONG, matrices, ages, 3) == [1] * matrices
        assert at_most(LONG, matrices, ages, 3) == math.ceil(matrices / SPREAD)
    between = set(range(LONG_FIRST_ROOTS[-1])) - {
        age for base in LONG_FIRST_ROOTS for age in range(base, base + SPREAD)
    }
    assert all(not due(LONG, age, matrices, 3) for age in between)


def test_stacks_of_one_matrix_take_turns():
    """By where they lie in the network."""
    ages = range(100, 100 + ROOT_PERIOD)
    when = [next(age for age in ages if due(8, age, 1, first)) for first in range(ROOT_PERIOD)]
    assert len(set(when)) == ROOT_PERIOD
