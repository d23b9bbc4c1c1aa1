"""The update rule of Kofinas et al. 2024: a reader, a head, and updates from its outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.blocks import Topology
from l2o_graph.layout.spec import NetSpec
from l2o_graph.models.mlp import linear_maps
from l2o_graph.paper.features import NUM_FEATURES, Scalars, Span, scalars_of
from l2o_graph.paper.readers import REGISTERED, WorkItem, reader_of
from l2o_graph.ranges import COUNT, check_choices, check_ranges

# Factor of an update, and of the logarithm of its magnitude.
STEP, LOG_MAGNITUDE = 0.01, 0.01

Model = Literal["ng_gnn", "ng_t", "nfn", "lstm", "ff"]


@dataclass(frozen=True, slots=True)
class RuleConfig:
    """Configuration of a rule, stored in the header of its checkpoint.

    Attributes:
        model: Reader: "ng_gnn", "ng_t", "nfn", "lstm", "ff" or the name of a registered one.
        hidden: Number of channels of the reader.
        layers: Number of layers of the reader, and of hidden layers of the head.
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
    """The paper's head: ``layers`` hidden layers on 14 features and the cell's state."""

    def __init__(self, context: int = 64, hidden: int = 64, layers: int = 8):
        super().__init__()
        maps = linear_maps(NUM_FEATURES + context, hidden, layers)
        self.layers = nn.Sequential(*maps, nn.ReLU(), nn.Linear(hidden, 2))

    def forward(
        self, scalars: Scalars, context: Float[Tensor, "cells H"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Compute direction and magnitude of each scalar."""
        of_parts = context.split([part.cells for part in scalars.parts])
        copies = [
            own.repeat_interleave(math.prod(part.positions), dim=0)
            for part, own in zip(scalars.parts, of_parts, strict=True)
        ]
        features = torch.cat([scalars.x.T, torch.cat(copies)], dim=1)
        direction, magnitude = self.layers(features).T
        return direction, magnitude


class UpdateRule(nn.Module):
    """Update rule: maps features of a network in training to its updates.

    The update of a scalar with direction d and magnitude m is 0.01 d exp(0.01 m).

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
        self, topology: Topology, raw: Sequence[Float[Tensor, "R _"]]
    ) -> dict[int, list[Float[Tensor, " _"]]]:
        """Compute the update of each parameter, as a list of consecutive parts.

        ``raw`` is that of all parameters, see ``raw_numbers``; read-only parts have no update.
        """
        groups = _groups(topology.spec, [row.shape[1] for row in raw])

        @cache  # used by the reader and by the head
        def features(group: WorkItem) -> Scalars:
            return scalars_of(raw, group.parts)

        states = self.reader(topology, groups, features)
        answer: dict[int, list[Tensor]] = {}
        for group in groups:
            direction, magnitude = self.head(features(group), states(group))
            updates = STEP * direction * (LOG_MAGNITUDE * magnitude).exp()
            runs = updates.split([part.size for part in group.parts])
            for part, run in zip(group.parts, runs, strict=True):
                if not part.read_only:
                    answer.setdefault(part.parameter, []).append(run)
        return answer


def untrained(config: RuleConfig, seed: int) -> UpdateRule:
    """Create a rule with random weights, determined by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UpdateRule(config)


def _groups(spec: NetSpec, sizes: Sequence[int]) -> list[WorkItem]:
    """Group all scalars of all parameters: kernels, biases, then each loose parameter."""
    kernels = [
        Span(k.parameter, k.start, k.start + k.size, k.positions,
             k.again or spec.is_constant(k.parameter))
        for k in spec.kernels
    ]  # fmt: skip
    biases = [Span(b.parameter, b.start, b.start + b.size, (), b.again) for b in spec.biases]
    loose = [WorkItem((Span(i, 0, sizes[i], ()),), "nothing") for i in spec.loose]
    groups = [WorkItem(tuple(kernels), "edges"), WorkItem(tuple(biases), "nodes"), *loose]
    return [group for group in groups if group.parts]
