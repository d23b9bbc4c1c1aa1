"""NFN: layers of all linear maps that commute with permutations (Zhou et al. 2023, section 3).

The maps are those of ``equivariant.py`` under NP, but shared by relation instead of by layer: a
kernel has the same weights for "the kernel after this one" wherever it stands, so that one model
serves networks of any depth and size. That inputs and outputs are permutable too loses nothing
where the first node states say which input or output a node is.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.graph import Topology
from l2o_graph.models.ng_gnn import Chunk, EdgeStates, kept_if

PairedEdges = Callable[[Chunk], Float[Tensor, "E C"]]

# Floor under the mean square of a state: what is smaller is not blown up to unit size.
SMALLEST_SQUARE = 1e-5


def kernel_means(
    topology: Topology, chunks: Sequence[Chunk], edges: PairedEdges
) -> Float[Tensor, "N two_C"]:
    """Mean state of the edges into each node, and of the edges out of it, beside each other.

    Args:
        topology: Where everything lies.
        chunks: All rows of all kernels, in order.
        edges: Gives the states of a chunk.

    Returns:
        Zeros where a node has no such edges. Several kernels into one set, as beside a skip,
        count alike.
    """
    kernels = topology.spec.kernels
    rows: dict[int, list[Tensor]] = {}  # kernel -> means of its rows, so far its first
    columns: dict[int, Tensor] = {}  # kernel -> sums of its columns, so far
    for chunk in chunks:
        states, at = edges(chunk), 0
        for piece in chunk:
            k, width = piece.kernel, topology.grid(kernels[piece.kernel])[1]
            size = (piece.stop - piece.start) * width
            grid = states[at : at + size].unflatten(0, (-1, width))
            at += size
            rows.setdefault(k, []).append(grid.mean(1))
            total = grid.sum(0)
            columns[k] = columns[k] + total if k in columns else total
    into: dict[int, list[Tensor]] = {}  # set -> means of each kernel that ends there
    out_of: dict[int, list[Tensor]] = {}
    for k, kernel in enumerate(kernels):
        into.setdefault(kernel.target, []).append(torch.cat(rows[k]))
        out_of.setdefault(kernel.source, []).append(columns[k] / topology.grid(kernel)[0])
    answer = []
    for n, neurons in enumerate(topology.spec.neurons):
        nothing = columns[0].new_zeros(1, neurons.size, columns[0].shape[1])
        sides = [torch.stack(side[n]) if n in side else nothing for side in (into, out_of)]
        answer.append(torch.cat([side.mean(0) for side in sides], dim=-1))
    return torch.cat(answer)


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
        own = torch.cat([nodes, kernel_means(topology, chunks, edges)], dim=-1)
        sizes = [neurons.size for neurons in topology.spec.neurons]
        means = torch.stack([each.mean(0) for each in own.split(sizes)])
        of_set = torch.cat([m.expand(n, -1) for m, n in zip(means, sizes, strict=True)])
        return torch.cat([own, of_set, means.mean(0).expand(len(own), -1)], dim=-1)

    def next_edges(
        self,
        topology: Topology,
        chunk: Chunk,
        terms: tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]],
        edges: Float[Tensor, "E C"],
    ) -> Float[Tensor, "E C"]:
        """Update the edges of a chunk from terms of their targets and of their sources."""
        of_target, of_source = terms
        around = []
        for piece in chunk:
            kernel = topology.spec.kernels[piece.kernel]
            rows, columns = topology.nodes(kernel.target), topology.nodes(kernel.source)
            rows = slice(rows.start + piece.start, rows.start + piece.stop)
            around.append((of_target[rows, None] + of_source[None, columns]).flatten(0, 1))
        return self.own(edges) + torch.cat(around)

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
        edges: EdgeStates,
    ) -> tuple[Float[Tensor, "N H"], EdgeStates]:
        """Map nodes and edges, layer by layer.

        Args:
            topology: Where everything lies.
            chunks: All rows of all kernels, in order.
            nodes: (N, H) initial states.
            edges: Gives the initial states (2, E, H) of a chunk's edges.

        Returns:
            Final node states, and a function that gives a chunk's final edge states (2, E, H).
            With several chunks these are computed anew wherever they are asked for: between
            layers, only what was gathered at the nodes is kept.
        """
        hold = kept_if(len(chunks) == 1)
        paired: PairedEdges = hold(lambda chunk: torch.cat(edges(chunk).unbind(), dim=-1))
        last = len(self.layers) - 1
        for k, layer in enumerate(self.layers):
            assert isinstance(layer, NFNLayer)
            contexts = layer.contexts(topology, chunks, nodes, paired)
            nodes = layer.node(contexts)
            if k < last:
                nodes = nn.functional.silu(self.node_norms[k](nodes))
            norm = self.edge_norms[k] if k < last else None
            paired = hold(_after(layer, norm, topology, layer.terms(contexts), paired))
        return nodes, hold(lambda chunk: torch.stack(paired(chunk).chunk(2, dim=-1)))


def _norm(channels: int) -> nn.Module:
    return nn.RMSNorm(channels, eps=SMALLEST_SQUARE)


def _after(
    layer: NFNLayer,
    norm: nn.Module | None,
    topology: Topology,
    terms: tuple[Tensor, Tensor],
    edges: PairedEdges,
) -> PairedEdges:
    """Edge states one layer further."""

    def states(chunk: Chunk) -> Tensor:
        mapped = layer.next_edges(topology, chunk, terms, edges(chunk))
        return mapped if norm is None else nn.functional.silu(norm(mapped))

    return states
