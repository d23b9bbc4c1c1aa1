"""Muon beside a slow twin, and what each contender trains."""

import pytest
import torch
from support.optimizers import controller_file
from support.rules import paper_cnn
from torch import nn

from meta_train.benchmarks.contenders import contenders
from meta_train.benchmarks.muon import QUINTIC, Muon, orthogonalised, split_parameters


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
    torch.testing.assert_close(orthogonalised(matrix).double(), expected, rtol=0, atol=1e-4)


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
    kernels, rest = split_parameters(net)
    assert [p.dim() for p in kernels] == [4, 4, 4]
    assert [list(p.shape) for p in rest] == [[4], [8], [8], [10, 8], [10]]


def test_muon_leaves_embeddings_vectors_and_the_last_layer_to_adamw():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    kernels, rest = split_parameters(net)
    assert [list(k.shape) for k in kernels] == [[3, 4], [3, 3]]
    assert len(kernels) + len(rest) == len(list(net.parameters()))
    assert any(p is net[0].weight for p in rest) and any(p is net[3].weight for p in rest)


@pytest.mark.parametrize("name", sorted(contenders()))
def test_each_contender_trains_every_parameter_once(name, tmp_path):
    net = paper_cnn(1, 4)
    contender = contenders(str(controller_file(tmp_path)))[name]
    if contender.library:
        pytest.importorskip(contender.library)
    optimizers = contender.make(net, 0.01, 100)
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in net.parameters()}
    assert len(trained) == len(list(net.parameters()))
    assert optimizers[0].param_groups[0]["lr"] == 0.01
