"""NFN: layers of all linear maps that commute with permutations (Zhou et al. 2023, section 3).

The maps are those of ``equivariant.py`` under NP, but shared by relation instead of by layer: a
kernel has the same weights for "the kernel after this one" wherever it stands, so that one model
serves networks of any depth and size. That inputs and outputs are permutable too loses nothing
where the first node states say which input or output a node is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.blocks import Chunk, Topology, with_edges
from l2o_graph.layout.edges import LazyEdges, cached_if, fits_in_memory, over_edges
from l2o_graph.layout.node_ranges import split_chunks

PairedEdges = Callable[[Chunk], Float[Tensor, "E C"]]

# Floor under the mean square of a state: what is smaller is not blown up to unit size.
SMALLEST_SQUARE = 1e-5


@dataclass(frozen=True, slots=True)
class MeanPartial:
    """What n nodes have of the kernels around them.

    ``total`` sums over kernels the mean state of a node's edges, into it and out of it; ``count``
    is how many kernels these are.
    """

    total: Float[Tensor, "2 n C"]
    count: tuple[float, float]

    def part(self, start: int, stop: int) -> "MeanPartial":
        """Of some of the nodes."""
        return MeanPartial(self.total[:, start:stop], self.count)

    def merge(self, other: "MeanPartial") -> "MeanPartial":
        """More kernels, or further rows of one, around the same nodes."""
        into, out_of = (a + b for a, b in zip(self.count, other.count, strict=True))
        return MeanPartial(self.total + other.total, (into, out_of))

    @staticmethod
    def of(means: Float[Tensor, "n C"], into: bool, count: float) -> "MeanPartial":
        """Means of the edges of one kernel, into the nodes or out of them."""
        nothing = torch.zeros_like(means)
        planes = (means, nothing) if into else (nothing, means)
        return MeanPartial(torch.stack(planes), (count, 0.0) if into else (0.0, count))

    def means(self) -> Float[Tensor, "n two_C"]:
        """Beside each other; zeros where there is no kernel."""
        count = self.total.new_tensor(self.count).clamp(min=1e-9)[:, None, None]
        return torch.cat((self.total / count).unbind(), dim=-1)


def kernel_means(
    topology: Topology, chunks: Sequence[Chunk], edges: PairedEdges, no_kernel: Tensor
) -> Float[Tensor, "N two_C"]:
    """Mean state of the edges into each node, and of the edges out of it, beside each other.

    That of ``no_kernel`` where a node has no such edges. Several kernels into one set, as beside a
    skip, count alike.
    """

    def sides() -> Iterator[MeanPartial]:
        for chunk in chunks:
            states = edges(chunk)
            for block, own in with_edges(chunk):
                grid = states[own].unflatten(0, block.grid)
                yield MeanPartial.of(grid.mean(2).flatten(0, 1), not block.from_rows, 1.0)
                means = block.share * grid.mean(1).flatten(0, 1)
                yield MeanPartial.of(means, block.from_rows, block.share)

    parts = split_chunks(topology, chunks)
    return parts.gathered(sides(), MeanPartial.means, no_kernel)


class NFNLayer(nn.Module):
    """Every linear map between nodes and kernels, shared by relation.

    With v_i the state of node i, e_ij that of the edge j -> i and m_i the mean of c over the set
    of neurons that i belongs to::

        c_i    = [v_i; mean e_ij over j; mean e_ki over k]
        u_i    = [c_i; m_i; mean of all sets' m]
        v_i   <- W_node u_i
        e_ij  <- W_own e_ij + W_target u_i + W_source [c_j; m_j]

    In a chain of kernels, e_ij thus reads itself, its row, its column and its kernel's mean, at
    i the columns of the next kernel, at j the rows of the last, their means, the nodes i and j,
    their sets' means and the mean of everything: the maps of the NP layer of Zhou et al. 2023.
    That tensors further away are not told apart is the only deviation.

    Args:
        hidden: Channels H of nodes; an edge has 2H, those of its two directions.
    """

    def __init__(self, hidden: int):
        super().__init__()
        pair, context = 2 * hidden, 5 * hidden
        self.own = nn.Linear(pair, pair)
        self.target = nn.Linear(3 * context, pair, bias=False)
        self.source = nn.Linear(2 * context, pair, bias=False)
        self.node = nn.Linear(3 * context, hidden)

    def contexts(
        self,
        topology: Topology,
        chunks: Sequence[Chunk],
        nodes: Float[Tensor, "N H"],
        edges: PairedEdges,
    ) -> Float[Tensor, "N fifteen_H"]:
        """u_i of every node, gathered from all chunks."""
        no_kernel = nodes.new_zeros(len(nodes), 4 * nodes.shape[-1])
        means_of_edges = kernel_means(topology, chunks, edges, no_kernel)
        own = torch.cat([nodes, means_of_edges], dim=-1)
        sizes = [neurons.size for neurons in topology.spec.neurons]
        means = torch.stack([each.mean(0) for each in own.split(sizes)])
        of_set = torch.cat([m.expand(n, -1) for m, n in zip(means, sizes, strict=True)])
        network = [neurons.network for neurons in topology.spec.neurons]
        of_network = []
        for n, (start, stop) in enumerate(topology.networks):
            sets = means[network.index(n) : network.index(n) + network.count(n)]
            of_network.append(sets.mean(0).expand(stop - start, -1))
        return torch.cat([own, of_set, torch.cat(of_network)], dim=-1)

    def next_edges(
        self,
        chunk: Chunk,
        terms: tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]],
        edges: Float[Tensor, "E C"],
    ) -> Float[Tensor, "E C"]:
        """Update the edges of a chunk from terms of their targets and of their sources."""
        return self.own(edges) + torch.cat(over_edges(chunk, *terms))

    def terms(
        self, contexts: Float[Tensor, "N fifteen_H"]
    ) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
        """What a node adds to the edges into it, and to those out of it."""
        # The mean of everything reaches an edge once, by its target.
        return self.target(contexts), self.source(contexts[:, : self.source.in_features])


class NFN(nn.Module):
    """NFN in NP mode: node and edge states in, node and edge states out, as ``NGGNN`` does.

    Between layers every state is brought to a unit mean square over its channels and activated;
    a node or an edge needs no other for that, so it is safe under permutation and in chunks.

    Args:
        hidden: Channels of nodes and of each direction of an edge.
        layers: Linear layers.
    """

    def __init__(self, hidden: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(NFNLayer(hidden) for _ in range(layers))
        self.node_norms = nn.ModuleList(_norm(hidden) for _ in range(layers - 1))
        self.edge_norms = nn.ModuleList(_norm(2 * hidden) for _ in range(layers - 1))

    def forward(
        self,
        topology: Topology,
        chunks: Sequence[Chunk],
        nodes: Float[Tensor, "N H"],
        edges: LazyEdges,
    ) -> tuple[Float[Tensor, "N H"], LazyEdges]:
        """Map nodes and edges, layer by layer; arguments and answers are as those of ``NGGNN``.

        With several chunks edge states are computed anew wherever they are asked for: between
        layers, only what was gathered at the nodes is kept.
        """
        cached = cached_if(fits_in_memory(topology, chunks))
        paired: PairedEdges = cached(lambda chunk: torch.cat(edges(chunk).unbind(), dim=-1))
        last = len(self.layers) - 1
        for k, layer in enumerate(self.layers):
            assert isinstance(layer, NFNLayer)
            contexts = layer.contexts(topology, chunks, nodes, paired)
            nodes = layer.node(contexts)
            if k < last:
                nodes = nn.functional.silu(self.node_norms[k](nodes))
            norm = self.edge_norms[k] if k < last else None
            paired = cached(_after(layer, norm, layer.terms(contexts), paired))
        return nodes, cached(lambda chunk: torch.stack(paired(chunk).chunk(2, dim=-1)))


def _norm(channels: int) -> nn.Module:
    return nn.RMSNorm(channels, eps=SMALLEST_SQUARE)


def _after(
    layer: NFNLayer,
    norm: nn.Module | None,
    terms: tuple[Tensor, Tensor],
    edges: PairedEdges,
) -> PairedEdges:
    """Edge states one layer further."""

    def states(chunk: Chunk) -> Tensor:
        mapped = layer.next_edges(chunk, terms, edges(chunk))
        return mapped if norm is None else nn.functional.silu(norm(mapped))

    return states
