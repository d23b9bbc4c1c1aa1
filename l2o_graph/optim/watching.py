"""Hooks that watch the user's calls of a model: its structure, and the examples it sees."""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from l2o_graph.optim.examples import Examples

if TYPE_CHECKING:
    from l2o_graph.optim.structure import Structure
    from l2o_graph.tracing.network import Reading

# Number of calls that are watched in training, and again in evaluation, for unused parameters.
# Layers that are dropped at random, or heads that alternate, appear within a few calls.
MOST_CALLS = 8


class Watching:
    """Hooks on a model that report its structure and its inputs to an optimizer.

    They only watch the user's own calls, and do not change them. In a copy or a pickle of the
    model the hooks do nothing.

    Args:
        model: Model, as passed to the optimizer.
        structure: Receiver of the structure, held weakly: hooks are removed when it is deleted.
            Without one, only examples are counted.
        examples: Counter of training examples.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        structure: "Structure | None" = None,
        examples: Examples | None = None,
    ):
        self._structure = None if structure is None else weakref.ref(structure, self._alone)
        self._examples = None if examples is None else weakref.ref(examples, self._alone)
        self._stack, self._watch, self._depth = ExitStack(), None, 0
        self._calls = {True: 0, False: 0}
        # Process group that trains the model: of the DistributedDataParallel that called it, or
        # the one that its parameters are sharded over.
        self.group: Any = None
        # Whether it was called inside of compiled code, or computed with sharded tensors.
        self.was_compiled = self.was_sharded = False
        self.was_called = False  # outside of compiled code
        self._module: nn.Module | None = None
        if model is None:
            return
        from l2o_graph.tracing.network import unwrapped

        self._module = unwrapped(model)
        # Hooks see nothing inside of compiled code, so the compiled module itself is watched, too.
        around = [m for m in model.modules() if "_orig_mod" in m._modules]
        self._watched = [m for m in around if unwrapped(m) is self._module] + [self._module]
        for module in self._watched:
            self._attach(module)

    def _alone(self, _: Any) -> None:
        self.leave()

    def _attach(self, module: nn.Module) -> None:
        # torch.jit.script cannot compile hooks; by this protocol it asks for a module without them.
        module.__dict__["__prepare_scriptable__"] = Scriptable(module)
        # ``module.compile()`` leaves a compiled call in the module, in which hooks see nothing.
        compiled = module._compiled_call_impl
        if compiled is not None and not isinstance(compiled, Compiled):
            module._compiled_call_impl = Compiled(module, compiled)
        self._stack.callback(_put_back, weakref.ref(module))
        handles = [module.register_forward_pre_hook(self.before, prepend=True, with_kwargs=True)]
        if self._structure is not None:
            handles.append(module.register_forward_hook(self.after, always_call=True))
        for handle in handles:
            self._stack.callback(handle.remove)

    def leave(self) -> None:
        """Remove the hooks."""
        self.stop()
        self._stack.close()

    def give_up(self) -> None:
        """Stop watching.

        Hooks are removed unless they were compiled with the model, as that would cause a
        recompilation.
        """
        if not self.was_compiled:
            self.leave()
        self._structure = self._examples = None

    @property
    def follows(self) -> bool:
        """Whether it watches the structure, not only the examples."""
        return self._structure is not None

    def is_tired(self) -> bool:
        """Return whether enough calls were watched."""
        return max(self._calls.values()) >= MOST_CALLS

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Handle the beginning of a call."""
        if torch.compiler.is_compiling():
            self.was_compiled = True
            return
        self.was_called = True
        self.count(module, (args, kwargs))
        structure = self._structure and self._structure()
        if structure is None or self._module is None or module not in self._watched:
            return
        self.group = self.group or structure.shards or _replicas_of(self._module)
        if self._watch is not None:
            self._depth += 1
            return
        enough = self._calls[module.training] >= MOST_CALLS or structure.is_complete
        if enough or self.was_sharded or _is_traced():
            return
        from l2o_graph.tracing.network import Watch

        self._calls[module.training] += 1
        self._watch = Watch(self._module, (args, kwargs)).__enter__()

    def count(self, module: nn.Module, inputs: Any) -> None:
        """Count the examples of a call in training mode."""
        examples = self._examples and self._examples()
        if examples is None or not _is_plain():
            return
        if self._watch is None and module.training and torch.is_grad_enabled():
            try:
                examples.see(inputs)
            except Exception:  # training continues whatever the inputs are
                examples.is_over = True
        if examples.is_over and self._structure is None:
            self.leave()

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Handle the end of a call, also if it failed."""
        if torch.compiler.is_compiling() or self._watch is None or module not in self._watched:
            return
        if self._depth:
            self._depth -= 1
            return
        watch = self._watch
        self.stop()
        structure = self._structure and self._structure()
        self.was_sharded |= watch.is_blind
        is_seen = not (self.was_sharded or watch.has_nested)
        if structure is not None and output is not None and is_seen:
            reading = watch.reading(output)
            if reading.used:
                structure.hear(reading)

    def stop(self) -> None:
        """End a watch that an interrupted call left open."""
        watch, self._watch, self._depth = self._watch, None, 0
        if watch is not None:
            watch.__exit__()

    def __reduce__(self) -> tuple[type["Watching"], tuple[()]]:
        return Watching, ()


class Scriptable:
    """Callable by which torch.jit.script gets the module without hooks, which it cannot compile.

    A copy of it refers to the copy of the module.
    """

    def __init__(self, module: nn.Module | None = None):
        self.__setstate__(module)

    def __call__(self) -> nn.Module | None:
        """Return the module with its hooks removed."""
        module = self._module and self._module()
        if module is not None:
            for key, watching in _watching(module).items():
                watching.leave()
                # A copy of a Watching does not know its hooks.
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    hooks.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
            _put_back(weakref.ref(module))
        return module

    def __setstate__(self, module: nn.Module | None) -> None:
        self._module = None if module is None else weakref.ref(module)

    def __reduce__(self) -> tuple[type["Scriptable"], tuple[()], nn.Module | None]:
        return Scriptable, (), self._module and self._module()


class Compiled:
    """Substitute for a module's compiled call while the module is watched."""

    def __init__(self, module: nn.Module, compiled: Callable[..., Any]):
        self._module, self.compiled = weakref.ref(module), compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module uncompiled while its structure is watched, else the compiled code."""
        module = self._module()
        if module is not None and not torch.compiler.is_compiling():
            watching = _watching(module).values()
            if any(one.follows for one in watching):  # hooks see nothing in compiled code
                return module._call_impl(*args, **kwargs)
            for one in watching:
                one.count(module, (args, kwargs))
        return self.compiled(*args, **kwargs)


def of_all_ranks(readings: "list[Reading]", group: Any) -> "list[Reading]":
    """Gather the readings of all ranks of a group, in the order of the ranks."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, readings, group=group)
    return [reading for of_rank in found for reading in of_rank]


def _replicas_of(module: nn.Module) -> Any:
    """Return the process group of the DistributedDataParallel that calls a module, if any."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    replicas = nn.parallel.DistributedDataParallel._active_ddp_module
    if replicas is None or not any(part is module for part in replicas.modules()):
        return None
    return replicas.process_group if dist.get_world_size(replicas.process_group) > 1 else None


def _watching(module: nn.Module) -> dict[int, Watching]:
    """Return all objects that watch a module, by the keys of their hooks."""
    hooks = {**module._forward_pre_hooks, **module._forward_hooks}
    owners = {key: getattr(hook, "__self__", None) for key, hook in hooks.items()}
    return {key: one for key, one in owners.items() if isinstance(one, Watching)}


def _put_back(module: "weakref.ref[nn.Module]") -> None:
    """Restore a module to its state before it was watched, unless something still watches it."""
    found = module()
    if found is None or _watching(found):
        return
    found.__dict__.pop("__prepare_scriptable__", None)
    if isinstance(instead := found._compiled_call_impl, Compiled):  # else it was compiled again
        found._compiled_call_impl = instead.compiled


def _is_traced() -> bool:
    """Return whether a tracer or a dispatch mode is active."""
    # Public, though not among the names that the module exports.
    is_tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return is_tracing or is_in_torch_dispatch_mode()


def _is_plain() -> bool:
    """Return whether this is plain eager execution, without tracing, transforms or capture."""
    return not (
        torch.compiler.is_compiling()
        or _is_traced()
        # Rows would be those of vmap, and stored tensors would belong to the transform.
        or torch._C._are_functorch_transforms_active()
        # A CUDA graph would capture the stored tensors, and waiting for the device ends a capture.
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )
