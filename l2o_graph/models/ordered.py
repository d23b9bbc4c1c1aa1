"""A pass in the order of a network's own computation: each edge is visited once.

    m_j = sum_i (W_e phi(w_ji) + b_e) * (A s_i + a) / sqrt(fan-in)      message to neuron j
    s_j = LayerNorm(GRU(m_j, u_j))                                      u_j: what j has of its own

from the inputs to the outputs. What a neuron of the network does, a sum of weights times what it
reads and then something of its own, is what the states of this pass do, channel by channel.
Source: DNG-Encoder (arXiv 2607.02166); there the GRU's state is the bias, too.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


class OrderedStep(nn.Module):
    """States of some neurons -> states of those that read them.

    Args:
        features: Number of features of an edge.
        size: Number of channels H of states.
    """

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
        """Take one step.

        Args:
            edges: Features of the edges between the neurons, phi.
            sources: States of the neurons that are read.
            own: What each neuron that reads has of its own: of its bias, of its responses.
        """
        factors = self.read(edges)
        messages = torch.einsum("noih,nih->noh", factors, self.say(sources))
        messages = messages / math.sqrt(edges.shape[2])
        states = self.cell(messages.flatten(0, 1), own.flatten(0, 1))
        return self.norm(states).view_as(own)
