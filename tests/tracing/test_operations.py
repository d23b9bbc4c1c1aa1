"""Symmetries of the graph are symmetries of the network, operation by operation."""

import importlib.util
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.automorphisms import Coloured, moved, random_symmetry
from support.hub_models import (
    TIMM,
    TIMM_LOOSE,
    TRANSFORMERS,
    TRANSFORMERS_LOOSE,
    timm_network,
    transformers_network,
)
from support.torchvision_models import MODELS
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from l2o_graph.layout.spec import NetSpec
from l2o_graph.tracing import spec_of_computation

WIDTH, TOKENS = 6, 4


class Between(nn.Module):
    """Two layers with an operation between them: (batch, tokens, width) to the same shape."""

    def __init__(self, operation, width: int = WIDTH, **parameters: Tensor):
        super().__init__()
        self.inner, self.head = nn.Linear(3, WIDTH), nn.Linear(width, 2)
        self.operation = operation
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(self, self.inner(x).tanh()))


def observed(weight: Tensor) -> Tensor:
    """Quantise as quantisation-aware training does: by one operator, which observes the range."""
    on, nothing = torch.ones(1, dtype=torch.long), torch.tensor(torch.inf)
    return torch.fused_moving_avg_obs_fake_quant(
        weight, on, on, nothing, -nothing, torch.ones(1), on - 1, 0.01, -128, 127, -1
    )


def written(net: nn.Module, h: Tensor) -> Tensor:
    out = h.new_zeros(len(h), TOKENS, WIDTH)
    for t in range(TOKENS):
        out[:, t] = h[:, t]
    return out


def half_written(net: nn.Module, h: Tensor) -> Tensor:
    out = h.clone()
    out[..., :3] = h[..., 3:] * 2
    return out


def experts_in_turn(net: nn.Module, h: Tensor) -> Tensor:
    rows = h.flatten(0, 1)
    out = torch.zeros_like(rows)
    for matrix in (net.p, net.m):
        chosen = torch.arange(len(rows))
        out.index_add_(0, chosen, F.linear(rows[chosen], matrix))
    return out.view_as(h)


def experts_by_rows(net: nn.Module, h: Tensor) -> Tensor:
    rows = h.flatten(0, 1)
    out = torch.zeros_like(rows)
    for matrix in (net.p, net.m):
        chosen = torch.arange(0, len(rows), 2)
        out[chosen] += F.linear(rows[chosen], matrix)
    return out.view_as(h) + h


def some_written_over(net: nn.Module, h: Tensor) -> Tensor:
    out = h.clone()
    out[:, 1:3] = F.linear(h[:, :2], net.p)
    out[:, 2:] += F.linear(h[:, 2:], net.m)
    return out


def masked_tokens(net: nn.Module, h: Tensor) -> Tensor:
    out = h.clone()
    out[:, 1:3] = net.d
    chosen = torch.zeros(h.shape[:2], dtype=torch.bool)
    chosen[:, :1] = True
    out[chosen] = net.p[0]
    mask = torch.linspace(0, 1, TOKENS, dtype=h.dtype)[:, None]
    return out * (1 - mask) + net.d.expand(1, 1, -1) * mask


def recurrent(net: nn.Module, h: Tensor) -> Tensor:
    state, states = torch.zeros_like(h[:, 0]), []
    for t in range(TOKENS):
        state = (h[:, t] + F.linear(state, net.p)).tanh()
        states.append(state)
    return torch.stack(states, 1)


def rotated(net: nn.Module, h: Tensor) -> Tensor:
    angles = torch.arange(TOKENS)[:, None] * FIXED[:1]
    cos, sin = angles.cos(), angles.sin()
    heads = h.unflatten(-1, (2, 3)).transpose(1, 2)
    turned, rest = heads[..., :2], heads[..., 2:]
    turned = turned * cos + torch.cat([-turned[..., 1:], turned[..., :1]], -1) * sin
    return torch.cat([turned, rest], -1).transpose(1, 2).flatten(2)


def noisy(net: nn.Module, h: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return h * torch.rand(WIDTH, generator=generator, dtype=h.dtype)


def random_mask(net: nn.Module, h: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return h * torch.bernoulli(torch.full((WIDTH,), 0.5, dtype=h.dtype), generator=generator)


def sown_anew(net: nn.Module, h: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return h * torch.rand(WIDTH, dtype=h.dtype)


def changed(part: Any):
    def operation(net: nn.Module, h: Tensor) -> Tensor:
        out = h.clone()
        out[part] *= 2
        return out

    return operation


FIXED = torch.linspace(0.5, 2, WIDTH, dtype=torch.float64)
ORDER = torch.tensor([2, 0, 1, 5, 4, 3])

# Operations that keep all neurons of the previous layer interchangeable.
FREE = {
    "flip of tokens": lambda net, h: h.flip(1),
    "roll of tokens": lambda net, h: h.roll(1, 1),
    "some tokens": lambda net, h: h.index_select(1, torch.tensor([2, 0])),
    "tokens by indices": lambda net, h: h[:, torch.tensor([1, 3, 0])],
    "tokens by a mask": lambda net, h: h[:, torch.tensor([True, False, True, True])],
    "gather of tokens": lambda net, h: h.gather(
        1, torch.tensor([1, 0])[None, :, None].expand(len(h), 2, WIDTH)
    ),
    "sort of tokens": lambda net, h: h.sort(1).values,
    "topk of tokens": lambda net, h: h.topk(2, 1).values,
    "cumsum of tokens": lambda net, h: h.cumsum(1),
    "max over tokens": lambda net, h: h.max(1).values[:, None],
    "median of tokens": lambda net, h: h.median(1).values[:, None],
    "std of tokens": lambda net, h: h.std(1, keepdim=True),
    "stack of tokens": lambda net, h: torch.stack([h[:, 0], h[:, 2]], 1),
    "written token by token": written,
    "written by an index": lambda net, h: torch.zeros_like(h).index_put(
        (torch.tensor([3, 0]),), h[:2]
    ),
    "tokens added up": lambda net, h: torch.zeros_like(h).index_add(
        1, torch.tensor([0, 0, 1, 2]), h
    ),
    "softmax over tokens": lambda net, h: h.softmax(1),
    "softmax": lambda net, h: h.softmax(-1),
    "normalised": lambda net, h: F.normalize(h, dim=-1),
    "one number of all": lambda net, h: h * torch.full_like(h, 2.0),
    "padded tokens": lambda net, h: F.pad(h, (0, 0, 1, 1)),
    "pooled tokens": lambda net, h: F.max_pool1d(h.mT, 2).mT,
    "einsum": lambda net, h: torch.einsum("btc,dc->btd", h, net.p),
    "a number of each by a vector": lambda net, h: h * (h @ net.d)[..., None],
    "distances": lambda net, h: torch.cdist(h, net.p),
    "[in, out]": lambda net, h: h @ net.p,
    "weights in heads": lambda net, h: torch.einsum(
        "btc,hdc->bthd", h, net.p.view(2, 3, WIDTH)
    ).flatten(2),
    "heads brought together": lambda net, h: torch.einsum(
        "bthd,hdc->btc", F.linear(h, net.p).unflatten(-1, (2, 3)).tanh(), net.p.view(2, 3, WIDTH)
    ),
    "experts that read the same": lambda net, h: torch.einsum("btc,ecd->bted", h, net.e).flatten(2),
    "experts, and their outputs": lambda net, h: torch.einsum(
        "bted,edc->btec", torch.einsum("btc,ecd->bted", h, net.e).tanh(), net.f
    ).mean(2),
    "a scaled weight": lambda net, h: F.linear(h, net.p / net.p.norm(dim=1, keepdim=True)),
    "a matrix times each vector": lambda net, h: torch.stack(
        [torch.stack([net.p.mv(token) for token in one]) for one in h]
    ),
    "rows times a vector, summed": lambda net, h: (h[..., None, :] * net.p).sum(-1),
    "weights scaled by rows and columns": lambda net, h: F.linear(
        h, net.p * net.d[:, None] * net.d.sigmoid()
    ),
    "two matrices, added": lambda net, h: F.linear(h, net.p + net.m.sigmoid()),
    "standardised by a batch norm, and scaled": lambda net, h: F.linear(
        h, F.batch_norm(net.p[None], None, None, net.d * 0.3, training=True).view_as(net.p)
    ),
    "a scale of two parameters": lambda net, h: h * (net.d * net.p[0]),
    "mean and variance of tokens": lambda net, h: torch.mul(*torch.var_mean(h, 1, keepdim=True)),
    "tokens in the order of a sort": lambda net, h: h.gather(1, h.sort(1).indices),
    "experts in turn, added in place": experts_in_turn,
    "rows added up by an index": experts_by_rows,
    "some tokens written over": some_written_over,
    "some tokens changed in place": changed((slice(None), slice(1, 3))),
    "tokens that a parameter is written over": masked_tokens,
    "a recurrence that begins at zero": recurrent,
    "repeated tokens": lambda net, h: h.repeat(1, 2, 1),
    "a repeated token": lambda net, h: torch.cat([net.d.repeat(len(h), 1, 1), h], 1),
    "repeated positions": lambda net, h: h + net.p[None, :TOKENS].repeat(len(h), 1, 1),
    "rows of a table": lambda net, h: h + net.p.index_select(0, torch.tensor([3, 0, 1, 1])),
    "pixels made more": lambda net, h: F.interpolate(h.mT, scale_factor=2).mT,
    "views in place": lambda net, h: h.clone().unsqueeze_(2).squeeze_(2) + net.d,
    "through vmap": lambda net, h: (
        torch.vmap(lambda x: F.linear(x, net.p, net.d))(h.flatten(0, 1)).view_as(h) + h
    ),
    "quantised weights": lambda net, h: F.linear(
        h,
        torch.fake_quantize_per_tensor_affine(net.p.float(), 0.1, 0, -128, 127).double(),
    ),
    "weights quantised as observed": lambda net, h: F.linear(h, observed(net.p.float()).double()),
    "checkpointed": lambda net, h: checkpoint(torch.sin, h, use_reentrant=False),
}
# Operations that distinguish at least some of them.
BOUND = {
    "flip": lambda net, h: h.flip(-1),
    "roll": lambda net, h: h.roll(2, -1),
    "index_select": lambda net, h: h.index_select(-1, ORDER),
    "index": lambda net, h: h[..., ORDER],
    "gather": lambda net, h: h.gather(-1, ORDER.expand(h.shape)),
    "sort": lambda net, h: h.sort(-1).values,
    "cumsum": lambda net, h: h.cumsum(-1),
    "cummax": lambda net, h: h.cummax(-1).values,
    "fft": lambda net, h: torch.fft.fft(h, dim=-1).real,
    "fixed factors": lambda net, h: h * FIXED,
    "fixed summands": lambda net, h: h + FIXED,
    "random factors": noisy,
    "a random mask": random_mask,
    "random factors of a seed of its own": sown_anew,
    "a half changed in place": changed((..., slice(3))),
    "a fixed matrix": lambda net, h: h @ torch.outer(FIXED, FIXED.flip(0)).tril(),
    "half of it written": half_written,
    "softmax of a half": lambda net, h: torch.cat([h[..., :3].softmax(-1), h[..., 3:]], -1),
    "mean of a half": lambda net, h: h * h[..., :3].mean(-1, keepdim=True),
    "norm of each half": lambda net, h: F.layer_norm(
        h.unflatten(-1, (2, 3)), (3,), net.q, net.q.flip(0)
    ).flatten(-2),
    "one matrix for both halves": lambda net, h: F.linear(h.unflatten(-1, (2, 3)), net.r).flatten(
        -2
    ),
    "factors for both halves": lambda net, h: (h.unflatten(-1, (2, 3)) * net.q).flatten(-2),
    "summands for both halves": lambda net, h: (h.unflatten(-1, (2, 3)) + net.q).flatten(-2),
    "a table for the halves": lambda net, h: (h.unflatten(-1, (2, 3)) + net.t[:, :, None]).flatten(
        -2
    ),
    "shuffled channels": lambda net, h: F.channel_shuffle(h.mT[..., None], 2)[..., 0].mT,
    "twice": lambda net, h: F.linear(F.linear(h, net.p).tanh(), net.p),
    "twice with the transpose": lambda net, h: F.linear(F.linear(h, net.p).tanh(), net.p.t()),
    "pixels side by side": lambda net, h: torch.cat([h[:, ::2], h[:, 1::2]], -1)[..., : WIDTH * 2],
    "rotated pairs": lambda net, h: torch.view_as_real(
        torch.view_as_complex(h.unflatten(-1, (3, 2)).contiguous())
        * torch.polar(FIXED[:3], FIXED[3:])
    ).flatten(-2),
    "kept by a mask": lambda net, h: F.linear(
        h, net.p * torch.ones(WIDTH, WIDTH, dtype=h.dtype).tril()
    ),
    "gated halves": lambda net, h: F.glu(torch.cat([h, h.roll(1, 1)], -1), -1),
    "a half gates the other": lambda net, h: h[..., :3] * h[..., 3:].sigmoid(),
    "torch's own gate": lambda net, h: F.glu(h, -1),
    "difference of halves": lambda net, h: h[..., :3] - h[..., 3:],
    "quotient of halves": lambda net, h: h[..., :3] / (2 + h[..., 3:]),
    "thirds changed and added": lambda net, h: h[..., :2].exp() + h[..., 2:4] + 2 * h[..., 4:],
    "thirds, added one by one": lambda net, h: (
        (F.linear(h, net.p)[..., :2] + h[..., :2]) * 2 + h[..., 2:4]
    ),
    "a half shifts, a half scales": lambda net, h: (
        F.linear(h, net.p)[..., :3] * (1 + h[..., :3]) + h[..., 3:]
    ),
    "halves stacked along data": lambda net, h: torch.stack(
        [h[..., :3].exp(), h[..., 3:]], 1
    ).select(1, 0),
    "halves as more tokens": lambda net, h: torch.cat([h[..., :3].exp(), h[..., 3:]], 1)[:, 2:6],
    "even and odd, interleaved": lambda net, h: torch.stack(
        [h[..., ::2], h[..., 1::2].exp()], -1
    ).flatten(-2),
    "parts of heads exchanged": lambda net, h: torch.cat(
        [h.unflatten(-1, (2, 3))[..., 1:], h.unflatten(-1, (2, 3))[..., :1].exp()], -1
    ).flatten(-2),
    "rotated halves of heads": rotated,
    "channels that look at channels": lambda net, h: (
        ((h[..., :3].mT @ h[..., 3:]).softmax(-1) @ h[..., 3:].mT).mT
    ),
    "products of all with all": lambda net, h: (h.mT @ h)[:, :TOKENS],
    "each with states of its own": lambda net, h: (h[..., None] * net.s).exp().sum(-1),
    "places of the largest": lambda net, h: h.argmax(-1, keepdim=True) * 0.1 + h,
    "places of the largest, besides": lambda net, h: h.max(-1, keepdim=True).indices * 0.1 + h,
    "a parameter elsewhere unknown": lambda net, h: (
        F.linear(h, net.p) * torch.kron(net.p, net.r)[0, 0]
    ),
    "a vector knows the rows": lambda net, h: F.linear(h, net.p / net.p.mv(FIXED)[0]),
    "softmax of halves of rows": lambda net, h: F.linear(
        h, net.p.unflatten(0, (2, 3)).softmax(1).flatten(0, 1)
    ),
    "a table by products, and its rows": lambda net, h: (
        (h[..., None, :] * net.p).sum(-1).softmax(-1) @ net.p
    ),
    "a table by cosines, and its rows": lambda net, h: (
        F.cosine_similarity(h[..., None, :], net.p, dim=-1).softmax(-1) @ net.p
    ),
    "mean of halves of rows": lambda net, h: F.linear(
        h, (net.p.unflatten(0, (2, 3)) - net.p.unflatten(0, (2, 3)).mean(1, True)).flatten(0, 1)
    ),
    "a masked bias": lambda net, h: h + net.d * FIXED,
    "one number by fixed ones": lambda net, h: h + net.d[:1].expand(WIDTH) * FIXED,
    "pixels of squares": lambda net, h: (
        F.pixel_shuffle(F.linear(h, net.p)[..., :4].mT[..., None], 2).flatten(2).mT[:, :TOKENS]
    ),
    "squares of pixels": lambda net, h: F.pixel_unshuffle(h.mT.unflatten(-1, (2, 2)), 2).mT[
        ..., 0, :
    ][:, None],
    "written over in place": lambda net, h: h.clone().index_put_(
        (torch.arange(len(h))[:, None], torch.tensor([1])), h[:, :1].exp()
    ),
}


def made(operation) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, TOKENS, 3, dtype=torch.float64)
    own = {
        "p": torch.randn(WIDTH, WIDTH), "q": torch.randn(3), "r": torch.randn(3, 3),
        "t": torch.randn(TOKENS, 2), "d": torch.randn(WIDTH), "m": torch.randn(WIDTH, WIDTH),
        "s": torch.randn(WIDTH, 3), "e": torch.randn(3, WIDTH, 4), "f": torch.randn(3, 4, WIDTH),
    }  # fmt: skip
    with torch.no_grad():
        wide = operation(Between(operation, **own).double(), torch.zeros(5, TOKENS, WIDTH).double())
    net = Between(operation, wide.shape[-1], **own).double()
    return net, x


def spec_and_gap(net: nn.Module, args: Any, seed: int) -> tuple[NetSpec, float]:
    """Return the graph, and how much a random symmetry of it changes the network's output.

    The change is relative to the largest output, or absolute if that is below 1.
    """
    args, named = ((), args) if isinstance(args, dict) else ((args,), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about loose parameters
        spec = spec_of_computation(net, args, named)
    before = [p.detach().clone() for p in net.parameters()]
    after = moved(spec, before, random_symmetry(spec, seed))
    names = [name for name, _ in net.named_parameters()]
    said = [
        numbers(functional_call(net, dict(zip(names, each, strict=True)), args, named))
        for each in (before, after)
    ]
    pairs = list(zip(*said, strict=True))
    assert pairs
    return spec, max(((a - b).abs().max() / a.abs().max().clamp(min=1)).item() for a, b in pairs)


def numbers(output: Any) -> list[Tensor]:
    """Return all floating-point tensors of an output."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [t for each in output for t in numbers(each)]
    return [output] if isinstance(output, Tensor) and output.is_floating_point() else []


def classes(spec: NetSpec, name: str) -> int:
    """Return the number of classes of interchangeable neurons in a set."""
    coloured = Coloured(spec)
    coloured.refine()
    ends = np.cumsum([neurons.size for neurons in spec.neurons])
    (n,) = [i for i, one in enumerate(spec.neurons) if one.name == name]
    return len(np.unique(coloured.colours[ends[n] - spec.neurons[n].size : ends[n]]))


def symmetric(case, draws: int) -> NetSpec:
    """Return the structure of a case; check that random automorphisms keep the output."""
    net, x = made(case)
    for seed in range(draws):
        spec, gap = spec_and_gap(net, x, seed)
        assert gap < 1e-9
    return spec


@pytest.mark.parametrize("name", FREE)
def test_neurons_stay_free(name):
    spec = symmetric(FREE[name], draws=3)
    assert classes(spec, "inner") == 1


@pytest.mark.parametrize("name", BOUND)
def test_neurons_are_bound(name):
    """Symmetries of the graph keep the output, although the operation depends on an order."""
    symmetric(BOUND[name], draws=4)


def test_half_a_symmetry_shows():
    """Negative control: permuting neurons without their readers changes the output."""
    net, x = made(FREE["einsum"])
    expected = net(x)
    with torch.no_grad():
        for p in net.inner.parameters():
            p.copy_(p.roll(1, 0))
    assert (net(x) - expected).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_symmetries_of_torchvision_models(name):
    torch.manual_seed(0)
    make, size = MODELS[name]
    net, x = make().double().eval(), torch.randn(2, 3, size, size, dtype=torch.float64)
    for p in net.parameters():
        p.data += 0.02 * torch.randn_like(p)
    spec, gap = spec_and_gap(net, x, 0)
    assert spec.loose == ()
    assert gap < 1e-6


HUBS = {
    "timm": (TIMM, TIMM_LOOSE, timm_network),
    "transformers": (TRANSFORMERS, TRANSFORMERS_LOOSE, transformers_network),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "hub, name", [(hub, name) for hub, (names, *_) in HUBS.items() for name in names]
)
# Both libraries warn about deprecated options of their own.
@pytest.mark.filterwarnings("ignore")
def test_symmetries_of_stock_networks(hub, name):
    if importlib.util.find_spec(hub) is None:
        pytest.skip(f"{hub} is not installed")
    _, loose, make = HUBS[hub]
    torch.manual_seed(0)
    net, batch = make(name)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p) * (1 + p.abs().mean())
    spec, gap = spec_and_gap(net, batch, 0)
    left = [spec.names[i] for i in spec.loose if spec.shapes[i] and max(spec.shapes[i]) > 1]
    assert not [n for n in left if not any(part in n for part in loose.get(name, ()))]
    # Some networks normalize in float32 in any precision.
    assert gap < 1e-6
