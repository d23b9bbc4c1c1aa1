"""NG-GNN can compute what an MLP computes: its weights are set by hand so that it runs any MLP.

Kofinas et al. 2024, appendix B, with the unchanged model of ``models/ng_gnn.py``. Initial states of
nodes are biases, those of input nodes the input values, and those of edges weights. Layer k of
NG-GNN computes the nodes of layer k of the MLP::

    z_i = b_i + sum_j W_ij f(z_j)        W (d_k, d_k-1), b_i and z_i (d_k), z_j (d_k-1)

How each part is computed:

- The product: an edge scales its message, s * m + t, here with s = W_ij, m = f(z_j) and t = 0.
- The sum: PNA computes means, and W_node multiplies one by the fan-in d_k-1. So a model is for one
  layout and one activation, but for any weights, biases and inputs.
- The activation: nodes have SiLU, and sums of SiLUs give many others (``SiLUs``).
- Biases of later layers, and weights, pass SiLU in two channels: SiLU(x) - SiLU(-x) = x.
- The norm: it divides all nodes of a graph by one number that depends on them all. Channels of C
  and -C dominate it: the number is C sqrt(2 / H), up to a relative S / 4 C^2, where S is the mean
  over nodes of the sum of squares of the other channels. The norm's own factors undo the division.
  Every channel has its negative, so that the mean is 0.

Axes, in addition to those of ``l2o_graph``: I networks of one layout, Q inputs of each.
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

# C. If larger, its own rounding matters; if smaller, the other channels influence the norm.
LOUD = 2.0**22
# c: SiLU(c z) / c is ReLU(z) up to 0.28 / c = 2e-19.
SHARP = 2.0**60
# Channels of nodes: the bias b, -b, then z for each SiLU, -z for each, C and -C.
BIAS, MINUS_BIAS, Z = 0, 1, 2


@dataclass(frozen=True, slots=True)
class SiLUs:
    """An activation f(z) = sum_k outer_k SiLU(inner_k z + shift_k) + constant."""

    outer: tuple[float, ...]
    inner: tuple[float, ...]
    shift: tuple[float, ...]
    constant: float = 0.0


SILU = SiLUs((1.0,), (1.0,), (0.0,))
IDENTITY = SiLUs((1.0, -1.0), (1.0, -1.0), (0.0, 0.0))
RELU = SiLUs((1 / SHARP,), (SHARP,), (0.0,))


def leaky_relu(slope: float = 0.01) -> SiLUs:
    """Build LeakyReLU, which is ReLU(z) - slope ReLU(-z)."""
    return SiLUs((1 / SHARP, -slope / SHARP), (SHARP, -SHARP), (0.0, 0.0))


def interpolated(function: Callable[[Tensor], Tensor], knots: Float[Tensor, " K"]) -> SiLUs:
    """Approximate any activation: piecewise linear between K knots, a ReLU for each bend.

    Between knots at a distance of h the error is at most h^2 max|f''| / 8. Beyond the first and the
    last knot it is constant.
    """
    values = function(knots)
    level = values.new_zeros(1)
    slopes = torch.cat([level, values.diff() / knots.diff(), level])
    outer, shift = slopes.diff() / SHARP, -SHARP * knots
    inner = [SHARP] * len(knots)
    return SiLUs(tuple(outer.tolist()), tuple(inner), tuple(shift.tolist()), values[0].item())


class ForwardPass(nn.Module):
    """NG-GNN that computes the outputs of MLPs of one layout, with as many layers as they have.

    In float64, because in float32 ``LOUD`` would leave no digits of the other channels.

    Args:
        layout: Widths d_0 to d_L of the MLPs, from input to output.
        activation: Activation of the MLPs after each layer but the last.
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
        # Input nodes send their values: no SiLU is applied to them.
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
        """Compute the outputs of MLPs for inputs.

        Args:
            weights: Weights of each layer, (I, out, in).
            biases: Biases of each layer, (I, out).
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
    """Build initial states: a number, and zeros."""
    return nn.functional.pad(x[..., None], (0, hidden - 1))


def _set_message(layer: NGGNNLayer, said: Mapping[int, float], constant: float) -> None:
    """Set m_ji = W_ij (sum of the source's channels times factors + constant) in channel 0.

    All weights of the layer have to be 0; like the other functions, this changes it in place.
    ``said`` are the factors by channel.
    """
    layer.film.weight[0, 0] = 1.0  # an edge's first channel is the scale
    of_source = layer.message.weight[:, layer.mix.out_features :]
    for channel, factor in said.items():
        of_source[0, channel] = factor
    layer.message.bias[0] = constant


def _set_node(layer: NGGNNLayer, fan_in: int) -> None:
    """Set b_i = b_i and z_i = b_i + fan_in mean_j(m_ji), and the negatives of both."""
    hidden = layer.mix.out_features
    terms = (hidden - Z - 2) // 2
    mean = hidden  # the column of channel 0's mean, after those of the node itself
    node = layer.node.weight
    node[BIAS, [BIAS, MINUS_BIAS]] = node.new_tensor([1.0, -1.0])
    z = node[Z : Z + terms]
    z.copy_(node[BIAS].expand_as(z))
    z[:, mean] = fan_in
    node[MINUS_BIAS] = -node[BIAS]
    node[Z + terms : Z + 2 * terms] = -z
    layer.mix.weight.copy_(torch.eye(hidden))


def _set_edge(layer: NGGNNLayer) -> None:
    """Keep W_ij = SiLU(W_ij) - SiLU(-W_ij)."""
    layer.edge.weight[:2, 0] = layer.edge.weight.new_tensor([1.0, -1.0])
    layer.out.weight[0, :2] = layer.out.weight.new_tensor([1.0, -1.0])


def _set_norm(norm: GraphNorm, activation: SiLUs) -> None:
    """Undo the division by the norm, and apply inner factors and shifts of the SiLUs to z."""
    deviation = LOUD * math.sqrt(2 / len(norm.weight)) + 1e-5
    factors = norm.weight.new_tensor([1.0, 1.0, *activation.inner])
    norm.weight[: len(factors)] = deviation * factors
    norm.bias[Z : len(factors)] = norm.bias.new_tensor(activation.shift)
