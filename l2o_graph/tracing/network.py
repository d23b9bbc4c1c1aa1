"""Tracing of a module's calls: NetSpec of its computation, observed on the actual tensors."""

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from l2o_graph.layout.spec import NetSpec
from l2o_graph.layout.tensors import is_sharded
from l2o_graph.tracing.checks import named_parameters, parameters_of
from l2o_graph.tracing.dispatch import Slot, TracingMode
from l2o_graph.tracing.replica import copied, copied_module, preserved_generators
from l2o_graph.tracing.trace import Trace

LayerRule = Callable[[Trace, Any, tuple, Any], None]
LAYERS: dict[type[nn.Module], LayerRule] = {}
# Types of arguments that are not data.
NO_DATA = (type(None), bool, int, float, str)


def register_layer(kind: type[nn.Module]) -> Callable[[LayerRule], LayerRule]:
    """Register a rule for a type of module, which replaces tracing of the operations inside it.

    Decorates a function ``rule(trace, module, inputs, output)``, which is called after each call of
    such a module, or of a subclass. It connects neurons with the methods ``dense``, ``bias`` and
    ``scale`` of ``trace`` and labels the output with ``trace.set_label``. Parameters that it omits
    are updated without the graph.

    Args:
        kind: Type of the module. An earlier rule for it is replaced.

    Returns:
        A decorator that registers the rule and returns it unchanged.
    """

    def add(rule: LayerRule) -> LayerRule:
        LAYERS[kind] = rule
        return rule

    return add


@dataclass(frozen=True)
class Reading:
    """Result of tracing calls of a network.

    Attributes:
        spec: Structure of the network.
        used: Parameters that an operation has read.
        numbers: Those of which single numbers are factors, as in a weighted sum of layers.
    """

    spec: NetSpec
    used: frozenset[int]
    numbers: frozenset[int] = frozenset()

    @cached_property  # read at every step
    def is_complete(self) -> bool:
        """Whether all parameters were used, except for empty ones."""
        return len(self.used) == sum(math.prod(shape) > 0 for shape in self.spec.shapes)

    @property
    def placed(self) -> frozenset[int]:
        """Parameters that were used and have a place in the graph."""
        return self.used - set(self.spec.loose)

    @property
    def unknown(self) -> list[str]:
        """Names of the parameters that were used in an unknown way."""
        spec = self.spec
        # Single numbers never have a place in the graph.
        unknown = self.used & {*spec.loose} - self.numbers
        return [spec.names[i] for i in sorted(unknown) if math.prod(spec.shapes[i]) > 1]


def spec_of_computation(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> NetSpec:
    """Determine the structure of a network by tracing its computation for a batch.

    A copy of the network with its parameters processes a copy of the batch, and the states of all
    random generators are restored: there are no side effects.

    Args:
        module: Network.
        args: Positional arguments of its call: a batch.
        kwargs: Keyword arguments of its call.

    Returns:
        The specification, with parameters in the order of ``module.parameters()``.

    Raises:
        Exception: Any error of the network itself for this batch.
    """
    reading = read(module, args, kwargs)
    if reading.unknown:
        warnings.warn(unknown_message(reading.unknown), stacklevel=3)
    return reading.spec


def unknown_message(names: Sequence[str]) -> str:
    """Return the warning about parameters that are used in an unknown way."""
    first = ", ".join(f"'{name}'" for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"the use of {first}{more} could not be traced: these parameters are outside the graph "
        "and updated without it (see l2o_graph.register_layer)"
    )


def read(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Reading:
    """Trace a copy of a network on a copy of a batch."""
    module = unwrapped(module)
    memo: dict[int, Any] = {id(p): p for p in parameters_of(module)}
    copy = copied_module(module, memo)
    own_args, own_kwargs = copied((tuple(args), dict(kwargs or {})), memo)
    devices = [p.device for p in parameters_of(module)]
    with (
        preserved_generators(devices),
        _without_fast_path(),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the network repeats them when it is called
        watch = Watch(copy, (own_args, own_kwargs))
        with watch:
            output = copy(*own_args, **own_kwargs)
        return watch.reading(output)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Disable fused encoder layers, which use nested tensors for padding, in evaluation mode."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the network inside of torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


class Watch:
    """Context manager that traces all operations inside of it.

    Args:
        module: Network.
        inputs: Inputs of the call. Without any, parameters that meet no data, such as the factors
            of a matrix, are tables.
    """

    def __init__(self, module: nn.Module, inputs: Any):
        self.trace = Trace(named_parameters(module))
        self._module = module
        self._has_inputs = any(not isinstance(x, NO_DATA) for x in tree_leaves(inputs))
        self._open = ExitStack()

    def __enter__(self) -> "Watch":
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # operations in compiled code are not visible
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            mode = stack.enter_context(TracingMode(self.trace, _slots_of(self._module)))
            stack.enter_context(_layer_hooks(self._module, mode))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    @property
    def is_blind(self) -> bool:
        """Whether there were operations on sharded tensors, which cannot be traced."""
        return self.trace.is_blind

    @property
    def has_nested(self) -> bool:
        """Whether there were nested tensors, as in fused encoder layers with padding."""
        return self.trace.has_nested

    def reading(self, output: Any) -> Reading:
        """Return the result, given the output of the network."""
        outputs = [t for t in tree_leaves(_opened(output)) if isinstance(t, Tensor)]
        known = [s for t in outputs for s in self.trace.label(t).sets()]
        known += [s for t in outputs for s in self.trace.hidden_in(t)]
        if not self._has_inputs:
            self.trace.builder.add_tables(sorted(self.trace.used))
        spec = self.trace.builder.spec(known)
        return Reading(spec, frozenset(self.trace.used), frozenset(self.trace.numbers))


def _slots_of(module: nn.Module) -> list[Slot]:
    """Return the slots of sharded and lazy parameters, which a call materializes, once each."""
    index = {id(p): i for i, p in enumerate(parameters_of(module)) if is_sharded(p) or is_lazy(p)}
    return [
        (index.pop(id(p)), part, name, p)
        for part in module.modules()
        for name, p in part._parameters.items()
        if p is not None and id(p) in index
    ]


@contextmanager
def _layer_hooks(network: nn.Module, mode: TracingMode) -> Iterator[None]:
    """Install hooks that apply rules of layers and pause tracing inside of them."""

    def before(module: nn.Module, _: tuple) -> None:
        mode.inside += 1

    # After an error, torch omits the keyword arguments, and the output is None.
    def after(module: nn.Module, args: tuple, *rest: Any) -> None:
        rule, output = _rule_of(module), rest[-1]
        try:
            if mode.inside == 1 and output is not None and rule is not None:
                inputs = inspect.signature(module.forward).bind(*args, **rest[0]).args
                _follow_layer(mode.trace, rule, module, inputs, output)
        finally:
            mode.inside -= 1

    with ExitStack() as stack:
        for module in network.modules():
            if _rule_of(module) is not None:
                handles = (
                    module.register_forward_pre_hook(before, prepend=True),
                    module.register_forward_hook(after, with_kwargs=True, always_call=True),
                )
                for handle in handles:
                    stack.callback(handle.remove)
        yield


def _follow_layer(
    trace: Trace, rule: LayerRule, module: nn.Module, inputs: tuple, output: Any
) -> None:
    """Apply the rule of a layer; tensors that it does not label stay unlabelled."""
    outs = [t for t in tree_leaves(_opened(output)) if isinstance(t, Tensor)]
    read = [t for t in tree_leaves(_opened(inputs)) if isinstance(t, Tensor)]
    before = trace.sets_of(read)
    for t in outs:  # labels from operations inside of the layer
        if not any(t is x for x in read):
            trace.forget(t)
    for p in parameters_of(module):
        trace.mark_used(p)
    trace.builder.recent_reads.clear()
    try:
        rule(trace, module, inputs, output)
    except Exception:  # as for operators: tracing and the call continue
        trace.builder.fix_order(before)
    trace.builder.fix_order(before - trace.sets_of(outs) - trace.builder.recent_reads)


def _rule_of(module: nn.Module) -> LayerRule | None:
    return next((LAYERS[kind] for kind in type(module).__mro__ if kind in LAYERS), None)


def _opened(output: Any) -> Any:
    """Convert mappings and wrapper tensors, which ``tree_leaves`` does not open, to lists."""
    if isinstance(output, Tensor):
        if is_sharded(output) or not is_traceable_wrapper_subclass(output):
            return output
        return [_opened(getattr(output, name)) for name in output.__tensor_flatten__()[0]]
    if isinstance(output, Mapping):
        return [_opened(value) for value in output.values()]
    if isinstance(output, list | tuple):
        return [_opened(value) for value in output]
    return output
