"""What a step does: the contract of a torch.optim.Optimizer, and that of a learned one."""

from contextlib import nullcontext

import pytest
import torch
from support.optimizers import (
    cnn,
    controller_file,
    copies,
    equal,
    give_gradients,
    mlp,
    run,
    state_tensors,
)
from torch import Tensor, nn

import l2o_graph.optim.structure
from l2o_graph.optim.averaging import follow
from l2o_graph.optim.blocks import blocks_of
from l2o_graph.optim.checkpoints import load_checkpoint
from l2o_graph.optim.controller import Learned
from l2o_graph.optim.memory import Memory, arrange, gathered, scattered
from l2o_graph.optim.optimizer import NGOptimizer
from l2o_graph.optim.step import advance
from l2o_graph.tracing.by_order import spec_of_parameters


@pytest.fixture(scope="module", params=["none", "messages", "sequence"])
def checkpoint(request, tmp_path_factory):
    """Of three rules, for all that depends on what a step computes."""
    return controller_file(tmp_path_factory.mktemp("zoo"), reader=request.param)


@pytest.fixture(scope="module")
def graph_checkpoint(tmp_path_factory):
    """Of a rule that reads the whole network; for what is done around a step, one is enough."""
    return controller_file(tmp_path_factory.mktemp("graph"))


class Pure:
    """The rule on plain tensors, with its memory."""

    def __init__(self, parameters: list[Tensor], checkpoint):
        self.controller = load_checkpoint(checkpoint).controller
        spec = spec_of_parameters(parameters)
        self.memory: Memory = arrange(spec, blocks_of(spec), 1)

    def update(self, parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        flat = [
            gathered(self.memory, [t.reshape(1, -1).float() for t in tensors])
            for tensors in (gradients, parameters)
        ]
        learned = Learned.of(self.controller.config, self.controller.weights())
        steps, _ = advance(learned, self.memory, *flat)
        found = scattered(self.memory, steps)
        return [found[i].view(p.shape).clone() for i, p in enumerate(parameters)]


def first_update(parameters: list[Tensor], checkpoint) -> list[Tensor]:
    """What the pure core makes of the gradients that the parameters hold."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return Pure(parameters, checkpoint).update(copies(parameters), gradients)


# The update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, cnn])
def test_pure_update_and_step_agree_bit_for_bit(make, checkpoint):
    parameters = list(make().parameters())
    pure, rule = copies(parameters), Pure(parameters, checkpoint)
    offsets = [torch.zeros_like(p) for p in pure]
    optimizer = NGOptimizer(parameters, checkpoint=checkpoint)
    for seed in range(5):
        give_gradients(parameters, seed)
        gradients = [p.grad for p in parameters if p.grad is not None]
        follow(pure, offsets, rule.update(pure, gradients), seed)
        optimizer.step()
        assert equal(pure, parameters)
    assert all(optimizer.state[p]["step"] == 5 for p in parameters)


@pytest.mark.parametrize("make, shape", [(mlp, (4,)), (cnn, (1, 8, 8))])
def test_loss_falls(make, shape, checkpoint):
    model, generator = make(), torch.Generator().manual_seed(0)
    x = torch.randn(64, *shape, generator=generator)
    y = (x.flatten(1)[:, 0] > 0).long() + (x.flatten(1)[:, 1] > 0).long()
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    losses = []
    for _ in range(41):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_neither_construction_nor_a_step_draws_random_numbers(checkpoint):
    model = mlp()
    give_gradients(model.parameters(), 0)
    before = torch.get_rng_state()
    NGOptimizer(model.parameters(), checkpoint=checkpoint).step()
    assert torch.equal(torch.get_rng_state(), before)


def test_meta_weights_are_frozen_and_nobodys_parameters(checkpoint):
    model = mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    run(optimizer, range(1))
    assert not any(p.requires_grad for p in optimizer._controller.parameters())
    assert not any(w.requires_grad for r in optimizer._placed.values() for w in r.weights.values())
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in listed] == [id(p) for p in model.parameters()]
    assert all(not t.requires_grad for t in state_tensors(optimizer))


def test_network_is_inferred_once(checkpoint, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return spec_of_parameters(*args)

    monkeypatch.setattr(l2o_graph.optim.structure, "spec_of_parameters", counted)
    optimizer = NGOptimizer(mlp().parameters(), checkpoint=checkpoint)
    run(optimizer, range(1))
    spec, rules = optimizer._structure.spec, dict(optimizer._placed)
    run(optimizer, range(3))
    assert optimizer._structure.spec is spec and optimizer._placed == rules and len(calls) == 1


# Rates and decay -------------------------------------------------------------------------------


def test_rate_and_decay_of_each_group_follow_their_formula(checkpoint):
    parameters = list(mlp().parameters())
    groups = [
        {"params": parameters[:2], "lr": 0.5, "weight_decay": 0.1},
        {"params": parameters[2:3], "weight_decay": 0.3},
        {"params": parameters[3:]},
    ]
    optimizer = NGOptimizer(groups, lr=2.0, checkpoint=checkpoint)
    give_gradients(parameters, 0)
    before, u = copies(parameters), first_update(parameters, checkpoint)
    optimizer.step()
    for i, (lr, decay) in enumerate([(0.5, 0.1), (0.5, 0.1), (2.0, 0.3), (2.0, 0.0)]):
        rms = u[i].square().mean().sqrt()
        torch.testing.assert_close(parameters[i], before[i] * (1 - lr * decay * rms) + lr * u[i])


def test_decay_means_what_it_means_to_adamw(checkpoint):
    """A step of AdamW is about as long as its rate, a step here as the RMS of its update."""
    parameters = list(mlp().parameters())
    give_gradients(parameters, 0)
    before, updates = copies(parameters), first_update(parameters, checkpoint)
    NGOptimizer(parameters, weight_decay=0.1, checkpoint=checkpoint).step()
    for p, old, update in zip(parameters, before, updates, strict=True):
        rms = update.square().mean().sqrt().item()
        twins = [nn.Parameter(old.clone()) for _ in range(2)]
        for twin, decay in zip(twins, (0.1, 0.0), strict=True):
            twin.grad = p.grad
            torch.optim.AdamW([twin], lr=rms, weight_decay=decay).step()
        torch.testing.assert_close(p - (old + update), twins[0] - twins[1])
        assert 0.9 < (twins[1] - old).square().mean().sqrt() / rms < 1.1


def test_decay_never_turns_a_weight_round(checkpoint):
    model = mlp()
    before = copies(model.parameters())
    optimizer = NGOptimizer(model.parameters(), weight_decay=1e9, checkpoint=checkpoint)
    give_gradients(model.parameters(), 0)
    updates = first_update(list(model.parameters()), checkpoint)
    optimizer.step()
    for p, old, update in zip(model.parameters(), before, updates, strict=True):
        torch.testing.assert_close(p.detach(), update)
        assert not torch.equal(p, old)


def test_zero_rate_changes_nothing_but_the_state(checkpoint):
    model = mlp()
    before = copies(model.parameters())
    optimizer = NGOptimizer(model.parameters(), lr=0.0, weight_decay=0.5, checkpoint=checkpoint)
    run(optimizer, range(2))
    assert equal(model.parameters(), before)
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_a_vanishing_rate_moves_nothing(checkpoint):
    model, alone = mlp(), nn.Parameter(torch.tensor([1.0, 2.0]))
    groups = [{"params": [alone], "lr": 1e-28}, {"params": model.parameters()}]
    run(NGOptimizer(groups, checkpoint=checkpoint), range(2))
    assert torch.equal(alone, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_may_be_a_tensor(shape, dtype, graph_checkpoint):
    by_float, by_tensor = mlp(), mlp()
    rate = torch.full(shape, 0.3, dtype=dtype)
    run(NGOptimizer(by_float.parameters(), 0.3, 0.1, checkpoint=graph_checkpoint), range(2))
    run(NGOptimizer(by_tensor.parameters(), rate, 0.1, checkpoint=graph_checkpoint), range(2))
    assert equal(by_float.parameters(), by_tensor.parameters())


def test_maximize_is_descent_on_the_negated_loss(checkpoint):
    up, down = mlp(), mlp()
    ascent = NGOptimizer(up.parameters(), maximize=True, checkpoint=checkpoint)
    descent = NGOptimizer(down.parameters(), checkpoint=checkpoint)
    for seed in range(3):
        give_gradients(up.parameters(), seed)
        for p, q in zip(up.parameters(), down.parameters(), strict=True):
            assert p.grad is not None
            q.grad = -p.grad
        ascent.step()
        descent.step()
        for p, q in zip(up.parameters(), down.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert torch.equal(p.grad, -q.grad), "a step must leave the gradients alone"
    assert equal(up.parameters(), down.parameters())


# The calling conventions -----------------------------------------------------------------------


def test_closure_runs_once_with_gradients_on_and_its_loss_comes_back(graph_checkpoint):
    model, calls = mlp(), []
    optimizer = NGOptimizer(model.parameters(), checkpoint=graph_checkpoint)
    before = copies(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        calls.append((torch.is_grad_enabled(), loss))
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure=closure)
    assert len(calls) == 1 and calls[0][0] and calls[0][1] is loss
    assert not equal(model.parameters(), before)
    assert optimizer.step() is None
    assert optimizer.step(lambda: 0.5) == 0.5


def test_hooks_fire_once(graph_checkpoint):
    optimizer = NGOptimizer(mlp().parameters(), checkpoint=graph_checkpoint)
    order = []
    optimizer.register_step_pre_hook(lambda *_: order.append("before"))
    optimizer.register_step_post_hook(lambda *_: order.append("after"))
    run(optimizer, range(1))
    assert order == ["before", "after"]


def test_zero_grad(graph_checkpoint):
    model = mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=graph_checkpoint)
    give_gradients(model.parameters(), 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_repr_shows_options_and_no_network(graph_checkpoint):
    text = repr(NGOptimizer(mlp().parameters(), lr=0.5, checkpoint=graph_checkpoint))
    assert "NGOptimizer" in text and "lr: 0.5" in text and "checkpoint: random0@" in text
    assert "Linear" not in text and "tensor" not in text


def test_accumulated_and_clipped_gradients_are_the_ones_used(checkpoint):
    model, twin = mlp(), mlp()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    for half in x.split(4):
        model(half).square().sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad
    NGOptimizer(twin.parameters(), checkpoint=checkpoint).step()
    assert equal(model.parameters(), twin.parameters())


def test_grad_scaler(graph_checkpoint):
    """A scale by a power of two is exact, so the scaler must not be seen in the result."""
    model, twin = mlp(), mlp()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = NGOptimizer(model.parameters(), checkpoint=graph_checkpoint)
    scaler.scale(model(x).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    twin(x).square().sum().backward()
    NGOptimizer(twin.parameters(), checkpoint=graph_checkpoint).step()
    assert equal(model.parameters(), twin.parameters())

    before, state = copies(model.parameters()), copies(state_tensors(optimizer))
    next(model.parameters()).grad[0, 0] = torch.inf
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert equal(model.parameters(), before) and equal(state_tensors(optimizer), state)


def bf16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("with_closure", [False, True])
def test_bf16_autocast_reaches_the_model_and_not_the_step(with_closure, graph_checkpoint):
    """Whether it is around the model alone, as it should be, or around the step as well."""
    results = []
    for around_model, around_all in ((bf16, nullcontext), (nullcontext, bf16)):
        model, outputs = mlp(), []
        optimizer = NGOptimizer(model.parameters(), checkpoint=graph_checkpoint)

        def closure(around=around_model, model=model, optimizer=optimizer, outputs=outputs):
            optimizer.zero_grad()
            with around():
                outputs.append(model(torch.ones(2, 4)))
            loss = outputs[-1].float().square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            with around_all():
                if with_closure:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
        assert all(y.dtype == torch.bfloat16 for y in outputs)
        kept = [*model.parameters(), *state_tensors(optimizer)]
        assert all(t.dtype == torch.float32 for t in kept)
        results.append(copies(kept))
    assert equal(*results) and not equal(results[0][:4], mlp().parameters())


@pytest.mark.parametrize("how", ["plain", "named", "model"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_the_model(backend, how, graph_checkpoint):
    """Compilation renames parameters and wraps the module; the network stays the same."""
    results = []
    for compiled in (False, True):
        model = mlp()
        used = torch.compile(model, backend=backend) if compiled else model
        assert isinstance(used, nn.Module)
        optimizer = NGOptimizer(
            used.named_parameters() if how == "named" else used.parameters(),
            model=used if how == "model" else None,
            checkpoint=graph_checkpoint,
        )
        for _ in range(2):
            optimizer.zero_grad()
            used(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        results.append(copies(model.parameters()))
    assert equal(*results)


@pytest.mark.parametrize("make", [mlp, cnn])
def test_a_step_waits_for_the_device_once(make, checkpoint):
    """For whether all gradients are finite, and never for one parameter alone.

    Decompositions wait for errors of their own; they are due in few steps.
    """
    optimizer = NGOptimizer(make().parameters(), weight_decay=0.1, checkpoint=checkpoint)
    run(optimizer, range(1))
    waits, decompositions = [], []
    for seed in (1, 2):
        give_gradients((p for g in optimizer.param_groups for p in g["params"]), seed)
        with torch.autograd.profiler.profile() as profile:
            optimizer.step()
        names = [event.name for event in profile.function_events]
        waits.append(names.count("aten::_local_scalar_dense"))
        decompositions.append(names.count("aten::_linalg_eigh"))
    assert waits == [1 + count for count in decompositions] and decompositions[1] == 0


# Which parameters ------------------------------------------------------------------------------


def test_names_tell_a_norm_from_a_bias(graph_checkpoint):
    """By order alone the lone vector behind a kernel counts as its bias."""

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4, bias=False), nn.RMSNorm(4), nn.Linear(4, 2))

    bare, named, told = network(), network(), network()
    run(NGOptimizer(bare.parameters(), checkpoint=graph_checkpoint), range(2))
    run(NGOptimizer(named.named_parameters(), checkpoint=graph_checkpoint), range(2))
    run(NGOptimizer(told.parameters(), model=told, checkpoint=graph_checkpoint), range(2))
    assert equal(named.parameters(), told.parameters())
    assert not equal(named.parameters(), bare.parameters())


def test_a_parameter_named_twice_is_one_parameter(graph_checkpoint):
    listed, twice = mlp(), mlp()
    names = list(twice.named_parameters())
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = NGOptimizer([*names, names[0]], checkpoint=graph_checkpoint)
    give_gradients(twice.parameters(), 0)
    optimizer.step()
    run(NGOptimizer(listed.named_parameters(), checkpoint=graph_checkpoint), range(1))
    assert equal(listed.parameters(), twice.parameters())


def test_a_part_of_a_model_is_trained_and_the_rest_is_context(graph_checkpoint):
    def last_layer(scale: float) -> list[Tensor]:
        model = mlp()
        with torch.no_grad():
            model[0].weight *= scale
        before = copies(model[0].parameters())
        optimizer = NGOptimizer(
            model[2].parameters(), model=model, weight_decay=0.1, checkpoint=graph_checkpoint
        )
        give_gradients(model[0].parameters(), 9)  # not the optimizer's: not its business
        run(optimizer, range(2))
        assert equal(model[0].parameters(), before)
        assert list(optimizer.state) == list(model[2].parameters())
        return copies(model[2].parameters())

    one, large, masked = last_layer(1.0), last_layer(1e30), last_layer(-torch.inf)
    assert equal(one, large) and equal(one, masked), "what is not trained is not looked at"


def test_a_model_in_another_order_than_its_groups(checkpoint):
    """Decay for kernels and none for biases, as people like it: the model keeps the graph right."""
    grouped, plain = mlp(), mlp()
    kernels = [p for p in grouped.parameters() if p.dim() > 1]
    biases = [p for p in grouped.parameters() if p.dim() == 1]
    groups = [{"params": kernels}, {"params": biases, "weight_decay": 0.0}]
    optimizer = NGOptimizer(groups, model=grouped, checkpoint=checkpoint)
    give_gradients(grouped.parameters(), 0)
    optimizer.step()
    run(NGOptimizer(plain.parameters(), model=plain, checkpoint=checkpoint), range(1))
    assert equal(grouped.parameters(), plain.parameters())


def test_a_group_may_come_later(checkpoint):
    model = mlp()
    optimizer = NGOptimizer(model[0].parameters(), checkpoint=checkpoint)
    run(optimizer, range(2))
    kept = optimizer.state[model[0].weight]["momenta"]
    before = copies(model[2].parameters())
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.5})
    assert optimizer.state[model[0].weight]["momenta"] is kept
    run(optimizer, range(1))
    assert [int(state["step"]) for state in optimizer.state.values()] == [3, 3, 1, 1]
    assert not any(torch.equal(a, b) for a, b in zip(before, model[2].parameters(), strict=True))


def test_a_replaced_layer_of_the_model_may_come_later(checkpoint):
    model = mlp()
    optimizer = NGOptimizer(model[0].parameters(), model=model, checkpoint=checkpoint)
    run(optimizer, range(1))
    model[2] = nn.Linear(6, 5)
    optimizer.add_param_group({"params": model[2].parameters()})
    before = copies(model.parameters())
    run(optimizer, range(1))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_frozen_and_unused_parameters_stay_and_have_no_state(checkpoint):
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = NGOptimizer(model.parameters(), weight_decay=0.5, checkpoint=checkpoint)
    before = copies(model.parameters())
    optimizer.step()
    assert equal(model.parameters(), before) and not optimizer.state
    give_gradients(list(model[2].parameters()), 0)
    optimizer.step()
    assert equal(model[0].parameters(), before[:2])
    assert list(optimizer.state) == list(model[2].parameters())


def test_a_parameter_that_skips_a_step_keeps_its_state(checkpoint):
    model = mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    run(optimizer, range(2))
    before = model[0].weight.clone()
    state = {name: t.clone() for name, t in optimizer.state[model[0].weight].items()}
    give_gradients(model.parameters(), 2)
    model[0].weight.grad = None
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert state["step"] == 2
    for name, t in optimizer.state[model[0].weight].items():
        assert torch.equal(t, state[name])
        if name not in ("step", "offset"):
            assert t.untyped_storage().nbytes() == t.nbytes, "alone, not a part of old stacks"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_zero_gradients_move_nothing(make, dtype, checkpoint):
    model = make().to(dtype)
    before = copies(model.parameters())
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        optimizer.step()
    assert equal(model.parameters(), before)


@pytest.mark.parametrize(
    "shapes",
    [
        [()],
        [(), ()],
        [(2,)],
        [(1,), (7,), (3,)],
        [(10, 5), (10,), ()],
        [(5, 3), (4, 9), (2,)],
        [(1, 1)],
        [(2, 3, 4, 5, 6)],
    ],
    ids=str,
)
def test_any_shapes_can_be_trained(shapes, checkpoint):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    before = copies(parameters)
    run(NGOptimizer(parameters, checkpoint=checkpoint), range(2))
    for p, old in zip(parameters, before, strict=True):
        assert p.isfinite().all() and (p != old).all()


@pytest.mark.parametrize("empty", [(0,), (0, 5), (5, 0), (3, 0, 2)], ids=str)
def test_empty_parameters_are_allowed(empty, graph_checkpoint):
    alone, beside = mlp(), mlp()
    run(NGOptimizer(alone.parameters(), checkpoint=graph_checkpoint), range(2))
    parameters = [*beside.parameters(), nn.Parameter(torch.zeros(empty))]
    run(NGOptimizer(parameters, checkpoint=graph_checkpoint), range(2))
    assert equal(alone.parameters(), beside.parameters())
    only = NGOptimizer([nn.Parameter(torch.zeros(empty))], checkpoint=graph_checkpoint)
    run(only, range(2))
    assert not only.state


def test_raw_tensors_can_be_trained(checkpoint):
    model = mlp()
    raw = [p.detach().clone().requires_grad_() for p in model.parameters()]
    run(NGOptimizer(raw, checkpoint=checkpoint), range(2))
    run(NGOptimizer(model.parameters(), checkpoint=checkpoint), range(2))
    assert equal(raw, model.parameters())


def test_memory_layout_does_not_matter(graph_checkpoint):
    def kernels():
        generator = torch.Generator().manual_seed(0)
        shapes = [(4, 3, 3, 3), (6, 4, 2, 2), (5, 6)]
        return [torch.randn(s, generator=generator) for s in shapes]

    contiguous = [nn.Parameter(t) for t in kernels()]
    a, b, c = kernels()
    strided = torch.zeros(10, 6)[::2]
    strided.copy_(c)
    scattered = [
        nn.Parameter(a.contiguous(memory_format=torch.channels_last)),
        nn.Parameter(b.transpose(0, 3).contiguous().transpose(0, 3)),
        nn.Parameter(strided),
    ]
    assert not any(p.is_contiguous() for p in scattered)
    layouts = [p.stride() for p in scattered]
    for parameters in (contiguous, scattered):
        run(
            NGOptimizer(parameters, 1.0, 0.1, checkpoint=graph_checkpoint),
            [0, 1],
        )
    assert equal(contiguous, scattered)
    assert [p.stride() for p in scattered] == layouts


def test_every_parameter_of_a_convolutional_network_moves(checkpoint):
    model = cnn()
    before = copies(model.parameters())
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 1, 9, 9)), torch.arange(8) % 3).backward()
        optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    del moved[1]  # a bias in front of a norm, whose gradient is rounding alone
    assert all(moved)


def test_tied_weights_are_one_parameter(checkpoint):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    optimizer = NGOptimizer(model.parameters(), model=model, checkpoint=checkpoint)
    before = copies(model.parameters())
    model(torch.ones(2, 4))
    run(optimizer, range(2))
    assert model[2].weight is model[0].weight
    assert len(optimizer.state) == 3 and optimizer.state[model[0].weight]["step"] == 2
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once_a_step(dtype, checkpoint):
    parameters = list(mlp(dtype=dtype).parameters())
    give_gradients(parameters, 0)
    expected = [
        (p.float() + u).to(dtype)
        for p, u in zip(parameters, first_update(parameters, checkpoint), strict=True)
    ]
    optimizer = NGOptimizer(parameters, checkpoint=checkpoint)
    optimizer.step()
    assert equal(parameters, expected)
    assert all(p.dtype == dtype for p in parameters)
    assert all(t.dtype == torch.float32 for t in state_tensors(optimizer))


def test_double_precision_is_computed_in_double(checkpoint):
    single, double = mlp(), mlp().double()
    run(NGOptimizer(single.parameters(), checkpoint=checkpoint), range(2))
    run(NGOptimizer(double.parameters(), checkpoint=checkpoint), range(2))
    for a, b in zip(single.parameters(), double.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)
        assert b.dtype == torch.float64 and not torch.equal(b, b.float().double())


def test_types_may_be_mixed(checkpoint):
    model = mlp()
    model[0].to(torch.bfloat16)
    model[2].to(torch.float64)
    before = copies(model.parameters())
    run(NGOptimizer(model.parameters(), checkpoint=checkpoint), range(2))
    for a, b in zip(before, model.parameters(), strict=True):
        assert a.dtype == b.dtype and not torch.equal(a, b)


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_layer_may_change_its_width(with_model, steps_before, graph_checkpoint):
    """A parameter of a new shape starts anew; with no steps before, so does everything."""
    model, wider = mlp(), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    told = {"model": model} if with_model else {}
    optimizer = NGOptimizer(model.parameters(), checkpoint=graph_checkpoint, **told)
    run(optimizer, range(steps_before))
    for p, q in zip(model.parameters(), wider.parameters(), strict=True):
        p.grad, p.data = None, q.data.clone()
    run(optimizer, range(2))
    steps = [int(state["step"]) for state in optimizer.state.values()]
    assert steps == [2, 2, 2, 2 + steps_before]
    told = {"model": wider} if with_model else {}
    run(NGOptimizer(wider.parameters(), checkpoint=graph_checkpoint, **told), range(2))
    assert equal(model.parameters(), wider.parameters()) == (steps_before == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_step_that_is_not_finite_changes_nothing(dtype, graph_checkpoint):
    for bad in (torch.inf, -torch.inf, torch.nan, 1e25):
        model, twin = mlp(dtype=dtype), mlp(dtype=dtype)
        optimizer = NGOptimizer(model.parameters(), weight_decay=0.1, checkpoint=graph_checkpoint)
        run(optimizer, range(2))
        before, state = copies(model.parameters()), copies(state_tensors(optimizer))
        give_gradients(model.parameters(), 5)
        model[2].bias.grad[1] = bad
        with pytest.warns(UserWarning, match="not finite, or .*this step changes nothing"):
            optimizer.step()
        assert equal(model.parameters(), before) and equal(state_tensors(optimizer), state)
        run(optimizer, [2])
        run(NGOptimizer(twin.parameters(), weight_decay=0.1, checkpoint=graph_checkpoint), range(3))
        assert equal(model.parameters(), twin.parameters())


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-12, 1e8, 1e16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_size_give_finite_steps(scale, dtype, checkpoint):
    model = mlp(dtype=dtype)
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    for factor in [scale] * 15 + [1.0] * 3:
        give_gradients(model.parameters(), 0)  # always the same: momenta grow as they can
        for p in model.parameters():
            p.grad = None if p.grad is None else p.grad * factor
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(t.isfinite().all() for t in state_tensors(optimizer))


def test_a_first_step_that_is_not_finite_makes_no_state(checkpoint):
    model = mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=checkpoint)
    give_gradients(model.parameters(), 0)
    model[0].weight.grad[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert not optimizer.state


CONVERSIONS = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "double, then back": lambda model: model.double().float(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "shared memory": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_model_may_be_converted_between_two_steps(name, graph_checkpoint):
    """As if an optimizer of the converted model had loaded the state."""
    model, twin = cnn(), cnn()
    optimizer = NGOptimizer(model.parameters(), checkpoint=graph_checkpoint)
    run(optimizer, range(2))
    twin.load_state_dict(model.state_dict())
    for converted in (model, twin):
        CONVERSIONS[name](converted)
    then = NGOptimizer(twin.parameters(), checkpoint=graph_checkpoint)
    then.load_state_dict(optimizer.state_dict())
    before = copies(model.parameters())
    for o in (optimizer, then):
        run(o, range(2, 4))
    assert equal(model.parameters(), twin.parameters())
    assert equal(state_tensors(optimizer), state_tensors(then))
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    # The first steps are short: in bfloat16 a weight of 1 may stay where it is.
    assert any(moved) if name == "bfloat16" else all(moved)
    expected = torch.float64 if name == "double" else torch.float32
    assert all(t.dtype == expected for t in state_tensors(optimizer))


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("steps_before", [False, True])
def test_layers_that_learn_their_width_at_the_first_batch(
    steps_before, with_model, graph_checkpoint
):
    """Lazy layers have no shapes when they are handed over, and keep their identity."""
    lazy = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(3))
    plain = mlp()
    optimizer, other = (
        NGOptimizer(
            net.parameters() if with_model else list(net.parameters()), checkpoint=graph_checkpoint
        )
        for net in (lazy, plain)
    )
    if steps_before:
        optimizer.step()
    for net in (lazy, plain):
        net(torch.ones(2, 4))
    lazy.load_state_dict(plain.state_dict())
    run(optimizer, range(2))
    run(other, range(2))
    assert equal(lazy.parameters(), plain.parameters())


def test_memory_given_anew_after_the_model_was_handed_over(graph_checkpoint):
    model, plain = mlp(), mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=graph_checkpoint)
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    run(optimizer, range(2))
    run(NGOptimizer(plain.parameters(), checkpoint=graph_checkpoint), range(2))
    assert equal(model.parameters(), plain.parameters())


@pytest.fixture
def _swapped_in_place():
    """Parameters are materialised in place, as ``torch.__future__`` promises it."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.usefixtures("_swapped_in_place")
def test_parameters_on_meta_may_be_materialised_in_place(graph_checkpoint):
    plain = mlp()
    with torch.device("meta"):
        model = mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=graph_checkpoint)
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    run(optimizer, range(2))
    run(NGOptimizer(plain.parameters(), checkpoint=graph_checkpoint), range(2))
    assert equal(model.parameters(), plain.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
@pytest.mark.parametrize("spread", [False, True])
def test_other_devices_agree_with_the_cpu(spread, checkpoint):
    """Also where a network is spread over two devices, or moved after it was handed over."""
    here, there = mlp(), mlp()
    optimizer = NGOptimizer(there.parameters(), torch.tensor(0.5), checkpoint=checkpoint)
    (there[2] if spread else there).to("cuda")
    run(NGOptimizer(here.parameters(), 0.5, checkpoint=checkpoint), range(3))
    run(optimizer, range(3))
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-3, atol=1e-4)
        assert optimizer.state[b]["momenta"].device == b.device
