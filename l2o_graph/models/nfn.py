"""NFN: layers of all linear maps that commute with permutations (Zhou et al. 2023, section 3).

The maps are those of ``equivariant.py`` under NP, but weights are shared by relation, for example
"the next kernel", instead of separate for each layer. So one model applies to networks of any depth
and size. Permutable inputs and outputs lose nothing if node features identify them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.blocks import Topology
from l2o_graph.layout.grids import GridRoute, Grids, over_edges

# Floor of the mean square of a state, so that tiny ones are not scaled to unit size.
SMALLEST_SQUARE = 1e-5


def kernel_means(
    grids: Grids, edges: Sequence[Float[Tensor, "... C"]], nothing: Float[Tensor, "N C"]
) -> Float[Tensor, "N two_C"]:
    """Concatenate the mean states of the edges into and out of each node.

    They are ``nothing``, zeros, for a node without such edges. Several kernels into one set, as
    with a skip connection, have equal weight.
    """
    into, out_of, kernels_into, kernels_out_of = (nothing.clone() for _ in range(4))
    for block, own in grids.blocks(edges):
        grid = own.unflatten(0, block.grid)
        of_rows, of_columns = grid.mean(2).flatten(0, 1), grid.mean(1).flatten(0, 1)
        to, of = (of_columns, of_rows) if block.from_rows else (of_rows, of_columns)
        targets, sources = (slice(*end) for end in block.ends)
        into[targets] += to
        kernels_into[targets] += 1
        out_of[sources] += of
        kernels_out_of[sources] += 1
    means = into / kernels_into.clamp(min=1), out_of / kernels_out_of.clamp(min=1)
    return torch.cat(means, dim=-1)


class NFNLayer(nn.Module):
    """All equivariant linear maps between nodes and kernels, shared by relation.

    With v_i the state of node i, e_ij that of the edge j -> i and m_i the mean of c over the set
    of neurons of i::

        c_i    = [v_i; mean e_ij over j; mean e_ki over k]
        u_i    = [c_i; m_i; mean of all sets' m]
        v_i   <- W_node u_i
        e_ij  <- W_own e_ij + W_target u_i + W_source [c_j; m_j]

    In a chain of kernels, e_ij thus reads itself, its row, its column and its kernel's mean, at
    i the columns of the next kernel, at j the rows of the previous one, their means, the nodes i
    and j, their sets' means and the mean of everything. These are the maps of the NP layer of Zhou
    et al. 2023, except that tensors further away are not distinguished.

    Args:
        hidden: Number of channels H of nodes; an edge has 2H, for its two directions.
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
        grids: Grids,
        nodes: Float[Tensor, "N H"],
        edges: Sequence[Float[Tensor, "... C"]],
    ) -> Float[Tensor, "N fifteen_H"]:
        """Compute u_i of every node."""
        nothing = nodes.new_zeros(len(nodes), 2 * nodes.shape[-1])
        means_of_edges = kernel_means(grids, edges, nothing)
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
        grids: Grids,
        contexts: Float[Tensor, "N fifteen_H"],
        edges: Sequence[Float[Tensor, "... C"]],
    ) -> list[Float[Tensor, "... C"]]:
        """Update edges from u of their targets and of their sources."""
        # An edge reads the mean of everything only once, through its target.
        terms = self.target(contexts), self.source(contexts[:, : self.source.in_features])
        pairs = zip(grids.chunks, edges, strict=True)
        return [self.own(each) + torch.cat(over_edges(chunk, *terms)) for chunk, each in pairs]


class NFN(nn.Module):
    """NFN in NP mode: maps node and edge states to node and edge states, as ``NGGNN`` does.

    Between layers every state is scaled to a mean square of 1 over its channels and activated. This
    treats each node and edge separately, and so commutes with permutations. Nodes, and each
    direction of an edge, have ``hidden`` channels.
    """

    def __init__(self, hidden: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(NFNLayer(hidden) for _ in range(layers))
        self.node_norms = nn.ModuleList(_norm(hidden) for _ in range(layers - 1))
        self.edge_norms = nn.ModuleList(_norm(2 * hidden) for _ in range(layers - 1))

    def forward(
        self,
        route: GridRoute,
        nodes: Float[Tensor, "N H"],
        edges: Sequence[Float[Tensor, "... H"]],
    ) -> tuple[Float[Tensor, "N H"], list[Float[Tensor, "... H"]]]:
        """Map nodes and edges layer by layer; arguments and results as for ``NGGNN``."""
        paired = [torch.cat(each.unbind(), dim=-1) for each in edges]
        silu, last = nn.functional.silu, len(self.layers) - 1
        for k, layer in enumerate(self.layers):
            assert isinstance(layer, NFNLayer)
            contexts = layer.contexts(route.topology, route.all, nodes, paired)
            nodes = layer.node(contexts)
            paired = layer.next_edges(route.all, contexts, paired)
            if k < last:
                nodes = silu(self.node_norms[k](nodes))
                paired = [silu(self.edge_norms[k](each)) for each in paired]
        return nodes, [torch.stack(each.chunk(2, dim=-1)) for each in paired]


def _norm(channels: int) -> nn.Module:
    return nn.RMSNorm(channels, eps=SMALLEST_SQUARE)
