"""Parameters of one type on one device: laid out in stacks, and stepped."""

# pyright: reportPrivateImportUsage=false
# torch has no public names for its functions of many tensors at once.

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2o_graph.layout.spec import NetSpec
from l2o_graph.layout.tensors import state_type
from l2o_graph.optim.averaging import AVERAGED_PART
from l2o_graph.optim.blocks import Block, blocks_of
from l2o_graph.optim.controller import Controller
from l2o_graph.optim.memory import Memory, arrange, gathered, scattered
from l2o_graph.optim.sharded import Sharing, whole
from l2o_graph.optim.step import advance


@dataclass(eq=False)
class Arrangement:
    """Parameters of one type on one device, laid out in stacks.

    Attributes:
        memory: Their stacks, N = 1.
        index: Place of each parameter in the network.
        parameters: The parameters.
        views: What each one owns of the memory, as ``optimizer.state`` has it.
        states: All that ``optimizer.state`` has of each.
        ages: Steps of each one so far.
        shapes: Their shapes when they were laid out.
        anew: Number of them that have a state that did not fit.
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
    ) -> "Arrangement":
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
        return Arrangement(memory, index, parameters, views, states, ages, shapes, anew, sharing)

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
        weight_decay: Weight decay of the group.
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
