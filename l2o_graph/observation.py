"""(parameters, gradients, momenta) -> the features of any run of scalars.

An observation holds views of one parameter's tensors and the little that all its scalars share.
The features of its scalars are made where they are used, for one chunk at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from l2o_graph import features as f
from l2o_graph.architecture import NetSpec
from l2o_graph.models.embedding import Part, Scalars

SLOWEST_SIGN_ROW = f.NUM_LOG_SIGN - 1
NOMINAL_ROW = f.NUM_LOG_SIGN + f.NUM_RAW
NUM_FEATURES = NOMINAL_ROW + 1

# Makes the RMS of squashed normal values 1.
SQUASHED_TO_UNIT = 1.7

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
        whitener: For a kernel, what turns that momentum into an orthogonal matrix, if wanted.
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
        times sqrt(max(fan_in, out)), or without a whitener the momentum squashed parameter by
        parameter; for everything else the momentum over its RMS.
        """
        gradient, momentum = self.gradient, self.momenta[f.NOMINAL]
        if self.whitener is None:
            follow = gradient[start:stop] + f.NOMINAL_DECAY * momentum[start:stop]
            if self.out:
                return SQUASHED_TO_UNIT * f.squashed(follow, self.nominal_scale)
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
    orthogonal: bool = True,
) -> list[Observation]:
    """Observe every parameter.

    Args:
        spec: Which parameter joins which neurons.
        parameters: P tensors of any shape.
        gradients: Their gradients.
        momenta: Their momenta, (5, *shape) each, this gradient included.
        steps: Updates that each parameter had before this one, 0-dimensional.
        dtype: What to compute in.
        orthogonal: Whether the nominal direction of kernels is to be orthogonal.
    """
    is_kernel = {kernel.parameter for kernel in spec.kernels}
    outs = [p.shape[0] if i in is_kernel else 0 for i, p in enumerate(parameters)]
    weights = [p.reshape(-1).to(dtype) for p in parameters]
    gradients = [g.reshape(-1).to(dtype) for g in gradients]
    momenta = [(m.flatten(1) if m.dim() > 1 else m[:, None]).to(dtype) for m in momenta]
    ages = torch.stack(list(steps)).to(dtype)
    sizes = ages.new_tensor([max(len(w), 1) for w in weights])
    fan_ins = ages.new_tensor(
        [len(w) // out if out else 1 for w, out in zip(weights, outs, strict=True)]
    )
    scale = _norms(weights, gradients, momenta) / sizes.sqrt()[:, None]
    shared = f.tensor_features(scale, fan_ins, ages, _roles(spec).to(ages))
    # The Gram matrix of a single row is its square.
    whiten = [out if orthogonal else 0 for out in outs]
    grams = [
        _gram(g, m[f.NOMINAL], n or 1) for g, m, n in zip(gradients, momenta, whiten, strict=True)
    ]
    squares = torch.stack([gram.diagonal().sum() for gram in grams])
    nominal_scale = (squares / sizes + f.TINY).sqrt()
    found = iter(f.whiteners([gram for gram, n in zip(grams, whiten, strict=True) if n]))
    whiteners = [next(found) if n else None for n in whiten]
    return [
        Observation(*row)
        for row in zip(
            weights, gradients, momenta, scale, shared, ages, outs, nominal_scale, whiteners,
            strict=True,
        )
    ]  # fmt: skip


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is cached may be needed for a backward pass later
def _roles(spec: NetSpec) -> Float[Tensor, "N 2"]:
    """Of each parameter, whether it reads inputs of the network and whether it writes outputs."""
    roles = torch.zeros(len(spec.shapes), f.NUM_ROLES)
    for kernel in spec.kernels:
        roles[kernel.parameter, 0] = spec.neurons[kernel.source].role == "input"
        roles[kernel.parameter, 1] = spec.neurons[kernel.target].role == "output"
    for bias in spec.biases:
        roles[bias.parameter, 1] = spec.neurons[bias.neurons].role == "output"
    return roles


def _norms(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], momenta: Sequence[Tensor]
) -> Float[Tensor, "N R"]:
    """Euclidean norm of the weight, the gradient and each momentum of N parameters."""
    norm = torch.linalg.vector_norm
    first = [torch.stack([norm(x) for x in xs])[:, None] for xs in (weights, gradients)]
    return torch.cat([*first, torch.stack([norm(m, dim=1) for m in momenta])], dim=1)


def _gram(gradient: Tensor, momentum: Tensor, out: int) -> Float[Tensor, "s s"]:
    """Gram matrix of the shorter side of g + beta m, (out, fan_in), in bounded memory."""
    gradient, momentum = gradient.view(out, -1), momentum.view(out, -1)
    if gradient.shape[0] > gradient.shape[1]:
        gradient, momentum = gradient.T, momentum.T
    short = len(gradient)
    width = max(GRAM_BLOCK // max(short, 1), 1)
    grams = []
    for g, m in zip(gradient.split(width, dim=1), momentum.split(width, dim=1), strict=True):
        follow = torch.add(g, m, alpha=f.NOMINAL_DECAY)
        grams.append(follow @ follow.T)
    return grams[0] if len(grams) == 1 else sum(grams, gradient.new_zeros(short, short))


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
