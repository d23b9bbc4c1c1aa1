"""What the optimizer refuses says what was expected and what was found, and leaves no trace."""

import json
import math
import struct
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save
from support.optimizers import (
    controller_file,
    copies,
    equal,
    give_gradients,
    mlp,
    run,
    state_tensors,
    tame_controller,
)
from torch import nn

from l2o_graph.optim.checkpoints import RULE_VERSION
from l2o_graph.optim.optimizer import NGOptimizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return controller_file(tmp_path_factory.mktemp("zoo"))


def test_no_parameters(checkpoint):
    with pytest.raises(ValueError, match="empty parameter list"):
        NGOptimizer([], checkpoint=checkpoint)


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, torch.tensor(-0.5)], ids=str)
def test_negative_options(key, value, checkpoint):
    match = rf"{key}: expected a number of at least 0, found .*(-0\.5|nan|inf)"
    with pytest.raises(ValueError, match=match):
        NGOptimizer([{"params": mlp().parameters(), key: value}], checkpoint=checkpoint)


def test_options_that_are_not_there(checkpoint):
    with pytest.raises(ValueError, match="Tensor lr must be 1-element, found shape \\[2\\]"):
        NGOptimizer(mlp().parameters(), lr=torch.ones(2), checkpoint=checkpoint)
    for option in (
        "chunk_size",
        "foreach",
        "fused",
        "capturable",
        "differentiable",
        "momentum",
        "betas",
    ):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            NGOptimizer(mlp().parameters(), checkpoint=checkpoint, **{option: True})
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


# All that is remembered of a matrix or a vector, but how old it is.
NAMES = (
    "offset", "momenta", "square", "left_gram", "left_root", "right_gram", "right_root", "rows",
    "tensors",
)  # fmt: skip


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
    return state_of(wider, checkpoint), r"shape \[3, 6\] for parameter 2, found \[5, 6\]"


def other_checkpoint(checkpoint):
    content = state_of(mlp(), controller_file(checkpoint.parent, seed=1))
    return content, r"expected one of checkpoint 'random0@\w+', found 'random1@\w+'"


def other_optimizer(checkpoint):
    return torch.optim.AdamW(mlp().parameters()).state_dict(), "random0@.*found 'None'"


def missing_offset(checkpoint):
    content = state_of(mlp(), checkpoint)
    del content["state"][3]["offset"]
    return content, r"a step and an offset of parameter 3, found \['momenta'"


def numbers_for_tensors(checkpoint):
    content = state_of(mlp(), checkpoint)
    content["state"][1]["momenta"] = 7.0
    return content, "for parameter 1, expected tensors, found 'momenta': 7.0"


def no_state(checkpoint):
    content = state_of(mlp(), checkpoint)
    content["state"][1] = 7.0
    return content, "expected the state of parameter 1, found 7.0"


def with_steps(value, found):
    def steps_that_were_never_taken(checkpoint):
        content = state_of(mlp(), checkpoint)
        content["state"][1]["step"] = value
        return content, f"expected a number of steps for parameter 1, found {found}"

    return steps_that_were_never_taken


def with_bad_number(name, value):
    """In the second parameter, a vector, or in the third, a matrix."""

    def bad_number(checkpoint):
        content = state_of(mlp(), checkpoint)
        at = next(i for i in (1, 2) if name in content["state"][i])
        tensor = content["state"][at][name]
        tensor[(0,) * tensor.dim()] = value
        found = f"NaN or infinity in 1 of {tensor.numel()} entries of '{name}'"
        return content, f"for parameter {at}, expected finite numbers, found {found}"

    return bad_number


def a_horizon_that_is_none(checkpoint):
    content = state_of(mlp(), checkpoint)
    content["param_groups"][0]["total_steps"] = "many"
    return content, "total_steps: expected an integer, at least 1, found 'many'"


@pytest.mark.parametrize(
    "make",
    [
        other_groups,
        fewer_parameters,
        other_shapes,
        other_checkpoint,
        other_optimizer,
        missing_offset,
        numbers_for_tensors,
        no_state,
        with_steps(torch.tensor(-1.0), "-1.0"),
        with_steps(-1, "-1"),
        with_steps(2.5, "2.5"),
        with_steps(math.nan, "nan"),
        with_steps(10**400, "1000"),
        with_steps("3", "'3'"),
        with_steps(True, "True"),
        with_steps(torch.ones(2), r"\[1.0, 1.0\]"),
        *(
            with_bad_number(name, value)
            for name in NAMES
            for value in (math.nan, math.inf, -math.inf)
        ),
        a_horizon_that_is_none,
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


@pytest.mark.parametrize("as_number", [int, float, np.float64, np.int64])
def test_a_number_of_steps_may_be_a_plain_number(as_number, checkpoint):
    model, twin = mlp(), mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    run(optimizer, range(3))
    content = optimizer.state_dict()
    for state in content["state"].values():
        state["step"] = as_number(state["step"])
    twin.load_state_dict(model.state_dict())
    other = NGOptimizer(twin.parameters(), checkpoint=checkpoint)
    other.load_state_dict(content)
    assert all(state["step"].dtype == torch.float32 for state in other.state.values())
    optimizer.load_state_dict(content)  # whose own state it was
    run(optimizer, [3])
    run(other, [3])
    assert equal(model.parameters(), twin.parameters())
    assert equal(state_tensors(optimizer), state_tensors(other))


# The number of steps ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -3, 2.5, "10", True, float("inf")])
def test_a_number_of_steps_that_is_none(value, checkpoint):
    if type(value) in (int, bool):  # beartype, which watches over tests, is before us elsewhere
        match = "total_steps: expected .*at least 1, found"
        with pytest.raises(ValueError, match=match):
            NGOptimizer(mlp().parameters(), checkpoint=checkpoint, total_steps=value)
    with pytest.raises(ValueError, match="total_steps: expected one for all groups, None, found"):
        NGOptimizer([{"params": mlp().parameters(), "total_steps": value}], checkpoint=checkpoint)


def test_training_goes_on_behind_the_last_step_with_one_warning(checkpoint):
    model = mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint, total_steps=3)
    run(optimizer, range(3))
    before = copies(model.parameters())
    with pytest.warns(UserWarning, match=r"this is step 4 of total_steps=3; .* shortest") as w:
        run(optimizer, [3])
    run(optimizer, [4])
    assert len(w) == 1 and not equal(model.parameters(), before)


def resumed(checkpoint, saved: int | None, told: int | None, steps: int = 5):
    optimizer = NGOptimizer(mlp().parameters(), checkpoint=checkpoint, total_steps=saved)
    run(optimizer, range(steps))
    other = NGOptimizer(mlp().parameters(), checkpoint=checkpoint, total_steps=told)
    other.load_state_dict(optimizer.state_dict())
    return other


@pytest.mark.parametrize("saved, told", [(None, None), (9, 9), (9, None)])
def test_a_resumed_run_ends_where_it_was_to_end(saved, told, checkpoint):
    optimizer = resumed(checkpoint, saved, told)
    assert optimizer.param_groups[0]["total_steps"] == saved
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    run(optimizer, [5])


@pytest.mark.parametrize("saved, told", [(9, 12), (None, 12)])
def test_another_end_holds_and_is_said(saved, told, checkpoint):
    with pytest.warns(UserWarning, match=rf"total_steps={saved}; .* keeps the total_steps=12"):
        optimizer = resumed(checkpoint, saved, told)
    assert optimizer.param_groups[0]["total_steps"] == 12
    run(optimizer, [5])


def test_an_end_that_has_passed_is_said_and_training_goes_on(checkpoint):
    with pytest.warns(UserWarning, match="saved with total_steps=None"):
        optimizer = resumed(checkpoint, None, 2)
    before = copies(optimizer.param_groups[0]["params"])
    with pytest.warns(UserWarning, match="this is step 6 of total_steps=2; training continues"):
        run(optimizer, [5])
    assert not equal(optimizer.param_groups[0]["params"], before)
    assert all(t.isfinite().all() for t in state_tensors(optimizer))


# Files -----------------------------------------------------------------------------------------


def with_header(path, header: bytes, length: int | None = None):
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    return path


def controller_with(path, **metadata):
    """The file of a controller with other entries in its header."""
    tensors = {name: p.detach() for name, p in tame_controller().named_parameters()}
    known = {"format": "l2o_graph controller", "rule_version": "3", "provenance": "{}"}
    path.write_bytes(save(tensors, known | metadata))
    return path


HOSTILE = {
    "a length beyond the file": lambda p: with_header(p, b"{}", 2**63),
    "hundreds of megabytes": lambda p: with_header(p, b"{" + b" " * 150_000_000 + b"}"),
    "nested lists": lambda p: with_header(p, b"[" * 1_000_000),
    "nested entries": lambda p: with_header(p, b'{"__metadata__":' * 300_000),
    "no text": lambda p: with_header(p, bytes(range(128, 256))),
    "a list": lambda p: with_header(p, b"[1, 2]"),
    "entries that are none": lambda p: with_header(p, b'{"__metadata__": 7}'),
    "nothing": lambda p: with_header(p, b"", 0),
    "less than a length": lambda p: p.write_bytes(b"abc") and p,
    "a huge network": lambda p: controller_with(
        p, config=json.dumps({"reader": "messages", "hidden": 10**9})
    ),
    "a large network of few tensors": lambda p: controller_with(
        p, config=json.dumps({"hidden": 256, "channels": 256})
    ),
    "a number with many digits": lambda p: controller_with(
        p, config='{"hidden": ' + "9" * 100_000 + "}"
    ),
    "nested configuration": lambda p: controller_with(p, config="[" * 1_000_000),
    "nested provenance": lambda p: controller_with(p, config="{}", provenance="[" * 1_000_000),
    "no configuration": lambda p: controller_with(p),
    "an unknown entry": lambda p: controller_with(p, config='{"hidden": 8, "eval": "1"}'),
    "a truth for a number": lambda p: controller_with(p, config='{"hidden": true}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once(name, tmp_path):
    path = HOSTILE[name](tmp_path / "hostile.safetensors")
    with pytest.raises(
        ValueError, match=r"^checkpoint '.*hostile.safetensors': expected"
    ) as caught:
        NGOptimizer(mlp().parameters(), checkpoint=path)
    assert len(str(caught.value)) < 5000
    if name == "hundreds of megabytes":  # by its length, without a look at it
        assert "150000010 bytes with a header of 150000002" in str(caught.value)


def test_a_checkpoint_of_the_old_rule_says_what_to_do(tmp_path):
    path = controller_with(tmp_path / "old.safetensors", format="l2o_graph learned optimizer")
    match = (
        rf"old.safetensors': expected version {RULE_VERSION} of the rule, found 3; "
        "train it again with python -m"
    )
    with pytest.raises(ValueError, match=match):
        NGOptimizer(mlp().parameters(), checkpoint=path)
    path = controller_with(tmp_path / "next.safetensors", rule_version=str(RULE_VERSION + 1))
    match = rf"expected version {RULE_VERSION} of the rule, found {RULE_VERSION + 1}"
    with pytest.raises(ValueError, match=f"next.safetensors': {match}"):
        NGOptimizer(mlp().parameters(), checkpoint=path)


# Frozen parameters that are no numbers ---------------------------------------------------------


class Masked(nn.Module):
    """What lies ahead is hidden by a parameter that nobody trains."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        ahead = torch.full((4, 4), -torch.inf).triu(1)
        self.mask = nn.Parameter(ahead, requires_grad=False)

    def forward(self, x):
        return self.last((self.first(x) @ x.mT + self.mask).softmax(-1) @ x)


@pytest.mark.filterwarnings("ignore:the use of 'mask'")
@pytest.mark.parametrize("with_model", [False, True])
def test_a_frozen_mask_does_no_harm(with_model, checkpoint):
    torch.manual_seed(0)
    net = Masked()
    told = net if with_model else None
    optimizer = NGOptimizer(net.parameters(), 1.0, 0.1, model=told, checkpoint=checkpoint)
    before = copies(net.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(2, 4, 4)).square().sum().backward()
        optimizer.step()
    with optimizer.averaged():
        assert torch.equal(net.mask, before[0])
    assert "mask" in str(optimizer.explain()) or not with_model
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old) if p is net.mask else p.isfinite().all()
    assert all(t.isfinite().all() for t in state_tensors(optimizer))


class Unread(nn.Module):
    """Its structure cannot be read, and by order it is not understood."""

    def __init__(self):
        super().__init__()
        self.pair = nn.Bilinear(4, 4, 2)

    def forward(self, x):
        raise RuntimeError("not now")


def lines_of_warnings(act) -> list[int]:
    """Where warnings say that they are from, all of them in this file."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        act()
    assert found and {w.filename for w in found} == {__file__}
    return [w.lineno for w in found]


def test_warnings_are_about_the_users_line(checkpoint):
    model, unread = mlp(), Unread()
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint, total_steps=1)
    later = NGOptimizer(mlp().parameters(), checkpoint=checkpoint, total_steps=2)
    of_unread = NGOptimizer(unread.parameters(), model=unread, checkpoint=checkpoint)
    run(optimizer, range(1))
    give_gradients([*model.parameters(), *unread.parameters()], 0)
    unread.pair.weight.grad[0, 0, 0] = 1.0

    def read():
        of_unread.read_structure((torch.ones(1, 4),))

    def over():
        optimizer.step()

    def loaded():
        later.load_state_dict(optimizer.state_dict())

    def not_finite():
        model[0].weight.grad[0, 0] = torch.inf
        optimizer.step()

    def not_read():
        of_unread.step()

    for act, line in ((read, 1), (over, 1), (loaded, 1), (not_finite, 2), (not_read, 1)):
        assert set(lines_of_warnings(act)) == {act.__code__.co_firstlineno + line}, act.__name__
