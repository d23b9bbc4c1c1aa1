"""The base class of learned optimizers: groups, closures, checks and states."""

# pyright: reportPrivateImportUsage=false
# torch's multi-tensor functions and this decorator have no public names.

import copy
import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from l2o_graph.layout.spec import NetSpec
from l2o_graph.layout.tensors import is_sharded
from l2o_graph.optim.examples import Examples
from l2o_graph.optim.sharded import Sharing, here, replaced, sharing_of
from l2o_graph.optim.structure import Structure, asked_of
from l2o_graph.optim.warn import warn
from l2o_graph.tracing.checks import check_module, parameters_of

# Norms above this count as an overflow; float32 has to hold their squares.
LONGEST_GRADIENT = 1e17
# The module in which ZeroRedundancyOptimizer creates the optimizer of each process.
ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
PARTED = (
    "the graph needs all neurons of a parameter in one process, as with DistributedDataParallel"
)


class LearnedOptimizer(torch.optim.Optimizer):
    """Base class of learned optimizers: everything that does not depend on the rule.

    Args:
        params: Parameters, named parameters or groups, as for any optimizer.
        defaults: Defaults of the groups' options, among them "lr", "weight_decay", "maximize" and
            "checkpoint".
        model: Network that the parameters belong to; its structure is read from its first batch.
            With None, it is the module whose ``parameters()`` are passed as ``params``; for other
            parameters the structure is inferred from order, shapes and names, if there are any.
        examples: Counter of training examples, if the rule depends on them.

    Raises:
        ValueError, TypeError: As ``NGOptimizer``; a TypeError for any shard if the rule does not
            support shards.
    """

    # Whether parameters may be sharded over processes, as DTensors.
    takes_shards: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        model: nn.Module | None,
        examples: Examples | None = None,
    ):
        _refuse_shares(type(self).__name__)
        if model is not None:
            check_module(model, "model")
        # Before the base class adds the groups, which exhausts a generator of parameters.
        found = asked_of(params) if model is None else model
        self._structure = Structure(type(self).__name__, found, examples, model is not None)
        super().__init__(params, defaults)
        # Only if the user has imported ``higher``: it is not a dependency.
        if "higher.optim" in sys.modules:
            from l2o_graph.higher_support import register

            register(type(self))
        self._structure.watch()

    def read_structure(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
        """Read the structure of the model from a call with an example batch.

        Not needed if the model is called before the first step: such calls are followed
        automatically. The call leaves the model unchanged.

        Args:
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Raises:
            RuntimeError: If the optimizer does not know its model.
        """
        self._structure.read(args, kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the graph is rebuilt at the next step.

        Raises:
            ValueError, TypeError: As at construction; the optimizer is then left unchanged.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            sharing = sharing_of(self._parameters())
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._forget()
        self._sharing = sharing
        self._structure.shards = sharing and sharing.group

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
        """Raise for parameters that cannot be trained; they may change after construction."""
        model = self._structure.model
        known = None if model is None else set(parameters_of(model))
        if known is not None and not (self._structure.is_given or known.issuperset(parameters)):
            self._structure.drop()
            known = None
        for i, p in enumerate(parameters):
            # FSDP1 marks its flat parameters and views of them, which look like vectors.
            if hasattr(p, "_fsdp_flattened") or (is_sharded(p) and not self.takes_shards):
                fit = " or a DTensor of fully_shard" if self.takes_shards else ""
                raise TypeError(
                    f"parameter {i}: expected a whole tensor{fit}, found a shard of "
                    f"FullyShardedDataParallel; {PARTED}"
                )
            if p.dtype.is_complex:
                raise ValueError(f"parameter {i}: expected a real tensor, found {p.dtype}")
            if known is not None and p not in known:
                if not is_sharded(p) and any(is_sharded(k) and k.shape == p.shape for k in known):
                    raise ValueError(_too_early(i))
                raise ValueError(
                    f"parameter {i}: expected one of the model's {len(known)} parameters, found "
                    f"another tensor, of shape {list(p.shape)}"
                )

    # Ages and shapes of stacks are Python numbers, so a compiled step would be recompiled almost
    # every time. torch's own optimizers have this decorator; importing its public form takes a
    # second longer.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Under ``torch.compile`` the step itself is not compiled and gives the same bits; the code
        around it is compiled.

        Args:
            closure: Function that evaluates the model and returns the loss. It is called once,
                with gradients enabled.

        Returns:
            Value of the closure.

        Raises:
            RuntimeError: For a sparse gradient; for a parameter on the meta device; at a first
                step if modules have replaced parameters by shards; and if only some ranks have a
                gradient of a sharded network's parameter.
            TypeError, ValueError: For a parameter that construction would refuse by now.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        for p in self._structure.replaced(group_of):
            del group_of[p]
        for i, p in enumerate(group_of):
            if p.is_meta:  # it never has a gradient, and would be skipped silently
                raise RuntimeError(
                    f"parameter {i}: expected a tensor with data, found one on the meta device; "
                    f"create the optimizer after to_empty(), which replaces the parameters"
                )
        self._check_parameters(group_of)
        gradient_of = {
            p: -p.grad if group["maximize"] else p.grad
            for p, group in group_of.items()
            if p.grad is not None
        }
        if not self.state and len(gradient_of) < len(group_of):
            self._refuse_left_behind(group_of, gradient_of)
        if not self._accepts(gradient_of):
            return loss
        self._structure.settle(gradient_of)
        # Autocast is meant for the user's model; the rule needs full precision.
        with torch.autocast(next(iter(gradient_of)).device.type, enabled=False):
            self._apply(group_of, gradient_of)
        return loss

    @abstractmethod
    def _apply(
        self, group_of: dict[Tensor, dict[str, Any]], gradient_of: dict[Tensor, Tensor]
    ) -> None:
        """Update all parameters that have a gradient, and their state."""

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @cached_property
    def _sharing(self) -> Sharing | None:
        """The ranks and which parameters each owns; None if no parameter is sharded."""
        return sharing_of(self._parameters())

    def _refuse_left_behind(
        self, parameters: Iterable[Tensor], gradient_of: Mapping[Tensor, Tensor]
    ) -> None:
        """Raise if shards have replaced parameters, which then never have gradients."""
        if dist.is_available() and dist.is_initialized():
            alone = [(i, p) for i, p in enumerate(parameters) if p not in gradient_of]
            for i in replaced(p for _, p in alone)[:1]:
                raise RuntimeError(_too_early(alone[i][0]))

    def _accepts(self, gradient_of: dict[Tensor, Tensor]) -> bool:
        """Return whether a step can be made; warn about unusable gradients."""
        for p, gradient in gradient_of.items():
            if gradient.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__}: expected dense gradients, found {gradient.layout} "
                    f"for a parameter of shape {list(p.shape)}"
                )
        given = list(gradient_of.values())
        if self._sharing is not None:
            given = [here(g) for g in given]
        fit = not given or all_bounded(given)
        if self._sharing is not None:  # or some ranks would wait for others
            fit = self._sharing.agreed(fit, gradient_of)
        if fit:
            return bool(gradient_of)
        warn(
            f"{type(self).__name__}: a gradient is not finite, or its norm is above "
            f"{LONGEST_GRADIENT:.0e}; this step changes nothing"
        )
        return False

    def _network(self, trained: Sequence[Tensor]) -> tuple[Sequence[Tensor], NetSpec]:
        """Return the parameters of the graph and its specification."""
        # A dictionary, because a list may name a parameter twice.
        name_of: dict[Tensor, str] = {}
        for group in self.param_groups:
            name_of.update(zip(group["params"], group.get("param_names", ()), strict=False))
        all_named = all("param_names" in group for group in self.param_groups)
        return self._structure.network(trained, list(name_of.values()) if all_named else None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; it stays float32 for parameters of lower precision.

        Raises:
            ValueError: For the state of another checkpoint or of another model. The optimizer
                is then left unchanged.
        """
        copies: dict[Tensor, dict[str, Tensor]] = {}

        # The base class would cast the state to the parameters' type, so it gets none. The last
        # pre-hook and the first post-hook see what the user's own hooks have made of the state.
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
        """Copy each parameter's state to the parameter's device."""
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
        """Raise for a saved group that does not belong to this optimizer."""
        # The digest, which is the same for a copy of the checkpoint under another name.
        found, expected = (str(g.get("checkpoint")).rpartition("@")[2] for g in (theirs, mine))
        if found != expected:
            raise ValueError(
                f"state_dict: expected one of checkpoint '{mine['checkpoint']}', "
                f"found '{theirs.get('checkpoint')}'"
            )

    @abstractmethod
    def _copy_of(self, saved: dict[str, Any], key: Any, parameter: Tensor) -> dict[str, Tensor]:
        """Copy the saved state of a parameter; raise if it is not one."""

    def _forget(self) -> None:
        """Drop everything inferred; the next step infers it again."""
        self._structure.forget()
        self.__dict__.pop("_sharing", None)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_structure": self._structure.copy()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "LearnedOptimizer":
        new = memo[id(self)] = type(self).__new__(type(self))
        state = copy.deepcopy(self.__getstate__(), memo)
        # A model that was found automatically is dropped, unless it is copied at the same time.
        state["_structure"].model = memo.get(id(self._structure.model), state["_structure"].model)
        new.__setstate__(state)
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        if dist.is_available() and dist.is_initialized():  # otherwise nothing can be sharded
            self._structure.shards = self._sharing and self._sharing.group
        self._structure.watch()


def _refuse_shares(name: str) -> None:
    """Raise inside ZeroRedundancyOptimizer, which passes only one process's parameters.

    They are whole tensors, so that only the caller shows that some are missing.
    """
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("l2o_graph", "torch")):
        if frame.f_globals["__name__"] == ZERO:
            raise TypeError(
                f"{name}: expected all parameters of a network, found those of one process inside "
                f"ZeroRedundancyOptimizer; {PARTED}"
            )
        frame = frame.f_back


def _too_early(i: int) -> str:
    return (
        f"parameter {i}: expected one of the network, found a tensor that was replaced by a shard"
        "; create the optimizer after fully_shard or parallelize_module, which replace the "
        "parameters"
    )


def all_bounded(gradients: Iterable[Tensor]) -> bool:
    """Return whether all gradients are finite and short enough; waits for the device once."""
    wide = [g if g.dtype in (torch.float32, torch.float64) else g.float() for g in gradients]
    norms = torch._foreach_norm(wide)
    one = norms[0]
    norms = [n if n.device == one.device else n.to(one.device) for n in norms]
    norms = [n if n.dtype == one.dtype else n.to(one.dtype) for n in norms]
    # False for NaN.
    return bool((torch.stack(norms) <= LONGEST_GRADIENT).all())
