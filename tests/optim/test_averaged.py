"""Averaged weights: what they are, and that those in training come back whatever happens."""

import copy

import pytest
import torch
from support.optimizers import controller_file, copies, equal, give_gradients, mlp, run
from torch import nn

from l2o_graph.optim.averaging import follow
from l2o_graph.optim.optimizer import NGOptimizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return controller_file(tmp_path_factory.mktemp("zoo"))


def trained(checkpoint, steps: int = 3, dtype: torch.dtype = torch.float32):
    model = mlp(dtype=dtype)
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    run(optimizer, range(steps))
    return model, optimizer


def test_weights_lie_between_where_updates_lead_and_the_mean_of_that():
    """Against the three sequences, each by its own formula."""
    torch.manual_seed(0)
    y, offset = torch.randn(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    z, x = y.clone(), y.clone()
    for t in range(400):
        update = torch.randn(5, dtype=torch.float64) / (t + 1)
        follow([y], [offset], [update], t)
        z = z + update
        x = x + (z - x) / (1 + t / 10)
        b = 0.9 * (t + 1) / (t + 301)
        torch.testing.assert_close(y, (1 - b) * z + b * x)
        torch.testing.assert_close(offset, z - x)
    assert 0.5 < b < 0.55


def test_they_are_the_mean_over_the_last_tenth(checkpoint):
    """Of z_t, which is found from the weights in training; taken in with 1 / (1 + t / 10)."""
    model = mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    expected, shares = [p.detach().double() for p in model.parameters()], torch.zeros(0)
    for step in range(200):
        run(optimizer, [step])
        c, b = 1 / (1 + 0.1 * step), 0.9 * (step + 1) / (step + 301)
        shares = torch.cat([shares * (1 - c), torch.tensor([c])])
        for i, p in enumerate(model.parameters()):
            z = (p.detach().double() - b * (1 - c) * expected[i]) / (1 - b + b * c)
            expected[i] = expected[i] + c * (z - expected[i])
    with optimizer.averaged():
        for p, e in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach().double(), e, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shares.sum(), torch.ones(()))
    age = (shares * (199 - torch.arange(200))).sum()
    assert 0.06 * 200 < age < 0.12 * 200
    assert shares[100:].sum() > 0.99


def test_who_writes_into_the_weights_moves_their_average_as_well(checkpoint):
    """A checkpoint that is put back, a row that begins anew: nothing pulls towards the old."""
    model, optimizer = trained(checkpoint, 50)
    with optimizer.averaged():
        before = copies(model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(7)
    with optimizer.averaged():
        for p, old in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), old + 7, rtol=0, atol=1e-5)


def test_a_learning_rate_of_0_moves_nothing(checkpoint):
    model, optimizer = trained(checkpoint, 20)
    optimizer.param_groups[0]["lr"] = 0.0
    before = copies(model.parameters())
    run(optimizer, range(3))
    assert equal(model.parameters(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_come_back_to_the_bit(dtype, checkpoint):
    model, optimizer = trained(checkpoint, dtype=dtype)
    before = copies(model.parameters())
    with optimizer.averaged():
        assert not equal(model.parameters(), before)
    assert equal(model.parameters(), before)
    with pytest.raises(KeyError), optimizer.averaged():
        raise KeyError
    assert equal(model.parameters(), before)
    with optimizer.averaged(), torch.inference_mode():
        model(torch.ones(2, 4, dtype=dtype))
    run(optimizer, [5])


def test_before_the_first_step_they_are_the_weights(checkpoint):
    model = mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    before = copies(model.parameters())
    with optimizer.averaged():
        assert equal(model.parameters(), before)


def test_a_parameter_without_a_step_stays(checkpoint):
    model = mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    give_gradients(model[0].parameters(), 0)
    optimizer.step()
    before = copies(model[2].parameters())
    with optimizer.averaged():
        assert equal(model[2].parameters(), before)


@pytest.mark.parametrize("what", ["step", "averaged", "load_state_dict"])
def test_what_would_be_lost_is_refused_inside(what, checkpoint):
    model, optimizer = trained(checkpoint)
    before, content = copies(model.parameters()), optimizer.state_dict()

    def enter():
        with optimizer.averaged():
            pass

    act = {
        "step": lambda: run(optimizer, [3]),
        "averaged": enter,
        "load_state_dict": lambda: optimizer.load_state_dict(content),
    }[what]
    with (
        pytest.raises(RuntimeError, match=rf"expected {what}\(\) outside of averaged\(\)"),
        optimizer.averaged(),
    ):
        act()
    assert equal(model.parameters(), before)
    act()


def test_what_is_saved_inside_can_be_gone_on_with(checkpoint):
    model, optimizer = trained(checkpoint)
    with optimizer.averaged():
        content = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        twin, other = copy.deepcopy((model, optimizer))
        averages = copies(model.parameters())
    assert equal(content[0].values(), averages) and equal(twin.parameters(), averages)
    resumed = mlp(seed=1)
    then = NGOptimizer(resumed.parameters(), checkpoint=checkpoint)
    resumed.load_state_dict(content[0])
    then.load_state_dict(content[1])
    for o in (then, other):
        run(o, [3])
    assert equal(resumed.parameters(), twin.parameters())
    assert isinstance(twin, nn.Module) and not equal(resumed.parameters(), averages)
