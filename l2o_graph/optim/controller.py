"""The controller, the learned part of the rule: signals of each neuron -> change of its length.

It is a linear model with a leaky integrator: changes are weighted sums of signals, and they add up
in the logarithm of the length. The mixture of momenta, the power of whitening and the weight decay
are learned, too, as constants for all matrices.

Weights are plain tensors by name with a leading axis N. In use N is 1; in meta-training each of the
N networks that are trained at once has its own set of weights.

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

# The largest change of the logarithm of a length in a step.
MOST_CHANGE = 0.2
# Factor of the sum of signals. Changes add up, so a small error of a weight would make lengths
# e times too long, and perturbed weights would all but rule out long steps.
CHANGE_UNIT = 0.2
# Limits of the logarithm of a length over its unit. Long steps are at most 1.4 times the unit:
# units follow the weights, so steps that are too long amplify themselves.
SHORTEST, LONGEST = -9.0, 0.35
# Time constant, in steps, with which lengths return to their units.
FORGOTTEN_AFTER = 100

# Number of sources of a direction: the gradient and its averages over about 10 and 100 steps.
NUM_SOURCES = 3
# Their shares before training.
FIRST_SHARES = (0.1, 0.8, 0.1)
# Power of whitening before training, and its upper limit.
FIRST_POWER, MOST_POWER = 0.45, 0.6

# Weight decay of a step relative to the step's length over the RMS of the weights: its value
# before training, and the largest change of its logarithm.
FIRST_DECAY, MOST_DECAY_CHANGE = 0.1, 2.5

# Units of the other weights, chosen as ``signals.COSINE_UNITS`` are.
FIRST_LENGTH_UNIT, SHARES_UNIT, POWER_UNIT, DECAY_UNIT = 6.0, 6.0, 6.0, 3.0


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """Configuration of a controller, stored in the header of its checkpoint.

    Attributes:
        reader: How neurons exchange information. "none": not at all. "messages": with neurons
            they are joined to, weighted by squared weights, as in NG-GNN. "attention": the same
            with attention, as in NG-T. "mean": an unweighted mean over the layers before and
            after, as in NFN. "sequence": an LSTM over the matrices, as in the LSTM baseline.
        grain: Unit with its own step length, "neuron" or "tensor".
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
    """Weights of one controller; the functions below compute with them.

    Before training all changes are 0, so that lengths stay at their units.
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
        """Return all weights by name, with an axis N of 1."""
        return {name: getattr(self, name.replace(".", "_"))[None] for name in self.config.shapes}

    def vector(self) -> Tensor:
        """Concatenate all weights to one vector, in the order of ``config.shapes``."""
        return torch.cat([w.detach().flatten() for w in self.weights().values()])

    def set_vector(self, vector: Tensor) -> None:
        """Set all weights from one vector."""
        for name, weight in weights_from(self.config, vector[None]).items():
            getattr(self, name.replace(".", "_")).data.copy_(weight[0])


def weights_from(config: ControllerConfig, vectors: Tensor) -> dict[str, Tensor]:
    """Split N vectors (N, size) into weights by name."""
    parts = vectors.split([math.prod(shape) for shape in config.shapes.values()], dim=1)
    return {
        name: part.unflatten(1, shape)
        for (name, shape), part in zip(config.shapes.items(), parts, strict=True)
    }


@dataclass(frozen=True, slots=True)
class Learned:
    """Weights of N controllers, and the learned constants computed from them once.

    Attributes:
        config: Configuration of all of them.
        weights: Weights by name.
        shares: (N, 3) shares of gradient, fast and slow average in a direction.
        power: (N, 1) power of whitening.
        decay: (N, 1) weight decay relative to a step's length over the RMS of the matrix.
    """

    config: ControllerConfig
    weights: Weights
    shares: Tensor
    power: Tensor
    decay: Tensor

    @staticmethod
    def of(config: ControllerConfig, weights: Weights) -> "Learned":
        """Compute the constants from the weights of N controllers."""
        return Learned(config, weights, shares(weights), power(weights), decay(weights))


def said(weights: Weights, signals: Tensor) -> Tensor:
    """Compute the message that each row sends: (N, R, F) -> (N, R, C), within (-1, 1)."""
    return torch.baddbmm(weights["say.bias"][:, None], signals, weights["say.weight"].mT).tanh()


def change(weights: Weights, signals: Tensor, heard: Tensor | None = None) -> Tensor:
    """Compute the change of the logarithm of each row's length, (N, R).

    Args:
        weights: Weights of N controllers.
        signals: Signals of each row, (N, R, F).
        heard: Messages received by each row, along and against the computation, (N, R, 2C).
    """
    found = torch.bmm(signals, weights["change"][..., None])
    if heard is not None:
        found = torch.baddbmm(found, heard, weights["hear"][..., None])
    return MOST_CHANGE * (CHANGE_UNIT * found[..., 0]).tanh()


def next_log_length(log_length: Tensor, change: Tensor) -> Tensor:
    """Apply a change to the stored logarithm of each row's length: (N, R)."""
    return (log_length * (1 - 1 / FORGOTTEN_AFTER) + change).clamp(SHORTEST, LONGEST)


def first_log_length(weights: Weights, kinds: Tensor) -> Tensor:
    """Compute the logarithm of each row's initial length over its unit: (R, 6) -> (N, R)."""
    return FIRST_LENGTH_UNIT * weights["first_length"] @ kinds.T


def shares(weights: Weights) -> Tensor:
    """Compute the shares of gradient, fast and slow average in a direction: (N, 3)."""
    logits = nn.functional.pad(SHARES_UNIT * weights["shares"], (1, 0))
    first = torch.tensor(FIRST_SHARES, dtype=logits.dtype, device=logits.device).log()
    return (logits + first).softmax(-1)


def power(weights: Weights) -> Tensor:
    """Compute the learned power of whitening: (N, 1)."""
    first = math.log(FIRST_POWER / (MOST_POWER - FIRST_POWER))
    return MOST_POWER * (POWER_UNIT * weights["power"] + first).sigmoid()


def decay(weights: Weights) -> Tensor:
    """Compute the decay relative to a step's length over the RMS of the matrix: (N, 1)."""
    return FIRST_DECAY * (MOST_DECAY_CHANGE * (DECAY_UNIT * weights["decay"]).tanh()).exp()
