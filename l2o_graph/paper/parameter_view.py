"""(parameters, gradients, momenta) -> the features of any run of scalars.

An observation holds views of one parameter's tensors. The features of its scalars are made where
they are used, for one chunk at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from l2o_graph.layout.spans import Scalars, Span
from l2o_graph.paper.features import NUM_FEATURES, log_sign


@dataclass(frozen=True, slots=True)
class ParameterView:
    """One parameter as a step sees it.

    Attributes:
        weight: (n,) flattened.
        gradient: (n,) flattened.
        momenta: (5, n) flattened.
    """

    weight: Float[Tensor, " n"]
    gradient: Float[Tensor, " n"]
    momenta: Float[Tensor, "B n"]

    def raw(self, start: int, stop: int) -> Float[Tensor, "R n"]:
        """Weight, gradient and momenta of the scalars from start to stop."""
        momenta = self.momenta[:, start:stop]
        return torch.cat([self.weight[None, start:stop], self.gradient[None, start:stop], momenta])


def view_parameters(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[ParameterView]:
    """Observe every parameter; differentiable where gradients are enabled.

    Args:
        parameters: P tensors of any shape.
        gradients: Their gradients.
        momenta: Their momenta, (5, *shape) each, this gradient included.
        dtype: What to compute in.
    """
    return [
        ParameterView(
            p.reshape(-1).to(dtype),
            g.reshape(-1).to(dtype),
            (m.flatten(1) if m.dim() > 1 else m[:, None]).to(dtype),
        )
        for p, g, m in zip(parameters, gradients, momenta, strict=True)
    ]


def scalars_of(observations: Sequence[ParameterView], parts: Sequence[Span]) -> Scalars:
    """The features of some parts' scalars: 7 logarithms and 7 signs."""
    if not parts:
        return Scalars((), observations[0].weight.new_zeros(NUM_FEATURES, 0))
    raw = [observations[part.parameter].raw(part.start, part.stop) for part in parts]
    return Scalars(tuple(parts), log_sign(torch.cat(raw, dim=1)))
