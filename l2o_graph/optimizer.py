"""The pure update applied in place, as a torch.optim.Optimizer, for each kind of rule."""

import copy
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from l2o_graph.architecture import NetSpec
from l2o_graph.features import MOMENTUM_DECAYS, decays_for, state_type
from l2o_graph.inference import spec_of_module, spec_of_parameters
from l2o_graph.rule import Model, UpdateRule
from l2o_graph.step import CHUNK_SIZE, State, moved, updates
from l2o_graph.zoo.registry import Checkpoint, load_checkpoint

# A momentum can grow to ten times its gradients, and float32 has to hold the squares of both.
LONGEST_GRADIENT = 1e17


class LearnedOptimizer(torch.optim.Optimizer):
    """A learned optimizer of any kind.

    Each step it makes features of every weight, its gradient and five momenta, lets what the
    checkpoint is made of read them, and asks a small head for every parameter's update. It
    remembers five momenta a parameter in float32 and a step count, nothing else.

    Parameters without a gradient, and frozen ones, are read as context and left as they are. A
    step in which any gradient is not finite, or longer than 1e17, changes nothing, neither
    parameters nor state, and warns. All parameters with a gradient form one graph across groups
    and devices; the network runs where the first of them lies, in float64 if any is float64, else
    in float32.

    Args:
        params: Parameters, named parameters or groups, as for any optimizer. Which neurons they
            join is inferred from order, shape and, where given, name.
        lr: Factor of every update. 1 is what the checkpoint was trained for. A tensor has one
            element.
        weight_decay: Decoupled: each step first takes lr * weight_decay of a parameter away.
        checkpoint: A name of ``list_checkpoints()``, or a path to a file; by default the packaged
            one of the class. Or the rule itself, as one that is being meta-trained: it is used as
            it is, never copied, and so has to be of the type and on the device to compute in.
        model: The network that the parameters belong to: its structure is then read from the
            first batch that it is called with, whatever it computes, rather than inferred. Those
            of its parameters that are not in ``params`` are context. A pickle or a deep copy of
            the optimizer holds it too.
        maximize: Ascend rather than descend.
        chunk_size: Scalars worked on at once, some 500 bytes each.

    In ``higher.innerloop_ctx`` and its like the optimizer works if ``higher`` was imported before
    it was made; see ``l2o_graph.higher_support``.

    Raises:
        ValueError: For an unknown or unreadable checkpoint or one of another kind, an empty list
            of parameters, a negative ``lr`` or ``weight_decay``, a complex parameter, or one that
            ``model`` lacks.
        TypeError: For a parameter that is sharded over processes (FSDP, DTensor).
        FileNotFoundError: For a checkpoint path to nothing.

    Source:
        Kofinas et al., "Graph Neural Networks for Learning Equivariant Representations of
        Neural Networks", ICLR 2024, section 4.3; the packaged checkpoints use the features and
        the update of ``l2o_graph.rule.UpdateRule`` instead of the paper's.
    """

    models: ClassVar[tuple[Model, ...]] = get_args(Model)
    packaged: ClassVar[str] = "fmnist"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        *,
        checkpoint: str | Path | UpdateRule | None = None,
        model: nn.Module | None = None,
        maximize: bool = False,
        chunk_size: int = CHUNK_SIZE,
    ):
        if chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1, found {chunk_size}")
        self._given = isinstance(checkpoint, UpdateRule)
        if isinstance(checkpoint, UpdateRule):
            # Named for its kind alone: its weights may change while the optimizer is in use.
            loaded = Checkpoint(f"{checkpoint.config.model} in memory", checkpoint, {})
        else:
            loaded = load_checkpoint(self.packaged if checkpoint is None else checkpoint)
        model_of_rule = loaded.rule.config.model
        if model_of_rule not in self.models:
            raise ValueError(
                f"{type(self).__name__}: expected a checkpoint of {' or '.join(self.models)}, "
                f"found '{loaded.identity if self._given else checkpoint}' of {model_of_rule}"
            )
        # Before the base class, which adds the groups.
        self._rule = loaded.rule
        self._chunk_size = chunk_size
        self._model = model
        self._traced: NetSpec | None = None
        self._forget()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "checkpoint": loaded.identity,
        }
        super().__init__(params, defaults)
        # Whoever has not imported it does not need it, and it is not a dependency.
        if "higher.optim" in sys.modules:
            from l2o_graph.higher_support import register

            register(type(self))
        self._watch()

    def _watch(self) -> None:
        """Wait for the first batch of the model."""
        if self._model is not None and self._traced is None:
            hook = FirstForward(self)
            hook.handle = self._model.register_forward_pre_hook(hook, with_kwargs=True)

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
            warnings.warn(
                f"{type(self).__name__}: could not follow the model ({error!r}); its structure is "
                "inferred from the order of its layers",
                stacklevel=2,
            )
            return
        self._spec = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the graph is built anew at the next step.

        Raises:
            ValueError: For a negative ``lr`` or ``weight_decay``, a complex parameter, or a
                parameter that ``model`` lacks.
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
            if not value >= 0:
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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: Evaluates the model and returns the loss; called once, with gradients on.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: For a sparse gradient, and for a parameter that is still on the meta
                device.
            TypeError, ValueError: For a parameter that has become one that construction refuses.
            ValueError: For a rule that was given and is not where or what it has to be.
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
        # Past this and the two wrappers that torch puts around a step.
        if not self._accepts(gradient_of, stacklevel=5):
            return loss
        for p, gradient in gradient_of.items():
            self._take_in(p, gradient)
        # Autocast is meant for the user's model; the rule needs all its digits.
        with torch.autocast(next(iter(gradient_of)).device.type, enabled=False):
            self._apply(group_of, gradient_of)
        for p in gradient_of:
            self.state[p]["step"] += 1
        return loss

    def _accepts(self, gradient_of: dict[Tensor, Tensor], stacklevel: int) -> bool:
        """Whether there are gradients to make a step of; warns if some are unfit for it."""
        for p, gradient in gradient_of.items():
            if gradient.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__}: expected dense gradients, found {gradient.layout} "
                    f"for a parameter of shape {list(p.shape)}"
                )
        if not gradient_of or _all_bounded(gradient_of.values()):
            return bool(gradient_of)
        warnings.warn(
            f"{type(self).__name__}: a gradient is not finite, or its norm is above "
            f"{LONGEST_GRADIENT:.0e}; this step changes nothing",
            stacklevel=stacklevel,
        )
        return False

    def _take_in(self, p: Tensor, gradient: Tensor) -> None:
        """Let the momenta of a parameter take in its gradient: ``next_momenta``, in place."""
        state = self.state[p]
        if not fits(state, p):
            fresh = State.fresh(p)
            state.update(momenta=fresh.momenta, step=fresh.step)
        if state["momenta"].dtype != state_type(p):  # the model was converted meanwhile
            state.update({key: value.to(state_type(p)) for key, value in state.items()})
        momenta = state["momenta"]
        momenta.mul_(decays_for(momenta)).add_(gradient.to(momenta))

    def _apply(
        self, group_of: dict[Tensor, dict[str, Any]], gradient_of: dict[Tensor, Tensor]
    ) -> None:
        """Compute the updates run by run, and write each as it comes."""
        parameters, spec = self._network(list(group_of))
        rule = self._rule_for(list(gradient_of))
        gradients = [gradient_of.get(p, _nothing(p, p.shape)) for p in parameters]
        state = [self._state_of(p) for p in parameters]
        copies: dict[Tensor, Tensor] = {}
        for part, update in updates(rule, spec, parameters, gradients, state, self._chunk_size):
            p = parameters[part.parameter]
            if p not in gradient_of:
                continue
            if p.is_contiguous():
                flat = p.view(-1)
            else:  # no view has its scalars in order: work on a copy, and write that back
                flat = copies[p] if p in copies else copies.setdefault(p, p.reshape(-1))
            weights = flat[part.start : part.stop]
            group = group_of[p]
            weights.copy_(moved(weights, update, group["lr"], group["weight_decay"]))
        for p, flat in copies.items():
            p.copy_(flat.view_as(p))

    def _network(self, trained: Sequence[Tensor]) -> tuple[Sequence[Tensor], NetSpec]:
        """The parameters of the graph and how they join, inferred where that is not yet known."""
        parameters = self._parameters or trained
        if self._spec is None or self._spec.shapes != _shapes(parameters):
            if self._model is None:
                self._spec = spec_of_parameters(parameters, self._names())
            else:
                parameters = self._parameters = [*self._model.parameters()]
                if self._traced is not None and self._traced.shapes != _shapes(parameters):
                    self._traced = None  # the model has changed: its next batch tells how
                    self._watch()
                self._spec = self._traced or self._spec_by_order(self._model)
        return parameters, self._spec

    def _spec_by_order(self, model: nn.Module) -> NetSpec:
        """The structure of a model that was not seen computing anything."""
        spec = spec_of_module(model)
        if spec.loose:
            warnings.warn(
                f"{type(self).__name__}: the model was not called before this step, so its "
                f"structure is inferred from the order of its layers, which leaves "
                f"{len(spec.loose)} of {len(spec.shapes)} parameters to their own features",
                stacklevel=6,
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

    def _state_of(self, p: Tensor) -> State:
        """What is remembered of a parameter."""
        state = self.state.get(p, {})
        if not fits(state, p):
            return State(_nothing(p, (len(MOMENTUM_DECAYS), *p.shape)), _nothing(p, ()))
        return State(state["momenta"], state["step"])

    def _rule_for(self, trained: list[Tensor]) -> UpdateRule:
        """The rule, where the first parameter lies and in the type to compute in."""
        double = any(p.dtype == torch.float64 for p in trained)
        place = trained[0].device, torch.float64 if double else torch.float32
        if self._given:
            first = next(self._rule.parameters())
            if (first.device, first.dtype) != place:
                raise ValueError(
                    f"{type(self).__name__}: expected a rule in {place[1]} on {place[0]}, as its "
                    f"parameters are, found one in {first.dtype} on {first.device}"
                )
            return self._rule
        if place not in self._placed:
            self._placed[place] = copy.deepcopy(self._rule).to(*place)
        return self._placed[place]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; momenta stay float32 for parameters of lower precision.

        Raises:
            ValueError: For the state of another checkpoint or of another model. The optimizer
                is then as it was.
        """
        copies: dict[Tensor, dict[str, Tensor]] = {}

        # The base class would cast the momenta to the parameters' type, so it gets none. As the
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
        copies = {}
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            if _digest(theirs.get("checkpoint")) != _digest(mine["checkpoint"]):
                raise ValueError(
                    f"state_dict: expected one of checkpoint '{mine['checkpoint']}', "
                    f"found '{theirs.get('checkpoint')}'"
                )
            for p, key in zip(mine["params"], theirs["params"], strict=True):
                saved = state.get(key)
                if not saved:
                    continue
                shapes = {"momenta": [len(MOMENTUM_DECAYS), *p.shape], "step": []}
                found = {k: list(v.shape) if isinstance(v, Tensor) else v for k, v in saved.items()}
                if found != shapes:
                    raise ValueError(
                        f"state_dict: expected shapes {shapes} for parameter {key}, found {found}"
                    )
                kind = state_type(p)
                copies[p] = {k: v.to(p.device, kind, copy=True) for k, v in saved.items()}
        return copies

    def _forget(self) -> None:
        """Drop what was inferred; the next step infers it anew."""
        self._placed: dict[tuple[torch.device, torch.dtype], UpdateRule] = {}
        self._spec: NetSpec | None = None
        self._parameters: Sequence[Tensor] = ()  # of the model, where there is one

    def __getstate__(self) -> dict[str, Any]:
        names = ("_rule", "_given", "_chunk_size", "_model", "_traced")
        own = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self._watch()


class NGOptimizer(LearnedOptimizer):
    """A learned optimizer that reads the network it trains as a graph: NG-GNN or NG-T.

    Neurons are nodes and weights are edges, so a permutation of hidden neurons permutes the
    updates and changes nothing else. Arguments and behaviour are ``LearnedOptimizer``'s; the
    packaged checkpoint is "fmnist".
    """

    models = ("ng_gnn", "ng_t")


class FFOptimizer(LearnedOptimizer):
    """The baseline that reads every parameter by itself (Metz et al. 2022, as in the paper)."""

    models = ("ff",)
    packaged = "fmnist-ff"


class LSTMOptimizer(LearnedOptimizer):
    """The baseline that reads tensors in their order, features averaged over each."""

    models = ("lstm",)
    packaged = "fmnist-lstm"


class NFNOptimizer(LearnedOptimizer):
    """The baseline of equivariant linear layers, in NP mode (Zhou et al. 2023).

    Inputs and outputs of a network count as permutable too.
    """

    models = ("nfn",)
    packaged = "fmnist-nfn"


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


def _shapes(parameters: Iterable[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(p.shape) for p in parameters)


def fits(state: dict[str, Any], p: Tensor) -> bool:
    """Whether there is a state for a parameter of this shape; reshaped ones start anew."""
    return bool(state) and state["momenta"].shape[1:] == p.shape


def _nothing(p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros that take no memory."""
    return p.new_zeros((), dtype=state_type(p)).expand(shape)


def _digest(identity: str | None) -> str | None:
    """The part of a checkpoint's identity that a copy under another name shares."""
    return identity and identity.rpartition("@")[2]


def _all_bounded(gradients: Iterable[Tensor]) -> bool:
    """Whether all are finite and short enough; one wait for the device."""
    norms = [torch.linalg.vector_norm(g.float()) for g in gradients]
    # Written so that NaN answers no.
    return bool((torch.stack([n.to(norms[0].device) for n in norms]) <= LONGEST_GRADIENT).all())
