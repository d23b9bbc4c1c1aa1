"""Parameters that are sharded over ranks (FSDP2, tensor parallelism): who works on which of them.

Each parameter has one owner among the ranks. The owner keeps its whole gradient and weight for a
step, remembers what there is to remember of it, works out its update and gives everyone their shard
of the new weight. Ranks tell each other sums over rows and messages between neurons. A saved state
is made of DTensors, whoever owned what.
"""

import gc
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l2o_graph.layout.tensors import is_sharded

if TYPE_CHECKING:  # importing it takes long, and most have no use for it
    from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Of a DTensor, every rank has to ask for it at the same time."""
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).detach()


def here(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank."""
    return (tensor.to_local() if is_sharded(tensor) else tensor).detach()


@dataclass(frozen=True, eq=False)
class Sharing:
    """The ranks that train one network together, and what each of them works on.

    Every method but ``is_mine`` has to be called by all of them at the same time.
    """

    group: Any  # their process group
    members: list[int]  # number of each of them among all processes, in the group's order
    rank: int  # of this process in the group
    owner_of: Mapping[Tensor, int]  # rank that owns each parameter

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.members)

    def is_mine(self, parameter: Tensor) -> bool:
        """Whether this rank owns a parameter."""
        return self.owner_of[parameter] == self.rank

    def summed(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def agreed(self, is_fit: bool, given: Iterable[Tensor]) -> bool:
        """Whether gradients are fit for a step on every rank, if ``given`` have one on this.

        Raises:
            RuntimeError: Where ranks have gradients of different parameters.
        """
        having = set(given)
        has = [int(p in having) for p in self.owner_of]
        lacks = [1 - each for each in has]
        device = here(next(iter(self.owner_of))).device
        least = torch.tensor([int(is_fit), *has, *lacks], device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN, self.group)
        fit, *either = least.tolist()
        count = len(has)
        apart = [i for i in range(count) if not either[i] and not either[count + i]]
        if apart:
            raise RuntimeError(
                f"parameter {apart[0]}: expected a gradient on all ranks or on none, found one on "
                f"some; sharded networks have to use the same parameters everywhere"
            )
        return bool(fit)

    def to_owners(self, tensors: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Put tensors of parameters together, each on the rank that owns its parameter.

        Returns:
            Whole tensors of the parameters that this rank owns.
        """
        answer: dict[Tensor, Tensor] = {}
        cut, others = self._parted(tensors)
        for p in others:
            found = whole(tensors[p])
            if self.is_mine(p):
                answer[p] = found
        for of_owner in cut:
            mine = of_owner[self.rank]
            sent = [[here(tensors[p]) for p in of_one] for of_one in of_owner]
            shapes = [[_shard(p, rank, self.size) for p in mine] for rank in range(self.size)]
            like = tensors[next(chain(*of_owner))]
            for p, *shards in zip(mine, *self._exchanged(sent, shapes, like), strict=True):
                answer[p] = torch.cat(shards, _axis(p))
        return answer

    def from_owners(self, parameters: Sequence[Tensor], tensors: Mapping[Tensor, Tensor]) -> None:
        """Write into parameters what their owners have, each rank its shard.

        ``tensors`` are whole, of the parameters that this rank owns.
        """
        cut, others = self._parted({p: p for p in parameters})
        for p in others:
            self.give(p, tensors.get(p, p))
        for of_owner in cut:
            pieces = [self._pieces(p, tensors[p]) for p in of_owner[self.rank]]
            sent = [[of_one[rank] for of_one in pieces] for rank in range(self.size)]
            shapes = [[_shard(p, self.rank, self.size) for p in of_one] for of_one in of_owner]
            found = self._exchanged(sent, shapes, next(chain(*of_owner)))
            for p, shard in zip(chain(*of_owner), chain(*found), strict=True):
                here(p).copy_(shard)

    def _parted(
        self, tensors: Mapping[Tensor, Tensor]
    ) -> "tuple[list[list[list[DTensor]]], list[Tensor]]":
        """Parameters of which each rank has a piece, by types and owners, and all others.

        Pieces are cut along one axis and lie in the order of the ranks, those of the parameters
        and of their tensors alike. What is not is put together by its own method, on all ranks.
        """
        cut: dict[torch.dtype, list[list[DTensor]]] = {}
        others: list[Tensor] = []
        for p, t in tensors.items():
            if is_sharded(p) and is_sharded(t) and self._is_cut(p, t):
                of_owner = cut.setdefault(t.dtype, [[] for _ in range(self.size)])
                of_owner[self.owner_of[p]].append(p)
            else:
                others.append(p)
        return list(cut.values()), others

    def _is_cut(self, parameter: "DTensor", tensor: "DTensor") -> bool:
        from torch.distributed.tensor import Shard

        in_order = parameter.device_mesh.mesh.tolist() == self.members
        alike = tensor.placements == parameter.placements
        return in_order and alike and [type(x) for x in parameter.placements] == [Shard]

    def _exchanged(
        self,
        sent: Sequence[Sequence[Tensor]],
        shapes: Sequence[Sequence[tuple[int, ...]]],
        like: Tensor,
    ) -> list[list[Tensor]]:
        """Send tensors to each rank, all at once: what comes from each, of these shapes.

        ``like`` is a tensor of the type and on the device of all.
        """
        sizes = [[math.prod(shape) for shape in of_one] for of_one in shapes]
        given = [sum(t.numel() for t in tensors) for tensors in sent]
        taken = [sum(of_one) for of_one in sizes]
        out = torch.cat([here(like).new_empty(0), *(t.flatten() for ts in sent for t in ts)])
        found = out.new_empty(sum(taken))
        dist.all_to_all_single(found, out, taken, given, self.group)
        return [
            [t.view(shape) for t, shape in zip(part.split(of_one), of_rank, strict=True)]
            for part, of_one, of_rank in zip(found.split(taken), sizes, shapes, strict=True)
        ]

    def _pieces(self, parameter: "DTensor", tensor: Tensor) -> Sequence[Tensor]:
        """Of a whole tensor, what goes to each rank."""
        dim = _axis(parameter)
        return tensor.split([_shard(parameter, r, self.size)[dim] for r in range(self.size)], dim)

    def spread(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """What the owner of a parameter has, on every rank.

        On others ``tensor`` is one of the same shape and type, which may be on the meta device.
        """
        if self.is_mine(parameter):
            found = tensor.contiguous()
        else:
            found = torch.empty(tensor.shape, dtype=tensor.dtype, device=here(parameter).device)
        dist.broadcast(found, self.members[self.owner_of[parameter]], self.group)
        return found

    def give(self, parameter: Tensor, tensor: Tensor) -> None:
        """Write what the owner has of a parameter's shape into it, each rank its shard."""
        found = self.spread(parameter, tensor)
        if is_sharded(parameter):
            found = _cut(found, parameter, parameter.placements)
        parameter.copy_(found)

    def saved(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """What a saved state has of a tensor that the owner of a parameter holds: a DTensor.

        What has the parameter's shape is sharded as that is, all else along its longest axis.
        Parameters that are on every rank have a state that is.
        """
        found = self.spread(parameter, tensor)
        if not is_sharded(parameter):
            return found
        placements = parameter.placements
        if found.shape != parameter.shape:
            from torch.distributed.tensor import Replicate, Shard

            longest = max(range(found.dim()), key=found.shape.__getitem__, default=0)
            split = Shard(longest) if found.dim() else Replicate()
            placements = [split if p.is_shard() else Replicate() for p in placements]
        return _cut(found, parameter, placements).clone()  # a view would keep all of it

    def mine_of(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """A tensor where this rank owns the parameter, else its shape on the meta device."""
        return tensor if self.is_mine(parameter) else tensor.to("meta")


def _cut(tensor: Tensor, parameter: "DTensor", placements: Sequence[Any]) -> "DTensor":
    """A tensor that every rank has, as a DTensor on the mesh of a parameter."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, placements)


def _axis(parameter: "DTensor") -> int:
    """The axis that a parameter is cut along."""
    from torch.distributed.tensor import Shard

    (placement,) = parameter.placements
    assert isinstance(placement, Shard)
    return placement.dim


def _shard(parameter: "DTensor", rank: int, ranks: int) -> tuple[int, ...]:
    """Shape of a rank's shard of a parameter that is cut along one axis; the last may be empty."""
    dim, shape = _axis(parameter), list(parameter.shape)
    each = -(-shape[dim] // ranks)
    shape[dim] = max(min(each, shape[dim] - rank * each), 0)
    return tuple(shape)


def sharing_of(parameters: Sequence[Tensor]) -> Sharing | None:
    """Who works on what; None where no parameter is sharded.

    Each parameter in turn falls to the rank that has the fewest scalars so far, so that what is
    added later moves nothing.

    Raises:
        ValueError: Where the parameters' meshes are not part of one that is a process group.
    """
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        return None
    meshes = {p.device_mesh for p in sharded}
    largest = max(meshes, key=lambda mesh: mesh.size())
    members = set(largest.mesh.flatten().tolist())
    if any(not members.issuperset(mesh.mesh.flatten().tolist()) for mesh in meshes):
        raise ValueError(
            "expected parameters on one mesh or on parts of it, found some on others; make an "
            "optimizer for those of each mesh"
        )
    if largest.ndim == 1:
        group = largest.get_group()
    elif largest.size() == dist.get_world_size():
        group = dist.group.WORLD
    else:
        raise ValueError(
            f"expected a mesh of one axis or of all {dist.get_world_size()} processes, found one "
            f"of shape {tuple(largest.shape)}"
        )
    loads = [(0, rank) for rank in range(largest.size())]
    owner_of: dict[Tensor, int] = {}
    for p in parameters:
        load, rank = heapq.heappop(loads)
        owner_of[p] = rank
        heapq.heappush(loads, (load + p.numel(), rank))
    return Sharing(group, dist.get_process_group_ranks(group), dist.get_rank(group), owner_of)


def replaced(parameters: Iterable[Tensor]) -> list[int]:
    """Indices of parameters that modules have since put sharded ones in the place of.

    That is those that no module holds, while one holds a DTensor of the same shape that is not
    among them. It looks at every module there is.
    """
    mine = list(parameters)
    ids = {id(p) for p in mine}
    held: set[int] = set()
    shapes: set[torch.Size] = set()
    for thing in gc.get_objects():
        if not issubclass(type(thing), nn.Module):
            continue
        for p in thing.__dict__.get("_parameters", {}).values():
            if p is None:
                continue
            held.add(id(p))
            if is_sharded(p) and id(p) not in ids:
                shapes.add(p.shape)
    return [i for i, p in enumerate(mine) if id(p) not in held and p.shape in shapes]
