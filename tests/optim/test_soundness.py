"""Updates are a smooth function of gradients: rounding and noise stay as small as they are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.optimizers import tame_controller
from torch import Tensor, nn

from l2o_graph.optim.optimizer import NGOptimizer

STEPS = 5


class Attention(nn.Module):
    """Tokens, one block of a transformer, and what comes next."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.word, self.norm = nn.Embedding(20, width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word(tokens)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x + self.down(F.gelu(self.up(x))))


def mlp_of(inputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


NETWORKS = {
    "mlp of 64": (lambda: mlp_of(64), lambda: torch.randn(48, 64)),
    "mlp of 784": (lambda: mlp_of(784), lambda: torch.randn(48, 784)),
    "cnn": (small_cnn, lambda: torch.randn(48, 3, 10, 10)),
    "attention": (Attention, lambda: torch.randint(20, (8, 10))),
}


def duplicated(x: Tensor) -> Tensor:
    x = x.clone()
    x[1::2] = x[: len(x) // 2 * 2 : 2]
    return x


DEFICIENT = {
    "as they are": lambda x: x,
    "of rank 1": lambda x: x[:, x.abs().sum(0).argmax(), None] * x[x.abs().sum(1).argmax()],
    "with duplicates": duplicated,
    "with rows of 0": lambda x: x * (torch.arange(len(x)) % 2)[:, None],
}


def changed(gradients: list[Tensor], how: str) -> list[Tensor]:
    return [DEFICIENT[how](g.flatten(1)).view_as(g) if g.dim() > 1 else g for g in gradients]


def gradients_of(net: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """Those of some steps of AdamW."""
    net, found = copy.deepcopy(net), []
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(STEPS):
        net.zero_grad()
        y = net(x)
        y = y.flatten(0, -2)
        F.cross_entropy(y, torch.arange(len(y)) % y.shape[-1]).backward()
        found.append([p.grad.clone() for p in net.parameters()])
        optimizer.step()
    return found


def way(net: nn.Module, x: Tensor, gradients: list[list[Tensor]], dtype: torch.dtype):
    """How far each parameter went."""
    net = copy.deepcopy(net).to(dtype)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = NGOptimizer(net.parameters(), model=net, checkpoint=tame_controller())
    net(x.to(dtype) if x.is_floating_point() else x)
    for each in gradients:
        for p, gradient in zip(net.parameters(), each, strict=True):
            p.grad = gradient.to(dtype)
        optimizer.step()
    return [(p.detach() - b).double() for p, b in zip(net.parameters(), before, strict=True)]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference, relative; the largest of all parameters."""
    pairs = zip(found, expected, strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    torch.manual_seed(0)
    make, batch = NETWORKS[request.param]
    net, x = make(), batch()
    return net, x, gradients_of(net, x)


@pytest.mark.parametrize("how", DEFICIENT)
def test_single_precision_is_enough(how, case):
    net, x, (gradients, *_) = case
    gradients = [changed(gradients, how)]
    found = way(net, x, gradients, torch.float32)
    assert apart(found, way(net, x, gradients, torch.float64)) < 1e-3


@pytest.mark.parametrize("how", DEFICIENT)
@pytest.mark.parametrize("steps, most", [(1, 1e-4), (STEPS, 1e-3)])
def test_noise_is_not_amplified(steps, most, how, case):
    net, x, gradients = case
    gradients = [changed(each, how) for each in gradients[:steps]]
    noisy = [[g.double() * (1 + 1e-7 * torch.randn_like(g)) for g in each] for each in gradients]
    found = way(net, x, noisy, torch.float32)
    assert apart(found, way(net, x, gradients, torch.float32)) < most


def test_the_bars_catch_what_is_not_smooth(case):
    """The sign of a gradient, on gradients of which some are all but 0."""
    _, _, (gradients, *_) = case
    gradients = [torch.cat([g.flatten(), 1e-9 * torch.randn(g.numel())]) for g in gradients]
    noisy = [g + 1e-7 * g.abs().mean() * torch.randn_like(g) for g in gradients]
    assert apart([g.sign() for g in noisy], [g.sign() for g in gradients]) > 1e-3
