"""A model that nobody gave: it is found by the generator that its parameters come from."""

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.optimizers import random_checkpoint
from torch import Tensor, nn

from l2o_graph import NGOptimizer, PaperOptimizer


class Attention(nn.Module):
    """What no order of parameters tells: queries, keys and values of one weight, and a sum."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(8, 2), nn.Linear(3, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.attend(x, x, x, need_weights=False)[0])


Params = Callable[[nn.Module], Any]


def made(params: Params, give: bool = False) -> tuple[nn.Module, NGOptimizer]:
    torch.manual_seed(0)
    net = Attention()
    return net, NGOptimizer(params(net), model=net if give else None)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 8) -> list[Tensor]:
    dice = torch.Generator().manual_seed(1)
    x = torch.randn(80, 4, 3, generator=dice)
    for step in range(steps):
        optimizer.zero_grad()
        batch = x[step % 2 * 40 :][:40]
        (net(batch) - batch[..., :2].sin()).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


GENERATORS: dict[str, Params] = {
    "parameters": nn.Module.parameters,
    "named": nn.Module.named_parameters,
    "filtered": lambda net: filter(lambda p: p.requires_grad, net.parameters()),
    "expression": lambda net: (p for p in net.parameters()),
}


@pytest.fixture(scope="module")
def given() -> list[Tensor]:
    """Weights that were trained by an optimizer that was given the model."""
    return train(*made(nn.Module.parameters, give=True))


@pytest.mark.parametrize("params", GENERATORS.values(), ids=GENERATORS)
def test_it_trains_as_one_that_was_given(params, given):
    net, optimizer = made(params)
    assert all(map(torch.equal, train(net, optimizer), given))
    assert optimizer.state_dict()["examples"]["rows"] == 8 * 40, "and its examples are counted"


def test_a_list_does_not_tell(given):
    in_a_list = train(*made(lambda net: list(net.parameters())))
    assert not all(map(torch.equal, in_a_list, given)), "a list does not tell whose they are"


def test_the_optimizer_of_the_paper_finds_it_too(tmp_path):
    path = random_checkpoint(tmp_path)
    answers = []
    for give in (True, False):
        net, _ = made(nn.Module.parameters)
        optimizer = PaperOptimizer(net.parameters(), checkpoint=path, model=net if give else None)
        answers.append(train(net, optimizer, 2))
    assert all(map(torch.equal, *answers))


def test_a_resumed_run_goes_on_to_the_bit():
    net, optimizer = made(nn.Module.parameters)
    train(net, optimizer)
    other, resumed = made(nn.Module.parameters)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, train(net, optimizer), train(other, resumed)))


def test_copies_and_pickles_hold_no_model_and_make_the_same_steps():
    net, optimizer = made(nn.Module.parameters)
    net.register_forward_pre_hook(lambda *_: None)  # which cannot be pickled
    train(net, optimizer)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for p, q in zip(*(o.param_groups[0]["params"] for o in (optimizer, other)), strict=True):
            p.grad = torch.ones_like(p).cumsum(0)
            q.grad = p.grad.clone()
        before = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        other.step()
        mine, theirs = (o.param_groups[0]["params"] for o in (optimizer, other))
        assert all(map(torch.equal, mine, theirs))
        net.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])


@pytest.mark.parametrize("steps", [0, 8])
def test_copied_together_they_go_on_together(steps):
    net, optimizer = made(nn.Module.parameters)
    train(net, optimizer, steps)
    other, its = copy.deepcopy((net, optimizer))
    assert all(map(torch.equal, train(net, optimizer), train(other, its)))


def test_one_that_nobody_calls_is_forgotten_without_a_word():
    nets = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = NGOptimizer(nets.parameters())
        assert nets._forward_pre_hooks
        for _ in range(3):
            optimizer.zero_grad()
            nets[1](nets[0](torch.randn(5, 3)).tanh()).square().mean().backward()
            optimizer.step()
    assert not nets._forward_pre_hooks and not nets._forward_hooks
    assert "0.weight" not in str(optimizer.explain())


def test_parameters_of_another_one_may_join():
    net, other = Attention(), nn.Linear(2, 2)
    optimizer = NGOptimizer(net.parameters())
    optimizer.add_param_group({"params": other.parameters()})
    assert not net._forward_pre_hooks
    optimizer.zero_grad()
    before = other.weight.detach().clone()
    other(net(torch.randn(2, 4, 3))).square().mean().backward()
    optimizer.step()
    assert not torch.equal(other.weight, before)


# By itself, as types are not checked there: what checks them cannot be compiled by all torches.
COMPILED = """
import warnings
import torch
from torch import nn
from l2o_graph import NGOptimizer

for give in (False, True):
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    graphs = []
    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    optimizer = NGOptimizer(net.parameters(), model=net if give else None)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(10):
            optimizer.zero_grad()
            compiled(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
    print(len(graphs), sum("compiled code" in str(w.message) for w in said))
"""


def test_what_is_compiled_around_it_is_compiled_once():
    """Who gave the model hears that it cannot be seen; who gave none hears nothing."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 0", "1 1"]


def test_scripted_modules_and_other_iterators_are_none():
    scripted = torch.jit.script(nn.Linear(3, 2))
    layer = nn.Linear(3, 2)
    for params in (scripted.parameters(), iter([layer.weight]), (p for p in [layer.weight])):
        optimizer = NGOptimizer(params)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()


def test_without_a_model_there_is_nothing_to_read():
    optimizer = NGOptimizer(list(nn.Linear(3, 2).parameters()))
    with pytest.raises(RuntimeError, match=r"NGOptimizer: expected a model to read.*pass model="):
        optimizer.read_structure((torch.ones(1, 3),))
