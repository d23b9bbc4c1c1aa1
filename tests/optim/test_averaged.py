"""Averaged weights: what they are, and that those in training come back whatever happens."""

import copy

import pytest
import torch
from support.optimizers import controller_file, copies, equal, give_gradients, mlp, run
from torch import nn

from l2o_graph.optim.optimizer import NGOptimizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return controller_file(tmp_path_factory.mktemp("zoo"))


def trained(checkpoint, steps: int = 3, dtype: torch.dtype = torch.float32):
    model = mlp(dtype=dtype)
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    run(optimizer, range(steps))
    return model, optimizer


def test_they_are_the_mean_over_the_last_twentieth(checkpoint):
    """Of the weights w_t after t + 1 steps, each taken in with the weight 1 / (1 + t / 20)."""
    model = mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    expected, shares = [p.detach().double() for p in model.parameters()], torch.zeros(0)
    for step in range(200):
        run(optimizer, [step])
        weight = 1 / (1 + 0.05 * step)
        shares = torch.cat([shares * (1 - weight), torch.tensor([weight])])
        pairs = zip(expected, model.parameters(), strict=True)
        expected = [e + weight * (p.detach().double() - e) for e, p in pairs]
    with optimizer.averaged():
        for p, e in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach().double(), e, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shares.sum(), torch.ones(()))
    age = (shares * (199 - torch.arange(200))).sum()
    assert 0.03 * 200 < age < 0.07 * 200
    assert shares[100:].sum() > 0.999


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
