"""A step of NGOptimizer against a twin of one matrix at a time, after docs/rule.md."""

import math

import pytest
import torch
from scipy.linalg import fractional_matrix_power
from torch import Tensor, nn

from l2o_graph.layout.spec import NetSpec
from l2o_graph.optim import whitening
from l2o_graph.optim.blocks import KINDS, blocks_of
from l2o_graph.optim.controller import ControllerConfig, Learned, weights_from
from l2o_graph.optim.memory import arrange, gathered, scattered
from l2o_graph.optim.signals import KIND_UNIT
from l2o_graph.optim.step import advance
from l2o_graph.tracing.by_order import spec_of_module

STEPS = 14
ROOTS_AT = (0, 1, 3, 6, 10)
SILENT = ControllerConfig("none")


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def constant(answer: Tensor, first: Tensor) -> dict[str, Tensor]:
    """A controller that changes lengths alike whatever it sees, and starts at given ones.

    Args:
        answer: Sum of signals, two logits of shares, those of the power and of the decay.
        first: Of each kind.
    """
    weights = weights_from(SILENT, torch.zeros(1, SILENT.size, dtype=torch.float64))
    weights["change"][0, -len(KINDS) :] = answer[0] / KIND_UNIT  # one kind is 1, the others 0
    of_all = {"shares": answer[1:3] / 6, "power": answer[3:4] / 6, "decay": answer[4:] / 3}
    return (
        weights | {name: w[None] for name, w in of_all.items()} | {"first_length": first[None] / 6}
    )


def run(
    gradients: list[list[Tensor]],
    weights: dict[str, Tensor],
    horizon: float | None = None,
    spec: NetSpec | None = None,
    start: list[Tensor] | None = None,
    networks: int = 1,
):
    """First weights, and the updates of each step by parameter, of weights that follow them.

    Of several networks at once, each of these tensors has one more axis in front.
    """
    spec = spec or spec_of_module(network())
    start = start or [p.detach() for p in network().parameters()]
    if networks > 1:
        start = [p.expand(networks, *p.shape) for p in start]
        weights = {name: w.expand(networks, *w.shape[1:]) for name, w in weights.items()}
    memory = arrange(spec, blocks_of(spec), networks, like=torch.zeros(()).double())
    parameters, updates = start, []
    told = None if horizon is None else torch.tensor([horizon], dtype=torch.float64)
    for of_step in gradients:
        flat = dict(enumerate(g.reshape(networks, -1) for g in of_step))
        now = dict(enumerate(p.reshape(networks, -1) for p in parameters))
        learned = Learned.of(SILENT, weights)
        found, _ = advance(learned, memory, gathered(memory, flat), gathered(memory, now), told)
        by_parameter = scattered(memory, [u.clone() for u in found])
        updates.append([by_parameter[i].view(p.shape) for i, p in enumerate(parameters)])
        parameters = [p + u for p, u in zip(parameters, updates[-1], strict=True)]
    return start, updates


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def power_of(matrix: Tensor, power: float) -> Tensor:
    damped = matrix / matrix.diagonal().mean() + 1e-3 * torch.eye(len(matrix))
    return torch.from_numpy(fractional_matrix_power(damped.numpy(), -power).real)


class Twin:
    """One parameter, step after step.

    Args:
        weight: At the start.
        unit: Of its lengths.
        first: Logarithm of its first length over its unit.
        answer: As in ``constant``.
        horizon: Steps of the whole run, if told.
    """

    def __init__(self, weight, unit, first, answer, horizon=None):
        self.weight, self.unit, self.log_length = weight.clone(), unit, first
        self.rms = rms(weight)
        self.answer, self.horizon, self.age = answer.tolist(), horizon, 0
        self.fast = self.slow = torch.zeros_like(weight)
        self.left = self.right = self.square = 0.0
        self.recent = self.long = 0.0

    def step(self, g: Tensor, growth: float) -> Tensor:
        """The update, where weights call for lengths that many times the first ones."""
        t, a = self.age, self.answer
        self.fast, self.slow = 0.9 * self.fast + 0.1 * g, 0.99 * self.slow + 0.01 * g
        fast, slow = self.fast / (1 - 0.9 ** (t + 1)), self.slow / (1 - 0.99 ** (t + 1))
        shares = [0.1, 0.8 * math.exp(a[1]), 0.1 * math.exp(a[2])]
        mixed = (shares[0] * g + shares[1] * fast + shares[2] * slow) / sum(shares)
        new = max(0.05, 1 / (t + 1))
        if self.weight.dim() == 2:
            self.left = (1 - new) * self.left + new * g @ g.T
            self.right = (1 - new) * self.right + new * g.T @ g
            if t in ROOTS_AT:
                steady = min(float(fast.square().sum() / g.square().sum()), 1.0)
                p = 0.6 / (1 + math.exp(-a[3]) / 3) * (1 - steady / 2)
                self.roots = power_of(self.left, p), power_of(self.right, p)
            direction = self.roots[0] @ mixed @ self.roots[1]
        else:
            self.square = (1 - new) * self.square + new * g.square()
            root = self.square.sqrt()
            direction = mixed / (root + rms(root))
        change = 0.2 * math.tanh(0.2 * a[0])
        self.log_length = max(-9.0, min(0.35, (1 - 1 / 100) * self.log_length + change))
        falling = 1 / (1 + t / 300) if self.horizon is None else 1 - t / self.horizon
        schedule = (t + 1) / (t + 10) * falling
        growth = max(1.0, min(20.0, growth))
        length = self.unit * growth * schedule * math.exp(self.log_length)
        self.recent += max(0.1, 1 / (1 + t)) * (float(g.square().sum()) - self.recent)
        self.long += (float(g.square().sum()) - self.long) / (1 + t / 4)
        length *= math.sqrt(min(1.0, self.recent / self.long))
        update = -length * direction / direction.square().mean().sqrt()
        if self.weight.dim() == 2:
            decay = 0.1 * math.exp(2.5 * math.tanh(a[4]))
            part = decay * length / (growth * self.rms)
            update = update - min(part, 0.1) * self.weight
        self.weight, self.age = self.weight + update, t + 1
        return update


@pytest.mark.parametrize("horizon", [None, 40.0])
@pytest.mark.parametrize("seed", range(4))
def test_steps_are_those_of_the_formulas(seed, horizon):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    answer, first = 2 * normal(5), 0.6 * normal(len(KINDS))
    signal, noise = [normal(*p.shape) for p in network().parameters()], 0.5 * seed
    size = 0.7 if seed == 1 else 1.1  # of a gradient, in that of the one before
    gradients = [[size**t * (s + noise * normal(*s.shape)) for s in signal] for t in range(STEPS)]
    start, updates = run(gradients, constant(answer, first), horizon)

    def larger(parameters: list[Tensor]) -> float:
        """How much larger than torch's kernels are, which units of vectors follow."""
        kernels = [w for w in parameters if w.dim() == 2]
        logs = [math.log(rms(w) * math.sqrt(3 * w.shape[1])) for w in kernels]
        return math.exp(sum(logs) / len(logs))

    twins = [
        Twin(
            weight,
            0.025 * math.sqrt(3) * rms(weight) if weight.dim() == 2 else 0.005 * larger(start),
            float(first[KINDS.index(kind)]),
            answer,
            horizon,
        )
        for weight, kind in zip(start, ["first", "vector", "last", "vector"], strict=True)
    ]
    for of_step, found in zip(gradients, updates, strict=True):
        now = [twin.weight for twin in twins]
        of_all = larger(now) / larger(start)
        for i, twin in enumerate(twins):
            growth = rms(now[i]) / twin.rms if now[i].dim() == 2 else of_all
            expected = twin.step(of_step[i], growth)
            torch.testing.assert_close(found[i], expected, rtol=1e-6, atol=1e-9)


def test_weights_that_go_the_same_way_for_ever_stop_where_the_decay_says():
    """At 1 / c times their first RMS, where c is above 1; biases do not decay, and go on."""
    answer = torch.zeros(5, dtype=torch.float64)
    answer[0] = answer[4] = 10.0  # as long as steps may be, so that they are soon there
    gradient = [torch.ones(p.shape).double() for p in network().parameters()]
    start, updates = run([gradient] * 150, constant(answer, torch.zeros(6).double()))
    final = [sum(us, w) for w, *us in zip(start, *updates, strict=True)]
    for before, after in zip(start, final, strict=True):
        if before.dim() == 2:
            limit = float(before.square().mean().sqrt()) / (0.1 * math.exp(2.5))
            assert float(after.mean()) == pytest.approx(-limit, rel=0.05)
    for i in (1, 3):
        torch.testing.assert_close(updates[-1][i] / updates[-1][i].abs(), -gradient[i])


def test_a_matrix_without_a_gradient_stays_as_it_is():
    """Not even its weights decay."""
    gradients = [torch.randn(p.shape).double() for p in network().parameters()]
    gradients[0] = torch.zeros_like(gradients[0])
    _, updates = run([gradients] * 3, constant(torch.zeros(5).double(), torch.zeros(6).double()))
    for of_step in updates:
        assert not of_step[0].any()
        assert of_step[2].all()


@pytest.mark.parametrize("token_first", [True, False])
def test_what_decays_does_so_wherever_it_lies_among_vectors(token_first):
    """A matrix of one row outside of the graph, such as a class token, shares their stack."""
    shapes = ((1, 4), (4,)) if token_first else ((4,), (1, 4))
    spec = NetSpec(("a", "b"), shapes, (), (), (), (0, 1))
    start = [torch.ones(shape).double() for shape in shapes]
    to_and_fro = [torch.tensor([1.0, -1.0, 1.0, -1.0]).double().view(shape) for shape in shapes]
    still = constant(torch.zeros(5).double(), torch.zeros(6).double())
    _, updates = run([to_and_fro], still, spec=spec, start=start)
    for shape, update in zip(shapes, updates[0], strict=True):
        decay = 0.1 * 0.05 / 10 if len(shape) == 2 else 0.0
        assert float(update.mean()) == pytest.approx(-decay, abs=1e-12)


@pytest.mark.parametrize(
    "order, alike",
    [
        ([1, 0, 2, 3, 4, 5, 6, 7], True),  # within a block
        ([4, 5, 6, 7, 0, 1, 2, 3], True),  # whole blocks
        ([4, 1, 2, 3, 0, 5, 6, 7], False),  # between them
    ],
)
def test_in_blocks_neurons_may_be_permuted_within_them_and_blocks_as_a_whole(
    order, alike, monkeypatch
):
    monkeypatch.setattr(whitening, "LONGEST_BLOCK", 4)
    monkeypatch.setattr(whitening, "SHORTEST_BLOCK", 2)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    spec, start = spec_of_module(net), [p.detach() for p in net.parameters()]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(5)]

    def permuted(tensors: list[Tensor]) -> list[Tensor]:
        first, bias, last, of_last = tensors
        return [first[order], bias[order], last[:, order], of_last]

    still = constant(torch.zeros(5).double(), torch.zeros(6).double())
    _, expected = run(gradients, still, spec=spec, start=start)
    _, found = run([permuted(g) for g in gradients], still, spec=spec, start=permuted(start))
    apart = max(
        float((a - b).abs().max() / b.abs().max())
        for of_found, of_expected in zip(found, expected, strict=True)
        for a, b in zip(of_found, permuted(of_expected), strict=True)
    )
    assert apart < 1e-9 if alike else apart > 1e-2


def test_steps_fade_with_gradients_and_not_with_their_scale():
    """Where they fall within the run, not where the loss has other units or they grow."""
    torch.manual_seed(0)
    signal = [torch.randn(p.shape).double() for p in network().parameters()]
    weights = constant(torch.zeros(5).double(), torch.zeros(6).double())

    def scaled(*sizes: float) -> list[Tensor]:
        return [torch.stack([size * s for size in sizes]) for s in signal]

    # Five networks: one whose gradients stay, two where they change, two with others throughout.
    earlier, later = scaled(1, 1, 1, 1e-3, 1e3), scaled(1, 1e-3, 1e3, 1e-3, 1e3)
    _, updates = run([earlier] * 100 + [later] * 100, weights, networks=5)
    for update in updates[-1]:
        same, fallen, grown, *in_other_units = map(rms, update)
        assert in_other_units == pytest.approx([same] * 2, rel=1e-3)
        # The last quarter of a run of 200 steps still has a part of the first hundred in it, and
        # so has the mean over ten.
        assert 1e-3 <= fallen / same < 0.05
        assert 1 - 1e-9 < grown / same < 1.1
