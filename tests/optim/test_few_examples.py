"""Few examples: counted as a set would count them, and what follows from it for a step."""

import copy
import math
import subprocess
import sys
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.optimizers import controller_file, copies, equal, mlp
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from l2o_graph.optim.examples import BY_HEART, Examples, _odd_weights
from l2o_graph.optim.optimizer import NGOptimizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return controller_file(tmp_path_factory.mktemp("zoo"))


def seen(batches: list) -> Examples:
    examples = Examples()
    for batch in batches:
        examples.see(batch)
        examples.end_step()
    return examples


def few_of(different: int, rows: int, numbers: int, parameters: float = math.inf) -> float:
    """By the formula, from exact counts."""
    many = 30 * numbers**2 if numbers < 10 else 300 * min(numbers, 32)
    again = (1 - different / rows) ** 3 / (1 + (different / (8 * parameters)) ** 2)
    return again / (1 + different / many) / (1 + (BY_HEART / different) ** 2)


def picked(x: Tensor, batch: int, steps: int, seed: int = 0) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [x[torch.randint(len(x), (batch,), generator=draws)] for _ in range(steps)]


KINDS = {
    "float32": lambda n: torch.randn(n, 10),
    "float64": lambda n: torch.randn(n, 10).double(),
    "bfloat16": lambda n: torch.randn(n, 10).bfloat16(),
    "complex": lambda n: torch.randn(n, 5, dtype=torch.complex64),
    "words": lambda n: torch.randint(50, (n, 10)),
    "images": lambda n: torch.randn(n, 3, 4, 4),
    "long": lambda n: torch.randn(n, 5000),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [100, 900])
def test_different_rows_are_counted_as_a_set_counts_them(kind, count):
    torch.manual_seed(0)
    x = KINDS[kind](count)
    batches = picked(x, 32, 60)
    exact = len({tuple(row.flatten().tolist()) for batch in batches for row in batch})
    found = seen(batches)
    assert found.rows == 32 * 60
    expected = few_of(exact, found.rows, x[0].numel() * (8 if kind == "words" else 1))
    assert found.few().item() == pytest.approx(expected, rel=0.06)
    assert expected > 0.05


def test_rows_are_known_again_in_any_place_of_any_batch():
    x = torch.randn(96, 7)
    one = seen([x])
    other = seen([*x[torch.randperm(96)].split(5)])
    assert torch.equal(one.marks, other.marks) and one.rows == other.rows
    x[3, 2] += 1e-6  # another row
    assert not torch.equal(one.marks, seen([x]).marks)


def test_defaults_of_torch_do_not_matter():
    batches = picked(torch.randn(100, 10), 32, 30)
    expected = seen(batches)
    few = expected.few()
    _odd_weights.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = seen(batches)
            assert torch.equal(found.marks, expected.marks) and torch.equal(found.few(), few)
    finally:
        torch.set_default_dtype(torch.float32)


def test_rows_are_the_same_in_any_order_of_memory_and_are_not_copied_whole():
    x = torch.randn(6, 3, 50, 50)
    moved = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen([moved]).marks, seen([x]).marks)
    wide = torch.randn(6, 2**20, 1).expand(6, 2**20, 2**20)  # of 24 terabytes
    assert seen([wide]).numbers == 2**40


def test_pairs_are_examples_where_their_halves_come_again():
    """As those of a user and a film: few users are not few ratings."""
    users, films = torch.randint(20, (6400,)), torch.randint(25, (6400,))
    exact = len(set(zip(users.tolist(), films.tolist(), strict=True)))
    pairs = list(zip(users.split(64), films.split(64), strict=True))
    expected = few_of(exact, 6400, 16)  # each index stands for eight numbers
    assert seen(pairs).few().item() == pytest.approx(expected, rel=0.1)
    named = [{"users": u, "and": {"films": f}, "mask": None} for u, f in pairs]
    assert torch.equal(seen(named).marks, seen(pairs).marks)
    assert not torch.equal(seen([u for u, _ in pairs]).marks, seen(pairs).marks)


def test_rows_inside_of_an_object_are_counted_as_those_outside():
    torch.manual_seed(0)
    batches = picked(torch.randn(200, 10), 50, 40)
    inside = seen([([], {"batch": SimpleNamespace(name="b", x=x)}) for x in batches])
    assert inside.few() == seen(batches).few() > 0.1


def test_ever_new_examples_and_one_small_batch_are_not_few():
    assert seen([torch.randn(32, 10) for _ in range(90)]).few().item() < 0.02
    assert seen([torch.eye(4)] * 500).few().item() < 0.01
    assert seen(picked(torch.randn(300, 10), 32, 400)).few().item() > 0.7


@pytest.mark.parametrize("frozen", [False, True])
def test_a_network_of_few_parameters_memorises_little(frozen, checkpoint):
    """Parameters count that are trained."""
    torch.manual_seed(0)
    x, few = torch.randn(500, 10), []
    for width in (2, 200):
        net = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 1))
        net[0].requires_grad_(not frozen)
        optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
        for batch in picked(x, 100, 60):
            net(batch).square().mean().backward()
            optimizer.step()
        parameters = sum(p.numel() for p in net.parameters() if p.requires_grad)
        few.append(optimizer._examples.few().item())
        assert few[-1] == pytest.approx(few_of(500, 6000, 10, parameters), rel=0.06)
    assert few[0] < 0.3 * few[1]


def test_counting_ends_where_examples_are_many(checkpoint):
    net = mlp()
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    for step in range(9):  # 3,840 are clearly many
        net(torch.randn(512, 4)).square().mean().backward()
        optimizer.step()
        assert optimizer._examples.is_over == (step >= 7)
    assert optimizer._examples.is_over and not net._forward_pre_hooks
    assert optimizer._examples.few() is None


def train(net: nn.Module, optimizer: NGOptimizer, x: Tensor, steps: range) -> None:
    y = torch.linspace(-1, 1, 3)
    for step in steps:
        (batch,) = picked(x, 16, 1, step)
        optimizer.zero_grad()
        F.mse_loss(net(batch), y.expand(16, 3)).backward()
        optimizer.step()


def test_calls_count_that_are_of_training_once_a_step(checkpoint):
    x, counts = torch.randn(100, 4), []
    for how in ("plain", "evaluated", "compiled", "compiled in place", "looked at twice"):
        net = mlp()
        if how == "compiled in place":
            net.compile(backend="eager")
        outer = torch.compile(net, backend="eager") if how == "compiled" else net
        optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=outer)
        for step in range(12):
            (batch,) = picked(x, 16, 1, step)
            if how == "evaluated":
                with torch.no_grad():
                    net(torch.randn(8, 4))
                net.eval()(torch.randn(8, 4))
                net.train()
            if how == "looked at twice":
                outer(batch)
            optimizer.zero_grad()
            outer(batch).square().mean().backward()
            optimizer.step()
        counts.append(optimizer._examples)
    assert all(c.rows == 192 for c in counts)
    assert all(torch.equal(c.marks, counts[0].marks) for c in counts)


@pytest.mark.parametrize("randomness", ["error", "different"])
def test_transforms_of_a_model_are_let_pass(randomness, checkpoint):
    net = mlp()
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    net(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    weights = {name: p.detach() for name, p in net.named_parameters()}
    x = torch.randn(5, 4)
    _odd_weights.cache_clear()  # made inside of vmap, they would be of no use outside
    found = vmap(lambda row: functional_call(net, weights, row[None]), randomness=randomness)(x)
    assert optimizer._examples.rows == 2
    torch.testing.assert_close(found[:, 0], net(x))
    grad(lambda w: functional_call(net, w, x.clone()).sum())(weights)
    assert optimizer._examples.rows == 7 and not optimizer._examples.is_over


# In a process of its own: torch 2.6 cannot compile the type checks of these tests.
COMPILED_AROUND = """
import torch
from torch import nn
from l2o_graph import NGOptimizer

net, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(8, 4)
net.compile(backend="eager")
optimizer = NGOptimizer(net.parameters(), model=net)
net(x).sum().backward()
optimizer.step()
whole = torch.compile(lambda x: net(x).sum(), backend="eager", fullgraph=True)
torch.testing.assert_close(whole(x), net(x).sum())
"""


def test_a_model_compiled_in_place_is_no_break_in_what_is_compiled_around_it():
    subprocess.run([sys.executable, "-c", COMPILED_AROUND], check=True)


def test_models_that_are_given_what_cannot_be_looked_at_are_trained(checkpoint):
    class Lazy(Mapping):
        """Whose values are not there before they are asked for in the right order."""

        def __getitem__(self, key):
            raise KeyError(key)

        def __iter__(self):
            return iter("ab")

        def __len__(self):
            return 2

    class Net(nn.Linear):
        def forward(self, x, others):
            return super().forward(x)

    net, x = Net(3, 2), torch.randn(5, 3)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    before = copies(net.parameters())
    net(x, Lazy()).sum().backward()
    optimizer.step()
    assert not equal(before, copies(net.parameters()))


def test_none_of_several_processes_counts(monkeypatch):
    for processes, rows in ((1, 8), (2, 0)):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda n=processes: n)
        examples = seen([torch.randn(8, 3)])
        assert examples.rows == rows and examples.is_over == (processes == 2)


def test_a_run_that_is_resumed_goes_on_with_its_count(checkpoint):
    torch.manual_seed(0)
    x, ends = torch.randn(120, 4), []
    for how in ("whole", "resumed", "without the count"):
        net = mlp()
        optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
        train(net, optimizer, x, range(37))  # between two evaluations of the count
        if how != "whole":
            saved, weights = optimizer.state_dict(), net.state_dict()
            if how == "without the count":
                del saved["examples"]
            net = mlp(seed=1)
            net.load_state_dict(weights)
            optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
            net(x[:2])
            optimizer.load_state_dict(saved)
        train(net, optimizer, x, range(37, 50))
        ends.append(copies(net.parameters()))
    assert equal(ends[0], ends[1]) and not equal(ends[0], ends[2])


def test_nothing_goes_on_with_a_count_without_a_model(checkpoint):
    net, x = mlp(), torch.randn(100, 4)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    train(net, optimizer, x, range(60))
    assert optimizer._examples.few() > 0.3
    other = NGOptimizer(list(net.parameters()), checkpoint=checkpoint)
    other.load_state_dict(optimizer.state_dict())
    assert other._examples.few() is None and "examples" not in str(other.explain())


@pytest.mark.parametrize(
    "state", [{"rows": 3}, 7, {"rows": "x"}, {"rows": 1, "marks": torch.ones(3)}]
)
def test_what_is_no_count_is_refused(state, checkpoint):
    net = mlp()
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    saved = optimizer.state_dict() | {"examples": state}
    with pytest.raises(ValueError, match="expected a count of examples under 'examples'"):
        optimizer.load_state_dict(saved)


def test_an_account_says_where_examples_are_few(checkpoint):
    for x, said in ((torch.randn(200, 4), "few (0."), (None, "")):
        net = mlp()
        optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
        for step in range(20):
            (batch,) = [torch.randn(16, 4)] if x is None else picked(x, 16, 1, step)
            net(batch).square().mean().backward()
            optimizer.step()
        text = str(optimizer.explain())
        assert said in text.splitlines()[-1] and ("distinct examples" in text) == bool(said)


# What follows ----------------------------------------------------------------------------------


def test_weights_decay_more_whose_size_matters():
    """Kernels whose loss depends on their size; not those before a norm, nor vectors."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    ).double()
    x = torch.randn(100, 4).double()
    ends = []
    for times in (0, 20):  # how often all examples were seen before
        for p, w in zip(net.parameters(), copies(net.parameters()), strict=True):
            p.data.copy_(w)
        before = copies(net.parameters())
        optimizer = NGOptimizer(net.parameters(), model=net)
        for _ in range(times):
            optimizer._examples.see(x.clone())
        optimizer.zero_grad()
        net(x.clone()).pow(2).sum(1).mean().backward()
        optimizer.step()
        ends.append(copies(net.parameters()))
        for p, w in zip(net.parameters(), before, strict=True):
            p.data.copy_(w)
    moved = [other - one for one, other in zip(*ends, strict=True)]
    kernel, last = before[0], before[3]
    assert moved[0].abs().max() < 1e-3 * kernel.abs().max() * moved[3].abs().max()
    assert all(not moved[i].any() for i in (1, 2, 4))
    part = -moved[3] / last  # of each weight, the same in all of a row
    assert (part > 0).all() and torch.allclose(part, part[:, :1].expand_as(part))


def _across(update: Tensor, weight: Tensor) -> float:
    """Norm of the part of an update that weight decay of rows does not make."""
    along = (update * weight).sum(-1, keepdim=True) / weight.square().sum(-1, keepdim=True)
    return (update - along * weight).norm().item()


def test_units_do_not_grow_with_weights_whose_size_matters():
    """As without weight decay on few examples; in front of a norm they grow as ever."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    ).double()
    x, ends = torch.randn(100, 4).double(), []
    for times in (0, 20):  # how often all examples were seen before
        other = copy.deepcopy(net)
        optimizer = NGOptimizer(other.parameters(), model=other)
        for grown in (1, 3):  # times as large at the second step
            with torch.no_grad():
                other[0].weight.mul_(grown), other[3].weight.mul_(grown)
            for _ in range(times):
                optimizer._examples.see(x.clone())
            optimizer.zero_grad()
            other(x.clone()).pow(2).sum(1).mean().backward()
            before = copies(other.parameters())
            optimizer.step()
        ends.append(
            [_across(p.detach() - w, w) for p, w in zip(other.parameters(), before, strict=True)]
        )
    many, few = ends
    assert few[0] == pytest.approx(many[0], rel=0.01)
    assert few[3] < 0.8 * many[3]


def test_tables_decay_where_examples_are_few_and_not_else():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.randint(40, (100, 3))
    unused = []
    for times in (0, 20):
        other = copy.deepcopy(net)
        optimizer = NGOptimizer(other.parameters(), model=other)
        for _ in range(times):
            optimizer._examples.see(x.clone())
        other(x.clone()).pow(2).sum(1).mean().backward()
        optimizer.step()
        unused.append(other[0].weight[40:] / net[0].weight[40:])
    assert torch.equal(unused[0], torch.ones(10, 4).double())
    assert (unused[1] < 1).all() and torch.allclose(unused[1], unused[1][0, 0].expand(10, 4))


def test_what_is_learned_of_few_examples_holds_for_others():
    """Where nothing tells that they are few, they are learned by heart."""
    torch.manual_seed(0)
    x, w = torch.randn(1128, 20), torch.randn(20)
    y = ((x @ w > 0) ^ (torch.rand(1128) < 0.1)).long()
    losses = []
    for watched in (True, False):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
        parameters = net.parameters() if watched else list(net.parameters())
        optimizer = NGOptimizer(parameters)
        for step in range(300):
            chosen = torch.randint(128, (32,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            F.cross_entropy(net(x[chosen]), y[chosen]).backward()
            optimizer.step()
        losses.append(F.cross_entropy(net(x[128:]), y[128:]).item())
    assert losses[0] < math.log(2) and losses[1] > 1.5 * losses[0]
