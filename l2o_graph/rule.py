"""A learned optimizer's network: a reader, two heads, and what their numbers mean as a step."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.architecture import NetSpec
from l2o_graph.graph import Piece, Topology
from l2o_graph.heads.per_parameter import PaperHead, PerParameterHead
from l2o_graph.heads.per_tensor import PerTensorHead
from l2o_graph.models.embedding import Part, Scalars
from l2o_graph.models.ng_gnn import kept_if
from l2o_graph.observation import (
    NOMINAL_ROW,
    NUM_FEATURES,
    SLOWEST_ROW,
    Observation,
    scalars_of,
)
from l2o_graph.readers import Group, reader_of

# First step sizes, relative to 1 / sqrt(fan_in) for kernels and absolute for all else, and the
# steps after which they have halved: what the nominal step alone did best with on FashionMNIST.
# 1 / t needs no horizon: whenever training stops, the steps before were small.
KERNEL_STEP = 0.1
VECTOR_STEP = 0.01
HALVED_AFTER = 200

# Entries of RMS 1 that all agree make a matrix whose norm is far above the nominal step's, and a
# first-order meta-gradient does not see what that does. A tenth cannot outweigh the nominal step.
DIRECTION_GAIN = 0.1

# A parameter's slowest momentum over its tensor's: where no more than that came, nothing moves.
NEVER = 1e-4

# The learned factor of a parameter's step lies between 1 / e and e.
MOST_LOG_FACTOR = 1.0

Model = Literal["ng_gnn", "ng_t", "nfn", "lstm", "ff"]
Preset = Literal["nominal", "paper"]
Direction = Literal["orthogonal", "squashed"]


@dataclass(frozen=True, slots=True)
class RuleConfig:
    """What a learned optimizer is made of; stored in the header of its checkpoint.

    Attributes:
        preset: "nominal", a learned correction of a normalised step, or "paper", the network,
            the sizes and the update of Kofinas et al. 2024.
        hidden: Channels of what reads the network.
        layers: Rounds of messages.
        inner: Channels of the two maps that run on every single parameter.
        model: What reads the network: see ``readers``.
        direction: The nominal direction of a kernel: its momentum made "orthogonal", which takes
            the whole matrix, or "squashed", each parameter by itself.
        activations: Whether a graph's nodes have a row of their activation; they are told where
            a network's computation was followed.
    """

    preset: Preset = "nominal"
    hidden: int = 16
    layers: int = 2
    inner: int = 8
    model: Model = "ng_gnn"
    direction: Direction = "orthogonal"
    activations: bool = False

    def __post_init__(self):
        for name, known in (("preset", Preset), ("model", Model), ("direction", Direction)):
            if getattr(self, name) not in get_args(known):
                expected = " or ".join(map(repr, get_args(known)))
                raise ValueError(f"{name}: expected {expected}, found {getattr(self, name)!r}")
        for name in ("hidden", "layers", "inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.activations and (self.preset == "paper" or self.model in ("lstm", "ff")):
            raise ValueError(
                "activations: expected a model that reads the graph, under the preset 'nominal', "
                f"found '{self.model}' under '{self.preset}'"
            )


# Sizes of Kofinas et al. 2024 (their supplement; NFN's are not given there).
PAPER: dict[Model, RuleConfig] = {
    "ng_gnn": RuleConfig("paper", hidden=64, layers=8, inner=64, model="ng_gnn"),
    "ng_t": RuleConfig("paper", hidden=32, layers=2, inner=32, model="ng_t"),
    "nfn": RuleConfig("paper", hidden=32, layers=3, inner=32, model="nfn"),
    "lstm": RuleConfig("paper", hidden=32, layers=1, inner=32, model="lstm"),
    "ff": RuleConfig("paper", hidden=64, layers=2, inner=64, model="ff"),
}


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
        self.is_paper = config.preset == "paper"
        self.orthogonal = config.direction == "orthogonal" and not self.is_paper
        self.reader = reader_of(
            config.model, config.preset, config.hidden, config.layers, config.inner,
            config.activations,
        )  # fmt: skip
        state = self.reader.size
        if self.is_paper:
            self.head = PaperHead(state, config.inner, config.layers)
        else:
            self.head = PerParameterHead(NUM_FEATURES, state, config.inner)
            self.length = PerTensorHead()

    def forward(
        self, topology: Topology, observations: Sequence[Observation], chunk_size: int
    ) -> Iterator[tuple[Part, Float[Tensor, " n"]]]:
        """Updates of all parameters, in runs of at most ``chunk_size`` scalars, a row or a bias.

        Args:
            topology: Where everything lies.
            observations: One for each parameter.
            chunk_size: Scalars worked on at once.

        Yields:
            A run of scalars and what is to be added to it.
        """
        groups = _groups(topology, observations, chunk_size)

        # Needed twice, before the graph is read and after: kept where a single chunk is all.
        @kept_if(sum(bool(g.chunk) for g in groups) <= 1)
        def of_graph(group: Group) -> Scalars:
            return scalars_of(observations, group.parts)

        def features(group: Group) -> Scalars:
            loose = not (group.chunk or group.biases)
            return scalars_of(observations, group.parts) if loose else of_graph(group)

        states = self.reader(topology, groups, features)
        steps = None if self.is_paper else self._steps(observations)
        for group in groups:
            answer = self._answer(features(group), states(group))
            runs = answer.split([part.stop - part.start for part in group.parts])
            for part, run in zip(group.parts, runs, strict=True):
                if part.read_only:
                    continue
                yield part, run if steps is None else run * steps[part.parameter]

    def _answer(self, scalars: Scalars, states: Tensor) -> Float[Tensor, " n"]:
        """What the head makes of some scalars; under "nominal" in units of the tensor's step."""
        direction, magnitude = self.head(scalars, states)
        if self.is_paper:
            return 0.01 * direction * (0.01 * magnitude).exp()
        factor = (MOST_LOG_FACTOR * (magnitude / MOST_LOG_FACTOR).tanh()).exp()
        # 0 where there never was a gradient, and next to 0 where it was a rounding error.
        squared = scalars.x[SLOWEST_ROW].square()
        ever = squared / (squared + NEVER * NEVER)
        return -factor * (scalars.x[NOMINAL_ROW] + DIRECTION_GAIN * direction.tanh()) * ever

    def _steps(self, observations: Sequence[Observation]) -> Float[Tensor, " N"]:
        """The size of each parameter's step."""
        ages = torch.stack([o.age for o in observations])
        first = [
            KERNEL_STEP / math.sqrt(o.fan_in) if o.fan_in else VECTOR_STEP for o in observations
        ]
        lengths = self.length(torch.stack([o.shared for o in observations]))
        return ages.new_tensor(first) / (1 + ages / HALVED_AFTER) * lengths.exp()

    def of_length(self) -> list[nn.Parameter]:
        """The weights that say how long the steps of a tensor are; none under "paper"."""
        return [p for name, p in self.named_parameters() if name.startswith("length.")]

    def of_direction(self) -> list[nn.Parameter]:
        """All other weights."""
        return [p for name, p in self.named_parameters() if not name.startswith("length.")]


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


def _groups(
    topology: Topology, observations: Sequence[Observation], chunk_size: int
) -> list[Group]:
    """All scalars of all parameters: kernels in chunks, the biases, then what is loose."""
    spec, groups = topology.spec, []
    for chunk in topology.chunks(chunk_size):
        groups.append(Group(tuple(_of_piece(observations, spec, p) for p in chunk), chunk))
    if spec.biases:
        parts = [
            _run(observations, b.parameter, b.start, b.start + b.size, b.again) for b in spec.biases
        ]
        groups.append(Group(tuple(parts), biases=True))
    for i in spec.loose:
        for start in range(0, len(observations[i].weight), chunk_size):
            stop = min(start + chunk_size, len(observations[i].weight))
            groups.append(Group((_run(observations, i, start, stop),)))
    return groups


def _of_piece(observations: Sequence[Observation], spec: NetSpec, piece: Piece) -> Part:
    """The scalars of a piece of a kernel."""
    i = piece.parameter
    fixed = piece.again or spec.is_constant(i)
    return Part(i, piece.start, piece.stop, piece.positions, observations[i].shared, fixed)


def _run(
    observations: Sequence[Observation], i: int, start: int, stop: int, again: bool = False
) -> Part:
    """Scalars without positions."""
    return Part(i, start, stop, (), observations[i].shared, again)
