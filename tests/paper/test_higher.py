"""Inside ``higher`` the paper's rule makes the steps it makes outside, and is differentiated."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import higher
import pytest
import torch
from support.optimizers import (
    MODELS,
    cnn,
    controller_file,
    equal,
    mlp,
    random_checkpoint,
    state_tensors,
)
from support.rules import random_rule
from support.unroll import TinyProblem, flat
from torch import Tensor, nn

from l2o_graph import LearnedOptimizer, NGOptimizer, PaperOptimizer
from l2o_graph.paper.checkpoints import load_checkpoint
from l2o_graph.paper.rule import RuleConfig, UpdateRule
from l2o_graph.paper.step import State
from meta_train.unroll import unrolled

STEPS = 5
MakeOptimizer = Callable[[nn.Module], LearnedOptimizer]
EXAMPLE = Path(__file__).parents[2] / "examples" / "meta_learn_with_higher.py"


def rule_of(model: str) -> UpdateRule:
    return random_rule(RuleConfig(model, hidden=8, layers=2, inner=8))


def losses_of(module: nn.Module, step: int) -> Tensor:
    x, y = TinyProblem(module, spec=()).batch(step)
    return (module(x) - y).square().mean()


def plain(module: nn.Module, optimizer: LearnedOptimizer, steps=range(STEPS)) -> list[Tensor]:
    """All parameters after each step."""
    passed = []
    for step in steps:
        optimizer.zero_grad()
        losses_of(module, step).backward()
        optimizer.step()
        passed += [p.detach().clone() for p in module.parameters()]
    return passed


def inside(module: nn.Module, optimizer: LearnedOptimizer, steps=range(STEPS), **settings):
    """The same by way of ``higher``."""
    passed = []
    with higher.innerloop_ctx(module, optimizer, **settings) as (net, inner):
        for step in steps:
            inner.step(losses_of(net, step))
            passed += list(net.parameters())
    return passed


def agree(network: Callable[[], nn.Module], optimizer: MakeOptimizer, **settings) -> bool:
    """Whether both ways come by the same parameters, bit for bit."""
    one, other = network(), network()
    return equal(
        inside(one, optimizer(one), **settings), plain(other, optimizer(other))
    ) and not equal(other.parameters(), network().parameters())


# The trajectory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_the_trajectory_is_that_of_step_bit_for_bit(model, dtype, tmp_path):
    path = random_checkpoint(tmp_path, model=model)
    assert agree(
        lambda: mlp(dtype=dtype), lambda m: PaperOptimizer(m.parameters(), checkpoint=path)
    )


@pytest.mark.parametrize("track", [True, False])
def test_groups_have_their_own_settings(track, tmp_path):
    def optimizer(m):
        groups = [
            {"params": [m[2].bias, m[0].weight], "lr": 0.5, "weight_decay": 0.1},
            {"params": [m[2].weight], "lr": torch.tensor([0.2]), "maximize": True},
            {"params": [m[0].bias], "lr": 0.0},
        ]
        return PaperOptimizer(groups, checkpoint=random_checkpoint(tmp_path))

    assert agree(lambda: mlp(dtype=torch.float64), optimizer, track_higher_grads=track)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("with_model", [True, False])
def test_frozen_and_unused_parameters_stay_and_are_read(track, with_model, tmp_path):
    class Network(nn.Module):
        """The unused layer is of the shape of the last, as in a network with two outputs."""

        def __init__(self):
            super().__init__()
            self.body, self.unused = mlp(dtype=torch.float64), nn.Linear(6, 3).double()
            self.body[0].bias.requires_grad_(False)

        def forward(self, x):
            return self.body(x)

    def optimizer(network):
        # Of what the model is, and not of a group, the learned optimizer reads all the same.
        parameters = list(network.parameters())[: -1 if with_model else None]
        model = network if with_model else None
        made = PaperOptimizer(parameters, checkpoint=random_checkpoint(tmp_path), model=model)
        if with_model:  # what higher calls is a copy of the model
            made.read_structure((torch.ones(2, 4, dtype=torch.float64),))
        return made

    def network():
        torch.manual_seed(0)
        return Network()

    assert agree(network, optimizer, track_higher_grads=track)
    one = network()
    last, start = inside(one, optimizer(one), track_higher_grads=track)[-6:], one.parameters()
    moved = [not torch.equal(a, b) for a, b in zip(last, start, strict=True)]
    assert moved == [True, False, True, True, False, False]


def test_a_convolution_with_a_norm(tmp_path):
    def optimizer(m):
        return PaperOptimizer(m.parameters(), checkpoint=random_checkpoint(tmp_path))

    def network():
        return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Upsample(8), *cnn())

    assert agree(network, optimizer)


def test_it_goes_on_from_the_state_of_the_optimizer_and_leaves_it_alone(tmp_path):
    path = random_checkpoint(tmp_path)
    one, other = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    optimizers = [PaperOptimizer(m.parameters(), checkpoint=path) for m in (one, other)]
    plain(one, optimizers[0], range(2))
    expected = plain(other, optimizers[1])[2 * 4 :]
    before = [t.clone() for t in (*one.parameters(), *state_tensors(optimizers[0]))]
    assert equal(inside(one, optimizers[0], range(2, STEPS)), expected)
    assert equal((*one.parameters(), *state_tensors(optimizers[0])), before)


def test_a_gradient_that_is_not_finite_changes_nothing_and_warns(tmp_path):
    module = mlp()
    optimizer = PaperOptimizer(module.parameters(), checkpoint=random_checkpoint(tmp_path))
    with higher.innerloop_ctx(module, optimizer) as (net, inner):
        with pytest.warns(UserWarning, match="not finite"):
            inner.step(losses_of(net, 0) * torch.inf)
        assert equal(net.parameters(), module.parameters())
        inner.step(losses_of(net, 1))
        first = list(net.parameters())
    other = mlp()
    fresh = PaperOptimizer(other.parameters(), checkpoint=random_checkpoint(tmp_path))
    assert equal(first, plain(other, fresh, [1]))


def test_without_a_patched_model_parameters_are_passed_by_hand(tmp_path):
    module = mlp(dtype=torch.float64)
    settings = {"checkpoint": random_checkpoint(tmp_path)}
    now = [p.detach().clone().requires_grad_() for p in module.parameters()]
    inner = higher.create_diff_optim(PaperOptimizer, settings, now)
    problem = TinyProblem(module)
    for step in range(STEPS):
        now = list(inner.step(problem.loss(now, problem.batch(step)), now))
    expected = plain(module, PaperOptimizer(module.parameters(), **settings))[-4:]
    assert equal(now, expected)


# The meta-gradient ------------------------------------------------------------------------------


def through_time(rule: UpdateRule, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Of the last loss in the rule's weights and the initial parameters, without ``higher``."""
    problem = TinyProblem(module)
    start, weights = problem.start(), list(rule.parameters())
    losses = unrolled(rule, problem, start, [State.fresh(p) for p in start], STEPS)
    found = torch.autograd.grad(losses[-1], [*weights, *start], allow_unused=True)
    return flat(found[: len(weights)], weights), flat(found[len(weights) :], start)


def last_loss(module: nn.Module, optimizer: LearnedOptimizer, **settings) -> Tensor:
    with higher.innerloop_ctx(module, optimizer, **settings) as (net, inner):
        for step in range(STEPS):
            inner.step(losses_of(net, step))
        return losses_of(net, STEPS)


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_the_meta_gradient_is_that_of_the_second_order_mode(model, copied):
    rule, module = rule_of(model), mlp(dtype=torch.float64)
    optimizer = PaperOptimizer(module.parameters(), checkpoint=rule)
    last_loss(module, optimizer, copy_initial_weights=copied).backward()
    of_rule, of_start = through_time(rule, module)
    found = flat([p.grad for p in rule.parameters()], list(rule.parameters()))
    assert (found - of_rule).norm() < 1e-10 * of_rule.norm()
    assert of_rule.norm() > 1e-3
    if copied:
        assert all(p.grad is None for p in module.parameters())
    else:
        found = flat([p.grad for p in module.parameters()], list(module.parameters()))
        assert (found - of_start).norm() < 1e-10 * of_start.norm()


def test_of_a_rule_in_a_file_the_start_alone_has_a_gradient(tmp_path):
    path, module = random_checkpoint(tmp_path), mlp(dtype=torch.float64)
    optimizer = PaperOptimizer(module.parameters(), checkpoint=path)
    last_loss(module, optimizer, copy_initial_weights=False).backward()
    rule = load_checkpoint(path).rule.double().requires_grad_(True)
    _, expected = through_time(rule, module)
    found = flat([p.grad for p in module.parameters()], list(module.parameters()))
    assert (found - expected).norm() < 1e-10 * expected.norm()


def test_rates_and_decays_of_groups_are_differentiated_in():
    rule, settings = rule_of("ng_gnn"), torch.tensor([[0.9, 0.6], [0.0, 0.3]])

    def optimizer(module, values):
        halves = [{"params": layer.parameters()} for layer in (module[0], module[2])]
        for group, lr, decay in zip(halves, *values.tolist(), strict=True):
            group.update(lr=lr, weight_decay=decay)
        return PaperOptimizer(halves, checkpoint=rule)

    def outside(values):
        module = mlp(dtype=torch.float64)
        plain(module, optimizer(module, values))
        return losses_of(module, STEPS).item()

    overridden = settings.double().requires_grad_()
    override = {"lr": [*overridden[0]], "weight_decay": [*overridden[1]]}
    module = mlp(dtype=torch.float64)
    last_loss(module, optimizer(module, settings), override=override).backward()
    for i, j in ((0, 0), (0, 1), (1, 1)):
        by = torch.zeros(2, 2, dtype=torch.float64)
        by[i, j] = 1e-6
        slope = (outside(settings + by) - outside(settings - by)) / 2e-6
        assert overridden.grad[i, j].item() == pytest.approx(slope, rel=1e-5)
    assert overridden.grad[1, 0] != 0  # a decay of 0 has a slope too


@pytest.mark.parametrize("track", [True, False])
def test_a_step_keeps_something_for_backward_if_asked_to_alone(track):
    module, kept = mlp(dtype=torch.float64), []
    optimizer = PaperOptimizer(module.parameters(), checkpoint=rule_of("ng_gnn"))
    with higher.innerloop_ctx(module, optimizer, track_higher_grads=track) as (net, inner):
        for step in range(2):
            loss = losses_of(net, step)
            with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
                inner.step(loss)
        momenta = [of_one["momenta"] for of_one in inner.state[0].values()]
    assert [m.requires_grad for m in momenta] == [track] * 4
    assert bool(kept) == track


def test_a_rule_of_another_type_is_refused_and_not_copied():
    module = mlp(dtype=torch.float64)
    optimizer = PaperOptimizer(module.parameters(), checkpoint=rule_of("ng_t").float())
    expected = (
        r"PaperOptimizer: expected a rule in torch.float64 on cpu, .* found one in torch.float32"
    )
    with (
        higher.innerloop_ctx(module, optimizer) as (net, inner),
        pytest.raises(ValueError, match=expected),
    ):
        inner.step(losses_of(net, 0))
    with pytest.raises(ValueError, match=expected):
        plain(module, optimizer)


def test_step_uses_a_given_rule_as_it_is_now():
    rule, module, twin = rule_of("ng_gnn"), mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    optimizer = PaperOptimizer(module.parameters(), checkpoint=rule)
    plain(module, optimizer, [0])
    twin.load_state_dict(module.state_dict())
    with torch.no_grad():
        rule.head.layers[-1].bias.add_(1.0)
    fresh = PaperOptimizer(twin.parameters(), checkpoint=rule)
    fresh.load_state_dict(optimizer.state_dict())
    found = plain(module, optimizer, [1])
    assert equal(found, plain(twin, fresh, [1]))
    unchanged = mlp(dtype=torch.float64)
    before = PaperOptimizer(unchanged.parameters(), checkpoint=rule_of("ng_gnn"))
    assert not equal(found, plain(unchanged, before, [0, 1])[4:])
    assert "ng_gnn in memory" in repr(optimizer)


def test_ng_optimizer_is_refused_in_one_sentence(tmp_path):
    module = mlp()
    optimizer = NGOptimizer(module.parameters(), checkpoint=controller_file(tmp_path))
    expected = "higher cannot differentiate through NGOptimizer, .* use PaperOptimizer"
    with (
        pytest.raises(TypeError, match=expected),
        higher.innerloop_ctx(module, optimizer),
    ):
        raise AssertionError("not refused")


# How they come together -------------------------------------------------------------------------

LATE = """
import sys, torch
from l2o_graph import PaperOptimizer
from l2o_graph.rule import PAPER, untrained
model = torch.nn.Linear(3, 2)
optimizer = PaperOptimizer(model.parameters(), checkpoint=untrained(PAPER["ff"], 0))
assert not [name for name in sys.modules if name.startswith("higher")]
sys.modules["higher"] = None
try:
    import l2o_graph.higher_support
except ImportError as error:
    assert "l2o_graph[higher]" in str(error), error
del sys.modules["higher"]
import higher
try:
    higher.get_diff_optim(optimizer, model.parameters())
except ValueError as error:
    assert "not supported" in str(error), error
import l2o_graph.higher_support
higher.get_diff_optim(optimizer, model.parameters())
print("done")
"""


def test_higher_is_imported_by_those_who_ask_for_it_alone():
    run = [sys.executable, "-W", "ignore", "-c", LATE]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


def test_a_subclass_is_known_to_higher_once_there_is_one(tmp_path):
    class Own(PaperOptimizer):
        pass

    path = random_checkpoint(tmp_path)
    assert agree(lambda: mlp(dtype=torch.float64), lambda m: Own(m.parameters(), checkpoint=path))


def test_the_example_learns_to_learn():
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after = example.main(steps=10)
    assert after < 0.9 * before
