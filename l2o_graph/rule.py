"""A learned optimizer's network: embedding, NG-GNN, head and what two numbers mean as a step."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.graph import Piece, Topology
from l2o_graph.heads.per_parameter import PaperHead, PerParameterHead
from l2o_graph.heads.per_tensor import PerTensorHead
from l2o_graph.models.embedding import OffsetEmbedding, PaddedEmbedding, Part, Scalars
from l2o_graph.models.ng_gnn import NGGNN, Chunk
from l2o_graph.observation import (
    NOMINAL_ROW,
    NUM_FEATURES,
    SLOWEST_SIGN_ROW,
    Observation,
    scalars_of,
)

# First step sizes, relative to 1 / sqrt(fan_in) for kernels and absolute for all else, and the
# steps after which they have halved: what the nominal step alone did best with on FashionMNIST.
# 1 / t needs no horizon: whenever training stops, the steps before were small.
KERNEL_STEP = 0.1
VECTOR_STEP = 0.01
HALVED_AFTER = 200

# Entries of RMS 1 that all agree make a matrix whose norm is far above the nominal step's, and a
# first-order meta-gradient does not see what that does. A tenth cannot outweigh the nominal step.
DIRECTION_GAIN = 0.1

# The learned factor of a step lies between 1 / e and e.
MOST_LOG_FACTOR = 1.0


@dataclass(frozen=True, slots=True)
class RuleConfig:
    """What a learned optimizer is made of; stored in the header of its checkpoint.

    Attributes:
        preset: "nominal", a learned correction of a normalised step, or "paper", the network,
            the sizes and the update of Kofinas et al. 2024.
        hidden: Channels of nodes and edges.
        layers: Rounds of messages.
        inner: Channels of the two maps that run on every single parameter.
    """

    preset: Literal["nominal", "paper"] = "nominal"
    hidden: int = 16
    layers: int = 2
    inner: int = 8

    def __post_init__(self):
        if self.preset not in ("nominal", "paper"):
            raise ValueError(f"preset: expected 'nominal' or 'paper', found {self.preset!r}")
        for name in ("hidden", "layers", "inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")


PAPER = RuleConfig("paper", hidden=64, layers=8, inner=64)


class UpdateRule(nn.Module):
    """Features of a network in training -> its updates.

    Under the preset "nominal", with direction d and magnitude m of a parameter and length l of
    its tensor::

        update = -step * exp(l + tanh(m)) * (nominal + 0.1 tanh(d))

    where ``nominal`` has an RMS of 1 over its tensor and ``step`` is s / (1 + age / 200), with
    s = 0.1 / sqrt(fan_in) for kernels and 0.01 for all other parameters. With the heads at their
    zero start this is Muon with a step size that falls as 1 / t. No output can grow without
    bound, and a parameter that never had a gradient does not move. Under "paper" the update is
    0.01 d exp(0.01 m).
    """

    def __init__(self, config: RuleConfig):
        super().__init__()
        self.config = config
        hidden, inner = config.hidden, config.inner
        self.backbone = NGGNN(hidden, config.layers)
        if config.preset == "paper":
            self.embedding = PaddedEmbedding(hidden)
            self.of_edge = ForwardEdges(*_two_layers(hidden))
            self.of_node = nn.Sequential(*_two_layers(hidden))
            self.head = PaperHead(hidden, inner, config.layers)
        else:
            self.embedding = OffsetEmbedding(NUM_FEATURES, hidden, inner)
            self.of_edge, self.of_node = BothEdges(hidden), nn.Linear(hidden, hidden)
            self.head = PerParameterHead(NUM_FEATURES, hidden, inner)
            self.length = PerTensorHead()

    def forward(
        self, topology: Topology, observations: Sequence[Observation], chunk_size: int
    ) -> Iterator[tuple[Part, Float[Tensor, " n"]]]:
        """Updates of all parameters, in runs of at most ``chunk_size`` scalars, a row or a bias.

        Args:
            topology: Where everything lies.
            observations: One for each parameter.
            chunk_size: Scalars worked on at once.

        Returns:
            One after the other, a run of scalars and what is to be added to it.
        """
        if self.config.preset == "paper":
            return self._answers(topology, observations, chunk_size)
        lengths = self.length(torch.stack([o.shared for o in observations]))
        steps = _nominal_steps(observations) * lengths.exp()
        answers = self._answers(topology, observations, chunk_size)
        return ((part, answer * steps[part.parameter]) for part, answer in answers)

    def _answers(
        self, topology: Topology, observations: Sequence[Observation], chunk_size: int
    ) -> Iterator[tuple[Part, Tensor]]:
        """Updates, under "nominal" in units of the tensor's step."""
        spec = topology.spec
        chunks = topology.chunks(chunk_size)
        hold = cache if len(chunks) == 1 else _recompute

        @hold
        def kernels(chunk: Chunk) -> Scalars:
            return scalars_of(observations, [_rows(topology, observations, p) for p in chunk])

        def first_edges(chunk: Chunk) -> Tensor:
            return self.embedding.edges(kernels(chunk))

        whole = [(b.parameter, 0, len(observations[b.parameter].weight)) for b in spec.biases]
        biases = scalars_of(observations, [_run(observations, *run) for run in whole])
        nodes = self.embedding.nodes(topology, biases)
        if chunks:
            nodes, edges = self.backbone(topology, chunks, nodes, first_edges)
            for chunk in chunks:
                yield from self._steps(kernels(chunk), self.of_edge(edges(chunk)))
        if spec.biases:
            context = torch.cat([nodes[topology.nodes(b.neurons)] for b in spec.biases])
            yield from self._steps(biases, self.of_node(context))
        for i in spec.loose:
            for start in range(0, len(observations[i].weight), chunk_size):
                stop = min(start + chunk_size, len(observations[i].weight))
                alone = scalars_of(observations, [_run(observations, i, start, stop)])
                # No neuron, no state: the features have to do.
                context = nodes.new_zeros(stop - start, self.config.hidden)
                yield from self._steps(alone, context)

    def _steps(self, scalars: Scalars, context: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """What the head answers, as updates."""
        direction, magnitude = self.head(scalars, context)
        if self.config.preset == "paper":
            answer = 0.01 * direction * (0.01 * magnitude).exp()
        else:
            factor = (MOST_LOG_FACTOR * (magnitude / MOST_LOG_FACTOR).tanh()).exp()
            # A momentum is zero only where there never was a gradient.
            ever = scalars.x[SLOWEST_SIGN_ROW] != 0
            correction = DIRECTION_GAIN * direction.tanh()
            answer = -factor * (scalars.x[NOMINAL_ROW] + correction) * ever
        runs = answer.split([part.stop - part.start for part in scalars.parts])
        yield from zip(scalars.parts, runs, strict=True)

    def of_length(self) -> list[nn.Parameter]:
        """The weights that say how long the steps of a tensor are; none under "paper"."""
        return [p for name, p in self.named_parameters() if name.startswith("length.")]

    def of_direction(self) -> list[nn.Parameter]:
        """All other weights."""
        return [p for name, p in self.named_parameters() if not name.startswith("length.")]


def _nominal_steps(observations: Sequence[Observation]) -> Float[Tensor, " N"]:
    """The size of each parameter's nominal step."""
    ages = torch.stack([o.age for o in observations])
    first = [KERNEL_STEP / math.sqrt(o.fan_in) if o.out else VECTOR_STEP for o in observations]
    return ages.new_tensor(first) / (1 + ages / HALVED_AFTER)


def untrained(config: RuleConfig, seed: int) -> UpdateRule:
    """A rule whose weights follow from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UpdateRule(config)


def uncorrected(rule: UpdateRule) -> UpdateRule:
    """The same rule with its per-parameter head at zero: the nominal direction alone."""
    plain = copy.deepcopy(rule)
    for p in plain.head.parameters():
        p.detach().zero_()
    return plain


class ForwardEdges(nn.Sequential):
    """The paper's readout of edges: a small network on the forward state, the reverse unread."""

    def forward(self, input: Float[Tensor, "2 E H"]) -> Float[Tensor, "E H"]:
        """Map the forward states."""
        return super().forward(input[0])


class BothEdges(nn.Module):
    """A linear map of an edge's forward and reverse states together."""

    def __init__(self, hidden: int):
        super().__init__()
        self.map = nn.Linear(2 * hidden, hidden)

    def forward(self, edges: Float[Tensor, "2 E H"]) -> Float[Tensor, "E H"]:
        """Map the two states of each edge."""
        of_forward, of_reverse = self.map.weight.chunk(2, dim=1)
        forward = torch.addmm(self.map.bias, edges[0], of_forward.T)
        return torch.addmm(forward, edges[1], of_reverse.T)


def _two_layers(hidden: int) -> list[nn.Module]:
    return [nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden)]


def _rows(topology: Topology, observations: Sequence[Observation], piece: Piece) -> Part:
    """The scalars of a piece of a kernel."""
    kernel = topology.spec.kernels[piece.kernel]
    observed = observations[kernel.parameter]
    start, stop = piece.start * observed.fan_in, piece.stop * observed.fan_in
    return Part(kernel.parameter, start, stop, kernel.positions, observed.shared)


def _run(observations: Sequence[Observation], i: int, start: int, stop: int) -> Part:
    """Scalars without positions."""
    return Part(i, start, stop, (), observations[i].shared)


def _recompute(scalars: Callable[[Chunk], Scalars]) -> Callable[[Chunk], Scalars]:
    return scalars
