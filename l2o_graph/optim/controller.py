"""Signals of each neuron -> how its step length changes: what is learned.

It is linear, with a memory: changes are sums of signals, and lengths the sums of changes. What
directions are made of, and how weights decay, is learned too, as the same numbers for all.

Weights are plain tensors by name with a leading axis N: one network in use has N = 1, meta-training
has a set of weights for each of the N networks it trains at once.

Axes here: N sets of weights, R rows (neurons, and blocks that have none), T matrices (tensors),
F signals, C channels of messages.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from l2o_graph.optim.blocks import KINDS
from l2o_graph.optim.signals import NUM_SIGNALS
from l2o_graph.ranges import Range, check_ranges

Reader = Literal["none", "messages", "attention", "mean", "sequence"]
Grain = Literal["neuron", "tensor"]

Weights = Mapping[str, Tensor]

# The most that the logarithm of a length changes in a step, and where it stays within.
MOST_CHANGE = 0.2
# What a sum of signals counts in it. Lengths add their changes up, so that a weight that is off by
# a little makes them e times too long; perturbed weights would all but forbid lengths to be long.
CHANGE_UNIT = 0.2
# At most twice the unit: units follow weights, so that steps that are too long feed on themselves.
SHORTEST, LONGEST = -9.0, 0.7
# Lengths start at their unit and tend to it, when nothing speaks against it, over so many steps.
FORGOTTEN_AFTER = 100

# What a direction is a mixture of: the gradient, and its averages of about 10 and 100 steps.
NUM_SOURCES = 3
# Shares of the three before anything is learned.
FIRST_SHARES = (0.1, 0.8, 0.1)
# The power that matrices are whitened with before anything is learned, and the largest.
FIRST_POWER, MOST_POWER = 0.45, 0.6

# What weights shrink by in a step, over the part of their RMS that the step is long, before
# anything is learned; and the logarithm of the most that this is changed by.
FIRST_DECAY, MOST_DECAY_CHANGE = 0.1, 2.5

# What the other weights count: see ``signals.COSINE_UNITS``.
FIRST_LENGTH_UNIT, SHARES_UNIT, POWER_UNIT, DECAY_UNIT = 6.0, 6.0, 6.0, 3.0


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """What a controller is made of; stored in the header of its checkpoint.

    Attributes:
        reader: What neurons know of each other. "none": each row by itself. "messages": what the
            neurons say that they read and are read by, by the weights between them, as in NG-GNN.
            "attention": the same, by what they have to say to each other, as in NG-T. "mean": all
            neurons of the layers before and after alike, as in NFN. "sequence": matrices one
            after the other, as the LSTM baseline.
        grain: What has a step length of its own, each "neuron" or each "tensor".
        channels: Number of channels of a message.
    """

    reader: Reader = "messages"
    grain: Grain = "neuron"
    channels: int = 4

    def __post_init__(self):
        for name, known in (("reader", Reader), ("grain", Grain)):
            if getattr(self, name) not in get_args(known):
                expected = " or ".join(map(repr, get_args(known)))
                raise ValueError(f"{name}: expected {expected}, found {getattr(self, name)!r}")
        check_ranges(self, channels=Range(1, 256, whole=True))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight by name."""
        c = self.channels
        shapes: dict[str, tuple[int, ...]] = {
            "change": (NUM_SIGNALS,),
            "shares": (NUM_SOURCES - 1,),
            "power": (1,),
            "decay": (1,),
            "first_length": (len(KINDS),),
        }
        if self.reader != "none":
            shapes |= {
                "say.weight": (c, NUM_SIGNALS),
                "say.bias": (c,),
                "hear": (2 * c,),
            }
        if self.reader == "sequence":
            shapes |= {
                "cell.input": (4 * 2 * c, c),
                "cell.state": (4 * 2 * c, 2 * c),
                "cell.bias": (4 * 2 * c,),
            }
        if self.reader == "attention":
            shapes |= {
                "ask.weight": (2, c, NUM_SIGNALS),
                "show.weight": (2, c, NUM_SIGNALS),
                "strength": (2,),
            }
        return shapes

    @property
    def size(self) -> int:
        """Number of weights in all."""
        return sum(math.prod(shape) for shape in self.shapes.values())


class Controller(nn.Module):
    """The weights of one controller; the arithmetic is in the functions below.

    Changes are 0 at the start: lengths stay as they begin.
    """

    def __init__(self, config: ControllerConfig):
        super().__init__()
        self.config = config
        for name, shape in config.shapes.items():
            weight = torch.zeros(shape)
            if len(shape) > 1:
                weight.normal_(std=1 / math.sqrt(shape[-1]))
            self.register_parameter(name.replace(".", "_"), nn.Parameter(weight))

    def weights(self) -> dict[str, Tensor]:
        """All weights by name, with an axis N of 1."""
        return {name: getattr(self, name.replace(".", "_"))[None] for name in self.config.shapes}

    def vector(self) -> Tensor:
        """All weights in one vector, in the order of ``config.shapes``."""
        return torch.cat([w.detach().flatten() for w in self.weights().values()])

    def set_vector(self, vector: Tensor) -> None:
        """Take all weights from one vector."""
        for name, weight in weights_from(self.config, vector[None]).items():
            getattr(self, name.replace(".", "_")).data.copy_(weight[0])


def weights_from(config: ControllerConfig, vectors: Tensor) -> dict[str, Tensor]:
    """Weights by name from N vectors (N, size)."""
    parts = vectors.split([math.prod(shape) for shape in config.shapes.values()], dim=1)
    return {
        name: part.unflatten(1, shape)
        for (name, shape), part in zip(config.shapes.items(), parts, strict=True)
    }


@dataclass(frozen=True, slots=True)
class Learned:
    """What N controllers answer whatever they see, found once for many steps, and their weights.

    Attributes:
        config: Their configuration.
        weights: Their weights by name.
        shares: (N, 3) shares of gradient, fast and slow average in a direction.
        power: (N, 1) power that matrices are whitened with.
        decay: (N, 1) what weights shrink by, relative to a length over the RMS of a matrix.
    """

    config: ControllerConfig
    weights: Weights
    shares: Tensor
    power: Tensor
    decay: Tensor

    @staticmethod
    def of(config: ControllerConfig, weights: Weights) -> "Learned":
        """Find them from the weights of N controllers."""
        return Learned(config, weights, shares(weights), power(weights), decay(weights))


def said(weights: Weights, signals: Tensor) -> Tensor:
    """What each row tells its neighbours: (N, R, F) -> (N, R, C), within (-1, 1)."""
    return torch.baddbmm(weights["say.bias"][:, None], signals, weights["say.weight"].mT).tanh()


def change(weights: Weights, signals: Tensor, heard: Tensor | None = None) -> Tensor:
    """What is seen and heard of each row -> the change of its logarithm of a length, (N, R).

    Args:
        weights: Weights of N controllers.
        signals: (N, R, F).
        heard: Messages that reached each row, along and against the computation: (N, R, 2C).
    """
    found = torch.bmm(signals, weights["change"][..., None])
    if heard is not None:
        found = torch.baddbmm(found, heard, weights["hear"][..., None])
    return MOST_CHANGE * (CHANGE_UNIT * found[..., 0]).tanh()


def next_log_length(log_length: Tensor, change: Tensor) -> Tensor:
    """Remembered logarithm of each row's length after a change: (N, R)."""
    return (log_length * (1 - 1 / FORGOTTEN_AFTER) + change).clamp(SHORTEST, LONGEST)


def first_log_length(weights: Weights, kinds: Tensor) -> Tensor:
    """Logarithm of the length that each row begins with, over its unit: (R, 6) -> (N, R)."""
    return FIRST_LENGTH_UNIT * weights["first_length"] @ kinds.T


def shares(weights: Weights) -> Tensor:
    """Shares of gradient, fast and slow average in a direction: (N, 3)."""
    logits = nn.functional.pad(SHARES_UNIT * weights["shares"], (1, 0))
    first = torch.tensor(FIRST_SHARES, dtype=logits.dtype, device=logits.device).log()
    return (logits + first).softmax(-1)


def power(weights: Weights) -> Tensor:
    """Power that matrices are whitened with: (N, 1)."""
    first = math.log(FIRST_POWER / (MOST_POWER - FIRST_POWER))
    return MOST_POWER * (POWER_UNIT * weights["power"] + first).sigmoid()


def decay(weights: Weights) -> Tensor:
    """What weights shrink by, relative to a length over the RMS of a matrix: (N, 1)."""
    return FIRST_DECAY * (MOST_DECAY_CHANGE * (DECAY_UNIT * weights["decay"]).tanh()).exp()
