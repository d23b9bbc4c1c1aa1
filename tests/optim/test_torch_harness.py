"""The checks that PyTorch runs on its own optimizers, in our words, through its own machinery.

``OptimizerInfo`` describes an optimizer, ``optims`` hands it to each check, and the list of bad
input that no optimizer may accept is PyTorch's. The machinery is private and moves between
versions: where it is not to be had, these checks are skipped, and the contract stands in
test_contract.py.
"""

import copy
import io

import pytest
import torch
from support.optimizers import tame_controller
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from l2o_graph.optim.optimizer import NGOptimizer

common = pytest.importorskip("torch.testing._internal.common_optimizers")
device_type = pytest.importorskip("torch.testing._internal.common_device_type")
common_utils = pytest.importorskip("torch.testing._internal.common_utils")


class Tame(NGOptimizer):
    """With a controller that the tests make."""

    def __init__(self, params, lr=1.0, weight_decay=0.0, **options):
        super().__init__(params, lr, weight_decay, checkpoint=tame_controller(), **options)


def inputs(device, dtype=None):
    """Every way to construct it, as PyTorch lists them for its own optimizers."""
    return [
        common.OptimizerInput(params=None, kwargs={}, desc="default"),
        common.OptimizerInput(params=None, kwargs={"lr": 0.1}, desc="non-default lr"),
        common.OptimizerInput(params=None, kwargs={"lr": torch.tensor(0.1)}, desc="Tensor lr"),
        common.OptimizerInput(params=None, kwargs={"weight_decay": 0.01}, desc="weight_decay"),
        common.OptimizerInput(
            params=None, kwargs={"weight_decay": 0.01, "maximize": True}, desc="maximize"
        ),
    ]


def error_inputs(device, dtype):
    """Bad input for any optimizer, and for this one."""
    bad = common.ErrorOptimizerInput(
        common.OptimizerInput(params=None, kwargs={"lr": -1.0}, desc="negative lr"),
        error_type=ValueError,
        error_regex="lr: expected a number of at least 0, found -1.0",
    )
    return [*common.get_error_inputs_for_all_optims(device, dtype), bad]


INFO = common.OptimizerInfo(
    Tame,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=(
        [lambda o: StepLR(o, gamma=0.9, step_size=10)],
        [lambda o: ReduceLROnPlateau(o)],
        [lambda o: ExponentialLR(o, gamma=0.99), lambda o: ReduceLROnPlateau(o)],
    ),
    supported_impls=(),
    not_og_supported_flags=(),
    supports_complex=False,
)


def linear_problem(device, dtype, contiguous: bool = True) -> tuple[list[nn.Parameter], Tensor]:
    """A weight (10, 5), a bias (10,) and an input, as PyTorch's checks use them."""
    weight, bias = torch.randn(10, 5), torch.randn(10)
    if not contiguous:
        weight, bias = torch.randn(10, 5, 2)[..., 0], torch.randn(10, 2)[..., 0]
    parameters = [nn.Parameter(t.to(device, dtype)) for t in (weight, bias)]
    assert all(p.is_contiguous() == contiguous for p in parameters)
    return parameters, torch.randn(5, device=device, dtype=dtype)


def closure_for(optimizer, parameters, x):
    def closure():
        optimizer.zero_grad()
        weight, bias = parameters[:2]
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss.detach()

    return closure


def loss_after(optimizer, schedulers, closure) -> tuple[float, float]:
    """Loss before and after 20 steps."""
    first = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step(*[loss] if isinstance(scheduler, ReduceLROnPlateau) else [])
    return first, closure().item()


class TestHarness(common_utils.TestCase):
    @common.optims([INFO], dtypes=[torch.float32])
    def test_bad_input_is_refused(self, device, dtype, optim_info):
        for bad in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            given = bad.optimizer_error_input
            params = [nn.Parameter(torch.ones(2))] if given.params is None else given.params
            with self.subTest(given.desc):
                if issubclass(bad.error_type, Warning):
                    with self.assertWarnsRegex(bad.error_type, bad.error_regex):
                        optim_info.optim_cls(params, **given.kwargs)
                else:
                    with self.assertRaisesRegex(bad.error_type, bad.error_regex):
                        optim_info.optim_cls(params, **given.kwargs)

    @common_utils.parametrize("contiguous", [True, False])
    @common.optims([INFO], dtypes=[torch.float32])
    def test_loss_goes_the_right_way(self, device, dtype, optim_info, contiguous):
        for given in optim_info.optim_inputs_func(device=device):
            parameters, x = linear_problem(device, dtype, contiguous)
            optimizer = optim_info.optim_cls(parameters, **given.kwargs)
            closure = closure_for(optimizer, parameters, x)
            first, last = loss_after(optimizer, [], closure)
            if given.kwargs.get("maximize", False):
                self.assertGreater(last, first, given.desc)
            else:
                self.assertLess(last, first, given.desc)

    @common.optims([INFO], dtypes=[torch.float32])
    def test_loss_goes_down_under_schedulers(self, device, dtype, optim_info):
        for makers in optim_info.scheduler_inputs:
            parameters, x = linear_problem(device, dtype)
            optimizer = optim_info.optim_cls(parameters)
            schedulers = [make(optimizer) for make in makers]
            closure = closure_for(optimizer, parameters, x)
            first, last = loss_after(optimizer, schedulers, closure)
            self.assertLess(last, first)

    @common_utils.parametrize("scheduled", [True, False])
    @common.optims([INFO], dtypes=[torch.float32])
    def test_groups_have_options_of_their_own(self, device, dtype, optim_info, scheduled):
        parameters, x = linear_problem(device, dtype)
        still = nn.Parameter(torch.randn(2, device=device, dtype=dtype))
        before = still.detach().clone()
        groups = [
            {"params": [parameters[0]], "lr": 1e-3},
            {"params": [parameters[1]], "lr": 0.01},
            {"params": [still], "lr": 1e-28},
        ]
        optimizer = optim_info.optim_cls(groups)
        scheduler = StepLR(optimizer, gamma=0.9, step_size=10) if scheduled else None
        closure = closure_for(optimizer, parameters, x)
        first = closure().item()
        for seed in range(20):
            closure()
            torch.manual_seed(seed)
            still.grad = torch.rand_like(still)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        self.assertLess(closure().item(), first)
        self.assertEqual(still, before, rtol=0, atol=0)

    @common.optims([INFO], dtypes=[torch.float32, torch.float64])
    def test_tensor_lr_is_lr(self, device, dtype, optim_info):
        parameters, x = linear_problem(device, dtype)
        twins = [nn.Parameter(p.detach().clone()) for p in parameters]
        by_float = optim_info.optim_cls(parameters, lr=0.125)
        by_tensor = optim_info.optim_cls(twins, lr=torch.tensor(0.125))
        for _ in range(5):
            by_float.step(closure_for(by_float, parameters, x))
            by_tensor.step(closure_for(by_tensor, twins, x))
            self.assertEqual(parameters, twins, rtol=0, atol=0)

    @common.optims([INFO], dtypes=[torch.float32])
    def test_step_without_gradients_does_nothing(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            parameters, _ = linear_problem(device, dtype)
            parameters += [nn.Parameter(torch.randn(2, 3), requires_grad=False)]
            before = copy.deepcopy(parameters)
            optimizer = optim_info.optim_cls(parameters, **given.kwargs)
            optimizer.step()
            self.assertEqual(parameters, before, rtol=0, atol=0)

    @common.optims([INFO], dtypes=[torch.float32])
    def test_step_with_zero_gradients_does_nothing(self, device, dtype, optim_info):
        """Nor does decay, which is a part of what an update changes."""
        for given in optim_info.optim_inputs_func(device=device):
            parameters, _ = linear_problem(device, dtype)
            before = [p.detach().clone() for p in parameters]
            optimizer = optim_info.optim_cls(parameters, **given.kwargs)
            for p in parameters:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            self.assertEqual(parameters, before, rtol=0, atol=0)
            self.assertEqual(len(optimizer.state), 2)

    @common_utils.parametrize("named_first", [True, False])
    @common_utils.parametrize("named_then", [True, False])
    @common.optims([INFO], dtypes=[torch.float32])
    def test_state_dict_goes_on_exactly(self, device, dtype, optim_info, named_first, named_then):
        for given in optim_info.optim_inputs_func(device=device):
            parameters, x = linear_problem(device, dtype)
            parameters.append(nn.Parameter(torch.tensor(0.5, device=device, dtype=dtype)))
            names = ["linear.weight", "linear.bias", "scale"]
            first = list(zip(names, parameters, strict=True)) if named_first else parameters
            optimizer = optim_info.optim_cls(first, **given.kwargs)
            for _ in range(3):
                optimizer.step(closure_for(optimizer, parameters, x))

            twins = [nn.Parameter(p.detach().clone()) for p in parameters]
            then = list(zip(names, twins, strict=True)) if named_then else twins
            resumed = optim_info.optim_cls(then, **given.kwargs)
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            resumed.load_state_dict(torch.load(file, weights_only=True))
            for _ in range(3):
                optimizer.step(closure_for(optimizer, parameters, x))
                resumed.step(closure_for(resumed, twins, x))
                self.assertEqual(parameters, twins, rtol=0, atol=0)
            self.assertEqual(optimizer.state_dict()["state"], resumed.state_dict()["state"])
            self.assertEqual(
                "param_names" in resumed.param_groups[0], named_first or named_then, given.desc
            )

    @common.optims([INFO], dtypes=[torch.float32])
    def test_deepcopy_keeps_public_attributes(self, device, dtype, optim_info):
        parameters, x = linear_problem(device, dtype)
        optimizer = optim_info.optim_cls(parameters)
        optimizer.step(closure_for(optimizer, parameters, x))
        twin = copy.deepcopy(optimizer)

        def public(o):
            return {key for key in vars(o) if not key.startswith("_")}

        self.assertEqual(public(twin), public(optimizer))
        self.assertEqual(twin.state_dict(), optimizer.state_dict())

    @common.optims([INFO], dtypes=[torch.float32])
    def test_hooks_run_in_order(self, device, dtype, optim_info):
        order = []
        parameters, x = linear_problem(device, dtype)
        optimizer = optim_info.optim_cls(parameters)
        own = [
            register_optimizer_step_pre_hook(lambda *_: order.append(0)),
            optimizer.register_step_pre_hook(lambda *_: order.append(1)),
            optimizer.register_step_post_hook(lambda *_: order.append(2)),
            register_optimizer_step_post_hook(lambda *_: order.append(3)),
        ]
        optimizer.step(closure_for(optimizer, parameters, x))
        for hook in own:
            hook.remove()
        optimizer.step(closure_for(optimizer, parameters, x))
        self.assertEqual(order, [0, 1, 2, 3])

    @common.optims([INFO], dtypes=[torch.float32])
    def test_state_dict_hooks_run(self, device, dtype, optim_info):
        parameters, _ = linear_problem(device, dtype)
        optimizer = optim_info.optim_cls(parameters)
        optimizer.register_state_dict_pre_hook(lambda o: setattr(o, "seen", True))
        optimizer.register_state_dict_post_hook(lambda _, content: {**content, "note": 7})
        content = optimizer.state_dict()
        self.assertTrue(optimizer.seen)
        self.assertEqual(content["note"], 7)
        optimizer.load_state_dict(content)

    @common.optims([INFO], dtypes=[torch.complex64])
    def test_complex_parameters_are_refused(self, device, dtype, optim_info):
        self.assertFalse(optim_info.supports_complex)
        with self.assertRaisesRegex(ValueError, "expected a real tensor, found torch.complex64"):
            optim_info.optim_cls([nn.Parameter(torch.ones(2, device=device, dtype=dtype))])


device_type.instantiate_device_type_tests(TestHarness, globals(), only_for=("cpu",))
