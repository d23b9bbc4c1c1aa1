"""The rule as a torch.optim.Optimizer: groups, state by parameter, averaged weights, an account."""

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

    Each step goes along a direction that is whitened on both sides of every kernel, for a length
    that a small recurrent network sets for every neuron, from how gradients agree with the last
    steps and from what neighbouring neurons say. Lengths start short and grow. Hidden neurons have
    no order: permute them, and the updates come out permuted in the same way, but in layers of
    more than 640 neurons, which are whitened in blocks.

    A step in which any gradient is not finite, or longer than 1e17, changes nothing and warns.
    Parameters without a gradient are left as they are. What is remembered of a parameter lies in
    ``optimizer.state`` as tensors, in float32, or in float64 for one in float64. Parameters on
    several devices are a network on each.

    Parameters may be sharded over processes, as DTensors (``fully_shard``,
    ``parallelize_module``): each is worked out by one of the ranks, which alone remembers it.
    Then ``step``, ``state_dict``, ``load_state_dict``, ``averaged`` and ``explain`` take all ranks.

    Args:
        params: Parameters, named parameters or groups, as for any optimizer.
        lr: Factor of every update; 1 is what the checkpoint was trained for.
        weight_decay: Decoupled, as in AdamW. There a step takes lr * weight_decay of a weight
            away, and changes it by about lr; here the RMS of the parameter's update stands for
            the latter, so that 0.01 to 0.1 mean about what they mean there.
        checkpoint: A name of ``list_checkpoints()``, a path to a file, or a controller.
        model: The network that the parameters belong to: its structure is then read from the
            first batch that it is called with, rather than inferred from order and shapes, and
            weights decay more where the same few examples come again and again. A pickle or a
            deep copy of the optimizer holds it too. Where ``params`` is ``model.parameters()``
            or ``model.named_parameters()`` itself it need not be given.
        total_steps: Number of steps that there will be, if that is known: lengths then end near 0.
            Without it the optimizer can be stopped at any time. Where a state is loaded, what was
            given here holds, or what the state has where nothing was.
        maximize: Ascend rather than descend.

    Raises:
        ValueError: For an unknown or unreadable checkpoint or one of another kind, an empty list
            of parameters, a negative ``lr`` or ``weight_decay``, a ``total_steps`` below 1, a
            complex parameter, one that ``model`` lacks, or sharded ones on several meshes.
        TypeError: For a shard of FullyShardedDataParallel, inside of ZeroRedundancyOptimizer, and
            for a ``model`` that is no module or one of TorchScript.
        FileNotFoundError: For a checkpoint path to nothing.

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
        """The parameters that have a gradient, laid out; anew where anything has changed."""
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
        anew = sum(one.anew for one in self._arrangements)
        if anew:
            warn(
                f"{type(self).__name__}: {anew} of {len(active)} parameters play another part in "
                "the network than when their state was made; what is remembered of them begins "
                "anew",
            )
        return self._arrangements

    def _leave(self, active: Sequence[Tensor]) -> None:
        """Take parameters that skip a step out of the stacks, which would live on for them."""
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
        """Number of steps of the whole run, 0 if it is not told; says so once it is over."""
        told = self.param_groups[0]["total_steps"]
        if told is None:
            return 0
        age = max((stack.age for one in arrangements for stack in one.memory.all_stacks), default=0)
        if age >= told and not self._said_ended:
            self._said_ended = True
            warn(
                f"{type(self).__name__}: this is step {age + 1} of total_steps={told}; training "
                "goes on with the shortest steps",
            )
        return told

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put averaged weights in the place of the weights, to evaluate or to save them.

        They are the mean over about the last tenth of the steps so far of where updates have led.
        Statistics of batch norms stay those of the weights in training.

        Raises:
            RuntimeError: Where it is entered already.
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
                f"{type(self).__name__}: expected {what} outside of averaged(), which keeps the "
                "weights in training aside"
            )

    def explain(self) -> Account:
        """Account for each parameter: what it is, which way it goes, how long its step was.

        Returns:
            A table; print it.
        """
        parameters, spec = self._network(self._parameters())
        sharing = self._sharing

        def updates_of(p: Tensor) -> list[Tensor]:
            momenta = [t for n, t in self.state.get(p, {}).items() if n.startswith("momenta")]
            lasts = [t[LAST_UPDATE] for t in momenta]
            return lasts if sharing is None else [sharing.spread(p, t) for t in lasts]

        return account_of(spec, parameters, updates_of, str(self._examples))

    def state_dict(self) -> dict[str, Any]:
        """The state, as of any optimizer, and as "examples" what was counted of these.

        Of sharded parameters it is made of DTensors, and every rank has to call this at the same
        time. ``optimizer.state`` itself has tensors on the rank that owns a parameter, and their
        shapes on the meta device elsewhere.
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
            ValueError: For the state of another checkpoint or of another model, for numbers that
                are not finite, and for a count of examples that is none. The optimizer is then as
                it was.
            RuntimeError: Inside of ``averaged()``.
        """
        self._refuse_inside_of_averaged("load_state_dict()")
        told = self.param_groups[0]["total_steps"]
        examples = Examples.of(state_dict.get("examples"))
        super().load_state_dict(state_dict)
        if self._structure.model is not None:  # else nothing goes on with the count
            self._examples.__dict__.update(examples.__dict__)
        self._structure.watch()
        self._forget()
        self._agree_on(told)

    def _agree_on(self, told: int | None) -> None:
        """Settle the number of steps after a state was loaded: what was said last holds."""
        self._said_ended = False
        saved = self.param_groups[0].get("total_steps")
        holds = saved if told is None else told
        for options in (self.defaults, *self.param_groups):
            options["total_steps"] = holds
        if told is not None and saved != told:
            warn(
                f"{type(self).__name__}: the state was saved with total_steps={saved}; "
                f"total_steps={told}, which this optimizer was made with, holds",
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
    """Raise for what is no number of steps."""
    if total_steps is not None:
        COUNT.check(name, total_steps)
