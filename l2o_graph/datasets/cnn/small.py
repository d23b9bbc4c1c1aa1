"""Networks of the Small CNN Zoo's kind: one architecture, trained in many ways, many at once.

Unterthiner et al. 2020: three convolutions of 16 channels, 3x3, stride 2, on grey images in
[-1, 1], a global average and a linear layer: 4,970 parameters. Like theirs, networks differ in
initialisation, optimizer, rate, dropout, decay and in how much of the data they see. Theirs take
86 epochs; the ranges here are chosen so that after a few thousand steps few networks still guess.
All are ReLU networks, where theirs are tanh networks, too.

The convolutions of a group of networks are one grouped convolution, which is what ``torch.vmap``
makes of them. Written out, and channels last, a step takes 0.7 of the time of ``torch.func.vmap``
around a module with the same order of memory, and 0.3 of one network after another (groups of
16, batches of 64 images of 16x16, one thread).
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
from l2o_graph.datasets.cnn.recipe import Recipe, log_uniform, one_of, shares_right, uniform
from l2o_graph.datasets.images import Images

ARCHITECTURE = CNNArchitecture(
    channels=(1, 16, 16, 16),
    kernels=(3, 3, 3),
    activations=("relu",) * 3,
    skips=(NO_SKIP,) * 3,
    strides=(2, 2, 2),
)

INITIALISATIONS = ("normal", "truncated_normal", "orthogonal", "glorot_normal", "he_normal")
DEVIATIONS = (5e-2, 5e-1)  # of the first two, log-uniform
RATES = (1e-3, 3e-2)  # log-uniform
DROPOUTS = (0.0, 0.4)  # uniform
DECAYS = (1e-8, 1e-2)  # log-uniform
FRACTIONS = (0.1, 0.25, 0.5, 1.0)

TRUNCATION = 0.87962566  # deviation of a standard normal number that lies within ±2
EPSILON = 1e-7
BYTE = 256


class Rule(NamedTuple):
    """An optimizer: a mean of gradients, over the root of a mean of their squares."""

    keep: float  # share of the mean that stays at a step
    gain: float  # share of the gradient that enters
    keep_squares: float | None  # share of the squares that stays; None to divide by nothing
    correct: bool  # whether means are corrected for having started at 0


RULES = {
    "momentum": Rule(0.9, 1.0, None, False),
    "adam": Rule(0.9, 0.1, 0.999, True),
    "rmsprop": Rule(0.0, 1.0, 0.9, False),
}


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """How a network is trained."""

    initialisation: str  # of the weights, one of INITIALISATIONS; biases start at 0
    deviation: float  # of the weights, where the initialisation leaves it open; else 0
    optimizer: str  # one of RULES
    rate: float  # its learning rate
    dropout: float  # share of what each convolution gives that a step leaves out, to 1/256
    decay: float  # its product with the sum of the squares of all weights is added to the loss
    fraction: float  # share of the training images that it sees


def draw_hyperparameters(generator: torch.Generator) -> Hyperparameters:
    """Draw from the ranges of this module."""
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
    """Train networks on grey images, all at once: see ``recipe.Train``.

    Dropout is drawn for all together, by the first generator. A network that sees a fraction of
    the training images sees the first.
    """
    drawn = [draw_hyperparameters(generator) for generator in generators]
    rows = [initial(h, g) for h, g in zip(drawn, generators, strict=True)]
    values = torch.stack(rows).requires_grad_()
    seen = [max(1, round(h.fraction * len(images.train_x))) for h in drawn]
    update, done, kept = Update(drawn), 0, []
    for stop in recipe.checkpoint_steps:
        for _ in range(done, stop):
            pairs = zip(seen, generators, strict=True)
            of_each = [torch.randint(n, (recipe.batch,), generator=g) for n, g in pairs]
            index = torch.stack(of_each, dim=1)
            answers = logits(
                values,
                images.normalise(images.train_x[index, 0]),
                Dropout([h.dropout for h in drawn], generators[0]),
            )
            # Summed over networks: each has the gradient of its own mean.
            loss = F.cross_entropy(answers.flatten(0, 1), images.train_y[index].flatten())
            (gradient,) = torch.autograd.grad(len(drawn) * loss, values)
            update.step(values, gradient)
        done = stop
        right = shares_right(lambda x: logits(values, x.expand(-1, len(drawn), -1, -1)), images)
        kept.append((done, right, values.detach().clone()))
    runs = []
    for i, number in enumerate(numbers):
        own = [(step, float(right[i]), rows[i]) for step, right, rows in kept]
        runs.append(run_of(number, ARCHITECTURE, asdict(drawn[i]), own))
    return runs


def initial(hyperparameters: Hyperparameters, generator: torch.Generator) -> Float[Tensor, " P"]:
    """Draw first parameters, as Keras does by the same names."""
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
    """Drops entries of a group of networks, and makes the others larger in turn.

    Random numbers are the costly part: each entry gets one byte of an integer, so that the shares
    to drop of each network are rounded to 1/256.
    """

    def __init__(self, shares: Sequence[float], generator: torch.Generator):
        dropped = [min(round(BYTE * share), BYTE - 1) for share in shares]
        self._dropped = torch.tensor(dropped, dtype=torch.uint8)[:, None]
        self._scale = torch.tensor([BYTE / (BYTE - d) for d in dropped])[:, None]
        self._generator = generator

    def __call__(self, x: Float[Tensor, "B IC height width"]) -> Tensor:
        """Drop, of channels that lie network after network."""
        batch, channels, *size = x.shape
        numbers = torch.empty(-(-x.numel() // 8), dtype=torch.int64)
        numbers.random_(-(2**63), None, generator=self._generator)
        of_entries = numbers.view(torch.uint8)[: x.numel()]
        by_network = of_entries.view(batch, *size, len(self._scale), -1)
        factor = (by_network >= self._dropped) * self._scale
        return x * factor.view(batch, *size, channels).permute(0, 3, 1, 2)


def logits(
    values: Float[Tensor, "I P"],
    pixels: Float[Tensor, "B I height width"],
    dropout: Dropout | None = None,
) -> Float[Tensor, "B I classes"]:
    """What each network says of its own images, with dropout behind each convolution."""
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
    """A step of each network's own optimizer, on all at once: one formula, and numbers of each."""

    def __init__(self, drawn: Sequence[Hyperparameters]):
        rules = [RULES[h.optimizer] for h in drawn]
        pairs = zip(rules, drawn, strict=True)
        numbers = [(r.keep, r.gain, r.keep_squares or 0.0, h.rate, h.decay) for r, h in pairs]
        columns = torch.tensor(numbers)[..., None].unbind(1)  # (I, 1) each
        self._keep, self._gain, self._keep_squares, self._rate, decay = columns
        self._divides = torch.tensor([[rule.keep_squares is not None] for rule in rules])
        self._corrects = torch.tensor([[rule.correct] for rule in rules])
        of_weights = [
            torch.full(shape, float(len(shape) > 1)).flatten() for shape in ARCHITECTURE.shapes
        ]
        self._decay = 2 * decay * torch.cat(of_weights)
        self._mean = torch.zeros_like(self._decay)
        self._squares = torch.zeros_like(self._decay)
        self._steps = 0

    @torch.no_grad()
    def step(self, values: Float[Tensor, "I P"], gradient: Float[Tensor, "I P"]) -> None:
        """Change the values."""
        self._steps += 1
        gradient = torch.addcmul(gradient, self._decay, values)
        self._mean.mul_(self._keep).addcmul_(self._gain, gradient)
        self._squares.mul_(self._keep_squares)
        self._squares.addcmul_(1 - self._keep_squares, gradient.square_())
        root = self._squares.div(self._correction(self._keep_squares)).sqrt_().add_(EPSILON)
        divisor = torch.where(self._divides, root, 1.0).mul_(self._correction(self._keep))
        values.sub_(self._mean.mul(self._rate).div_(divisor))

    def _correction(self, keep: Float[Tensor, "I 1"]) -> Float[Tensor, "I 1"]:
        return torch.where(self._corrects, 1 - keep**self._steps, 1.0)
