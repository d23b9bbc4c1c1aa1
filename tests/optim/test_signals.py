"""What a controller sees: against a twin of one row at a time, and free of all scales."""

import functools
import math

import pytest
import torch
from support.optimizers import READERS
from torch import Tensor, nn

from l2o_graph import NGOptimizer
from l2o_graph.optim import step
from l2o_graph.optim.blocks import KINDS, MATRICES, blocks_of
from l2o_graph.optim.controller import ControllerConfig, Learned, weights_from
from l2o_graph.optim.memory import arrange, gathered, scattered
from l2o_graph.optim.signals import (
    AGAINST_SUM,
    FIRST_LOG_UNIT,
    LOG_LENGTH,
    MOST,
    NUM_SIGNALS,
    OLDEST,
    corrections,
    cosine,
    first_log_unit,
    log_growth,
    observe,
    remaining,
)
from l2o_graph.tracing.by_order import spec_of_module

STEPS = 6


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False),
        nn.Flatten(), nn.Linear(3 * 4, 2),
    ).double()  # fmt: skip


def without_biases() -> nn.Module:
    layers = nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)
    return nn.Sequential(*layers).double()


class Run:
    """Some steps from given gradients, and all that was seen on the way.

    Attributes:
        signals: Of each step, (1, R, F).
        updates: Of each step, of each parameter.
        log_lengths: Before each step, (R,).
    """

    def __init__(self, make=network, reader="none", weight=1.0, gradient=1.0, horizon=None):
        torch.manual_seed(0)
        net = make()
        self.spec, config = spec_of_module(net), ControllerConfig(reader, channels=2)
        self.memory = arrange(self.spec, blocks_of(self.spec), 1, like=torch.zeros(()).double())
        vector = 0.4 * torch.randn(1, config.size, dtype=torch.float64)
        weights, count = weights_from(config, vector), len(self.spec.shapes)
        # A number for all, or one for each parameter.
        of_weight = weight if isinstance(weight, list) else [weight] * count
        of_gradient = gradient if isinstance(gradient, list) else [gradient] * count
        # No weight is 0 or 1, and none of their squares 0.
        self.start = [p.detach() + 0.1 * torch.randn_like(p) for p in net.parameters()]
        parameters = [a * p for a, p in zip(of_weight, self.start, strict=True)]
        told = None if horizon is None else torch.tensor([horizon], dtype=torch.float64)
        self.signals, self.updates, self.log_lengths = [], [], []
        self.gradients, self.weights = [], []

        def seen(*arguments):
            self.log_lengths.append(self.memory.history.rows[LOG_LENGTH, 0].clone())
            self.signals.append(observe(*arguments))
            return self.signals[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "observe", seen)
            for _ in range(STEPS):
                gradients = [
                    a * torch.randn_like(p) for a, p in zip(of_gradient, self.start, strict=True)
                ]
                self.gradients.append(self.flat(gradients))
                self.weights.append(self.flat(parameters))
                args = self.memory, self.gradients[-1], self.weights[-1], told
                updates, _ = step.advance(Learned.of(config, weights), *args)
                found = scattered(self.memory, updates)
                self.updates.append(
                    [found[i].view(p.shape).clone() for i, p in enumerate(parameters)]
                )
                parameters = [p + u for p, u in zip(parameters, self.updates[-1], strict=True)]

    def flat(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t.clone() for t in gathered(self.memory, [t.reshape(1, -1) for t in tensors])]


run_of = functools.cache(Run)  # which is looked at, and goes no further


def close(found: Run, expected: Run, factors: list[float]) -> None:
    for a, b in zip(found.signals, expected.signals, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    for at, (a, b) in enumerate(zip(found.updates, expected.updates, strict=True)):
        for u, v, factor in zip(a, b, factors, strict=True):
            torch.testing.assert_close(u, factor * v, rtol=1e-6, atol=1e-9 * factor), at


# No scale is seen -------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-8, 1e-3, 1e5])
@pytest.mark.parametrize("reader", READERS)
def test_of_a_loss_in_other_units_nothing_changes(reader, factor):
    expected = run_of(reader=reader)
    close(Run(reader=reader, gradient=factor), expected, [1.0] * len(expected.start))


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("reader", READERS)
def test_of_weights_in_other_units_lengths_are_in_these_units(reader, factor):
    """With w = w' / a and so a gradient of g / a."""
    expected = run_of(reader=reader)
    found = Run(reader=reader, weight=factor, gradient=1 / factor)
    close(found, expected, [factor] * len(expected.start))


@pytest.mark.parametrize("reader", READERS)
def test_kernels_may_have_somewhat_other_units_than_each_other(reader):
    factors, expected = [0.6, 1.8], run_of(without_biases, reader)
    inverse = [1 / factor for factor in factors]
    found = Run(without_biases, reader, weight=factors, gradient=inverse)
    close(found, expected, factors)


def first_units(sizes: list[float], scale: float = 1.0) -> Tensor:
    """First unit of each layer of a chain, over that of torch's initialisation."""
    net = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in sizes]).double()
    spec = spec_of_module(net)
    constants = arrange(spec, blocks_of(spec), 1, like=torch.zeros(()).double()).constants
    rms = scale * torch.tensor(sizes, dtype=torch.float64) / math.sqrt(3 * 8)
    found = first_log_unit((64 * rms.square())[None], constants)[0].exp()
    return found / (0.025 / math.sqrt(8) * scale)


def test_kernels_of_like_size_have_units_of_their_own_weights():
    sizes = [1.0, 0.26, 3.0, 1.0]
    torch.testing.assert_close(first_units(sizes), torch.tensor(sizes).double())
    # Most kernels of a SIREN are small, and the first is not.
    torch.testing.assert_close(first_units([8.0, 1, 1, 1]), torch.tensor([8.0, 1, 1, 1]).double())


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_a_far_smaller_kernel_starts_as_if_it_were_zero(scale):
    units = [first_units([1.0, 1.0, size], scale)[-1].item() for size in (0, 1e-9, 0.01, 0.1)]
    assert units == pytest.approx([1, 1, 0.97, 0.7])
    others = first_units([1.0, 1.0, 0.01], scale)[:2]
    torch.testing.assert_close(others, torch.ones(2).double())
    before, after = (first_units([1.0, 1.0, size], scale)[-1] for size in (0.2499, 0.2501))
    assert before == pytest.approx(after.item(), rel=2e-3), "no jump"
    of_two = first_units([1.0, 0.01], scale)
    assert of_two.tolist() == pytest.approx([1, 0.97])


def test_a_last_layer_that_starts_near_zero_learns_as_one_that_starts_at_zero():
    def loss_at_the_end(std: float) -> float:
        torch.manual_seed(0)
        x = torch.randn(512, 16)
        y = (x[:, :8] * x[:, 8:]).sum(1, keepdim=True)
        net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
        nn.init.normal_(net[2].weight, std=std)
        opt = NGOptimizer(net.parameters(), model=net)
        for i in range(120):
            rows = slice(64 * (i % 8), 64 * (i % 8) + 64)
            loss = (net(x[rows]) - y[rows]).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
        return (net(x) - y).square().mean().item()

    assert loss_at_the_end(1e-4) < 1.2 * loss_at_the_end(0.0)


def test_units_of_a_single_neuron_are_seen():
    one = torch.tensor([10.0, 1.0, 1.0, 1.0, 1.0])[:, None]
    expected, found = run_of(without_biases), Run(without_biases, weight=[one, 1.0])
    assert (found.signals[-1] - expected.signals[-1]).abs().max() > 0.01


# The slow twin ----------------------------------------------------------------------------------


def rows_of(run: Run, stacks: list[Tensor]) -> list[tuple[int, str, list[float]]]:
    """Of each row its matrix, its kind and its numbers, without the zeros behind short ones."""
    answer, matrix = [], 0
    for stack, numbers in zip(run.memory.stacks, stacks, strict=True):
        at = 0
        for block in stack.blocks:
            groups, rows, columns = block.matrix
            for _ in range(groups):
                for r in range(rows):
                    answer.append((matrix, block.kind, numbers[at, r, :columns].tolist()))
                at, matrix = at + 1, matrix + 1
    return answer


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def averaged(history: list[float], decay: float) -> float:
    answer = 0.0
    for x in history:
        answer = decay * answer + (1 - decay) * x
    return answer


def slow_cosines(products, gradients, updates, age: int) -> list[float]:
    """Of all steps so far, averaged at three decays, in their units."""
    cosines = [0.0]
    for t in range(1, age + 1):
        cosines.append(-products[t] / math.sqrt(gradients[t] * updates[t - 1]))
    units = (0.5, 6), (0.9, 10), (0.99, 14)
    return [u * averaged(cosines, d) / (1 - d ** max(age, 1)) for d, u in units]


def bounded(x: float) -> float:
    return min(max(x, -MOST), MOST)


def slow_growth(run: Run, age: int, matrix: int, kind: str) -> float:
    """Logarithm of how much larger weights are than at first; vectors follow all kernels."""

    def log_rms(at: int, m: int) -> float:
        rows = [row for n, _, row in rows_of(run, run.weights[at]) if n == m]
        return 0.5 * math.log(sum(dot(r, r) for r in rows) / sum(len(r) for r in rows))

    kernels = {n for n, k, _ in rows_of(run, run.weights[0]) if k in MATRICES}
    followed = kernels if kind == "vector" else {matrix}
    grown = [log_rms(age, m) - log_rms(0, m) for m in followed]
    return min(max(sum(grown) / len(grown), 0.0), math.log(20))


def slow_signals(run: Run, age: int) -> Tensor:
    """Signals of all rows at one step, from the whole history."""
    gradients = [rows_of(run, g) for g in run.gradients[: age + 1]]
    updates = [rows_of(run, run.flat(u)) for u in run.updates[:age]]
    count = len(gradients[0])
    matrices = 1 + gradients[0][-1][0]
    products = [
        [0.0] * count,
        *(
            [dot(g[r][2], u[r][2]) for r in range(count)]
            for g, u in zip(gradients[1:], updates, strict=True)
        ),
    ]
    g2 = [[dot(row, row) for _, _, row in g] for g in gradients]
    u2 = [[dot(row, row) for _, _, row in u] for u in updates]

    def of_matrix(values: list[list[float]], m: int) -> list[float]:
        return [sum(v[r] for r in range(count) if gradients[0][r][0] == m) for v in values]

    tensor_cosines = [
        slow_cosines(of_matrix(products, m), of_matrix(g2, m), of_matrix(u2, m), age)
        for m in range(matrices)
    ]
    ratios = []
    for r in range(count):
        n = len(gradients[0][r][2])
        series = [[g[r][2][i] for g in gradients] for i in range(n)]
        fast, slow = (
            sum((averaged(x, d) / (1 - d ** (age + 1))) ** 2 for x in series) for d in (0.9, 0.99)
        )
        now, last, first = g2[age][r], g2[max(age - 1, 0)][r], g2[0][r]
        pairs = [(fast, now, 2), (slow, now, 2), (slow, fast, 1), (now, last, 1), (now, first, 3)]
        ratios.append([bounded(0.5 * math.log(a / b) / unit) for a, b, unit in pairs])
    growth = []
    for m in range(matrices):
        own = [ratios[r][3] for r in range(count) if gradients[0][r][0] == m]
        growth.append(sum(own) / len(own))
    of_network = [sum(c[k] for c in tensor_cosines) / matrices for k in (1, 2)]
    of_network.append(sum(growth) / matrices)
    answer = []
    for r, (m, kind, weights) in enumerate(rows_of(run, run.weights[age])):
        log_length = run.log_lengths[age][r].item()
        log_growth = slow_growth(run, age, m, kind)
        log_unit = run.memory.history.tensors[FIRST_LOG_UNIT, 0, m].item() + log_growth
        rms = math.sqrt(dot(weights, weights) / len(weights))
        of_row = [[v[r] for v in values] for values in (products, g2, u2)]
        answer.append(
            [
                *slow_cosines(*of_row, age), *tensor_cosines[m], *ratios[r], *of_network,
                bounded((log_length + log_unit - math.log(rms)) / 8), log_length / 4,
                log_growth / 2, math.log((age + 1) / 100) / 6,
                *((kind == known) / 2 for known in KINDS),
            ]
        )  # fmt: skip
    return torch.tensor(answer, dtype=torch.float64)


def test_signals_are_those_of_a_loop_over_rows():
    run = Run()
    for age in range(STEPS):
        (found,), expected = run.signals[age], slow_signals(run, age)
        assert found.shape == expected.shape == (len(run.log_lengths[0]), NUM_SIGNALS)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


# Parts ------------------------------------------------------------------------------------------


def sign_of(gradient: Tensor, last: Tensor) -> float:
    sums = (gradient * last).sum(), gradient.square().sum(), last.square().sum()
    return cosine(*sums).item()


def test_a_cosine_says_whether_the_step_could_have_been_longer():
    down = -torch.randn(9, dtype=torch.float64)
    assert sign_of(-3 * down, 0.1 * down) == pytest.approx(1)  # the slope is still there
    assert sign_of(2 * down, 0.1 * down) == pytest.approx(-1)  # it went past the bottom
    assert sign_of(down, torch.zeros(9)) == 0
    assert sign_of(torch.zeros(9), down) == 0
    faint, step = torch.full((9,), 1e-23), torch.full((9,), -1e-3)  # squares of 1e-46 are 0
    assert sign_of(faint, step) == 0
    assert sign_of(1e5 * faint, step) == pytest.approx(1)
    other = torch.randn(9, dtype=torch.float64)
    expected = -torch.cosine_similarity(other, down, dim=0).item()
    assert sign_of(other, down) == pytest.approx(expected)


def test_averages_of_the_same_are_the_same_once_corrected():
    memory = Run().memory
    ages = torch.arange(5.0, dtype=torch.float64)
    averages = [[1 - decay ** (t + 1) for t in range(5)] for decay in (0.9, 0.99)]
    found = torch.tensor(averages) / corrections(ages, memory.constants)
    torch.testing.assert_close(found, torch.ones(2, 5, dtype=torch.float64))


def test_what_is_ahead_ends_above_zero():
    horizon = torch.tensor([4.0, 100.0])
    for age, expected in ((0, [1, 1]), (2, [1 / 2, 0.98]), (4, [1 / 4, 0.96]), (9, [1 / 4, 0.91])):
        found = remaining(horizon, torch.full((3,), float(age)))
        torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype)[:, None])


def test_whoever_is_told_the_end_goes_shorter_to_it_and_sees_what_others_see():
    """Lengths fall linearly to the end, and as 1 / t where it is not told, or as 0."""
    told, untold, zero = Run(horizon=float(STEPS)), Run(), Run(horizon=0.0)
    assert torch.equal(told.signals[0], untold.signals[0])
    assert torch.equal(zero.signals[-1], untold.signals[-1])
    ages = torch.arange(float(STEPS))
    falling = [step._schedule(ages[t : t + 1], torch.tensor([STEPS, 0.0])) for t in range(STEPS)]
    warm = (ages + 1) / (ages + step.GROWN_AFTER)
    found = torch.cat(falling, 1)
    torch.testing.assert_close(found[0], warm * (1 - ages / STEPS))
    torch.testing.assert_close(found[1], warm / (1 + ages / step.HALVED_AFTER))
    for a, b in zip(told.updates[0], untold.updates[0], strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(told.updates[-1][0], untold.updates[-1][0], rtol=0.1)


def test_signals_stay_bounded_when_gradients_come_and_go():
    """Rows without a gradient, one of 1e12 after one of 1, and a run that is very old."""
    run = Run()
    memory = run.memory
    memory.history.ages += 100 * OLDEST
    for scale in (0.0, 1e12, 1e-12):
        sums = scale * torch.rand(6, *memory.history.rows[0].shape, dtype=torch.float64)
        sums[AGAINST_SUM] = 0
        of_matrices = step._over_rows(memory, sums)
        correction = corrections(memory.history.ages, memory.constants)
        weight = torch.full_like(memory.history.tensors[0], scale)
        growth = log_growth(weight, memory.history, memory.constants)
        assert growth.min() >= 0
        found = observe(sums, of_matrices, correction, memory.history, memory.constants, growth)
        assert found.isfinite().all() and found.abs().max() <= MOST
