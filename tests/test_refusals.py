"""What the optimizer refuses says what was expected and what was found, and leaves no trace."""

import pytest
import torch
from helpers_optimizer import copies, equal, mlp, random_checkpoint, run, state_tensors
from torch import nn

from l2o_graph import NGOptimizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("zoo"))


def test_no_parameters(checkpoint):
    with pytest.raises(ValueError, match="empty parameter list"):
        NGOptimizer([], checkpoint=checkpoint)


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-0.5, float("nan"), torch.tensor(-0.5)], ids=str)
def test_negative_options(key, value, checkpoint):
    match = rf"{key}: expected a number of at least 0, found .*(-0\.5|nan)"
    with pytest.raises(ValueError, match=match):
        NGOptimizer([{"params": mlp().parameters(), key: value}], checkpoint=checkpoint)


def test_options_that_are_not_there(checkpoint):
    with pytest.raises(ValueError, match="Tensor lr must be 1-element, found shape \\[2\\]"):
        NGOptimizer(mlp().parameters(), lr=torch.ones(2), checkpoint=checkpoint)
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, found 0"):
        NGOptimizer(mlp().parameters(), checkpoint=checkpoint, chunk_size=0)
    for option in ("foreach", "fused", "capturable", "differentiable", "momentum", "betas"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            NGOptimizer(mlp().parameters(), **{option: True})
    with pytest.raises(ValueError, match=r"one for all groups, 'random0@\w+', found 'other'"):
        NGOptimizer([{"params": mlp().parameters(), "checkpoint": "other"}], checkpoint=checkpoint)


def test_complex_parameter(checkpoint):
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))]
    with pytest.raises(ValueError, match=r"parameter 1: expected a real tensor, found .*complex64"):
        NGOptimizer(parameters, checkpoint=checkpoint)


def test_parameter_of_another_model(checkpoint):
    match = r"parameter 0: expected one of the model's 4 parameters, found .* shape \[6, 4\]"
    with pytest.raises(ValueError, match=match):
        NGOptimizer(mlp().parameters(), model=mlp(), checkpoint=checkpoint)


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("materialised", [False, True])
def test_parameters_left_on_meta(materialised, with_model, checkpoint):
    with torch.device("meta"):
        model = mlp()
    told = model if with_model else None
    optimizer = NGOptimizer(model.parameters(), model=told, checkpoint=checkpoint)
    if materialised:  # in new parameters, of which the optimizer knows nothing
        model.to_empty(device="cpu")
        model(torch.ones(2, 4)).sum().backward()
    match = r"parameter 0: expected a tensor with data, found one on the meta device"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()


def test_parameter_that_the_model_lacks_by_now(checkpoint):
    model = mlp()
    optimizer = NGOptimizer(model.parameters(), model=model, checkpoint=checkpoint)
    model[2] = nn.Linear(6, 3)
    model(torch.ones(2, 4)).sum().backward()
    before = copies(model.parameters())
    with pytest.raises(ValueError, match="parameter 2: expected one of the model's 4 parameters"):
        optimizer.step()
    assert equal(model.parameters(), before) and not optimizer.state


def test_sparse_gradient(checkpoint):
    embedding, linear = nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2)
    optimizer = NGOptimizer([*linear.parameters(), embedding.weight], checkpoint=checkpoint)
    before = copies([*linear.parameters(), embedding.weight])
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    match = r"expected dense gradients, found torch.sparse_coo for a parameter of shape \[4, 3\]"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert equal([*linear.parameters(), embedding.weight], before) and not optimizer.state


@pytest.mark.parametrize(
    "group, error",
    [
        ({"params": [nn.Parameter(torch.ones(2))], "lr": -1.0}, ValueError),
        ({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, ValueError),
        ({"params": ["weight"]}, TypeError),
    ],
)
def test_a_refused_group_leaves_no_trace(group, error, checkpoint):
    model, twin = mlp(), mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    with pytest.raises(error):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    run(optimizer, range(1))
    run(NGOptimizer(twin.parameters(), checkpoint=checkpoint), range(1))
    assert equal(model.parameters(), twin.parameters())


def state_of(model: nn.Module, checkpoint, groups: int = 1) -> dict:
    parameters = list(model.parameters())
    of_each = [{"params": parameters[i::groups]} for i in range(groups)]
    optimizer = NGOptimizer(of_each, lr=0.125, checkpoint=checkpoint)
    run(optimizer, range(1))
    return optimizer.state_dict()


def other_groups(checkpoint):
    return state_of(mlp(), checkpoint, groups=2), r"groups of \[4\] parameters, found \[2, 2\]"


def fewer_parameters(checkpoint):
    return state_of(mlp()[0], checkpoint), r"groups of \[4\] parameters, found \[2\]"


def other_shapes(checkpoint):
    wider = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    return state_of(wider, checkpoint), r"\[5, 3, 6\].* for parameter 2, found .*\[5, 5, 6\]"


def other_checkpoint(checkpoint):
    content = state_of(mlp(), random_checkpoint(checkpoint.parent, seed=1))
    return content, r"expected one of checkpoint 'random0@\w+', found 'random1@\w+'"


def other_optimizer(checkpoint):
    return torch.optim.AdamW(mlp().parameters()).state_dict(), "random0@.*found 'None'"


def missing_momenta(checkpoint):
    content = state_of(mlp(), checkpoint)
    del content["state"][3]["momenta"]
    return content, r"for parameter 3, found \{'step': \[\]\}"


def numbers_for_tensors(checkpoint):
    content = state_of(mlp(), checkpoint)
    content["state"][1]["step"] = 7.0
    return content, r"for parameter 1, found .*'step': 7.0"


@pytest.mark.parametrize(
    "make",
    [
        other_groups,
        fewer_parameters,
        other_shapes,
        other_checkpoint,
        other_optimizer,
        missing_momenta,
        numbers_for_tensors,
    ],
)
def test_a_refused_state_leaves_no_trace(make, checkpoint):
    content, match = make(checkpoint)
    model, twin = mlp(), mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    run(optimizer, range(2))
    before, options = copies(state_tensors(optimizer)), repr(optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(content)
    assert equal(state_tensors(optimizer), before) and repr(optimizer) == options
    run(optimizer, [2])
    run(NGOptimizer(twin.parameters(), checkpoint=checkpoint), range(3))
    assert equal(model.parameters(), twin.parameters())
    optimizer.load_state_dict(optimizer.state_dict())
