"""A module and one batch -> NetSpec: the network is run once, on stand-ins for its tensors."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from l2o_graph.architecture import NetSpec
from l2o_graph.tracing.operations import follow
from l2o_graph.tracing.trace import Trace

LayerRule = Callable[[Trace, Any, tuple, Any], None]
LAYERS: dict[type[nn.Module], LayerRule] = {}


def register_layer(kind: type[nn.Module]) -> Callable[[LayerRule], LayerRule]:
    """Say what a kind of module does to neurons, in place of the operations inside it.

    The rule is called as ``rule(trace, module, inputs, output)`` after each call of such a module,
    or of a subclass. It joins neurons with the methods of ``trace`` and labels the output with
    ``trace.set_label``; parameters that it leaves out are updated from their own features.

    Args:
        kind: The module's type.
    """

    def add(rule: LayerRule) -> LayerRule:
        LAYERS[kind] = rule
        return rule

    return add


def spec_of_computation(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> NetSpec:
    """Follow a network through one batch.

    The batch passes on stand-ins that have shapes and no numbers. Where the network asks for
    numbers on its way, it is run for real, without a trace in its buffers or the random state.

    Args:
        module: The network.
        args: A batch, as the module's call takes it.
        kwargs: Named arguments of that call.

    Returns:
        The specification, parameters in the order of ``module.parameters()``.

    Raises:
        Whatever the network itself raises for that batch.
    """
    module, kwargs = unwrapped(module), dict(kwargs or {})
    try:
        return _run(module, args, kwargs, stand_ins=True)
    except Exception:  # whatever it was, the real run shows whether the network is at fault
        return _run(module, args, kwargs, stand_ins=False)


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside a compiled module, DataParallel or DistributedDataParallel."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


def _run(module: nn.Module, args: Sequence[Any], kwargs: dict, stand_ins: bool) -> NetSpec:
    fake = FakeTensorMode(allow_non_fake_inputs=True) if stand_ins else None

    def held(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return fake.from_tensor(t) if fake else t

    # Parameters go by identity: a tensor that two modules share is one.
    parameters = {name: held(p) for name, p in module.named_parameters()}
    buffers = {name: held(b if fake else b.clone()) for name, b in module.named_buffers()}
    trace = Trace(list(parameters.items()))
    args, kwargs = tree_map(held, (tuple(args), kwargs))
    state = _in_every_place(module, parameters, buffers)
    devices = {p.device for p in module.parameters() if p.is_cuda}
    with (
        torch.random.fork_rng(devices=list(devices)),
        torch.enable_grad(),
        fake or _nothing(),
        _Following(trace) as following,
        _layers_of(following),
    ):
        output = functional_call(module, state, args, kwargs, tie_weights=False)
    outputs = [t for t in tree_leaves(_plain(output)) if isinstance(t, Tensor)]
    spec = trace.builder.spec([s for t in outputs for s in trace.label(t).sets()])
    # A single number has no place in any graph, and what was not used needs none.
    unread = [i for i in spec.loose if math.prod(spec.shapes[i]) > 1 and i in trace.used]
    if unread:
        names = ", ".join(f"'{spec.names[i]}'" for i in unread[:3])
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        warnings.warn(
            f"what the network does with {names}{more} is not known: outside the graph, and "
            "updated from their own features (see l2o_graph.register_layer)",
            stacklevel=4,
        )
    return spec


def _in_every_place(
    module: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What is to take the place of each parameter and buffer, by one name for each place.

    Several names lead to the places of a module that is registered twice, and what is put there
    twice is not taken out again.
    """
    known = dict(module.named_parameters()) | dict(module.named_buffers())
    instead = {id(t): {**parameters, **buffers}[name] for name, t in known.items()}
    return {
        f"{prefix}.{name}" if prefix else name: instead[id(t)]
        for prefix, part in module.named_modules()
        for own in (part.named_parameters, part.named_buffers)
        for name, t in own(recurse=False, remove_duplicate=False)
    }


class _Following(TorchDispatchMode):
    """Tells a trace of every operation, but for those inside layers that have a rule."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace, self.inside = trace, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.inside:
            follow(self.trace, func, args, kwargs or {}, out)
        return out


@contextmanager
def _layers_of(following: _Following):
    """Rules of layers in the place of what happens inside them."""

    def before(module: nn.Module, _: tuple) -> None:
        following.inside += _rule_of(module) is not None

    def after(module: nn.Module, inputs: tuple, output: Any) -> None:
        rule = _rule_of(module)
        if rule is not None:
            following.inside -= 1
            if not following.inside:
                rule(following.trace, module, inputs, output)

    hooks = nn.modules.module
    handles = [
        hooks.register_module_forward_pre_hook(before),
        hooks.register_module_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rule_of(module: nn.Module) -> LayerRule | None:
    return next((LAYERS[kind] for kind in type(module).__mro__ if kind in LAYERS), None)


@contextmanager
def _nothing():
    yield


def _plain(output: Any) -> Any:
    """Dictionaries and data classes that tree_leaves would not look into, as lists."""
    if isinstance(output, Mapping):
        return [_plain(value) for value in output.values()]
    if isinstance(output, list | tuple):
        return [_plain(value) for value in output]
    return output
