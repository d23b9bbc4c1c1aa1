"""Messages can compute what a network computes: NG-GNN with weights set by hand runs any MLP.

Kofinas et al. 2024, appendix B, with the model of ``models/ng_gnn.py`` as it is. Nodes begin with
biases, and with values at the inputs; edges with weights. Round k makes the nodes of layer k be::

    z_i = b_i + sum_j W_ij f(z_j)        W (d_k, d_k-1), b_i and z_i (d_k), z_j (d_k-1)

What does which part of it:

- The product: an edge scales its message, s * m + t, here with s = W_ij, m = f(z_j) and t = 0.
- The sum: PNA takes means, and W_node multiplies one by the fan-in d_k-1. So a model is of one
  layout and one activation, and of any weights, biases and inputs.
- The activation: nodes have SiLU, and a sum of SiLUs is many another (``SiLUs``).
- Biases of layers to come, and weights, pass SiLU in two channels: SiLU(x) - SiLU(-x) = x.
- The norm: it divides all nodes of a graph by one number that depends on them all. Channels of C
  and -C drown them: that number is C sqrt(2 / H), but for a share of S / 4 C^2, where S is the sum
  of squares of a node's other channels, on the mean. The norm's own factors undo it. Every channel
  has its negative, so that the mean is 0.

Axes, beside those of ``l2o_graph``: I networks of one layout, Q inputs of each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.blocks import topology_of
from l2o_graph.layout.grids import grid_route
from l2o_graph.metanets.inr_body import spec_of_layout
from l2o_graph.models.ng_gnn import NGGNN, GraphNorm, NGGNNLayer

# C. More of it, and its own rounding shows; less, and what it drowns does.
LOUD = 2.0**22
# SiLU(c z) / c is ReLU(z) up to 0.28 / c = 2e-19.
SHARP = 2.0**60
# Channels of nodes: the bias b, -b, then z for each SiLU, -z for each, C and -C.
BIAS, MINUS_BIAS, Z = 0, 1, 2


@dataclass(frozen=True, slots=True)
class SiLUs:
    """An activation that is a sum: f(z) = sum_k outer_k SiLU(inner_k z + shift_k) + constant."""

    outer: tuple[float, ...]
    inner: tuple[float, ...]
    shift: tuple[float, ...]
    constant: float = 0.0


SILU = SiLUs((1.0,), (1.0,), (0.0,))
IDENTITY = SiLUs((1.0, -1.0), (1.0, -1.0), (0.0, 0.0))
RELU = SiLUs((1 / SHARP,), (SHARP,), (0.0,))


def leaky_relu(slope: float = 0.01) -> SiLUs:
    """Make LeakyReLU, which is ReLU(z) - slope ReLU(-z)."""
    return SiLUs((1 / SHARP, -slope / SHARP), (SHARP, -SHARP), (0.0, 0.0))


def interpolated(function: Callable[[Tensor], Tensor], knots: Float[Tensor, " K"]) -> SiLUs:
    """Make any activation roughly: straight lines between K points, a ReLU for each bend.

    Between knots that are h apart it is off by h^2 max|f''| / 8 at most. Beyond the first and the
    last it is constant.
    """
    values = function(knots)
    level = values.new_zeros(1)
    slopes = torch.cat([level, values.diff() / knots.diff(), level])
    outer, shift = slopes.diff() / SHARP, -SHARP * knots
    inner = [SHARP] * len(knots)
    return SiLUs(tuple(outer.tolist()), tuple(inner), tuple(shift.tolist()), values[0].item())


class ForwardPass(nn.Module):
    """NG-GNN that computes what MLPs of one layout compute, in as many rounds as they have layers.

    In float64: to float32, ``LOUD`` leaves nothing of what it drowns.

    Args:
        layout: Widths d_0 to d_L of the MLPs, from input to output.
        activation: What the MLPs apply behind each layer but the last.
    """

    def __init__(self, layout: Sequence[int], activation: SiLUs = RELU):
        super().__init__()
        self.topology = topology_of(spec_of_layout(layout))
        self.outputs = layout[-1]
        self.hidden = Z + 2 * len(activation.outer) + 2
        rounds = len(layout) - 1
        self.backbone = NGGNN(self.hidden, rounds, last_edges=False).double()
        self.requires_grad_(False)
        for p in self.parameters():
            p.zero_()
        # What inputs say is what they are: no SiLU was applied to them.
        said, constant = {BIAS: 1.0, MINUS_BIAS: -1.0}, 0.0
        for k, layer in enumerate(self.backbone.layers):
            assert isinstance(layer, NGGNNLayer)
            _set_message(layer, said, constant)
            _set_node(layer, fan_in=layout[k])
            said, constant = dict(enumerate(activation.outer, Z)), activation.constant
            if k < rounds - 1:
                layer.node.bias[-2:] = torch.tensor([LOUD, -LOUD])
                _set_edge(layer)
        for norm in self.backbone.norms:
            assert isinstance(norm, GraphNorm)
            _set_norm(norm, activation)

    def forward(
        self,
        weights: Sequence[Float[Tensor, "I _ _"]],
        biases: Sequence[Float[Tensor, "I _"]],
        x: Float[Tensor, "I Q d_in"],
    ) -> Float[Tensor, "I Q d_out"]:
        """Outputs of MLPs at inputs.

        Args:
            weights: Of each layer, (I, out, in).
            biases: Of each layer, (I, out).
            x: Inputs of each MLP.
        """
        networks, queries, _ = x.shape
        of_neurons = torch.cat(list(biases), dim=-1)[:, None].expand(-1, queries, -1)
        nodes = _in_first_channel(torch.cat([x, of_neurons], dim=-1), self.hidden)

        edges = []
        for weight in weights:
            states = _in_first_channel(weight.flatten(1), self.hidden)
            edges.append(states[:, None, None].expand(networks, queries, 1, -1, -1))
        route = grid_route(self.topology, nodes.device, both=False)
        nodes, _ = self.backbone(route, nodes, edges)
        return nodes[..., -self.outputs :, Z]


def _in_first_channel(x: Float[Tensor, "*n"], hidden: int) -> Float[Tensor, "*n H"]:
    """First states: a number, and zeros."""
    return nn.functional.pad(x[..., None], (0, hidden - 1))


def _set_message(layer: NGGNNLayer, said: Mapping[int, float], constant: float) -> None:
    """m_ji = W_ij (sum of the source's channels times factors + constant), in the first channel.

    The layer is of zeros, and changed in place, as by all functions here. ``said`` has the factors
    by channel.
    """
    layer.film.weight[0, 0] = 1.0  # an edge's first channel is the scale
    of_source = layer.message.weight[:, layer.mix.out_features :]
    for channel, factor in said.items():
        of_source[0, channel] = factor
    layer.message.bias[0] = constant


def _set_node(layer: NGGNNLayer, fan_in: int) -> None:
    """b_i stays what it is, and z_i = b_i + fan_in mean_j(m_ji); beside each its negative."""
    hidden = layer.mix.out_features
    terms = (hidden - Z - 2) // 2
    mean = hidden  # the column behind those of the node itself, of the first channel's mean
    node = layer.node.weight
    node[BIAS, [BIAS, MINUS_BIAS]] = node.new_tensor([1.0, -1.0])
    z = node[Z : Z + terms]
    z.copy_(node[BIAS].expand_as(z))
    z[:, mean] = fan_in
    node[MINUS_BIAS] = -node[BIAS]
    node[Z + terms : Z + 2 * terms] = -z
    layer.mix.weight.copy_(torch.eye(hidden))


def _set_edge(layer: NGGNNLayer) -> None:
    """W_ij stays what it is: SiLU(w) - SiLU(-w)."""
    layer.edge.weight[:2, 0] = layer.edge.weight.new_tensor([1.0, -1.0])
    layer.out.weight[0, :2] = layer.out.weight.new_tensor([1.0, -1.0])


def _set_norm(norm: GraphNorm, activation: SiLUs) -> None:
    """What the norm divides by, it multiplies by again; then z is what the SiLUs are of."""
    deviation = LOUD * math.sqrt(2 / len(norm.weight)) + 1e-5
    factors = norm.weight.new_tensor([1.0, 1.0, *activation.inner])
    norm.weight[: len(factors)] = deviation * factors
    norm.bias[Z : len(factors)] = norm.bias.new_tensor(activation.shift)
