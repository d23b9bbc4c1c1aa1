"""CNNs of one architecture with random hyperparameters, in the manner of the Small CNN Zoo.

Unterthiner et al. 2020: three convolutions of 16 channels, 3x3, stride 2, on grey images in
[-1, 1], global average pooling and a linear layer, 4,970 parameters. As in the paper, networks
differ in initialisation, optimizer, learning rate, dropout, weight decay and the fraction of the
training images. The paper trains for 86 epochs; the ranges here are chosen so that after a few
thousand steps few networks are at chance level. All networks have ReLU; the paper also has tanh.

A group of networks is trained in parallel, by grouped convolutions, into which ``torch.func.vmap``
would convert them. Written out, with channels last, a step takes 0.7 of the time of
``torch.func.vmap`` of a module with the same memory format, and 0.3 of the time of training one by
one (groups of 16, batches of 64 images of 16x16, one thread).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from l2o_graph.datasets.cnn.architecture import FUNCTIONS, NO_SKIP, CNNArchitecture
from l2o_graph.datasets.cnn.files import Run, run_of, unflattened
from l2o_graph.datasets.cnn.recipe import Recipe, accuracies_of, log_uniform, one_of, uniform
from l2o_graph.datasets.images import Images

ARCHITECTURE = CNNArchitecture(
    channels=(1, 16, 16, 16),
    kernels=(3, 3, 3),
    activations=("relu",) * 3,
    skips=(NO_SKIP,) * 3,
    strides=(2, 2, 2),
)

INITIALISATIONS = ("normal", "truncated_normal", "orthogonal", "glorot_normal", "he_normal")
DEVIATIONS = (5e-2, 5e-1)  # standard deviation of the first two, log-uniform
RATES = (1e-3, 3e-2)  # log-uniform
DROPOUTS = (0.0, 0.4)  # uniform
DECAYS = (1e-8, 1e-2)  # log-uniform
FRACTIONS = (0.1, 0.25, 0.5, 1.0)

# Standard deviation of the standard normal distribution truncated to [-2, 2].
TRUNCATION = 0.87962566
EPSILON = 1e-7  # Keras' default in Adam and RMSprop
BYTE = 256


class Rule(NamedTuple):
    """Optimizer with the step -lr m / (sqrt(v) + epsilon).

    m = keep m + gain g and v = keep_squares v + (1 - keep_squares) g^2, for a gradient g.
    """

    keep: float
    gain: float
    keep_squares: float | None  # None for the step -lr m
    correct: bool  # whether m and v have Adam's bias correction


RULES = {
    "momentum": Rule(0.9, 1.0, None, False),
    "adam": Rule(0.9, 0.1, 0.999, True),
    "rmsprop": Rule(0.0, 1.0, 0.9, False),
}


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Training hyperparameters of a network."""

    initialisation: str  # initialisation of the weights, one of INITIALISATIONS; biases are 0
    deviation: float  # standard deviation of initial weights, for the first two; else 0
    optimizer: str  # key of RULES
    rate: float  # learning rate
    dropout: float  # dropout rate after each convolution, rounded to 1/256
    decay: float  # factor of the sum of squared weights, an additional loss
    fraction: float  # fraction of the training images that are used


def draw_hyperparameters(generator: torch.Generator) -> Hyperparameters:
    """Draw hyperparameters from the ranges of this module."""
    initialisation = one_of(INITIALISATIONS, generator)
    deviation = log_uniform(*DEVIATIONS, generator)
    return Hyperparameters(
        initialisation,
        deviation=deviation if initialisation in ("normal", "truncated_normal") else 0.0,
        optimizer=one_of(tuple(RULES), generator),
        rate=log_uniform(*RATES, generator),
        dropout=uniform(*DROPOUTS, generator),
        decay=log_uniform(*DECAYS, generator),
        fraction=one_of(FRACTIONS, generator),
    )


def train_small(
    numbers: Sequence[int],
    generators: Sequence[torch.Generator],
    images: Images,
    recipe: Recipe,
) -> list[Run]:
    """Train networks on grey images in parallel; see ``recipe.Train``.

    Dropout masks of all networks come from the first generator. A fraction of the training images
    means the first ones.
    """
    drawn = [draw_hyperparameters(generator) for generator in generators]
    rows = [initial(h, g) for h, g in zip(drawn, generators, strict=True)]
    values = torch.stack(rows).requires_grad_()
    sizes = [max(1, round(h.fraction * len(images.train_x))) for h in drawn]
    update, done, kept = Update(drawn), 0, []
    for stop in recipe.checkpoint_steps:
        for _ in range(done, stop):
            pairs = zip(sizes, generators, strict=True)
            columns = [torch.randint(n, (recipe.batch,), generator=g) for n, g in pairs]
            index = torch.stack(columns, dim=1)  # (B, I)
            answers = logits(
                values,
                images.normalise(images.train_x[index, 0]),
                Dropout([h.dropout for h in drawn], generators[0]),
            )
            # The sum over networks of each one's mean loss.
            loss = F.cross_entropy(answers.flatten(0, 1), images.train_y[index].flatten())
            (gradient,) = torch.autograd.grad(len(drawn) * loss, values)
            update.step(values, gradient)
        done = stop
        accuracies = accuracies_of(
            lambda x: logits(values, x.expand(-1, len(drawn), -1, -1)), images
        )
        kept.append((done, accuracies, values.detach().clone()))
    runs = []
    for i, number in enumerate(numbers):
        own = [(step, float(accuracies[i]), rows[i]) for step, accuracies, rows in kept]
        runs.append(run_of(number, ARCHITECTURE, asdict(drawn[i]), own))
    return runs


def initial(hyperparameters: Hyperparameters, generator: torch.Generator) -> Float[Tensor, " P"]:
    """Draw initial parameters by Keras' initialiser of the same name."""
    row = torch.zeros(ARCHITECTURE.num_parameters)
    for parameter in unflattened(row, ARCHITECTURE):
        if parameter.dim() == 1:
            continue
        fan_out, fan_in = parameter.shape[0], parameter[0].numel()
        fan_out *= parameter[0, 0].numel()
        if hyperparameters.initialisation == "normal":
            parameter.normal_(std=hyperparameters.deviation, generator=generator)
        elif hyperparameters.initialisation == "orthogonal":
            nn.init.orthogonal_(parameter, generator=generator)
        else:
            std = {
                "truncated_normal": hyperparameters.deviation * TRUNCATION,
                "glorot_normal": (2 / (fan_in + fan_out)) ** 0.5,
                "he_normal": (2 / fan_in) ** 0.5,
            }[hyperparameters.initialisation]
            nn.init.trunc_normal_(parameter, a=-2, b=2, generator=generator)
            parameter.mul_(std / TRUNCATION)
    return row


class Dropout:
    """Inverted dropout with a rate for each network of a group.

    Random numbers are the costly part: each activation takes one byte of a random integer, so
    rates are rounded to 1/256.
    """

    def __init__(self, rates: Sequence[float], generator: torch.Generator):
        dropped = [min(round(BYTE * rate), BYTE - 1) for rate in rates]
        self._dropped = torch.tensor(dropped, dtype=torch.uint8)[:, None]
        self._scale = torch.tensor([BYTE / (BYTE - d) for d in dropped])[:, None]
        self._generator = generator

    def __call__(self, x: Float[Tensor, "B IC height width"]) -> Tensor:
        """Apply dropout to activations whose channels are those of the networks in turn."""
        batch, channels, *size = x.shape
        numbers = torch.empty(-(-x.numel() // 8), dtype=torch.int64)
        numbers.random_(-(2**63), None, generator=self._generator)
        random_bytes = numbers.view(torch.uint8)[: x.numel()]
        by_network = random_bytes.view(batch, *size, len(self._scale), -1)
        factor = (by_network >= self._dropped) * self._scale
        return x * factor.view(batch, *size, channels).permute(0, 3, 1, 2)


def logits(
    values: Float[Tensor, "I P"],
    pixels: Float[Tensor, "B I height width"],
    dropout: Dropout | None = None,
) -> Float[Tensor, "B I classes"]:
    """Compute the logits of each network on its own images, with dropout after convolutions."""
    parameters, count = unflattened(values, ARCHITECTURE), len(values)
    hidden = pixels.contiguous(memory_format=torch.channels_last)
    for i, name in enumerate(ARCHITECTURE.activations):
        weight, bias = parameters[2 * i].flatten(0, 1), parameters[2 * i + 1].flatten()
        stride, padding = ARCHITECTURE.strides[i], ARCHITECTURE.kernels[i] // 2
        hidden = FUNCTIONS[name](F.conv2d(hidden, weight, bias, stride, padding, groups=count))
        if dropout is not None:
            hidden = dropout(hidden)
    features = hidden.mean((2, 3)).unflatten(1, (count, -1)).transpose(0, 1)
    weight, bias = parameters[-2:]
    return torch.baddbmm(bias[:, None], features, weight.mT).transpose(0, 1)


class Update:
    """Optimizers of a group of networks, each with its own rule, as one vectorised formula."""

    def __init__(self, drawn: Sequence[Hyperparameters]):
        rules = [RULES[h.optimizer] for h in drawn]
        pairs = zip(rules, drawn, strict=True)
        numbers = [(r.keep, r.gain, r.keep_squares or 0.0, h.rate, h.decay) for r, h in pairs]
        columns = torch.tensor(numbers)[..., None].unbind(1)  # (I, 1) each
        self._keep, self._gain, self._keep_squares, self._rate, decay = columns
        self._divides = torch.tensor([[rule.keep_squares is not None] for rule in rules])
        self._corrects = torch.tensor([[rule.correct] for rule in rules])
        is_weight = [
            torch.full(shape, float(len(shape) > 1)).flatten() for shape in ARCHITECTURE.shapes
        ]
        self._decay = 2 * decay * torch.cat(is_weight)
        self._mean = torch.zeros_like(self._decay)
        self._squares = torch.zeros_like(self._decay)
        self._steps = 0

    @torch.no_grad()
    def step(self, values: Float[Tensor, "I P"], gradient: Float[Tensor, "I P"]) -> None:
        """Update the parameters ``values`` in place."""
        self._steps += 1
        gradient = torch.addcmul(gradient, self._decay, values)
        self._mean.mul_(self._keep).addcmul_(self._gain, gradient)
        self._squares.mul_(self._keep_squares)
        self._squares.addcmul_(1 - self._keep_squares, gradient.square_())
        root = self._squares.div(self._correction(self._keep_squares)).sqrt_().add_(EPSILON)
        divisor = torch.where(self._divides, root, 1.0).mul_(self._correction(self._keep))
        values.sub_(self._mean.mul(self._rate).div_(divisor))

    def _correction(self, keep: Float[Tensor, "I 1"]) -> Float[Tensor, "I 1"]:
        """Compute Adam's bias correction 1 - keep^t, or 1."""
        return torch.where(self._corrects, 1 - keep**self._steps, 1.0)
