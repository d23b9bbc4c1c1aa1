"""NGOptimizer, the rule as a torch.optim.Optimizer: groups, state, averaged weights, explain()."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from l2o_graph.layout.spec import NetSpec
from l2o_graph.layout.tensors import state_type
from l2o_graph.optim.account import Account, account_of
from l2o_graph.optim.arrangement import Arrangement
from l2o_graph.optim.averaging import averages_of
from l2o_graph.optim.base import LearnedOptimizer
from l2o_graph.optim.checkpoints import checkpoint_of, load_checkpoint
from l2o_graph.optim.controller import Controller, Learned
from l2o_graph.optim.examples import Examples
from l2o_graph.optim.memory import LAST_UPDATE
from l2o_graph.optim.saved import check_state, is_owned, sharded_state, with_step
from l2o_graph.optim.sharded import whole
from l2o_graph.optim.warn import warn
from l2o_graph.ranges import COUNT


class NGOptimizer(LearnedOptimizer):
    """A learned optimizer that reads the network it trains as a graph; there is nothing to tune.

    The update of a kernel is its averaged gradient, whitened on both sides, times a step length
    for each output neuron. A small learned controller adjusts these lengths at every step, by how
    well gradients agree with the steps before. Lengths start short and grow. The rule is
    equivariant: permuting hidden neurons permutes their updates alike, except in layers of more
    than 640 neurons, which are whitened in blocks.

    If any gradient is not finite or has a norm above 1e17, the step changes nothing and warns.
    Parameters without a gradient are left unchanged. The state of a parameter is a dictionary of
    tensors in ``optimizer.state``, float32, or float64 for a float64 parameter. Parameters on
    several devices are treated as one network on each device.

    Parameters may be sharded over processes as DTensors (``fully_shard``,
    ``parallelize_module``). One rank owns each parameter: it computes the update and holds the
    state. ``step``, ``state_dict``, ``load_state_dict``, ``averaged`` and ``explain`` are then
    collective calls, which every rank has to make.

    Args:
        params: Parameters, named parameters or groups, as for any optimizer.
        lr: Factor of every update; the checkpoint was trained for 1.
        weight_decay: Decoupled weight decay, as in AdamW: a step removes lr * weight_decay * u of
            each weight, where u is the RMS of the parameter's update. In AdamW u is about 1 before
            the factor lr, so values of 0.01 to 0.1 mean about the same in both.
        checkpoint: A name of ``list_checkpoints()``, a path to a file, or a controller.
        model: Module that the parameters belong to. Its structure is then read from its first
            forward pass instead of being inferred from the order and shapes of the parameters,
            and weight decay grows where training repeats few examples. It is found by itself if
            ``params`` is ``model.parameters()`` or ``model.named_parameters()``. Pickles and deep
            copies of the optimizer include a model that was passed here.
        total_steps: Number of steps of the whole run, if known: lengths then fall to about 0 at
            its end. Without it the run can be stopped at any time. After ``load_state_dict`` a
            value given here takes precedence over the saved one.
        maximize: Maximize the objective instead of minimizing it.

    Raises:
        ValueError: For an unknown or unreadable checkpoint or one of another kind, an empty list
            of parameters, a negative ``lr`` or ``weight_decay``, a ``total_steps`` below 1, a
            complex parameter, a parameter that is not one of ``model``, or parameters sharded over
            several meshes.
        TypeError: For a shard of FullyShardedDataParallel, inside ZeroRedundancyOptimizer, and
            for a ``model`` that is not a module or is a TorchScript module.
        FileNotFoundError: For a checkpoint path that does not exist.

    Source:
        The graph is that of Kofinas et al., "Graph Neural Networks for Learning Equivariant
        Representations of Neural Networks", ICLR 2024; rule and training are this package's own.
    """

    packaged: ClassVar[str] = "general"
    takes_shards: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        *,
        checkpoint: str | Path | Controller | None = None,
        model: nn.Module | None = None,
        total_steps: int | None = None,
        maximize: bool = False,
    ):
        _check_total("total_steps", total_steps)
        if isinstance(checkpoint, Controller):
            loaded = checkpoint_of(checkpoint)
        else:
            loaded = load_checkpoint(self.packaged if checkpoint is None else checkpoint)
        self._controller = loaded.controller
        self._stash: dict[Tensor, Tensor] | None = None
        self._said_ended = False
        self._examples = Examples()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "total_steps": total_steps,
            "checkpoint": loaded.identity,
        }
        super().__init__(params, defaults, model, self._examples)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["total_steps"] != self.defaults["total_steps"]:
            raise ValueError(
                f"total_steps: expected one for all groups, {self.defaults['total_steps']}, found "
                f"{group['total_steps']!r}"
            )

    def _apply(
        self, group_of: dict[Tensor, dict[str, Any]], gradient_of: dict[Tensor, Tensor]
    ) -> None:
        self._refuse_inside_of_averaged("step()")
        arrangements = self._arranged(group_of, [p for p in gradient_of if p.numel()])
        horizon, few = self._horizon(arrangements), self._examples.few()
        self._examples.end_step()
        for one in arrangements:
            one.step(self._learned_for(one), group_of, gradient_of, horizon, few)

    def _arranged(
        self, group_of: dict[Tensor, dict[str, Any]], active: Sequence[Tensor]
    ) -> list[Arrangement]:
        """Lay out the parameters that have a gradient; reuse the layout if nothing has changed."""
        known = {id(p) for one in self._arrangements for p in one.parameters}
        if (
            known == {id(p) for p in active}
            and self._laid_out is self._structure.spec is not None
            and all(one.holds(self.state) and one.is_current() for one in self._arrangements)
        ):
            return self._arrangements
        self._leave(active)
        parameters, spec = self._network(list(group_of))
        self._laid_out = spec
        index = {p: i for i, p in enumerate(parameters)}
        places: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in active:
            places.setdefault((p.device, state_type(p)), []).append(p)
        self._arrangements = [
            Arrangement.of(
                spec,
                [index[p] for p in members],
                members,
                [self.state[p] for p in members],
                self._sharing,
            )
            for members in places.values()
        ]
        self._examples.parameters = float(sum(p.numel() for p in active))
        anew = sum(one.anew for one in self._arrangements)
        if anew:
            warn(
                f"{type(self).__name__}: the state of {anew} of {len(active)} parameters does not "
                "fit the structure of the network any more; it is reset",
            )
        return self._arrangements

    def _leave(self, active: Sequence[Tensor]) -> None:
        """Copy the state of parameters that skip a step, so that it does not keep stacks alive."""
        staying = {id(p) for p in active}
        for one in self._arrangements:
            for p, mine in zip(one.parameters, one.views, strict=True):
                if id(p) not in staying and p in self.state:
                    state = self.state[p]
                    for name, tensor in mine.items():
                        if state.get(name) is tensor:
                            state[name] = tensor.clone()
        self._arrangements = []

    def _learned_for(self, one: Arrangement) -> Learned:
        place = one.device, one.dtype
        if place not in self._placed:
            own = copy.deepcopy(self._controller).to(*place)
            self._placed[place] = Learned.of(own.config, own.weights())
        return self._placed[place]

    def _horizon(self, arrangements: Sequence[Arrangement]) -> int:
        """Return ``total_steps``, 0 if it is not known; warn once when the run exceeds it."""
        told = self.param_groups[0]["total_steps"]
        if told is None:
            return 0
        age = max((stack.age for one in arrangements for stack in one.memory.all_stacks), default=0)
        if age >= told and not self._said_ended:
            self._said_ended = True
            warn(
                f"{type(self).__name__}: this is step {age + 1} of total_steps={told}; training "
                "continues with the shortest steps",
            )
        return told

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Replace the weights by their average within the block, to evaluate or to save them.

        The average is taken over about the last tenth of the steps so far. Running statistics of
        batch norms stay those of the weights in training.

        Raises:
            RuntimeError: If it is entered already.
        """
        self._refuse_inside_of_averaged("averaged()")
        self._stash = {}
        try:
            with torch.no_grad():
                for p, state in self.state.items():
                    offset = state.get("offset")
                    if offset is not None and offset.shape == p.shape:
                        self._stash[p] = p.detach().clone()
                        if self._sharing is None:
                            p.copy_(offset)
                        else:
                            self._sharing.give(p, offset)
                        (average,) = averages_of([self._stash[p]], [p], int(state["step"]))
                        p.copy_(average)
            yield
        finally:
            stash, self._stash = self._stash, None
            with torch.no_grad():
                for p, weights in stash.items():
                    p.copy_(weights)

    def _refuse_inside_of_averaged(self, what: str) -> None:
        if self._stash is not None:
            raise RuntimeError(
                f"{type(self).__name__}: expected {what} outside of averaged(), inside of which "
                "the parameters hold averaged weights"
            )

    def explain(self) -> Account:
        """Tabulate the kind, the direction and the last step length of each parameter.

        Returns:
            A table to print.
        """
        parameters, spec = self._network(self._parameters())
        sharing = self._sharing

        def updates_of(p: Tensor) -> list[Tensor]:
            momenta = [t for n, t in self.state.get(p, {}).items() if n.startswith("momenta")]
            lasts = [t[LAST_UPDATE] for t in momenta]
            return lasts if sharing is None else [sharing.spread(p, t) for t in lasts]

        return account_of(spec, parameters, updates_of, str(self._examples))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as any optimizer does, with the count of examples as "examples".

        For sharded parameters it consists of DTensors, and every rank has to call this at the same
        time. ``optimizer.state`` itself holds tensors on the rank that owns a parameter, and
        tensors on the meta device on the other ranks.
        """

        def as_saved(_: Any, found: dict[str, Any]) -> dict[str, Any]:
            sharing = self._sharing
            if sharing is not None:
                found = sharded_state(found, sharing, self._parameters())
            counted = {"examples": self._examples.state()} if self._examples.rows else {}
            return {**found, **counted}

        handle = self.register_state_dict_post_hook(as_saved, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; it stays float32 for parameters of lower precision.

        Raises:
            ValueError: For the state of another checkpoint or of another model, for values that
                are not finite, and for an invalid count of examples. The optimizer is then left
                unchanged.
            RuntimeError: Inside ``averaged()``.
        """
        self._refuse_inside_of_averaged("load_state_dict()")
        told = self.param_groups[0]["total_steps"]
        examples = Examples.of(state_dict.get("examples"))
        super().load_state_dict(state_dict)
        if self._structure.model is not None:  # without a model nothing is counted
            self._examples.__dict__.update(examples.__dict__)
        self._structure.watch()
        self._forget()
        self._agree_on(told)

    def _agree_on(self, told: int | None) -> None:
        """Set ``total_steps`` after loading: ``told``, if not None, overrides the saved one."""
        self._said_ended = False
        saved = self.param_groups[0].get("total_steps")
        holds = saved if told is None else told
        for options in (self.defaults, *self.param_groups):
            options["total_steps"] = holds
        if told is not None and saved != told:
            warn(
                f"{type(self).__name__}: the state was saved with total_steps={saved}; this "
                f"optimizer keeps the total_steps={told} that it was created with",
            )

    def _check_saved_group(self, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
        super()._check_saved_group(mine, theirs)
        _check_total("state_dict: total_steps", theirs.get("total_steps"))

    def _copy_of(self, saved: Any, key: Any, parameter: Tensor) -> dict[str, Tensor]:
        saved = with_step(saved, key)
        sharing, kind = self._sharing, state_type(parameter)
        if sharing is not None:
            saved = {n: whole(t) if isinstance(t, Tensor) else t for n, t in saved.items()}
        check_state(saved, key, parameter)
        copies = {
            name: t.to("cpu" if name == "step" else parameter.device, kind, copy=True)
            for name, t in saved.items()
        }
        if sharing is None:
            return copies
        return {n: sharing.mine_of(parameter, t) if is_owned(n) else t for n, t in copies.items()}

    def _forget(self) -> None:
        super()._forget()
        self._arrangements: list[Arrangement] = []
        self._laid_out: NetSpec | None = None
        self._placed: dict[tuple[torch.device, torch.dtype], Learned] = {}

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_controller", "_examples", "_said_ended")}
        return {**super().__getstate__(), **own, "_stash": None}


def _check_total(name: str, total_steps: Any) -> None:
    """Raise for an invalid number of steps."""
    if total_steps is not None:
        COUNT.check(name, total_steps)
