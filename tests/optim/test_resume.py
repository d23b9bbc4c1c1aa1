"""An optimizer that was saved, copied or sent elsewhere goes on as if nothing had happened."""

import copy
import io
import pickle

import pytest
import torch
from support.checkpoint import load_folder, save_folder
from support.optimizers import READERS, cnn, controller_file, copies, equal, mlp, run, state_tensors
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from l2o_graph.optim.optimizer import NGOptimizer


@pytest.fixture(scope="module", params=READERS)
def any_checkpoint(request, tmp_path_factory):
    return controller_file(tmp_path_factory.mktemp("zoo"), reader=request.param)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of one model, where it makes no difference which."""
    return controller_file(tmp_path_factory.mktemp("one"))


def through_a_file(content):
    """What another process would read."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def new(model: nn.Module, checkpoint, how: str = "plain") -> NGOptimizer:
    if how == "model":
        return NGOptimizer(model.parameters(), model=model, checkpoint=checkpoint)
    if how == "groups":
        first, *others = model.parameters()
        groups = [{"params": [first], "lr": 0.5}, {"params": others, "weight_decay": 0.1}]
        return NGOptimizer(groups, checkpoint=checkpoint)
    named = model.named_parameters() if how == "named" else model.parameters()
    return NGOptimizer(named, checkpoint=checkpoint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_resumed_run_is_the_run_bit_for_bit(make, dtype, any_checkpoint):
    model, other = make().to(dtype), make(seed=1).to(dtype)
    optimizer, resumed = new(model, any_checkpoint), new(other, any_checkpoint)
    run(optimizer, range(3))
    other.load_state_dict(through_a_file(model.state_dict()))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(t.dtype == expected for t in state_tensors(resumed))
    run(optimizer, range(3, 6))
    run(resumed, range(3, 6))
    assert equal(model.parameters(), other.parameters())
    assert equal(state_tensors(optimizer), state_tensors(resumed))


@pytest.mark.parametrize("how", ["named", "model", "groups"])
def test_resume_however_it_was_made(how, checkpoint):
    model, other = mlp(), mlp(seed=1)
    optimizer, resumed = new(model, checkpoint, how), new(other, checkpoint, how)
    run(optimizer, range(2))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, [2])
    run(resumed, [2])
    assert equal(model.parameters(), other.parameters())


def test_resume_after_steps_of_its_own_and_with_parameters_that_never_had_a_gradient(checkpoint):
    model, other = mlp(), mlp()
    optimizer, resumed = new(model, checkpoint), new(other, checkpoint)
    run(resumed, range(3))
    for p in model[2].parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state_dict=through_a_file(optimizer.state_dict()))
    assert len(resumed.state) == 2
    run(optimizer, [1])
    run(resumed, [1])
    assert equal(model.parameters(), other.parameters())


@pytest.mark.parametrize("make", [mlp, cnn])
def test_state_is_float32_tensors_for_each_parameter_and_nothing_else(make, checkpoint):
    model = make()
    optimizer = new(model, checkpoint)
    run(optimizer, range(2))
    content = optimizer.state_dict()
    assert set(content) == {"state", "param_groups"}
    for i, p in enumerate(model.parameters()):
        state = content["state"][i]
        assert all(isinstance(t, Tensor) and t.dtype == torch.float32 for t in state.values())
        assert state["step"].shape == () and state["offset"].shape == p.shape
        assert state["momenta"].numel() == 3 * p.numel()
    (group,) = content["param_groups"]
    assert all(
        value is None or isinstance(value, (float, bool, str, list)) for value in group.values()
    )


def test_options_of_groups_come_back(checkpoint):
    model, other = mlp(), mlp()
    optimizer, resumed = new(model, checkpoint), new(other, checkpoint)
    optimizer.param_groups[0].update(lr=torch.tensor(0.25), weight_decay=0.5, maximize=True)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, range(2))
    run(resumed, range(2))
    assert resumed.param_groups[0]["lr"] == 0.25
    assert equal(model.parameters(), other.parameters())


def test_a_loaded_state_is_a_copy(checkpoint):
    """The base class hands on the very tensor of a step count, and both would count on it."""
    optimizer, other = new(mlp(), checkpoint), new(mlp(), checkpoint)
    run(optimizer, range(2))
    content = optimizer.state_dict()
    other.load_state_dict(content)
    before = copies(state_tensors(optimizer))
    run(other, range(2))
    assert equal(state_tensors(optimizer), before)
    assert content["state"] and all(state["step"] == 4 for state in other.state.values())


def test_hooks_on_load_see_and_change_what_is_loaded(checkpoint):
    model = mlp(dtype=torch.bfloat16)
    optimizer, resumed, seen = new(model, checkpoint), new(mlp(), checkpoint), []
    run(optimizer, range(1))

    def unwrap(_, wrapped):
        return wrapped["inner"]

    def look(loaded):
        seen.extend(state_tensors(loaded))

    resumed.register_load_state_dict_pre_hook(unwrap)
    resumed.register_load_state_dict_post_hook(look)
    for _ in range(2):
        resumed.load_state_dict({"inner": optimizer.state_dict()})
    assert equal(seen, 2 * state_tensors(optimizer))


def test_state_follows_its_parameter_to_another_type(checkpoint):
    model, half = mlp(), mlp(dtype=torch.float16)
    optimizer, resumed = new(model, checkpoint), new(half, checkpoint)
    run(optimizer, range(2))
    resumed.load_state_dict(optimizer.state_dict())
    assert equal(state_tensors(resumed), state_tensors(optimizer))
    run(resumed, [2])
    assert all(p.dtype == torch.float16 for p in half.parameters())


def test_another_name_for_the_same_file_is_the_same_checkpoint(checkpoint, tmp_path):
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(checkpoint.read_bytes())
    optimizer, resumed = new(mlp(), checkpoint), new(mlp(), renamed)
    run(optimizer, range(1))
    resumed.load_state_dict(optimizer.state_dict())
    assert equal(state_tensors(resumed), state_tensors(optimizer))
    resumed.load_state_dict(resumed.state_dict())


def test_a_group_may_come_after_a_resume(checkpoint):
    model, other = mlp(), mlp()
    optimizer = NGOptimizer(model[0].parameters(), checkpoint=checkpoint)
    resumed = NGOptimizer(other[0].parameters(), checkpoint=checkpoint)
    run(optimizer, range(2))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for o, m in ((optimizer, model), (resumed, other)):
        o.add_param_group({"params": m[2].parameters()})
        run(o, [2])
    assert equal(model.parameters(), other.parameters())


@pytest.mark.parametrize("how", ["plain", "named", "model"])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["copy", "pickle"],
)
def test_a_copy_with_its_model_goes_on_alike_and_apart(duplicate, how, any_checkpoint):
    model = cnn()
    optimizer = new(model, any_checkpoint, how)
    run(optimizer, range(2))
    twin, other = duplicate((model, optimizer))
    assert equal(state_tensors(other), state_tensors(optimizer))
    before = copies(model.parameters())
    run(other, [2])
    assert equal(model.parameters(), before), "the copy must not train the original"
    run(optimizer, [2])
    assert equal(model.parameters(), twin.parameters())
    assert equal(state_tensors(optimizer), state_tensors(other))
    other.load_state_dict(other.state_dict())


def test_a_copy_works_without_the_file(tmp_path):
    path = controller_file(tmp_path)
    model = mlp()
    optimizer = new(model, path)
    path.unlink()
    twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    run(optimizer, range(1))
    run(other, range(1))
    assert equal(model.parameters(), twin.parameters())


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_distributed_checkpoint_in_one_process(flatten, steps, any_checkpoint):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, other = mlp(), mlp(seed=1)
    optimizer, resumed = new(model, any_checkpoint), new(other, any_checkpoint)
    run(optimizer, range(steps))
    before = copies(model.parameters())
    content = get_optimizer_state_dict(model, optimizer, options=options)
    assert equal(model.parameters(), before), "saving must not train"
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, through_a_file(content), options=options)
    assert equal(model.parameters(), other.parameters()), "loading must not train"
    assert equal(state_tensors(optimizer), state_tensors(resumed))
    run(optimizer, [2])
    run(resumed, [2])
    assert equal(model.parameters(), other.parameters())


# There is one process here, as torch remarks.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("how", ["plain", "named", "model", "groups"])
def test_distributed_checkpoint_in_a_folder(how, checkpoint, tmp_path):
    model, other = cnn(), cnn(seed=1)
    optimizer, resumed = new(model, checkpoint, how), new(other, checkpoint, how)
    run(optimizer, range(2))
    save_folder(model, optimizer, tmp_path)
    load_folder(other, resumed, tmp_path)
    assert equal(state_tensors(optimizer), state_tensors(resumed))
    run(optimizer, [2])
    run(resumed, [2])
    assert equal(model.parameters(), other.parameters())
