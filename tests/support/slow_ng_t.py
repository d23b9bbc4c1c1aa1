"""NG-T pair by pair, and the largest tensor that is made."""

import math

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l2o_graph.models.ng_t import NGTLayer


def noisy(module: nn.Module) -> nn.Module:
    """In float64, with no weight left at zero or one."""
    for p in module.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return module.double()


def normalised(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.sum() / len(x)
    deviation = (centred.square().sum() / len(x) + 1e-5).sqrt()
    return centred / deviation * norm.weight + norm.bias


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def post_norm(post, x: Tensor, update: Tensor) -> Tensor:
    x = normalised(post.norm, x + update)
    first, _, last = post.ffn
    return normalised(post.ffn_norm, x + last.weight @ gelu(first.weight @ x) + last.bias)


def slow_layer(layer: NGTLayer, nodes, pairs, states, all_pairs: bool):
    """One layer, a pair (source, target) and a head at a time."""
    of_query, of_key, of_value = layer.node.of_node.weight.chunk(3)
    edge_query, edge_key, edge_scale, edge_value = layer.node.of_edge.weight.chunk(4)
    zero = layer.node.of_edge.weight.new_zeros(layer.node.of_edge.in_features)
    heads, channels = layer.node.heads, len(of_query)
    next_nodes = []
    for i, x in enumerate(nodes):
        met = [(j, e) for (j, target), e in zip(pairs, states, strict=True) if target == i]
        met.append((i, zero))
        neighbours = {j for j, _ in met}
        met += [(j, zero) for j in range(len(nodes)) if all_pairs and j not in neighbours]
        read = []
        for h in range(heads):
            of_head = slice(h * channels // heads, (h + 1) * channels // heads)
            masses, carried = [], []
            for j, e in met:
                query = of_query @ x + edge_query @ e
                key = of_key @ nodes[j] + edge_key @ e
                value = (layer.node.plain + edge_scale @ e) * (of_value @ nodes[j]) + edge_value @ e
                score = query[of_head] @ key[of_head] / math.sqrt(channels)
                masses.append(score.exp())
                carried.append(score.exp() * value[of_head])
            read.append(sum(carried) / sum(masses))
        update = torch.cat(read)
        for linear in layer.node.out:
            update = linear.weight @ update + linear.bias
        next_nodes.append(post_norm(layer.node.post, x, update))

    edge, next_states = layer.edge, []
    if edge is None:
        return next_nodes, states
    for n, ((j, i), e) in enumerate(zip(pairs, states, strict=True)):
        reverse = states[(n + len(pairs) // 2) % len(pairs)]
        hidden = edge.edge.weight @ torch.cat([e, reverse]) + edge.edge.bias
        hidden = hidden + edge.source.weight @ next_nodes[j] + edge.source.bias
        hidden = hidden + edge.target.weight @ next_nodes[i] + edge.target.bias
        if edge.row is not None:
            leaving = [s for s, (source, _) in zip(states, pairs, strict=True) if source == j]
            leading = [s for s, (_, target) in zip(states, pairs, strict=True) if target == i]
            hidden = hidden + edge.column.weight @ (sum(leaving) / len(leaving))
            hidden = hidden + edge.row.weight @ (sum(leading) / len(leading))
        next_states.append(post_norm(edge.post, e, edge.out.weight @ gelu(hidden) + edge.out.bias))
    return next_nodes, next_states


class LargestTensor(TorchDispatchMode):
    """Notes the most entries that the result of any operation has."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.entries = max(self.entries, x.untyped_storage().nbytes() // x.itemsize)
        return result
