"""The ordered pass on INRs, with a second, backward pass for editing."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.metanets.heads import answers_first
from l2o_graph.metanets.inr_config import INRModelConfig
from l2o_graph.metanets.probes import probe_outputs
from l2o_graph.models.fourier import FourierFeatures
from l2o_graph.models.mlp import linear_maps, mlp
from l2o_graph.models.ordered import OrderedStep

FREQUENCIES = 16  # of a number's Fourier features
RANK = 32  # rank of the part of a delta that is a product of factors of two neurons
EDGE = 32  # hidden channels of the part that is computed for each edge


class Numbers(nn.Module):
    """Features [x, cos(2 pi f x), sin(2 pi f x)] of a number x.

    Args:
        sigma: Standard deviation of the frequencies f; with 0 there are none.
    """

    def __init__(self, sigma: float):
        super().__init__()
        self.waves = FourierFeatures(1, sigma, FREQUENCIES) if sigma else None
        self.size = 1 + (self.waves.size if self.waves else 0)

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n size"]:
        """Compute the features of each number."""
        x = x[..., None]
        return x if self.waves is None else torch.cat([x, self.waves(x)], -1)


class OrderedBody(nn.Module):
    """Ordered pass from the inputs to the outputs, and a head on the states of the outputs.

    Inputs have learned states. Features of other neurons are those of the bias and, with probes, a
    map of the responses; the head then also reads the outputs at the probes. For editing, a second
    pass goes from the outputs to the inputs over the same edges.
    """

    def __init__(self, config: INRModelConfig):
        super().__init__()
        size, layout, probes = config.hidden, config.layout, config.probes
        self.features = Numbers(config.fourier)
        self.inputs = nn.Parameter(torch.randn(layout[0], size))
        layers = range(len(layout) - 1)
        self.own = nn.ModuleList(nn.Linear(self.features.size, size) for _ in layers)
        self.probes = nn.ModuleList(
            nn.Sequential(nn.Linear(probes, size), nn.LayerNorm(size))
            for _ in (layers if probes else ())
        )
        self.steps = nn.ModuleList(OrderedStep(self.features.size, size) for _ in layers)
        self.drop = nn.Dropout(config.dropout)
        self.back, self.deltas, self.head = None, None, None
        if config.task == "edit":
            self.back = BackwardPass(layout, self.features.size, size)
            self.deltas = nn.ModuleList(
                LayerDeltas(self.features.size, 2 * size, config.answers) for _ in layers
            )
        else:
            inputs = layout[-1] * (size + probes)
            maps = linear_maps(inputs, 2 * size, 2)
            self.head = nn.Sequential(*maps, nn.ReLU(), nn.Linear(2 * size, config.classes))

    def forward(
        self,
        weights: Sequence[Float[Tensor, "I _ _"]],
        biases: Sequence[Float[Tensor, "I _"]],
        responses: Sequence[Float[Tensor, "I _ M"]],
    ) -> Float[Tensor, "I classes"] | tuple[list[Tensor], list[Tensor]]:
        """Compute logits, or a number for each weight and each bias: see ``inr.BODIES``."""
        edges = [self.features(w) for w in weights]
        states = [self.inputs.expand(len(weights[0]), -1, -1)]
        for i, step in enumerate(self.steps):
            own = self.own[i](self.features(biases[i]))
            if self.probes:
                own = own + self.probes[i](responses[i + 1])
            states.append(self.drop(step(edges[i], states[-1], own)))
        if self.head is not None:
            last = states[-1].flatten(1)
            return self.head(torch.cat([last, probe_outputs(responses)], 1) if responses else last)
        assert self.back is not None and self.deltas is not None
        both = self.back(edges, states)
        found = [delta(edges[i], both[i], both[i + 1]) for i, delta in enumerate(self.deltas)]
        return [of_weights for of_weights, _ in found], [of_biases for _, of_biases in found]


class BackwardPass(nn.Module):
    """Ordered pass from the outputs to the inputs.

    Edges have F = ``features``, neurons H = ``size`` channels.
    """

    def __init__(self, layout: Sequence[int], features: int, size: int):
        super().__init__()
        self.outputs = nn.Parameter(torch.randn(layout[-1], size) / 10)
        self.own = nn.ModuleList(nn.Linear(size, size) for _ in layout)
        self.steps = nn.ModuleList(OrderedStep(features, size) for _ in pairwise(layout))

    def forward(
        self, edges: Sequence[Float[Tensor, "I _ _ F"]], states: Sequence[Float[Tensor, "I _ H"]]
    ) -> list[Float[Tensor, "I _ 2*H"]]:
        """Concatenate each layer's states of the forward and of the backward pass."""
        back = [self.own[-1](states[-1]) + self.outputs]
        for i in reversed(range(len(edges))):
            own = self.own[i](states[i])
            back.insert(0, self.steps[i](edges[i].transpose(1, 2), back[0], own))
        return [torch.cat(pair, -1) for pair in zip(states, back, strict=True)]


class LayerDeltas(nn.Module):
    """Head that gives K = ``answers`` numbers for each weight and bias of a layer.

    That of a weight is the sum of a product of factors of its two neurons, a matrix of low rank,
    and the output of a small network for the edge. Edges have F = ``features``, neurons S =
    ``size`` channels.
    """

    def __init__(self, features: int, size: int, answers: int):
        super().__init__()
        self.answers = answers
        self.of_source, self.of_target = (nn.Linear(size, answers * RANK) for _ in range(2))
        self.edge = nn.Linear(features, EDGE)
        self.source, self.target = (nn.Linear(size, EDGE) for _ in range(2))
        self.last = nn.Linear(EDGE, answers)
        self.bias = mlp([size, size // 2, answers])

    def forward(
        self,
        edges: Float[Tensor, "I j i F"],
        sources: Float[Tensor, "I i S"],
        targets: Float[Tensor, "I j S"],
    ) -> tuple[Tensor, Tensor]:
        """Compute numbers of weights, (I, out, in), and biases, (I, out); K > 1 comes first."""
        left = self.of_target(targets).unflatten(-1, (self.answers, RANK))
        right = self.of_source(sources).unflatten(-1, (self.answers, RANK))
        product = torch.einsum("nokr,nikr->noik", left, right) / math.sqrt(RANK)
        hidden = self.edge(edges) + self.target(targets)[:, :, None] + self.source(sources)[:, None]
        of_weights = product + self.last(hidden.relu())
        return answers_first(of_weights), answers_first(self.bias(targets))
