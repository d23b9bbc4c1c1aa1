"""A pass in the order of a network's own computation: each edge is visited once.

    m_j = sum_i (W_e phi(w_ji) + b_e) * (A s_i + a) / sqrt(fan-in)      message to neuron j
    s_j = LayerNorm(GRU(m_j, u_j))                                      u_j: what j has of its own

from the inputs to the outputs. What a neuron of the network does, a sum of weights times what it
reads and then something of its own, is what the states of this pass do, channel by channel.
Source: DNG-Encoder (arXiv 2607.02166); there the GRU's state is the bias, too.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from l2o_graph.layout.segments import DirectedEdges


class OrderedStep(nn.Module):
    """States of some neurons, of ``size`` channels H -> states of those that read them."""

    def __init__(self, features: int, size: int):
        super().__init__()
        self.read = nn.Linear(features, size)
        self.say = nn.Linear(size, size)
        self.cell = nn.GRUCell(size, size)
        self.norm = nn.LayerNorm(size)

    def forward(
        self,
        edges: Float[Tensor, "I j i F"],
        sources: Float[Tensor, "I i H"],
        own: Float[Tensor, "I j H"],
    ) -> Float[Tensor, "I j H"]:
        """Take one step, from the edges' features phi and the states of the neurons that are read.

        ``own`` is what each neuron that reads has of its own: of its bias, of its responses.
        """
        factors = self.read(edges)
        messages = torch.einsum("noih,nih->noh", factors, self.say(sources))
        messages = messages / math.sqrt(edges.shape[2])
        states = self.cell(messages.flatten(0, 1), own.flatten(0, 1))
        return self.norm(states).view_as(own)


class OrderedGraph(nn.Module):
    """The same over networks of any architectures, as one graph, with one set of maps.

    Nodes and edges have H = ``size`` channels; states of the nodes that are read come out.
    """

    def __init__(self, size: int, dropout: float = 0.0):
        super().__init__()
        self.say = nn.Linear(size, size)
        self.cell = nn.GRUCell(size, size)
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, directed: DirectedEdges, nodes: Float[Tensor, "N H"], edges: Float[Tensor, "D H"]
    ) -> Float[Tensor, "n H"]:
        """Pass over all edges, which go along the flow alone, from the inputs on.

        Args:
            directed: The edges.
            nodes: What each node has of its own; where no edge leads to, it stays that.
            edges: What each edge multiplies by, W_e phi + b_e.

        Raises:
            ValueError: For a graph with a cycle.
        """
        segments = directed.all
        source = segments.source
        target = segments.target.repeat_interleave(segments.lengths)
        level = levels(len(nodes), source, target)
        scale = segments.arrivals.degree.clamp(min=1).rsqrt()[:, None].to(nodes)
        states = nodes
        for number in range(1, int(level.max()) + 1):
            own = (level == number).nonzero().flatten()
            arriving = (level[target] == number).nonzero().flatten()
            said = edges[arriving] * self.say(states[source[arriving]])
            heard = torch.zeros_like(nodes).index_add(0, target[arriving], said)[own] * scale[own]
            coming = self.dropout(self.norm(self.cell(heard, nodes[own])))
            states = states.index_copy(0, own, coming)
        return states[directed.last.nodes]


def levels(
    nodes: int, source: Int64[Tensor, " D"], target: Int64[Tensor, " D"]
) -> Int64[Tensor, " N"]:
    """How many edges there are, at most, on the way from an input to each node.

    Raises:
        ValueError: For a graph with a cycle.
    """
    level = torch.zeros(nodes, dtype=torch.long, device=source.device)
    for _ in range(nodes):
        further = torch.zeros_like(level).scatter_reduce(0, target, level[source] + 1, "amax")
        if torch.equal(further, level):
            return level
        level = further
    raise ValueError("ordered pass: expected a network without cycles, found one with a cycle")
