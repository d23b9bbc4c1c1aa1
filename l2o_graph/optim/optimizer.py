"""The rule as a torch.optim.Optimizer: groups, state by parameter, averaged weights, an account."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from l2o_graph.layout.spec import NetSpec
from l2o_graph.layout.tensors import state_type
from l2o_graph.optim.account import Account, account_of
from l2o_graph.optim.averaging import AVERAGED_PART
from l2o_graph.optim.base import LearnedOptimizer
from l2o_graph.optim.blocks import Block, blocks_of
from l2o_graph.optim.checkpoints import checkpoint_of, load_checkpoint
from l2o_graph.optim.controller import Controller
from l2o_graph.optim.memory import Memory, arrange, gathered, scattered
from l2o_graph.optim.saved import check_numbers, with_step
from l2o_graph.optim.sharded import Sharing, whole
from l2o_graph.optim.step import advance
from l2o_graph.optim.warn import warn


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
            first batch that it is called with, rather than inferred from order and shapes. A
            pickle or a deep copy of the optimizer holds it too.
        total_steps: How many steps there will be, if that is known: lengths then end near 0.
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
        _check_total(total_steps)
        if isinstance(checkpoint, Controller):
            loaded = checkpoint_of(checkpoint)
        else:
            loaded = load_checkpoint(self.packaged if checkpoint is None else checkpoint)
        self._controller = loaded.controller
        self._stash: dict[Tensor, Tensor] | None = None
        self._said_ended = False
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "total_steps": total_steps,
            "checkpoint": loaded.identity,
        }
        super().__init__(params, defaults, model)

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
        parts = self._parts_for(group_of, [p for p in gradient_of if p.numel()])
        horizon = self._horizon(parts)
        for part in parts:
            part.step(self._controller_for(part), group_of, gradient_of, horizon)

    def _parts_for(
        self, group_of: dict[Tensor, dict[str, Any]], active: Sequence[Tensor]
    ) -> list["Part"]:
        """The parameters that have a gradient, laid out; anew where anything has changed."""
        known = [p for part in self._parts for p in part.parameters]
        if len(known) == len(active) and all(part.holds(self.state) for part in self._parts):
            same = {id(p) for p in known}.issuperset(id(p) for p in active)
            if same and self._is_current():
                return self._parts
        self._leave(active)
        parameters, spec = self._network(list(group_of))
        self._laid_out = spec
        index = {p: i for i, p in enumerate(parameters)}
        places: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in active:
            places.setdefault((p.device, state_type(p)), []).append(p)
        self._parts = [
            Part.of(
                spec,
                [index[p] for p in members],
                members,
                [self.state[p] for p in members],
                self._sharing,
            )
            for members in places.values()
        ]
        anew = sum(part.anew for part in self._parts)
        if anew:
            warn(
                f"{type(self).__name__}: {anew} of {len(active)} parameters play another part in "
                "the network than when their state was made; what is remembered of them begins "
                "anew",
            )
        return self._parts

    def _leave(self, active: Sequence[Tensor]) -> None:
        """Take parameters that skip a step out of the stacks, which would live on for them."""
        staying = {id(p) for p in active}
        for part in self._parts:
            for p, mine in zip(part.parameters, part.views, strict=True):
                if id(p) not in staying and p in self.state:
                    state = self.state[p]
                    for name, tensor in mine.items():
                        if state.get(name) is tensor:
                            state[name] = tensor.clone()
        self._parts = []

    def _is_current(self) -> bool:
        """Whether the structure is the one that the parameters were laid out by."""
        spec = self._structure.spec
        return (
            spec is not None
            and self._laid_out is spec
            and all(part.is_current() for part in self._parts)
        )

    def _controller_for(self, part: "Part") -> Controller:
        place = part.device, part.dtype
        if place not in self._placed:
            first = next(self._controller.parameters())
            fits = (first.device, first.dtype) == place
            own = self._controller if fits else copy.deepcopy(self._controller).to(*place)
            self._placed[place] = own
        return self._placed[place]

    def _horizon(self, parts: Sequence["Part"]) -> int:
        """Number of steps of the whole run, 0 if it is not told; says so once it is over."""
        told = self.param_groups[0]["total_steps"]
        if told is None:
            return 0
        age = max((stack.age for part in parts for stack in part.memory.all_stacks), default=0)
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

        They are the mean over about the last 5 % of the steps so far. Statistics of batch norms
        stay those of the weights in training.

        Raises:
            RuntimeError: Where it is entered already.
        """
        self._refuse_inside_of_averaged("averaged()")
        self._stash = {}
        try:
            with torch.no_grad():
                for p, state in self.state.items():
                    average = state.get("average")
                    if average is not None and average.shape == p.shape:
                        self._stash[p] = p.detach().clone()
                        if self._sharing is None:
                            p.copy_(average)
                        else:
                            self._sharing.give(p, average)
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

        def remembered(p: Tensor) -> dict[str, Tensor]:
            state = self.state.get(p, {})
            if sharing is None:
                return state
            momenta = {name: t for name, t in state.items() if name.startswith("momenta")}
            return {name: sharing.spread(p, t) for name, t in momenta.items()}

        return account_of(spec, parameters, remembered)

    def state_dict(self) -> dict[str, Any]:
        """The state, as of any optimizer.

        Of sharded parameters it is made of DTensors, and every rank has to call this at the same
        time. ``optimizer.state`` itself has tensors on the rank that owns a parameter, and their
        shapes on the meta device elsewhere.
        """
        handle = self.register_state_dict_post_hook(_as_saved, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; it stays float32 for parameters of lower precision.

        Raises:
            ValueError: For the state of another checkpoint or of another model, and for numbers
                that are not finite. The optimizer is then as it was.
            RuntimeError: Inside of ``averaged()``.
        """
        self._refuse_inside_of_averaged("load_state_dict()")
        told = self.param_groups[0]["total_steps"]
        super().load_state_dict(state_dict)
        self._forget()
        self._agree_on(told)

    def _agree_on(self, told: int | None) -> None:
        """Settle the number of steps after a state was loaded: what was said last holds."""
        saved = self.param_groups[0].get("total_steps")
        holds = saved if told is None else told
        for options in (self.defaults, *self.param_groups):
            options["total_steps"] = holds
        if told is not None and saved != told:
            warn(
                f"{type(self).__name__}: the state was saved with total_steps={saved}; "
                f"total_steps={told}, which this optimizer was made with, holds",
            )
        done = max((int(state["step"]) for state in self.state.values()), default=0)
        self._said_ended = holds is not None and holds < done
        if self._said_ended:
            warn(
                f"{type(self).__name__}: total_steps={holds} is below the {done} steps taken "
                "already; training goes on with the shortest steps",
            )

    def _check_saved_group(self, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
        super()._check_saved_group(mine, theirs)
        _check_total(theirs.get("total_steps"), "state_dict: ")

    def _copy_of(self, saved: Any, key: Any, parameter: Tensor) -> dict[str, Tensor]:
        saved = with_step(saved, key)
        sharing, kind = self._sharing, state_type(parameter)
        if sharing is not None:
            saved = {n: whole(t) if isinstance(t, Tensor) else t for n, t in saved.items()}
        _check_state(saved, key, parameter)
        copies = {
            name: t.to("cpu" if name == "step" else parameter.device, kind, copy=True)
            for name, t in saved.items()
        }
        if sharing is None:
            return copies
        return {n: sharing.mine_of(parameter, t) if is_owned(n) else t for n, t in copies.items()}

    def _forget(self) -> None:
        super()._forget()
        self._parts: list[Part] = []
        self._laid_out: NetSpec | None = None
        self._placed: dict[tuple[torch.device, torch.dtype], Controller] = {}

    def __getstate__(self) -> dict[str, Any]:
        own = {"_controller": self._controller, "_said_ended": self._said_ended}
        return {**super().__getstate__(), **own, "_stash": None}


@dataclass(eq=False)
class Part:
    """Parameters of one type on one device, laid out in stacks.

    Attributes:
        memory: Their stacks, N = 1.
        index: Place of each parameter in the network.
        parameters: The parameters.
        views: What each one owns of the memory, as ``optimizer.state`` has it.
        states: All that ``optimizer.state`` has of each.
        ages: Steps of each one so far.
        shapes: Their shapes when they were laid out.
        anew: How many of them have a state that did not fit.
        sharing: Which of them are worked on here, where they are sharded.
    """

    memory: Memory
    index: list[int]
    parameters: list[Tensor]
    views: list[dict[str, Tensor]]
    states: list[dict[str, Tensor]]
    ages: list[int]
    shapes: list[torch.Size]
    anew: int
    sharing: Sharing | None

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.memory.history.ages.device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.memory.history.ages.dtype

    @staticmethod
    def of(
        spec: NetSpec,
        index: list[int],
        parameters: list[Tensor],
        states: list[dict[str, Tensor]],
        sharing: Sharing | None = None,
    ) -> "Part":
        """Lay parameters out, and take over what is remembered of them where it fits."""
        place = {i: j for j, i in enumerate(index)}
        blocks = [b for b in blocks_of(spec) if b.parameter in place]
        one = parameters[0]
        like = torch.zeros((), device=one.device, dtype=state_type(one))
        for p, state in zip(parameters, states, strict=True):
            average = state.get("average")
            if average is None or average.shape != p.shape:  # new, or of another shape meanwhile
                state.clear()
                state["step"] = torch.zeros((), dtype=like.dtype)
                start = whole(p).to(like, copy=True).contiguous()
                state["average"] = start if sharing is None else sharing.mine_of(p, start)
            else:
                state["step"] = state["step"].to("cpu", like.dtype)
                state["average"] = average.to(like.to(average.device) if average.is_meta else like)
        mine = None
        if sharing is not None:
            mine = [sharing.is_mine(parameters[place[b.parameter]]) for b in blocks]
        summed = None if sharing is None else sharing.summed
        memory, views = _laid_out(spec, blocks, states, place, like, mine, summed)
        anew = 0
        for state, own in zip(states, views, strict=True):
            if int(state["step"]) and not _fits(state, own):
                state["step"].zero_()
                anew += 1
        if anew:  # ages have changed, and stacks are of one age
            memory, views = _laid_out(spec, blocks, states, place, like, mine, summed)
        for state, own in zip(states, views, strict=True):
            _take_over(state, own)
        ages, shapes = [int(state["step"]) for state in states], [p.shape for p in parameters]
        return Part(memory, index, parameters, views, states, ages, shapes, anew, sharing)

    def holds(self, states: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Whether the state of all parameters is what was laid out here."""
        for p, mine, state in zip(self.parameters, self.views, self.states, strict=True):
            if states.get(p) is not state or any(state.get(n) is not t for n, t in mine.items()):
                return False
        return torch.stack([state["step"] for state in self.states]).tolist() == self.ages

    def is_current(self) -> bool:
        """Whether the parameters are of the shape, type and place that they were."""
        return all(
            p.shape == shape and p.device == self.device and state_type(p) == self.dtype
            for p, shape in zip(self.parameters, self.shapes, strict=True)
        )

    def step(
        self,
        controller: Controller,
        group_of: Mapping[Tensor, dict[str, Any]],
        gradient_of: Mapping[Tensor, Tensor],
        horizon: int,
    ) -> None:
        """Update all parameters and what is remembered of them."""
        given = {p: gradient_of[p] for p in self.parameters}
        weights = {p: p.detach() for p in self.parameters}
        if self.sharing is not None:
            given, weights = self.sharing.to_owners(given), self.sharing.to_owners(weights)
        here = [j for j, p in enumerate(self.parameters) if p in weights]
        gradients, current = (
            {self.index[j]: of[self.parameters[j]].reshape(1, -1).to(self.dtype) for j in here}
            for of in (given, weights)
        )
        told = torch.full((1,), float(horizon), device=self.device, dtype=self.dtype)
        updates, _ = advance(
            controller.config,
            controller.weights(),
            self.memory,
            gathered(self.memory, gradients),
            gathered(self.memory, current),
            told if horizon else None,
        )
        found = scattered(self.memory, updates)
        by_group: dict[int, list[int]] = {}
        for j in here:
            by_group.setdefault(id(group_of[self.parameters[j]]), []).append(j)
        for members in by_group.values():
            group = group_of[self.parameters[members[0]]]
            chosen = [weights[self.parameters[j]] for j in members]
            moves = [found[self.index[j]].view(self.shapes[j]) for j in members]
            _move(chosen, moves, group["lr"], group["weight_decay"])
        self._average(here, weights)
        if self.sharing is not None:
            self.sharing.from_owners(self.parameters, weights)

    def _average(self, here: Sequence[int], weights: Mapping[Tensor, Tensor]) -> None:
        """Let averages take in the weights after the step; count it."""
        by_age: dict[int, list[int]] = {}
        for j in here:
            by_age.setdefault(self.ages[j], []).append(j)
        for age, members in by_age.items():
            averages = [self.states[j]["average"] for j in members]
            moved = [weights[self.parameters[j]] for j in members]
            moved = [w.to(a) for w, a in zip(moved, averages, strict=True)]
            torch._foreach_lerp_(averages, moved, 1 / (1 + AVERAGED_PART * age))
        torch._foreach_add_([state["step"] for state in self.states], 1)
        self.ages = [age + 1 for age in self.ages]


def _move(
    parameters: list[Tensor],
    updates: list[Tensor],
    lr: float | Tensor,
    weight_decay: float | Tensor,
) -> None:
    """Add updates to the parameters of a group, after what weight decay takes away.

    AdamW changes a weight by about lr a step and takes lr * weight_decay of it away. The RMS of
    an update stands for the former here. What is of low precision is rounded once.

    Args:
        parameters: To change in place.
        updates: What the rule answers, in the type that it computes in.
        lr: Factor of all.
        weight_decay: Of the group.
    """
    if isinstance(lr, Tensor):
        lr = lr.reshape(()).to(updates[0])
    if isinstance(weight_decay, Tensor):
        weight_decay = weight_decay.reshape(()).to(updates[0])
    wide = [p.to(u) for p, u in zip(parameters, updates, strict=True)]
    if isinstance(weight_decay, Tensor) or weight_decay:
        sizes = updates[0].new_tensor([u.numel() for u in updates])
        rms = torch.stack(torch._foreach_norm(updates)) / sizes.sqrt()
        kept = (1 - rms * lr * weight_decay).clamp(min=0)
        torch._foreach_mul_(wide, list(kept.unbind()))
    if isinstance(lr, Tensor) or lr != 1:
        updates = list(torch._foreach_mul(updates, lr))
    torch._foreach_add_(wide, updates)
    for p, w in zip(parameters, wide, strict=True):
        if w is not p:
            p.copy_(w)


def _laid_out(
    spec: NetSpec,
    blocks: Sequence[Block],
    states: Sequence[dict[str, Tensor]],
    place: Mapping[int, int],
    like: Tensor,
    here: Sequence[bool] | None = None,
    summed: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Memory, list[dict[str, Tensor]]]:
    """A memory of parameters of some ages, and what each of them owns of it."""
    ages = [int(states[place[b.parameter]]["step"]) for b in blocks]
    memory = arrange(spec, blocks, 1, ages, like, here, summed)
    views: list[dict[str, Tensor]] = [{} for _ in states]
    for block, owned in sorted(owners(memory), key=lambda found: found[0].start):
        mine = views[place[block.parameter]]
        number = sum(name.startswith("momenta") for name in mine)
        suffix = f".{number}" if number else ""
        mine |= {name + suffix: tensor for name, tensor in owned.items()}
    return memory, views


def owners(memory: Memory) -> Iterator[tuple[Block, dict[str, Tensor]]]:
    """Each block with views of what it owns of a memory of one network.

    What other ranks hold is on the meta device; what is known of rows and matrices is everywhere.
    """
    history = memory.history
    for stack in memory.all_stacks:
        r, at = stack.shape[1], 0
        owned = stack.owned()
        rows, tensors = history.rows[:, 0], history.tensors[:, 0]
        for block in stack.blocks:
            n = block.matrix[0]
            first = stack.rows[0] + at * r
            tensor = stack.tensors[0] + at
            mine = {
                name: (t[:, 0, at : at + n] if name == "momenta" else t[0, at : at + n])
                for name, t in owned.items()
            }
            for name in ("momenta", "square"):  # short blocks have zeros behind them
                if name in mine:
                    mine[name] = mine[name][..., : block.matrix[2]]
            mine["rows"] = rows[:, first : first + n * r]
            mine["tensors"] = tensors[:, tensor : tensor + n]
            yield block, mine
            at += n


def is_owned(name: str) -> bool:
    """Whether what a state calls by a name lies on one rank alone, that which owns a parameter.

    So does all but the count of its steps and what is remembered of its rows and matrices.
    """
    return name.partition(".")[0] not in ("step", "rows", "tensors")


def _as_saved(optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> dict[str, Any] | None:
    """A state as it is saved: whatever one rank owns as DTensors."""
    assert isinstance(optimizer, NGOptimizer)
    sharing = optimizer._sharing
    if sharing is None:
        return None
    ids = [key for group in found["param_groups"] for key in group["params"]]
    parameter_of = dict(zip(ids, optimizer._parameters(), strict=True))
    # In one piece, as what broadcasts a state needs it.
    state = {
        key: {
            name: sharing.saved(parameter_of[key], t) if is_owned(name) else t.contiguous()
            for name, t in of_one.items()
        }
        for key, of_one in found["state"].items()
    }
    return {**found, "state": state}


def _fits(state: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> bool:
    """Whether what is remembered is of the same geometry as its new place."""
    return all(name in state and state[name].shape == tensor.shape for name, tensor in mine.items())


def _take_over(state: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
    """Copy what is remembered into its new place, which ``state`` then holds; else start anew."""
    if int(state["step"]) and _fits(state, mine):
        for name, tensor in mine.items():
            tensor.copy_(state[name])
    kept = {name: state[name] for name in ("step", "average")}
    state.clear()
    state.update({**kept, **mine})


def _check_state(saved: Mapping[str, Any], key: Any, parameter: Tensor) -> None:
    """Raise for what is not the state of a parameter."""
    if not {"step", "average"} <= saved.keys():
        raise ValueError(
            f"state_dict: expected a step and an average of parameter {key}, found {sorted(saved)}"
        )
    for name, value in saved.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"state_dict: for parameter {key}, expected tensors, found '{name}': {value!r}"
            )
    shape = saved["average"].shape
    if shape != parameter.shape:
        raise ValueError(
            f"state_dict: expected an average of shape {list(parameter.shape)} for parameter "
            f"{key}, found {list(shape)}"
        )
    check_numbers(saved, key, parameter)


def _check_total(total_steps: Any, where: str = "") -> None:
    """Raise for what is no number of steps."""
    if total_steps is not None and (
        isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1
    ):
        raise ValueError(
            f"{where}total_steps: expected an integer of at least 1 or None, found {total_steps!r}"
        )
