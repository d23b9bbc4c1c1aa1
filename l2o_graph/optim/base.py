"""What every learned optimizer owes its users: groups, closures, refusals, states, structure."""

import math
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from l2o_graph.architecture import NetSpec
from l2o_graph.inference import check_module, spec_of_module, spec_of_parameters
from l2o_graph.optim.sharded import Sharing, here, is_sharded, replaced, sharing_of
from l2o_graph.optim.watching import Watching, of_all_ranks

if TYPE_CHECKING:  # whoever gives no model does not need it
    from l2o_graph.tracing.network import Reading

# Gradients above this are taken for an overflow; float32 has to hold their squares.
LONGEST_GRADIENT = 1e17
# Where ZeroRedundancyOptimizer makes the optimizers of each process.
ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
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
        TypeError: For a shard that is not a DTensor (of FullyShardedDataParallel), or any where
            the rule takes none; inside of ZeroRedundancyOptimizer; and for a ``model`` that is no
            module or one of TorchScript.
    """

    # Whether parameters may be sharded over processes, as DTensors.
    takes_shards: ClassVar[bool] = False
    # What watches calls of the model; a copy or a pickle begins without.
    _watching: "Watching | None" = None
    # The ranks that train replicas of the model, once a call by way of them was seen.
    _group: Any = None

    def __init__(self, params: ParamsT, defaults: dict[str, Any], model: nn.Module | None):
        _refuse_shares(type(self).__name__)
        if model is not None:
            check_module(model, "model")
        # Before the base class, which adds the groups.
        self._model = model
        self._known: Reading | None = None
        self._news: list[Reading] = []
        self._told: set[str] = set()  # names of parameters that a warning was about
        self._asked: set[int] = set()  # parameters that calls were watched for once more
        self._forget()
        super().__init__(params, defaults)
        # Whoever has not imported it does not need it, and it is not a dependency.
        if "higher.optim" in sys.modules:
            from l2o_graph.higher_support import register

            register(type(self))
        self._watch()

    @property
    def _traced(self) -> NetSpec | None:
        """The structure as far as calls of the model told it."""
        return None if self._known is None else self._known.spec

    def _watch(self) -> None:
        """Watch calls of the model, until all of its parameters were seen at work."""
        if self._model is not None and self._watching is None and not self._is_complete():
            self._watching = Watching(self._model, self)

    def _is_complete(self) -> bool:
        """Whether calls have shown what all parameters of the model do."""
        return self._known is not None and self._known.is_complete

    def read_structure(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
        """Follow the model through a batch of its own, of which nothing remains.

        Calls of the model are followed by themselves; this is for whoever makes none before the
        first step.

        Args:
            args: A batch, as the model's call takes it.
            kwargs: Named arguments of that call.
        """
        from l2o_graph.tracing.network import read

        assert self._model is not None
        try:
            self._news.append(read(self._model, args, kwargs))
        except Exception as error:  # training can go on without, and the model may say more
            warn(
                f"{type(self).__name__}: could not follow the model ({error!r}); its structure is "
                "inferred from the order of its layers"
            )
            return
        self._learn(self._news)

    def _hear(self, reading: "Reading") -> None:
        """Hear what a call of the model told."""
        self._news.append(reading)
        replicas = self._group or (self._watching and self._watching.group)
        if not replicas:  # else all of them learn it together
            self._learn(self._news)

    def _learn(self, readings: Sequence["Reading"]) -> None:
        """Learn what calls of the model told, here or in other processes."""
        self._news = []
        if not readings:
            return
        from l2o_graph.tracing.joining import all_of

        before = [] if self._known is None else [self._known]
        after = all_of([*before, *readings])
        if after is not None and (self._known is None or after.spec != self._known.spec):
            self._spec = None
        self._known = after

    def _settle(self, gradient_of: Mapping[Tensor, Tensor]) -> None:
        """Before a step: learn what was seen since the last one, and see to what was not.

        Replicas of DistributedDataParallel learn what any of them saw, at their first step and
        whenever a gradient comes of a parameter that none has seen at work. They have the same
        gradients, and so ask each other at the same steps.
        """
        watching = self._watching
        if self._model is None or (watching is None and self._is_complete()):
            return
        group = None
        if watching is not None:
            watching.stop()
            group = watching.group
        self._group = group or self._group
        if self._group is None:
            self._learn(self._news)
        unseen = self._unseen(gradient_of)
        if self._group is not None and (not self._agreed or unseen):
            if not self._agreed and self._known is not None:  # seen by this rank alone
                self._news.insert(0, self._known)
                self._known = None
            self._learn(of_all_ranks(self._news, self._group))
            self._agreed = True
            unseen = self._unseen(gradient_of)
        done = self._is_complete()
        tired = watching is not None and watching.is_tired() and not unseen
        # Of other inputs or another mode than what was watched.
        again = set() if done else unseen - self._asked
        if done or tired or again:
            if watching is not None:
                watching.leave()
            self._watching = None
        if again:
            self._asked |= again
            self._watching = Watching(self._model, self)
            if watching is not None:
                self._watching.was_compiled = watching.was_compiled
                self._watching.was_sharded = watching.was_sharded
        self._tell()

    def _unseen(self, gradient_of: Mapping[Tensor, Tensor]) -> set[int]:
        """Parameters of the model that have a gradient, though no call has shown them at work."""
        assert self._model is not None
        used = frozenset() if self._known is None else self._known.used
        return {
            i for i, p in enumerate(self._model.parameters()) if i not in used and p in gradient_of
        }

    def _tell(self) -> None:
        """Warn of parameters whose work is not understood, once each."""
        names = [] if self._known is None else self._known.unknown
        new = [name for name in names if name not in self._told]
        if new:
            from l2o_graph.tracing.network import unknown_message

            self._told.update(new)
            warn(unknown_message(new))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the graph is built anew at the next step.

        Raises:
            ValueError: For an ``lr`` or ``weight_decay`` that is no finite number of at least 0, a
                complex parameter, or a parameter that ``model`` lacks.
            TypeError: For a shard, as at construction.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            sharing_of(self._parameters())
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
            # FSDP1 puts this mark on its flat ones and on views of them, which look like vectors.
            if hasattr(p, "_fsdp_flattened") or (is_sharded(p) and not self.takes_shards):
                instead = "as fully_shard makes them, or " if self.takes_shards else ""
                raise TypeError(
                    f"parameter {i}: expected a whole tensor{instead and ' or a DTensor'}, found a "
                    f"shard, as {'FullyShardedDataParallel makes' if instead else 'FSDP makes'} "
                    f"them; its neurons lie on several processes, and the graph needs them "
                    f"together, {instead}as DistributedDataParallel has them"
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
            RuntimeError: For a sparse gradient; for a parameter that is still on the meta device;
                at a first step where modules have put shards in the place of parameters; and
                where some ranks alone have a gradient of a sharded network's parameter.
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
        if not self.state and len(gradient_of) < len(group_of):
            self._refuse_left_behind(group_of, gradient_of)
        if not self._accepts(gradient_of):
            return loss
        self._settle(gradient_of)
        # Autocast is meant for the user's model; the rule needs all its digits.
        with torch.autocast(next(iter(gradient_of)).device.type, enabled=False):
            self._apply(group_of, gradient_of)
        return loss

    @abstractmethod
    def _apply(
        self, group_of: dict[Tensor, dict[str, Any]], gradient_of: dict[Tensor, Tensor]
    ) -> None:
        """Update all parameters that have a gradient, and what is remembered of them."""

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @cached_property
    def _sharing(self) -> Sharing | None:
        """Which rank works on which parameter; None where none is sharded."""
        return sharing_of(self._parameters())

    def _refuse_left_behind(
        self, parameters: Iterable[Tensor], gradient_of: Mapping[Tensor, Tensor]
    ) -> None:
        """Raise where shards have taken the place of parameters, which never have gradients."""
        if dist.is_available() and dist.is_initialized():
            alone = [(i, p) for i, p in enumerate(parameters) if p not in gradient_of]
            for i in replaced(p for _, p in alone)[:1]:
                raise RuntimeError(_too_early(alone[i][0]))

    def _accepts(self, gradient_of: dict[Tensor, Tensor]) -> bool:
        """Whether there are gradients to make a step of; warns if some are unfit for it."""
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
        """The parameters of the graph and how they join, inferred where that is not yet known."""
        if self._group is None:
            self._learn(self._news)
        parameters = trained if self._model is None else [*self._model.parameters()]
        if self._spec is None or self._spec.shapes != shapes_of(parameters):
            if self._model is None:
                self._spec = spec_of_parameters(parameters, self._names())
            else:
                if self._traced is not None and self._traced.shapes != shapes_of(parameters):
                    self._known = None  # the model has changed: its next batch tells how
                    self._agreed = False
                    self._asked.clear()
                    self._watch()
                self._spec = self._traced or self._spec_by_order(self._model)
        return parameters, self._spec

    def _spec_by_order(self, model: nn.Module) -> NetSpec:
        """The structure of a model that was not seen computing anything."""
        spec = spec_of_module(model)
        if self._watching is not None and self._watching.was_compiled:
            warn(
                f"{type(self).__name__}: the model was called compiled, and what is compiled "
                f"cannot be followed; its structure is inferred from the order of its layers. Give "
                f"the compiled module itself as model="
            )
        elif self._watching is not None and self._watching.was_sharded:
            warn(
                f"{type(self).__name__}: the model computes with sharded tensors, as tensor "
                f"parallelism does, and these cannot be followed; its structure is inferred from "
                f"the order of its layers"
            )
        elif spec.loose:
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
        self._agreed = False  # with the other ranks
        self.__dict__.pop("_sharing", None)

    def __getstate__(self) -> dict[str, Any]:
        own = {"_model": self._model, "_known": self._known, "_told": set(self._told)}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._news, self._asked = [], set()
        self._forget()
        self._watch()


def warn(message: str) -> None:
    """Warn at the line that called this package, be it by way of torch or of ``higher``."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ON_THE_WAY:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _refuse_shares(name: str) -> None:
    """Raise where an optimizer is made for those parameters alone that fall to one process.

    They come as whole tensors, and nothing but who is calling tells that they are not all.
    """
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("l2o_graph", "torch")):
        if frame.f_globals["__name__"] == ZERO:
            raise TypeError(
                f"{name}: expected all parameters of a network, found the share of one process, as "
                "ZeroRedundancyOptimizer gives them out; its neurons lie on several processes, and "
                "the graph needs them together, as DistributedDataParallel has them"
            )
        frame = frame.f_back


def _too_early(i: int) -> str:
    return (
        f"parameter {i}: expected one of the network, found a tensor that a sharded one has taken "
        "the place of; make the optimizer after fully_shard or parallelize_module, which make new "
        "parameters"
    )


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
