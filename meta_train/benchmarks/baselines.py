"""The optimizers that a benchmark compares, hand-designed ones and the learned one, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from l2o_graph import NGOptimizer

# Newton-Schulz coefficients of K. Jordan, "Muon: an optimizer for hidden layers in neural
# networks" (2024): fast rather than exact, singular values end in about 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
AUXILIARY_RATE = 1e-2


# What a learned optimizer is told, and how it is evaluated: suffixes of its name, and of its label.
VARIANTS = {
    "": "",
    "_told": ", told the end",
    "_averaged": ", averaged weights",
}
HAND_DESIGNED = ("adam", "adamw", "sgd", "muon")
LABELS = {
    "ng": "NGOptimizer",
    "ng_gnn": "NG-GNN",
    "ng_t": "NG-T",
    "nfn": "NFN",
    "lstm": "LSTM",
    "ff": "FF",
}


def learned_checkpoints(
    checkpoints: Mapping[str, str | Path] | None = None,
) -> dict[str, str | Path]:
    """Checkpoint of each learned contender, in all variants.

    Args:
        checkpoints: Those beside the packaged one, which is "ng", or in its place.

    Raises:
        ValueError: For a name that is one of a variant, or of an optimizer that is not learned.
    """
    for name in checkpoints or {}:
        variant = next((v for v in VARIANTS if v and name.endswith(v)), None)
        if variant is not None:
            raise ValueError(
                f"checkpoint: expected a name without '{variant}', found '{name}'; of each name "
                f"there are also {' and '.join(f'NAME{v}' for v in VARIANTS if v)}"
            )
        if name in HAND_DESIGNED:
            raise ValueError(
                f"checkpoint: expected a name beside {', '.join(HAND_DESIGNED)}, which are "
                f"optimizers of their own, found '{name}'"
            )
    found: dict[str, str | Path] = {"ng": NGOptimizer.packaged, **(checkpoints or {})}
    return {name + variant: c for name, c in found.items() for variant in VARIANTS}


# The learned optimizers in the package: contender -> checkpoint.
PACKAGED = learned_checkpoints()

# Of each grid, what did best on the task fmnist_cnn (docs/results.md).
BEST_RATES = {
    "sgd": 1e-1,
    "adam": 2e-2,
    "adamw": 2e-2,
    "muon": 5e-2,
    **dict.fromkeys(PACKAGED, 1.0),
}

# Test accuracy in % after 1,000 steps, mean and standard deviation: Kofinas et al. 2024, Table 2.
PUBLISHED = {
    "fmnist_cnn": {
        "adam": (80.97, 0.66), "ff": (85.08, 0.14), "lstm": (85.69, 0.23), "nfn": (83.78, 0.58),
        "ng_gnn": (85.91, 0.37), "ng_t": (86.52, 0.19),
    },
    "cifar10_cnn": {
        "adam": (54.76, 2.82), "ff": (57.55, 1.06), "lstm": (59.10, 0.66), "nfn": (57.95, 0.64),
        "ng_gnn": (64.37, 0.34), "ng_t": (60.79, 0.51),
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Contender:
    """An optimizer with its grid of rates.

    Attributes:
        label: For tables and plots.
        rates: The grid; a comparison is with the best of them.
        make: (network, rate, steps of the run) -> the optimizers that train it together.
        decays: Whether the rate falls linearly to zero over the run.
        averaged: Whether accuracies are those of averaged weights.
    """

    label: str
    rates: tuple[float, ...]
    make: Callable[[nn.Module, float, int], list[Optimizer]]
    decays: bool = False
    averaged: bool = False


def contenders(checkpoints: Mapping[str, str | Path] | None = None) -> dict[str, Contender]:
    """All known optimizers.

    Args:
        checkpoints: Learned ones beside the packaged "ng", or in its place: any name, and the
            name or path of a checkpoint. Their rate is a plain factor. Of each there is also one
            that is told the number of steps, "ng_told", and one whose averaged weights are
            evaluated, "ng_averaged".

    Raises:
        ValueError: As ``learned_checkpoints``.
    """

    def adam(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        return [Adam(net.parameters(), lr=rate)]

    def adamw(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        return [AdamW(net.parameters(), lr=rate)]

    def sgd(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        return [SGD(net.parameters(), lr=rate, momentum=0.9, nesterov=True)]

    def muon(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        kernels, rest = split_for_muon(net)
        return [Muon(kernels, lr=rate), AdamW(rest, lr=AUXILIARY_RATE)]

    grid = (1e-3, 3e-3, 6e-3, 1e-2, 2e-2)
    return {
        "adam": Contender("Adam", grid, adam),
        "adamw": Contender("AdamW, linear decay", grid, adamw, decays=True),
        "sgd": Contender("SGD Nesterov, linear decay", (0.03, 0.1, 0.3), sgd, decays=True),
        "muon": Contender("Muon, linear decay", (0.02, 0.05, 0.1), muon, decays=True),
        **{name: _learned(name, c) for name, c in learned_checkpoints(checkpoints).items()},
    }


def _learned(name: str, checkpoint: str | Path) -> Contender:
    told, averaged = name.endswith("_told"), name.endswith("_averaged")

    def make(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        horizon = steps if told else None
        return [NGOptimizer(net.parameters(), lr=rate, checkpoint=checkpoint, total_steps=horizon)]

    return Contender(label_of(name), (1.0,), make, averaged=averaged)


def label_of(name: str) -> str:
    """Label of a learned contender."""
    own = base_of(name)
    return f"{LABELS.get(own, own)} (learned{VARIANTS[name.removeprefix(own)]})"


def base_of(name: str) -> str:
    """Name of a learned contender without its variant."""
    for variant in filter(None, VARIANTS):
        name = name.removesuffix(variant)
    return name


def split_for_muon(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Kernels and matrices but that of the last layer; and the rest, which AdamW takes."""
    parameters = list(net.parameters())
    matrices = [p for p in parameters if p.dim() >= 2][:-1]
    return matrices, [p for p in parameters if all(p is not m for m in matrices)]


class Muon(Optimizer):
    """Momentum whose update is made orthogonal, for kernels and matrices.

    A kernel counts as a matrix of out x (in * height * width); its update is scaled by
    sqrt(max(1, rows / columns)).

    Args:
        params: Parameters of at least two dimensions.
        lr: Length of a step along each singular direction.
        momentum: Decay of the Nesterov momentum.
        iterations: Number of iterations of Newton and Schulz.

    Raises:
        ValueError: For a parameter of fewer than two dimensions.

    Source:
        K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024; without
        weight decay, in the parameters' own type rather than in bfloat16.
    """

    def __init__(self, params: Any, lr: float = 0.02, momentum: float = 0.95, iterations: int = 5):
        super().__init__(params, {"lr": lr, "momentum": momentum, "iterations": iterations})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() < 2:
                    raise ValueError(f"Muon: expected kernels or matrices, found {list(p.shape)}")

    # torch declares two overloads, with and without a closure; this is their union.
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].mul_(beta).add_(p.grad)
                ahead = (p.grad + beta * momentum).flatten(1)
                scale = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
                update = orthogonalised(ahead, group["iterations"])
                p.sub_(update.view_as(p), alpha=group["lr"] * scale)
        return loss


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """A matrix with the same singular vectors, its singular values driven to about 1."""
    a, b, c = QUINTIC
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]  # the smaller of the two Gram matrices is the cheaper one
    if tall:
        x = x.T
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
