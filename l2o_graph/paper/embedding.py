"""Initial node and edge states from features, with kernels padded to one size as in the paper."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.blocks import Topology
from l2o_graph.layout.positions import position_rows
from l2o_graph.models.fourier import read_both_ways
from l2o_graph.paper.features import NUM_FEATURES, Scalars


class PaddedEmbedding(nn.Module):
    """The paper's initial states: kernels zero-padded to a fixed size, and position embeddings.

    Kofinas et al. 2024, sections 3.1 and 3.2, with the sizes of their optimizer experiments. A
    kernel is centred in ``max_kernel`` x ``max_kernel`` positions, whose features are concatenated.
    Forward edges read [x, 0, x], reverse edges [0, x, x]. A bias is padded like a kernel with one
    position. Without ``reverse`` a forward edge reads x, and the state of a reverse edge is 0. The
    ``table`` position embeddings are initially sinusoidal and trained: one for each input, each
    hidden layer and each output.
    """

    def __init__(
        self, hidden: int = 64, max_kernel: int = 5, table: int = 10_000, reverse: bool = True
    ):
        super().__init__()
        self.max_kernel, self.reverse = max_kernel, reverse
        width = NUM_FEATURES * max_kernel**2
        read = 3 * width if reverse else width
        self.edge = nn.Sequential(nn.Linear(read, hidden), nn.Linear(hidden, hidden))
        self.node = nn.Sequential(nn.Linear(width, hidden), nn.Linear(hidden, hidden))
        self.position = nn.Parameter(_wave(table, hidden))

    def check(self, topology: Topology) -> None:
        """Check that kernels and positions do not exceed the sizes of this embedding.

        Raises:
            ValueError: For a kernel larger than ``max_kernel``, or too many positions.
        """
        spec, most = topology.spec, self.max_kernel
        for kernel in spec.kernels:
            if max(kernel.positions, default=1) > most or len(kernel.positions) > 2:
                raise ValueError(
                    f"parameter '{spec.names[kernel.parameter]}': kernel "
                    f"{'x'.join(map(str, kernel.positions))} exceeds max_kernel {most}x{most} "
                    "of the paper preset"
                )
        needed = int(position_rows(topology).max()) + 1
        if needed > len(self.position):
            raise ValueError(
                f"the paper preset's table has {len(self.position)} positions, "
                f"the network needs {needed}"
            )

    def edges(self, scalars: Scalars) -> Float[Tensor, "2 E H"]:
        """Compute the states of the edges of kernel parts, forward and reverse."""
        runs = scalars.x.split([part.size for part in scalars.parts], dim=1)
        parts = zip(scalars.parts, runs, strict=True)
        x = torch.cat([self._padded(run, part.positions) for part, run in parts])
        if not self.reverse:
            forward = self.edge(x)
            return torch.stack([forward, torch.zeros_like(forward)])
        return self.edge(torch.stack(read_both_ways(x)))

    def nodes(self, topology: Topology, biases: Scalars) -> Float[Tensor, "N H"]:
        """Compute the states of all nodes; ``biases`` are those of ``topology.spec``, in order."""
        self.check(topology)
        width = NUM_FEATURES * self.max_kernel**2
        features = self.position.new_zeros(topology.spec.num_nodes, width)
        if biases.parts:  # several biases of one node are added up
            at = [torch.arange(*topology.bias(bias)) for bias in topology.spec.biases]
            where = torch.cat(at).to(features.device)
            features = features.index_add(0, where, self._padded(biases.x, ()))
        return self.node(features) + self.position[position_rows(topology).to(features.device)]

    def _padded(self, x: Tensor, positions: tuple[int, ...]) -> Float[Tensor, "cells width"]:
        """Pad kernels on all sides: (F, n) -> (cells, max_kernel^2 F)."""
        height, width = (1,) * (2 - len(positions)) + positions
        grid = x.unflatten(1, (-1, height, width))
        top, left = (self.max_kernel - height) // 2, (self.max_kernel - width) // 2
        bottom, right = self.max_kernel - height - top, self.max_kernel - width - left
        grid = nn.functional.pad(grid, (left, right, top, bottom))
        return grid.permute(1, 2, 3, 0).flatten(1)


def _wave(rows: int, hidden: int) -> Tensor:
    """Compute the sinusoidal positions of Vaswani et al. 2017."""
    frequency = 10_000.0 ** (-torch.arange(0, hidden, 2) / hidden)
    angles = torch.arange(rows)[:, None] * frequency
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
