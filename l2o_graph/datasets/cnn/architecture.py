"""Architectures of small CNNs, and their modules.

Convolutions with "same" padding, each followed by an activation; skip connections from earlier
layers; global average pooling; a linear layer to the classes. Layers are counted from the image,
layer 0: convolution i, counted from 0, reads layer i, and layer i + 1 is its output after the
activation.

The family of the CNN Wild Park (Kofinas et al. 2024, appendix C.3), with strides in addition.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from l2o_graph.ranges import COUNT

NO_SKIP = -1

# Activations by their names in graphs; "" for none.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}


@dataclass(frozen=True, slots=True)
class CNNArchitecture:
    """Architecture of a CNN; hashable.

    Attributes:
        channels: Number of channels of the image, then of each convolution's output.
        kernels: Side of each convolution's square kernel; odd.
        activations: Activation after each convolution, by the name of torch's function; ""
            for none.
        skips: Source of each convolution's skip connection, a layer that is added to its output
            before the activation: 0 for the image, k for convolution k - 1, -1 for none. If
            their widths differ, only the first channels are added, up to the smaller width.
        strides: Stride of each convolution.
        classes: Number of classes, the outputs of the linear layer.

    Raises:
        ValueError: For values out of range, naming the field and the convolution.
    """

    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    activations: tuple[str, ...]
    skips: tuple[int, ...]
    strides: tuple[int, ...]
    classes: int = 10

    def __post_init__(self):
        depth = len(self.channels) - 1
        if depth < 1 or min(*self.channels, self.classes) < 1:
            raise ValueError(
                "channels: expected positive numbers for the image and at least one convolution, "
                f"and at least one class, found {self.channels} and {self.classes} classes"
            )
        for name in ("kernels", "activations", "skips", "strides"):
            if len(getattr(self, name)) != depth:
                raise ValueError(
                    f"{name}: expected one for each of {depth} convolutions, found "
                    f"{getattr(self, name)}"
                )
        each = zip(self.kernels, self.strides, self.activations, self.skips, strict=True)
        for i, (kernel, stride, name, skip) in enumerate(each):
            if kernel < 1 or kernel % 2 == 0:
                raise ValueError(f"kernel of convolution {i}: expected an odd size, found {kernel}")
            COUNT.check(f"stride of convolution {i}", stride)
            if name not in FUNCTIONS:
                raise ValueError(
                    f"activation of convolution {i}: expected one of {list(FUNCTIONS)}, found "
                    f"'{name}'"
                )
            if skip not in (known := [NO_SKIP, *range(i)]):
                raise ValueError(
                    f"skip to convolution {i}: expected a layer before its input, one of {known}, "
                    f"found {skip}"
                )
            passed = () if skip == NO_SKIP else self.strides[skip : i + 1]
            if math.prod(passed) != 1:
                raise ValueError(
                    f"skip to convolution {i}: expected stride 1 from layer {skip} on, found "
                    f"{passed}"
                )

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the weight and bias of each convolution, then of the linear layer."""
        shapes: list[tuple[int, ...]] = []
        for (fan_in, fan_out), side in zip(pairwise(self.channels), self.kernels, strict=True):
            shapes += [(fan_out, fan_in, side, side), (fan_out,)]
        return (*shapes, (self.classes, self.channels[-1]), (self.classes,))

    @property
    def num_parameters(self) -> int:
        """Number of parameters, as scalars."""
        return sum(map(math.prod, self.shapes))

    def __str__(self) -> str:
        """Return for example "3-16-32-10, kernels 3 5, relu tanh, skips -1 0"."""
        widths = "-".join(map(str, (*self.channels, self.classes)))
        parts = [widths, f"kernels {' '.join(map(str, self.kernels))}"]
        parts.append(" ".join(name or "none" for name in self.activations))
        if set(self.skips) != {NO_SKIP}:
            parts.append(f"skips {' '.join(map(str, self.skips))}")
        if set(self.strides) != {1}:
            parts.append(f"strides {' '.join(map(str, self.strides))}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "CNNArchitecture":
        """Convert from the result of ``to_json``.

        Raises:
            ValueError: For missing or unknown fields, and values out of range.
        """
        expected = [field.name for field in fields(CNNArchitecture)]
        if set(content) != set(expected):
            raise ValueError(
                f"architecture: expected the fields {expected}, found {sorted(content)}"
            )
        tuples = {k: tuple(v) for k, v in content.items() if k != "classes"}
        return CNNArchitecture(**tuples, classes=content["classes"])


def cnn_module(architecture: CNNArchitecture) -> nn.Module:
    """Build a network of an architecture, initialised as torch does.

    It maps images (B, channels, height, width) to logits (B, classes). Its parameters have the
    order of ``architecture.shapes``.

    Examples:
        >>> architecture = CNNArchitecture((3, 8, 16), (3, 3), ("relu", "relu"), (-1, -1), (2, 1))
        >>> print(architecture)
        3-8-16-10, kernels 3 3, relu relu, strides 2 1
        >>> cnn_module(architecture)(torch.zeros(4, 3, 16, 16)).shape
        torch.Size([4, 10])
    """
    return _CNN(architecture)


class _CNN(nn.Module):
    def __init__(self, architecture: CNNArchitecture):
        super().__init__()
        self.architecture = a = architecture
        widths = zip(pairwise(a.channels), a.kernels, a.strides, strict=True)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(fan_in, fan_out, side, stride, padding=side // 2)
            for (fan_in, fan_out), side, stride in widths
        )
        self.linear = nn.Linear(a.channels[-1], a.classes)

    def forward(self, x: Float[Tensor, "B C height width"]) -> Float[Tensor, "B classes"]:
        layers, a = [x], self.architecture
        for convolution, name, skip in zip(self.convolutions, a.activations, a.skips, strict=True):
            x = convolution(x)
            if skip != NO_SKIP:
                x = x + as_wide(layers[skip], x.shape[1])
            x = FUNCTIONS[name](x)
            layers.append(x)
        return self.linear(x.mean((2, 3)))


def as_wide(x: Float[Tensor, "*B C height width"], channels: int) -> Tensor:
    """Keep the first channels, padded with zeros: a skip connection between different widths."""
    kept = x[..., :channels, :, :]
    return F.pad(kept, (0, 0, 0, 0, 0, channels - kept.shape[-3]))
