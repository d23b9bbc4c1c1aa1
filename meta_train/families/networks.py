"""MLPs of several families, and initialisation of parameters."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from meta_train.families.dice import Dice

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: tuple[Activation, ...] = (F.relu, F.gelu, torch.tanh, F.silu)


class MLP(nn.Module):
    """MLP of these sizes, from inputs to outputs; ``norm`` puts a LayerNorm before activations."""

    def __init__(self, sizes: Sequence[int], activation: Activation, norm: bool = False):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norm = nn.ModuleList(nn.LayerNorm(n) for n in sizes[1:-1] if norm)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs] -> [B, outputs]."""
        for i, linear in enumerate(self.linear[:-1]):
            x = linear(x)
            if self.norm:
                x = self.norm[i](x)
            x = self.activation(x)
        return self.linear[-1](x)


# With the frequencies of practice: lengths depend on the initial weights, and those of "he" are 2.4
# times as large as torch's own.
SCHEMES = ("torch", "torch", "torch", "torch", "he", "xavier")


def initial(
    module: nn.Module, dice: Dice, scheme: str = "torch", gain: float | Tensor = 1.0
) -> dict[str, Tensor]:
    """Draw parameters for each pair: [P, *shape] for each name of ``module.named_parameters()``.

    Args:
        module: Network of one instance.
        dice: Random numbers.
        scheme: Initialisation of kernels of linear and convolutional layers: "torch", uniform
            within 1 / sqrt(fan-in); "he", normal with variance 2 / fan-in; "xavier", uniform with
            variance 2 / (fan-in + fan-out). Biases start as in torch, or with the others at 0.
        gain: Factor of these kernels, one number or (P,) of them.
    """
    start: dict[str, Tensor] = {}
    for prefix, part in module.named_modules():
        own = dict(part.named_parameters(recurse=False))
        if own:
            drawn = _draw(part, own, dice, scheme, gain)
            start |= {f"{prefix}.{name}" if prefix else name: drawn[name] for name in own}
    # A parameter that two modules share has only one name.
    return {name: start[name] for name, _ in module.named_parameters()}


def spread_tables(start: dict[str, Tensor], module: nn.Module, spread: float) -> dict[str, Tensor]:
    """Multiply initial embeddings by ``spread``, in place."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            start[f"{name}.weight"] *= spread
    return start


def gains(dice: Dice) -> Tensor:
    """Draw log-uniform gains, (P,)."""
    return dice.log_uniform(0.8, 1.25)


def _draw(
    part: nn.Module, own: dict[str, nn.Parameter], dice: Dice, scheme: str, gain: float | Tensor
) -> dict[str, Tensor]:
    if isinstance(part, nn.Linear | nn.Conv2d):
        return _kernel(own, dice, scheme, gain)
    if isinstance(part, nn.LayerNorm | nn.GroupNorm | _NormBase):
        return {
            name: torch.full((dice.pairs, *p.shape), float(name == "weight"))
            for name, p in own.items()
        }
    if isinstance(part, nn.RNNBase):
        bound = part.hidden_size**-0.5
        return {n: dice.uniform(*p.shape, low=-bound, high=bound) for n, p in own.items()}
    if isinstance(part, nn.Embedding):
        return {name: dice.normal(*p.shape) for name, p in own.items()}
    raise TypeError(f"no initialisation is known for {type(part).__name__}")


def _kernel(
    own: dict[str, nn.Parameter], dice: Dice, scheme: str, gain: float | Tensor
) -> dict[str, Tensor]:
    shape = own["weight"].shape
    fan_in, fan_out = prod(shape[1:]), shape[0] * prod(shape[2:])
    if scheme == "he":
        weight = dice.normal(*shape) * (2 / fan_in) ** 0.5
    else:
        square = 1 / fan_in if scheme == "torch" else 6 / (fan_in + fan_out)
        weight = dice.uniform(*shape, low=-(square**0.5), high=square**0.5)
    if isinstance(gain, Tensor):
        gain = gain.view(-1, *[1] * len(shape))
    drawn = {"weight": weight * gain}
    if "bias" in own:
        bound = fan_in**-0.5 if scheme == "torch" else 0.0
        drawn["bias"] = dice.uniform(*own["bias"].shape, low=-bound, high=bound)
    return drawn
