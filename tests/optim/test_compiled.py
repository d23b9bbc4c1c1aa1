"""A step inside of what torch.compile compiles is the step that it is outside, to the bit."""

import logging
import subprocess
import sys

import pytest
import torch
from support.optimizers import cnn, controller_file, equal, mlp, state_tensors
from torch import nn

from l2o_graph.optim.optimizer import NGOptimizer

STEPS = 20
SHAPES = {mlp: (4,), cnn: (1, 8, 8)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return controller_file(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(autouse=True)
def _compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain(net, optimizer):
    return optimizer.step


def compiled_step(net, optimizer):
    return torch.compile(optimizer.step)


def trained(make, checkpoint, how, step_of=plain, **options):
    """A network after some steps, and what trained it."""
    net = make()
    told = net if how == "model" else None
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=told, **options)
    step, draws = step_of(net, optimizer), torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(6, *SHAPES[make], generator=draws)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(6) % 3).backward()
        step()
    return net, optimizer


@pytest.mark.parametrize("how", ["plain", "model"])
@pytest.mark.parametrize("make", SHAPES)
def test_a_compiled_step_is_the_step(make, how, checkpoint, caplog):
    net, optimizer = trained(make, checkpoint, how)
    with caplog.at_level(logging.WARNING):
        other, compiled = trained(make, checkpoint, how, compiled_step)
    assert equal(net.parameters(), other.parameters())
    assert equal(state_tensors(optimizer), state_tensors(compiled))
    assert "recompile_limit" not in caplog.text


# Of torch, about its own wrapper of a step and about the loss.
@pytest.mark.filterwarnings("ignore:.*(non-leaf Tensor|requires_grad=True to a scalar)")
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_whole_training_step_may_be_compiled(with_closure, checkpoint):
    """In the backend that keeps torch's own kernels, so that gradients are the same."""

    def train(compile_it):
        net = mlp()
        # In a list, as what is compiled does not show the model at work.
        optimizer = NGOptimizer(list(net.parameters()), checkpoint=checkpoint)

        def loss_of(x):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            return loss

        def step(x):
            if with_closure:
                return optimizer.step(lambda: loss_of(x))
            loss = loss_of(x)
            optimizer.step()
            return loss

        run = torch.compile(step, backend="eager") if compile_it else step
        draws = torch.Generator().manual_seed(1)
        losses = [float(run(torch.randn(6, 4, generator=draws))) for _ in range(STEPS)]
        return losses, list(net.parameters())

    (losses, weights), (others, compiled) = train(False), train(True)
    assert losses == pytest.approx(others, rel=1e-5)
    torch.testing.assert_close(weights, compiled)


def test_importing_the_package_does_not_import_the_compiler():
    code = "import sys, l2o_graph; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
