"""Muon beside a slow twin, and what each contender trains."""

import pytest
import torch
from support.optimizers import controller_file
from support.rules import paper_cnn

from l2o_graph import NGOptimizer
from meta_train.benchmarks.baselines import (
    BEST_RATES,
    QUINTIC,
    Muon,
    base_of,
    contenders,
    label_of,
    orthogonalised,
    split_for_muon,
)


def slow_orthogonalised(matrix, iterations):
    """Newton and Schulz on each singular value by itself."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    a, b, c = QUINTIC
    norm = values.square().sum().sqrt()
    total = torch.zeros_like(matrix, dtype=torch.float64)
    for i, value in enumerate(values):
        s = float(value / norm)
        for _ in range(iterations):
            s = a * s + b * s**3 + c * s**5
        total += s * torch.outer(u[:, i], v[i])
    return total


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7), (1, 4)])
def test_newton_schulz_works_on_singular_values_alone(shape):
    matrix = torch.randn(shape)
    expected = slow_orthogonalised(matrix, 5)
    torch.testing.assert_close(orthogonalised(matrix, 5).double(), expected, rtol=0, atol=1e-4)


def test_five_steps_of_muon_equal_the_slow_twin():
    kernel = torch.randn(6, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    expected, average = kernel.detach().clone(), torch.zeros(6, 2, 1, 1, dtype=torch.float64)
    optimizer = Muon([kernel], lr=0.1)
    for step in range(5):
        gradient = torch.randn(6, 2, 1, 1, dtype=torch.float64)
        kernel.grad = gradient.clone()
        optimizer.step()
        # An average with weights 0.95 and 0.05 differs by a factor, which has no effect.
        average = 0.95 * average + 0.05 * gradient
        nesterov = 0.95 * average + 0.05 * gradient
        update = slow_orthogonalised(nesterov.reshape(6, 2), 5).reshape(6, 2, 1, 1)
        expected -= 0.1 * (6 / 2) ** 0.5 * update
        torch.testing.assert_close(kernel.detach(), expected, rtol=0, atol=1e-5, msg=str(step))


def test_a_wide_kernel_is_not_scaled():
    kernel = torch.zeros(4, 3, 3, 3, requires_grad=True)
    kernel.grad = torch.randn(4, 3, 3, 3)
    Muon([kernel], lr=1.0).step()
    torch.testing.assert_close(
        -kernel.detach().flatten(1), orthogonalised(kernel.grad.flatten(1)), rtol=0, atol=1e-5
    )


def test_muon_leaves_alone_what_has_no_gradient_and_refuses_vectors():
    kernel = torch.randn(3, 3, requires_grad=True)
    before = kernel.detach().clone()
    Muon([kernel]).step()
    assert torch.equal(kernel, before)
    with pytest.raises(ValueError, match=r"expected kernels or matrices, found \[3\]"):
        Muon([torch.zeros(3)])


def test_muon_takes_the_kernels_and_adamw_the_rest():
    net = paper_cnn(1, 4)
    kernels, rest = split_for_muon(net)
    assert [p.dim() for p in kernels] == [4, 4, 4]
    assert [list(p.shape) for p in rest] == [[4], [8], [8], [10, 8], [10]]


@pytest.mark.parametrize("name", sorted(contenders()))
def test_each_contender_trains_every_parameter_once(name, tmp_path):
    net = paper_cnn(1, 4)
    known = contenders({"ng": controller_file(tmp_path)})
    optimizers = known[name].make(net, 0.01, 100)
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in net.parameters()}
    assert len(trained) == len(list(net.parameters()))
    assert optimizers[0].param_groups[0]["lr"] == 0.01


def test_a_checkpoint_is_a_contender_in_three_variants(tmp_path):
    path, net = controller_file(tmp_path), paper_cnn(1, 4)
    known = contenders({"mine": path})
    assert set(known) - set(contenders()) == {"mine", "mine_told", "mine_averaged"}
    for name, told, averaged in (
        ("mine", None, False), ("mine_told", 100, False), ("mine_averaged", None, True)
    ):  # fmt: skip
        (optimizer,) = known[name].make(net, 1.0, 100)
        assert isinstance(optimizer, NGOptimizer)
        assert optimizer.defaults["checkpoint"].startswith(f"{path.stem}@")
        assert optimizer.defaults["total_steps"] == told
        assert known[name].averaged == averaged


def test_labels_and_names_of_variants():
    assert label_of("ng") == "NGOptimizer (learned)"
    assert label_of("ng_gnn_told") == "NG-GNN (learned, told the end)"
    assert label_of("mine_averaged") == "mine (learned, averaged weights)"
    names = ("ng", "ng_told", "ng_t", "ng_t_averaged")
    assert [base_of(name) for name in names] == ["ng", "ng", "ng_t", "ng_t"]


def test_a_best_rate_is_known_of_every_contender():
    assert set(BEST_RATES) == set(contenders())
