"""The learned optimizer of Kofinas et al. 2024: a reader, a head, and its numbers as a step."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.blocks import KernelBlock, Topology
from l2o_graph.layout.edges import cached_if
from l2o_graph.layout.spec import NetSpec
from l2o_graph.paper.features import NUM_FEATURES, ParameterView, Scalars, Span, scalars_of
from l2o_graph.paper.readers import REGISTERED, WorkItem, reader_of
from l2o_graph.ranges import COUNT, check_choices, check_ranges

# Factor of a step, and of the logarithm of its magnitude.
STEP, LOG_MAGNITUDE = 0.01, 0.01

Model = Literal["ng_gnn", "ng_t", "nfn", "lstm", "ff"]


@dataclass(frozen=True, slots=True)
class RuleConfig:
    """What a rule is made of; stored in the header of its checkpoint.

    Attributes:
        model: What reads the network, "ng_gnn", "ng_t", "nfn", "lstm", "ff" or the name of a
            registered reader.
        hidden: Number of channels of what reads the network.
        layers: Number of layers of messages, and of hidden layers of the head.
        inner: Number of channels of the head.
    """

    model: str = "ng_gnn"
    hidden: int = 64
    layers: int = 8
    inner: int = 64

    def __post_init__(self):
        check_choices(self, model=(*get_args(Model), *REGISTERED))
        check_ranges(self, hidden=COUNT, layers=COUNT, inner=COUNT)


# Sizes of Kofinas et al. 2024 (their supplement; NFN's are not given there).
PAPER: dict[Model, RuleConfig] = {
    "ng_gnn": RuleConfig("ng_gnn", hidden=64, layers=8, inner=64),
    "ng_t": RuleConfig("ng_t", hidden=32, layers=2, inner=32),
    "nfn": RuleConfig("nfn", hidden=32, layers=3, inner=32),
    "lstm": RuleConfig("lstm", hidden=32, layers=1, inner=32),
    "ff": RuleConfig("ff", hidden=64, layers=2, inner=64),
}


class PaperHead(nn.Module):
    """The paper's head: ``layers`` hidden layers on 14 features and a copy of the cell's state."""

    def __init__(self, context: int = 64, hidden: int = 64, layers: int = 8):
        super().__init__()
        widths = [NUM_FEATURES + context, *[hidden] * layers]
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            parts += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*parts, nn.Linear(hidden, 2))

    def forward(
        self, scalars: Scalars, context: Float[Tensor, "cells H"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Direction and magnitude of each scalar."""
        copies, cell = [], 0
        for part in scalars.parts:
            positions = math.prod(part.positions)
            cells = (part.stop - part.start) // positions
            copies.append(context[cell : cell + cells].repeat_interleave(positions, dim=0))
            cell += cells
        features = torch.cat([scalars.x.T, torch.cat(copies)], dim=1)
        direction, magnitude = self.layers(features).T
        return direction, magnitude


class UpdateRule(nn.Module):
    """Features of a network in training -> its updates.

    With direction d and magnitude m of a parameter its update is 0.01 d exp(0.01 m).

    Source:
        Kofinas et al., "Graph Neural Networks for Learning Equivariant Representations of Neural
        Networks", ICLR 2024, section 4.3.
    """

    def __init__(self, config: RuleConfig):
        super().__init__()
        self.config = config
        self.reader = reader_of(config.model, config.hidden, config.layers)
        self.head = PaperHead(self.reader.size, config.inner, config.layers)

    def forward(
        self, topology: Topology, observations: Sequence[ParameterView], chunk_size: int
    ) -> Iterator[tuple[Span, Float[Tensor, " n"]]]:
        """Updates of all parameters, in runs of at most ``chunk_size`` scalars, a row or a bias.

        Yields:
            A run of scalars and what is to be added to it.
        """
        groups = _groups(topology, observations, chunk_size)

        # Needed twice, before the graph is read and after: kept where a single chunk is all.
        @cached_if(sum(bool(g.chunk) for g in groups) <= 1)
        def of_graph(group: WorkItem) -> Scalars:
            return scalars_of(observations, group.parts)

        def features(group: WorkItem) -> Scalars:
            loose = not (group.chunk or group.biases)
            return scalars_of(observations, group.parts) if loose else of_graph(group)

        states = self.reader(topology, groups, features)
        for group in groups:
            direction, magnitude = self.head(features(group), states(group))
            answer = STEP * direction * (LOG_MAGNITUDE * magnitude).exp()
            runs = answer.split([part.stop - part.start for part in group.parts])
            for part, run in zip(group.parts, runs, strict=True):
                if not part.read_only:
                    yield part, run


def untrained(config: RuleConfig, seed: int) -> UpdateRule:
    """A rule whose weights follow from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UpdateRule(config)


def _groups(
    topology: Topology, observations: Sequence[ParameterView], chunk_size: int
) -> list[WorkItem]:
    """All scalars of all parameters: kernels in chunks, the biases, then what is loose."""
    spec, groups = topology.spec, []
    for chunk in topology.chunks(chunk_size):
        groups.append(WorkItem(tuple(_span_of(spec, block) for block in chunk), chunk))
    if spec.biases:
        parts = [Span(b.parameter, b.start, b.start + b.size, (), b.again) for b in spec.biases]
        groups.append(WorkItem(tuple(parts), biases=True))
    for i in spec.loose:
        for start in range(0, len(observations[i].weight), chunk_size):
            stop = min(start + chunk_size, len(observations[i].weight))
            groups.append(WorkItem((Span(i, start, stop, ()),)))
    return groups


def _span_of(spec: NetSpec, block: KernelBlock) -> Span:
    """The scalars of a block of a kernel."""
    fixed = block.again or spec.is_constant(block.parameter)
    return Span(block.parameter, block.start, block.stop, block.positions, fixed)
