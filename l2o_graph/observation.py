"""(parameters, gradients, momenta) -> the features of any run of scalars.

An observation holds views of one parameter's tensors and the little that all its scalars share.
The features of its scalars are made where they are used, for one chunk at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from l2o_graph import features as f
from l2o_graph.architecture import NetSpec
from l2o_graph.models.embedding import Part, Scalars

NOMINAL_ROW = f.NUM_LOG_SIGN + f.NUM_RAW
NUM_FEATURES = NOMINAL_ROW + 1

# Scalars of a momentum that enter its Gram matrix at once.
GRAM_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Observation:
    """One parameter as a step sees it.

    Attributes:
        weight: (n,) flattened.
        gradient: (n,) flattened.
        momenta: (5, n) flattened.
        scale: (7,) RMS of weight, gradient and momenta over the tensor.
        shared: (T,) features of the tensor.
        age: Updates that the parameter had before this one.
        out: Neurons that a kernel writes; 0 for what is not a kernel.
        nominal_scale: RMS over the tensor of the momentum that the nominal step follows, never 0.
        whitener: For a kernel, what turns that momentum into an orthogonal matrix.
    """

    weight: Float[Tensor, " n"]
    gradient: Float[Tensor, " n"]
    momenta: Float[Tensor, "B n"]
    scale: Float[Tensor, " R"]
    shared: Float[Tensor, " T"]
    age: Float[Tensor, ""]
    out: int
    nominal_scale: Float[Tensor, ""]
    whitener: Float[Tensor, "s s"] | None

    @property
    def fan_in(self) -> int:
        """Values that one neuron of a kernel reads; 1 for what is not a kernel."""
        return len(self.weight) // self.out if self.out else 1

    def raw(self, start: int, stop: int) -> Float[Tensor, "R n"]:
        """Weight, gradient and momenta of the scalars from start to stop."""
        momenta = self.momenta[:, start:stop]
        return torch.cat([self.weight[None, start:stop], self.gradient[None, start:stop], momenta])

    def nominal(self, start: int, stop: int) -> Float[Tensor, " n"]:
        """The nominal direction of the scalars from start to stop, of RMS about 1.

        For a kernel it is the orthogonal matrix closest to the momentum (Jordan et al. 2024),
        times sqrt(max(fan_in, out)); for everything else the momentum over its RMS.
        """
        gradient, momentum = self.gradient, self.momenta[f.NOMINAL]
        if self.whitener is None:
            follow = gradient[start:stop] + f.NOMINAL_DECAY * momentum[start:stop]
            return follow / self.nominal_scale
        size = max(self.fan_in, self.out) ** 0.5
        rows = slice(start // self.fan_in, stop // self.fan_in)
        gradient, momentum = gradient.view(self.out, -1), momentum.view(self.out, -1)
        if self.out <= self.fan_in:
            q = self.whitener[rows] * size
            answer = q @ gradient + f.NOMINAL_DECAY * (q @ momentum)
        else:
            follow = gradient[rows] + f.NOMINAL_DECAY * momentum[rows]
            answer = follow @ (self.whitener * size)
        return answer.reshape(-1)


def observe(
    spec: NetSpec,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    steps: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Observation]:
    """Observe every parameter.

    Args:
        spec: Which parameter joins which neurons.
        parameters: P tensors of any shape.
        gradients: Their gradients.
        momenta: Their momenta, (5, *shape) each, this gradient included.
        steps: Updates that each parameter had before this one, 0-dimensional.
        dtype: What to compute in.
    """
    is_kernel = {kernel.parameter for kernel in spec.kernels}
    observations = []
    for i, (p, g, m, step) in enumerate(zip(parameters, gradients, momenta, steps, strict=True)):
        weight, gradient = p.reshape(-1).to(dtype), g.reshape(-1).to(dtype)
        m = m.flatten(1).to(dtype) if p.dim() else m[:, None].to(dtype)
        scale = torch.cat([f.root_mean_square(x) for x in (weight[None], gradient[None], m)])
        out = p.shape[0] if i in is_kernel else 0
        gram = _gram(gradient, m[f.NOMINAL], out or 1)
        observations.append(
            Observation(
                weight=weight,
                gradient=gradient,
                momenta=m,
                scale=scale,
                shared=f.tensor_features(scale, p.numel() // out if out else 1, step.to(scale)),
                age=step.to(scale),
                out=out,
                nominal_scale=(gram.diagonal().sum() / max(p.numel(), 1) + f.TINY).sqrt(),
                whitener=f.whitener(gram) if out else None,
            )
        )
    return observations


def _gram(gradient: Tensor, momentum: Tensor, out: int) -> Float[Tensor, "s s"]:
    """Gram matrix of the shorter side of g + beta m, (out, fan_in), in bounded memory."""
    gradient, momentum = gradient.view(out, -1), momentum.view(out, -1)
    if gradient.shape[0] > gradient.shape[1]:
        gradient, momentum = gradient.T, momentum.T
    short, long = gradient.shape
    gram = gradient.new_zeros(short, short)
    for block in range(0, long, max(GRAM_BLOCK // max(short, 1), 1)):
        columns = slice(block, block + max(GRAM_BLOCK // max(short, 1), 1))
        follow = gradient[:, columns] + f.NOMINAL_DECAY * momentum[:, columns]
        gram = gram + follow @ follow.T
    return gram


def scalars_of(observations: Sequence[Observation], parts: Sequence[Part]) -> Scalars:
    """The features of some parts' scalars: 14 log and sign, 7 relative to RMS, 1 nominal."""
    if not parts:
        return Scalars((), observations[0].weight.new_zeros(NUM_FEATURES, 0))
    of = [observations[part.parameter] for part in parts]
    raw = torch.cat([o.raw(p.start, p.stop) for o, p in zip(of, parts, strict=True)], dim=1)
    scale = torch.cat(
        [o.scale[:, None].expand(-1, p.stop - p.start) for o, p in zip(of, parts, strict=True)],
        dim=1,
    )
    nominal = torch.cat([o.nominal(p.start, p.stop) for o, p in zip(of, parts, strict=True)])
    x = torch.cat([f.log_sign(raw), f.squashed(raw, scale), nominal[None]])
    return Scalars(tuple(parts), x)
