"""What every learned optimizer owes its users: groups, closures, refusals, states, structure."""

import math
import sys
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from l2o_graph.architecture import NetSpec
from l2o_graph.inference import check_module, spec_of_module, spec_of_parameters

# Gradients above this are taken for an overflow; float32 has to hold their squares.
LONGEST_GRADIENT = 1e17
# Packages that calls come by way of, and whose lines no warning is about.
ON_THE_WAY = ("l2o_graph", "torch", "higher", "jaxtyping", "beartype")


class LearnedOptimizer(torch.optim.Optimizer):
    """The part of a learned optimizer that is the same for every rule.

    Parameters without a gradient, and frozen ones, are left as they are. A step in which any
    gradient is not finite, or longer than 1e17, changes nothing, neither parameters nor state, and
    warns.

    Args:
        params: Parameters, named parameters or groups, as for any optimizer.
        defaults: Of the groups' options, "lr", "weight_decay", "maximize" and "checkpoint" among
            them.
        model: The network that the parameters belong to, whose structure is read from its first
            batch; None to infer it from order, shape and, where given, name.

    Raises:
        ValueError: For an empty list of parameters, an ``lr`` or ``weight_decay`` that is no finite
            number of at least 0, a complex parameter, or one that ``model`` lacks.
        TypeError: For a parameter that is sharded over processes (FSDP, DTensor), and for a
            ``model`` that is no module or one of TorchScript.
    """

    # What waits for the model's first batch; a copy or a pickle begins without.
    _hook: "FirstForward | None" = None

    def __init__(self, params: ParamsT, defaults: dict[str, Any], model: nn.Module | None):
        if model is not None:
            check_module(model, "model")
        # Before the base class, which adds the groups.
        self._model = model
        self._traced: NetSpec | None = None
        self._forget()
        super().__init__(params, defaults)
        # Whoever has not imported it does not need it, and it is not a dependency.
        if "higher.optim" in sys.modules:
            from l2o_graph.higher_support import register

            register(type(self))
        self._watch()

    def _watch(self) -> None:
        """Wait for the first batch of the model, once."""
        waiting = self._hook is not None and self._hook.handle is not None
        if self._model is not None and self._traced is None and not waiting:
            self._hook = FirstForward(self)
            handle = self._model.register_forward_pre_hook(self._hook, with_kwargs=True)
            self._hook.handle = handle

    def read_structure(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
        """Follow the model through a batch; called by itself at the model's first call.

        Args:
            args: A batch, as the model's call takes it.
            kwargs: Named arguments of that call.
        """
        from l2o_graph.tracing import spec_of_computation

        assert self._model is not None
        try:
            self._traced = spec_of_computation(self._model, args, kwargs)
        except Exception as error:  # training can go on without, and the model may say more
            warn(
                f"{type(self).__name__}: could not follow the model ({error!r}); its structure is "
                "inferred from the order of its layers"
            )
            return
        self._spec = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the graph is built anew at the next step.

        Raises:
            ValueError: For an ``lr`` or ``weight_decay`` that is no finite number of at least 0, a
                complex parameter, or a parameter that ``model`` lacks.
            TypeError: For a parameter that is sharded over processes.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._forget()

    def _check_group(self, group: dict[str, Any]) -> None:
        for key in ("lr", "weight_decay"):
            value = group[key]
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"Tensor {key} must be 1-element, found shape {list(value.shape)}")
            if not 0 <= value < math.inf:
                raise ValueError(f"{key}: expected a number of at least 0, found {value}")
        if group["checkpoint"] != self.defaults["checkpoint"]:
            raise ValueError(
                f"checkpoint: expected one for all groups, '{self.defaults['checkpoint']}', "
                f"found '{group['checkpoint']}'"
            )
        self._check_parameters(group["params"])

    def _check_parameters(self, parameters: Iterable[Tensor]) -> None:
        """Raise for what cannot be trained; some of it happens to parameters only later."""
        known = None if self._model is None else set(self._model.parameters())
        for i, p in enumerate(parameters):
            # Told by a method and by FSDP1's mark: importing their classes takes long.
            if hasattr(p, "full_tensor") or hasattr(p, "_fsdp_flattened"):
                raise TypeError(
                    f"parameter {i}: expected a whole tensor, found a shard, as FSDP and DTensor "
                    f"make them; its neurons lie on several processes, and the graph needs them "
                    f"together, as DistributedDataParallel has them"
                )
            if p.dtype.is_complex:
                raise ValueError(f"parameter {i}: expected a real tensor, found {p.dtype}")
            if known is not None and p not in known:
                raise ValueError(
                    f"parameter {i}: expected one of the model's {len(known)} parameters, found "
                    f"another tensor, of shape {list(p.shape)}"
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # Compiled, it would be other code at almost every step, as ages and shapes of stacks are
    # numbers of Python; this is the decorator that torch's own optimizers have, whose public form
    # makes an import of this package take a second more.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Under ``torch.compile`` it runs as it is, to the same bits; what surrounds it is compiled.

        Args:
            closure: Evaluates the model and returns the loss; called once, with gradients on.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: For a sparse gradient, and for a parameter that is still on the meta
                device.
            TypeError, ValueError: For a parameter that has become one that construction refuses.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        for i, p in enumerate(group_of):
            if p.is_meta:  # it never has a gradient, and would be passed over without a word
                raise RuntimeError(
                    f"parameter {i}: expected a tensor with data, found one on the meta device; "
                    f"make the optimizer after to_empty(), which makes new parameters"
                )
        self._check_parameters(group_of)
        gradient_of = {
            p: -p.grad if group["maximize"] else p.grad
            for p, group in group_of.items()
            if p.grad is not None
        }
        if not self._accepts(gradient_of):
            return loss
        # Autocast is meant for the user's model; the rule needs all its digits.
        with torch.autocast(next(iter(gradient_of)).device.type, enabled=False):
            self._apply(group_of, gradient_of)
        return loss

    @abstractmethod
    def _apply(
        self, group_of: dict[Tensor, dict[str, Any]], gradient_of: dict[Tensor, Tensor]
    ) -> None:
        """Update all parameters that have a gradient, and what is remembered of them."""

    def _accepts(self, gradient_of: dict[Tensor, Tensor]) -> bool:
        """Whether there are gradients to make a step of; warns if some are unfit for it."""
        for p, gradient in gradient_of.items():
            if gradient.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__}: expected dense gradients, found {gradient.layout} "
                    f"for a parameter of shape {list(p.shape)}"
                )
        if not gradient_of or all_bounded(gradient_of.values()):
            return bool(gradient_of)
        warn(
            f"{type(self).__name__}: a gradient is not finite, or its norm is above "
            f"{LONGEST_GRADIENT:.0e}; this step changes nothing"
        )
        return False

    def _network(self, trained: Sequence[Tensor]) -> tuple[Sequence[Tensor], NetSpec]:
        """The parameters of the graph and how they join, inferred where that is not yet known."""
        parameters = trained if self._model is None else [*self._model.parameters()]
        if self._spec is None or self._spec.shapes != shapes_of(parameters):
            if self._model is None:
                self._spec = spec_of_parameters(parameters, self._names())
            else:
                if self._traced is not None and self._traced.shapes != shapes_of(parameters):
                    self._traced = None  # the model has changed: its next batch tells how
                    self._watch()
                self._spec = self._traced or self._spec_by_order(self._model)
        return parameters, self._spec

    def _spec_by_order(self, model: nn.Module) -> NetSpec:
        """The structure of a model that was not seen computing anything."""
        spec = spec_of_module(model)
        if spec.loose:
            warn(
                f"{type(self).__name__}: the model was not called before this step, so its "
                f"structure is inferred from the order of its layers, which leaves "
                f"{len(spec.loose)} of {len(spec.shapes)} parameters to their own features"
            )
        return spec

    def _names(self) -> list[str] | None:
        """Names of the parameters, where every group has them."""
        if not all("param_names" in group for group in self.param_groups):
            return None
        # As a dictionary, like the parameters themselves: a list may name one of them twice.
        name_of: dict[Tensor, str] = {}
        for group in self.param_groups:
            name_of.update(zip(group["params"], group["param_names"], strict=True))
        return list(name_of.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; it stays float32 for parameters of lower precision.

        Raises:
            ValueError: For the state of another checkpoint or of another model. The optimizer
                is then as it was.
        """
        copies: dict[Tensor, dict[str, Tensor]] = {}

        # The base class would cast the state to the parameters' type, so it gets none. As the
        # last hook before and the first after, this works with what the user's own hooks made.
        def take_out(_: Any, found: dict[str, Any]) -> dict[str, Any]:
            copies.update(self._copies(found))
            return {**found, "state": {}}

        def put_in(_: Any) -> None:
            self.state.update(copies)

        before = self.register_load_state_dict_pre_hook(take_out)
        after = self.register_load_state_dict_post_hook(put_in, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _copies(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """A copy of each parameter's state, where the parameter lies."""
        groups, state = state_dict["param_groups"], state_dict["state"]
        expected, found = ([len(g["params"]) for g in gs] for gs in (self.param_groups, groups))
        if expected != found:
            raise ValueError(f"state_dict: expected groups of {expected} parameters, found {found}")
        copies: dict[Tensor, dict[str, Tensor]] = {}
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            self._check_saved_group(mine, theirs)
            for p, key in zip(mine["params"], theirs["params"], strict=True):
                if saved := state.get(key):
                    copies[p] = self._copy_of(saved, key, p)
        return copies

    def _check_saved_group(self, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
        """Raise for a group of a saved state that is not one of this optimizer."""
        if digest_of(theirs.get("checkpoint")) != digest_of(mine["checkpoint"]):
            raise ValueError(
                f"state_dict: expected one of checkpoint '{mine['checkpoint']}', "
                f"found '{theirs.get('checkpoint')}'"
            )

    @abstractmethod
    def _copy_of(self, saved: dict[str, Any], key: Any, parameter: Tensor) -> dict[str, Tensor]:
        """A copy of what a saved state has of a parameter; raises for what is none."""

    def _forget(self) -> None:
        """Drop what was inferred; the next step infers it anew."""
        self._spec: NetSpec | None = None

    def __getstate__(self) -> dict[str, Any]:
        own = {"_model": self._model, "_traced": self._traced}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self._watch()


class FirstForward:
    """A hook that shows an optimizer the first batch of its model, and is gone.

    A copy or a pickle of the model holds a hook that does nothing.
    """

    def __init__(self, optimizer: LearnedOptimizer | None = None):
        self._optimizer = weakref.ref(optimizer) if optimizer is not None else None
        self.handle: RemovableHandle | None = None

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None
    ) -> None:
        """Before the model computes."""
        if torch.compiler.is_compiling() or self.handle is None:
            return
        self.handle.remove()
        self.handle = None
        optimizer = self._optimizer and self._optimizer()
        if optimizer is not None:
            optimizer.read_structure(args, kwargs)

    def __reduce__(self) -> tuple[type["FirstForward"], tuple[()]]:
        return FirstForward, ()


def warn(message: str) -> None:
    """Warn at the line that called this package, be it by way of torch or of ``higher``."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ON_THE_WAY:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def shapes_of(parameters: Iterable[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Shapes as a network's specification has them."""
    return tuple(tuple(p.shape) for p in parameters)


def digest_of(identity: str | None) -> str | None:
    """The part of a checkpoint's identity that a copy under another name shares."""
    return identity and identity.rpartition("@")[2]


def all_bounded(gradients: Iterable[Tensor]) -> bool:
    """Whether all are finite and short enough; one wait for the device."""
    wide = [g if g.dtype in (torch.float32, torch.float64) else g.float() for g in gradients]
    norms = torch._foreach_norm(wide)
    one = norms[0]
    norms = [n if n.device == one.device else n.to(one.device) for n in norms]
    norms = [n if n.dtype == one.dtype else n.to(one.dtype) for n in norms]
    # Written so that NaN answers no.
    return bool((torch.stack(norms) <= LONGEST_GRADIENT).all())
