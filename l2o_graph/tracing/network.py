"""Calls of a module -> NetSpec: what is computed is watched, on the tensors themselves."""

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
from l2o_graph.tracing.following import Following, Slot
from l2o_graph.tracing.replica import as_they_were, copied, copied_module
from l2o_graph.tracing.trace import Trace

LayerRule = Callable[[Trace, Any, tuple, Any], None]
LAYERS: dict[type[nn.Module], LayerRule] = {}
# Types of arguments that are not data.
NO_DATA = (type(None), bool, int, float, str)


def register_layer(kind: type[nn.Module]) -> Callable[[LayerRule], LayerRule]:
    """Say what a kind of module does to neurons, in place of the operations inside it.

    Decorates a rule, which is called as ``rule(trace, module, inputs, output)`` after each call of
    such a module, or of a subclass. It joins neurons with the methods of ``trace`` (``dense``,
    ``bias``, ``scale``) and labels the output with ``trace.set_label``; parameters that it leaves
    out are updated from their own features.

    Args:
        kind: The module's type. A rule of before is replaced.

    Returns:
        What decorates the rule, which stays as it is.
    """

    def add(rule: LayerRule) -> LayerRule:
        LAYERS[kind] = rule
        return rule

    return add


@dataclass(frozen=True)
class Reading:
    """What calls of a network told: its structure, and which parameters any operation read."""

    spec: NetSpec
    used: frozenset[int]

    @cached_property  # every step asks
    def is_complete(self) -> bool:
        """Whether all parameters that have any scalars were read."""
        return len(self.used) == sum(math.prod(shape) > 0 for shape in self.spec.shapes)

    @property
    def placed(self) -> frozenset[int]:
        """The parameters that were read and have a place in the graph."""
        return self.used - set(self.spec.loose)

    @property
    def unknown(self) -> list[str]:
        """Names of the parameters that were read in a way that is not known."""
        spec = self.spec
        # A single number has no place in any graph, and what was not used needs none.
        return [
            spec.names[i] for i in spec.loose if math.prod(spec.shapes[i]) > 1 and i in self.used
        ]


def spec_of_computation(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> NetSpec:
    """Follow a network through one batch.

    The network is run on copies of its buffers, its objects and the batch, and all random
    generators are put back: nothing of it remains.

    Args:
        module: The network.
        args: A batch, as the module's call takes it.
        kwargs: Named arguments of that call.

    Returns:
        The specification, parameters in the order of ``module.parameters()``.

    Raises:
        Exception: Whatever the network itself raises for that batch.
    """
    reading = read(module, args, kwargs)
    if reading.unknown:
        warnings.warn(unknown_message(reading.unknown), stacklevel=3)
    return reading.spec


def unknown_message(names: Sequence[str]) -> str:
    """Say of which parameters it is not known what the network does with them."""
    first = ", ".join(f"'{name}'" for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"what the network does with {first}{more} is not known: outside the graph, and "
        "updated from their own features (see l2o_graph.register_layer)"
    )


def read(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Reading:
    """Run a copy of a network on copies of a batch, and tell what was seen."""
    module = unwrapped(module)
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    copy = copied_module(module, memo)
    own_args, own_kwargs = copied((tuple(args), dict(kwargs or {})), memo)
    devices = [p.device for p in module.parameters()]
    with (
        as_they_were(devices),
        _without_fast_path(),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the network says it again when it is called
        watch = Watch(copy, (own_args, own_kwargs))
        with watch:
            output = copy(*own_args, **own_kwargs)
        return watch.reading(output)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Have encoders in evaluation compute as in training, for padding without nested tensors."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside a compiled module, DataParallel or DistributedDataParallel."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


class Watch:
    """Follows whatever is computed while it is entered, on the tensors themselves.

    Args:
        module: The network.
        inputs: Inputs of the call. Without any, parameters that meet no data, like the factors of
            a matrix or the pixels of an image, are tables.
    """

    def __init__(self, module: nn.Module, inputs: Any):
        self.trace = Trace(list(module.named_parameters()))
        self._module = module
        self._has_inputs = any(not isinstance(x, NO_DATA) for x in tree_leaves(_plain(inputs)))
        self._open: ExitStack | None = None

    def __enter__(self) -> "Watch":
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # what is compiled cannot be seen inside
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            following = stack.enter_context(Following(self.trace, _slots_of(self._module)))
            stack.enter_context(_layers_of(self._module, following))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    @property
    def is_blind(self) -> bool:
        """Whether the network computed with sharded tensors, between which ways are not seen."""
        return self.trace.is_blind

    @property
    def has_nested(self) -> bool:
        """Whether it computed with nested tensors, as an encoder in evaluation does for padding."""
        return self.trace.has_nested

    def reading(self, output: Any) -> Reading:
        """What was seen, of a network that gave this answer."""
        outputs = [t for t in tree_leaves(_plain(output)) if isinstance(t, Tensor)]
        known = [s for t in outputs for s in self.trace.label(t).sets()]
        known += [s for t in outputs for s in self.trace.hidden_in(t)]
        if not self._has_inputs:
            self.trace.builder.add_tables(sorted(self.trace.used))
        spec = self.trace.builder.spec(known)
        return Reading(spec, frozenset(self.trace.used))


def _slots_of(module: nn.Module) -> list[Slot]:
    """Where in a network parameters are that a call makes whole, or gives a shape, once each."""
    index = {id(p): i for i, p in enumerate(module.parameters()) if is_sharded(p) or is_lazy(p)}
    return [
        (index.pop(id(p)), part, name, p)
        for part in module.modules()
        for name, p in part._parameters.items()
        if p is not None and id(p) in index
    ]


@contextmanager
def _layers_of(network: nn.Module, following: Following) -> Iterator[None]:
    """Rules of layers in the place of what happens inside them."""

    def before(module: nn.Module, _: tuple) -> None:
        following.inside += 1

    # Behind an error torch leaves out the named arguments, and there is no output.
    def after(module: nn.Module, args: tuple, *rest: Any) -> None:
        rule, output = _rule_of(module), rest[-1]
        try:
            if following.inside == 1 and output is not None and rule is not None:
                inputs = inspect.signature(module.forward).bind(*args, **rest[0]).args
                _follow_layer(following.trace, rule, module, inputs, output)
        finally:
            following.inside -= 1

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
    """Apply the rule of a layer; what it says nothing of is not known."""
    outs = [t for t in tree_leaves(_plain(output)) if isinstance(t, Tensor)]
    read = [t for t in tree_leaves(_plain(inputs)) if isinstance(t, Tensor)]
    before = trace.sets_of(read)
    for t in outs:  # what the operations inside said of it
        if not any(t is x for x in read):
            trace.forget(t)
    for p in module.parameters():
        trace.use(p)
    trace.builder.touched.clear()
    try:
        rule(trace, module, inputs, output)
    except Exception:  # as in operations: neither the reading nor the call ends here
        trace.builder.lose(before)
    trace.builder.lose(before - trace.sets_of(outs) - trace.builder.touched)


def _rule_of(module: nn.Module) -> LayerRule | None:
    return next((LAYERS[kind] for kind in type(module).__mro__ if kind in LAYERS), None)


def _plain(output: Any) -> Any:
    """Open dictionaries and wrapper tensors, which tree_leaves would not open, as lists."""
    if isinstance(output, Tensor):
        if is_sharded(output) or not is_traceable_wrapper_subclass(output):
            return output
        return [_plain(getattr(output, name)) for name in output.__tensor_flatten__()[0]]
    if isinstance(output, Mapping):
        return [_plain(value) for value in output.values()]
    if isinstance(output, list | tuple):
        return [_plain(value) for value in output]
    return output
