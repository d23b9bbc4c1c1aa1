"""NG-GNN on INRs as n x n matrices: the classifier again, in the layout of the released code.

Every pair of nodes has a place, joined or not. Weights are those of an ``INRClassifier``; the
rest is written out once more: a slow twin for values and gradients, and what the throughput of
the block layout is measured against.

    python tests/support/dense_twin.py --threads 2 --batch 32
"""

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn

from l2o_graph.inr import INRClassifier, initialise, inr_config, statistics_of


def matrices(weights, biases) -> tuple[Tensor, Tensor]:
    """Weights (I, n, n) from source to target, and biases (I, n)."""
    layout = [weights[0].shape[2], *(bias.shape[1] for bias in biases)]
    starts = [0, *itertools.accumulate(layout)]
    edges = weights[0].new_zeros(len(weights[0]), starts[-1], starts[-1])
    nodes = weights[0].new_zeros(len(weights[0]), starts[-1])
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        sources = slice(starts[layer], starts[layer + 1])
        targets = slice(starts[layer + 1], starts[layer + 2])
        edges[:, sources, targets] = weight.mT
        nodes[:, targets] = bias
    return edges, nodes


def joined(layout, reverse: bool) -> Tensor:
    """(n, n) which pairs (source, target) messages take: edges, with ``reverse`` both ways."""
    ones = [torch.ones(1, target, source) for source, target in itertools.pairwise(layout)]
    forward, _ = matrices(ones, [torch.ones(1, n) for n in layout[1:]])
    return (forward[0] + reverse * forward[0].T) > 0


def normalised(model: INRClassifier, weights, biases):
    s = model.statistics
    return (
        [(w - s.weight_mean[i]) / s.weight_std[i] for i, w in enumerate(weights)],
        [(b - s.bias_mean[i]) / s.bias_std[i] for i, b in enumerate(biases)],
    )


def fourier(features, x: Tensor) -> Tensor:
    if features.frequencies is None:
        return x
    angles = 2 * math.pi * x @ features.frequencies.T
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def positions(layout) -> list[int]:
    """The row of the table of each node."""
    rows = list(range(layout[0]))
    for size in layout[1:-1]:
        rows += [rows[-1] + 1] * size
    return rows + [rows[-1] + 1 + i for i in range(layout[-1])]


def probed(model: INRClassifier, weights, biases) -> list[Tensor]:
    """(I, d, M) what inputs and neurons say."""
    said = [model.probes.expand(len(weights[0]), -1, -1)]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        linear = weight @ said[-1] + bias[..., None]
        last = i == len(weights) - 1
        said.append(linear + 0.5 if last else torch.sin(model.config.omega0 * linear))
    return said


def aggregates(messages: Tensor, mask: Tensor) -> Tensor:
    """(I, n, n, H) from source to target -> (I, n, 4H): mean, least, most and deviation."""
    m, there = messages, mask[..., None]
    count = there.sum(0).clamp(min=1).to(m)
    mean = (m * there).sum(1) / count
    square = (m * m * there).sum(1) / count
    variance = square - mean * mean
    alive = variance > 1e-5
    deviation = torch.where(alive, torch.where(alive, variance, 1.0).sqrt(), 0.0)
    alone = ~there.any(0)
    low = m.masked_fill(~there, math.inf).amin(1).masked_fill(alone, 0)
    high = m.masked_fill(~there, -math.inf).amax(1).masked_fill(alone, 0)
    return torch.cat([mean, low, high, deviation], dim=-1)


def pairs(target_term: Tensor, source_term: Tensor) -> Tensor:
    """(I, n, n, H): a row for each source, a column for each target."""
    return target_term[:, None, :] + source_term[:, :, None]


def logits(model: INRClassifier, weights, biases) -> Tensor:
    """What an NG-GNN classifier answers, in evaluation or without dropout."""
    config, body = model.config, model.body
    mask = joined(config.layout, config.reverse)
    said = probed(model, weights, biases) if config.probes else []
    edges, nodes = matrices(*normalised(model, weights, biases))
    x, back = edges[..., None], edges.mT[..., None]
    if config.reverse:
        x = torch.cat([x, back, x + back], dim=-1)
    e = body.edges.second(body.edges.first(fourier(body.edges.features, x)))
    v = body.nodes.first(fourier(body.nodes.features, nodes[..., None]))
    if said:
        v = v + torch.cat([p(r) for p, r in zip(body.nodes.probes, said, strict=True)], dim=1)
    v = body.nodes.second(v)
    if body.nodes.table is not None:
        v = v + body.nodes.table[positions(config.layout)]
    silu = nn.functional.silu
    degree = mask.sum(0)
    log_degree = (degree + 1).to(v).log()
    for layer, norm in itertools.zip_longest(body.backbone.layers, body.backbone.norms):
        scale, shift = layer.film(e).chunk(2, dim=-1)
        n = v.shape[1]
        both = torch.cat(
            [v[:, None].expand(-1, n, -1, -1), v[:, :, None].expand(-1, -1, n, -1)], -1
        )
        a = aggregates(scale * layer.message(both) + shift, mask)
        amplified = a * (log_degree / log_degree.mean())[:, None]
        v = layer.mix(layer.node(torch.cat([v, a, amplified], dim=-1)))
        if norm is None:
            break
        centred = v - v.mean((1, 2), keepdim=True)
        v = centred / (centred.square().mean((1, 2), keepdim=True).sqrt() + 1e-5)
        v = silu(v * norm.weight + norm.bias)
        e = layer.out(silu(layer.edge(e) + pairs(layer.target(v), layer.source(v))))
    return body.head.maps(v[:, -config.layout[-1] :].flatten(1))


def throughput(batch: int, hidden: int = 64, rounds: int = 5) -> tuple[float, float]:
    """INRs a second, forward and backward: in blocks, and as matrices; by turns."""
    generators = [torch.Generator().manual_seed(i) for i in range(batch)]
    networks = initialise(generators, output="linear")
    config = inr_config("ng_gnn", hidden=hidden, dropout=0.0)
    model = INRClassifier(config, statistics_of(*networks))
    labels = torch.zeros(batch, dtype=torch.long)
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):  # the first does not count
        for answer, times in zip((model, lambda w, b: logits(model, w, b)), seconds, strict=True):
            model.zero_grad()
            begin = time.perf_counter()
            nn.functional.cross_entropy(answer(*networks), labels).backward()
            if turn:
                times.append(time.perf_counter() - begin)
    blocks, dense = (batch / median(times) for times in seconds)
    return blocks, dense


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    blocks, dense = throughput(args.batch, args.hidden, args.rounds)
    print(f"blocks {blocks:.1f} INRs/s, n x n {dense:.1f} INRs/s: {blocks / dense:.2f} times")


if __name__ == "__main__":
    main()
