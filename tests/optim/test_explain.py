"""What an optimizer says of each parameter."""

import pytest
import torch
from support.optimizers import cnn, mlp, run, tame_controller
from torch import Tensor, nn

from l2o_graph.optim.optimizer import NGOptimizer


class Conv1D(nn.Module):
    """As GPT-2 has it: the weight is [in, out]."""

    def __init__(self, source: int, target: int):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(source, target)),
            nn.Parameter(torch.zeros(target)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.word, self.mix = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.last = Conv1D(8, 12), nn.Linear(12, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.word(x)
        return self.last(self.up(x + self.mix(x, x, x, need_weights=False)[0]).tanh())


class Recurrent(nn.Module):
    def __init__(self, kind: type):
        super().__init__()
        self.cells, self.last = kind(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cells(x)[0])


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.pair, self.last = nn.Linear(4, 5), nn.Bilinear(5, 5, 6), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).tanh()
        return self.last(self.pair(y, y).tanh()) * self.scale


def convolutions(axes: int) -> nn.Module:
    conv, back = [
        (nn.Conv1d, nn.ConvTranspose1d),
        (nn.Conv2d, nn.ConvTranspose2d),
        (nn.Conv3d, nn.ConvTranspose3d),
    ][axes - 1]
    return nn.Sequential(
        conv(2, 4, 3, padding=1), nn.Tanh(), conv(4, 4, 3, padding=1, groups=4), nn.Tanh(),
        conv(4, 8, 1, groups=2), nn.Tanh(), back(8, 3, 3),
    )  # fmt: skip


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.word, self.last = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.last.weight = self.word.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.word(x).tanh())


CASES = {
    "attention": (Attending, lambda: torch.randint(9, (3, 5))),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randn(3, 6, 4)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randn(3, 6, 4)),
    "bilinear": (Pairs, lambda: torch.randn(3, 4)),
    "1 axis": (lambda: convolutions(1), lambda: torch.randn(3, 2, 6)),
    "2 axes": (lambda: convolutions(2), lambda: torch.randn(3, 2, 6, 6)),
    "3 axes": (lambda: convolutions(3), lambda: torch.randn(3, 2, 4, 4, 4)),
    "tied": (Tied, lambda: torch.randint(9, (3, 5))),
}


def check_table(text: str, count: int) -> list[list[str]]:
    """Cells of an account whose columns are aligned."""
    title, rule, *rows = text.splitlines()
    starts = [0] + [i + 2 for i in range(len(rule)) if rule.startswith("  -", i)]
    assert title.startswith("parameter") and len(rows) == count
    for row in (title, *rows):
        for start in starts[1:]:
            assert row[max(start - 2, 0) : start].strip() == ""
    ends = [*[s - 2 for s in starts[1:]], None]
    return [[row[a:b].strip() for a, b in zip(starts, ends, strict=True)] for row in rows]


@pytest.mark.filterwarnings("ignore:the use of 'pair")
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_is_accounted_for_and_trained(name):
    torch.manual_seed(0)
    make, batch = CASES[name]
    net, x = make(), batch()
    optimizer = NGOptimizer(net.named_parameters(), model=net, checkpoint=tame_controller())
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    rows = check_table(str(optimizer.explain()), len(before))
    assert [row[0] for row in rows] == [n for n, _ in net.named_parameters()]
    for p, old, row in zip(net.parameters(), before, rows, strict=True):
        assert p.isfinite().all() and not torch.equal(p, old), row[0]
        assert 1e-6 < float(row[4]) < 10
    kinds = {row[0]: row[2] for row in rows}
    expected = {
        "attention": {
            "word.weight": "table",
            "mix.in_proj_weight": "kernel, 3 in one",
            "up.weight": "kernel",
            "last.weight": "last kernel",
        },
        "lstm": {
            "cells.weight_ih_l0": "first kernel, 4 in one",
            "cells.weight_hh_l0": "kernel, 4 in one",
        },
        "gru": {
            "cells.weight_ih_l0": "first kernel, 3 in one",
            "cells.weight_hh_l0": "kernel, 3 in one",
        },
        "bilinear": {"pair.weight": "kernel", "scale": "vector"},
        "tied": {"word.weight": "table"},
    }.get(
        name,
        {
            "0.weight": "first kernel",
            "2.weight": "diagonal",
            "4.weight": "kernel, 2 groups",
            "6.weight": "last kernel",
        },
    )
    assert {n: kinds[n] for n in expected} == expected


def test_before_the_first_step_and_without_a_structure():
    parameters = [
        nn.Parameter(torch.randn(s)) for s in ((), (3,), (2, 3, 4, 2, 2, 2, 2), (0, 4), (1, 7))
    ]
    optimizer = NGOptimizer(parameters, checkpoint=tame_controller())
    rows = check_table(str(optimizer.explain()), 5)
    assert [row[4:] for row in rows] == [["", ""]] * 5
    assert rows[0][1] == "scalar" and rows[3][2] == "empty"
    assert rows[2][1] == "2 x 3 x 4 x 2 x 2 x 2 x 2"
    run(optimizer, range(2))
    rows = check_table(str(optimizer.explain()), 5)
    assert all(float(row[4]) > 0 for row in rows if row[2] != "empty")
    assert "<table>" in optimizer.explain()._repr_html_()


@pytest.mark.parametrize("make", [mlp, cnn])
def test_an_account_changes_nothing(make):
    models = [make(), make()]
    for looks, model in enumerate(models):
        optimizer = NGOptimizer(model.parameters(), checkpoint=tame_controller())
        for seed in range(3):
            if looks:
                str(optimizer.explain())
            run(optimizer, [seed])
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_step_lengths_are_those_of_the_steps():
    model = mlp()
    optimizer = NGOptimizer(model.parameters(), checkpoint=tame_controller())
    run(optimizer, [0])
    before = [p.detach().clone() for p in model.parameters()]
    run(optimizer, [1])
    for p, old, entry in zip(model.parameters(), before, optimizer.explain().entries, strict=True):
        assert entry.step_length == pytest.approx((p - old).square().mean().sqrt().item(), rel=1e-3)
