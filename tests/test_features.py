import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2o_graph import features as f

numbers = st.floats(-1e6, 1e6, width=32)
near_border = st.sampled_from([0.0, -0.0, 1e-30, math.exp(-10), -math.exp(-10), 4.5e-5, -4.6e-5])


@given(st.lists(numbers | near_border, min_size=1, max_size=20))
def test_log_and_sign_equal_the_scalar_loop(values):
    expected = torch.tensor([reference.log_sign(x) for x in values]).T
    torch.testing.assert_close(f.log_sign(torch.tensor([values])), expected, rtol=1e-5, atol=1e-6)


def test_log_and_sign_by_hand():
    x = torch.tensor([[1.0, -math.e, 0.0, math.exp(-11), -math.exp(-20)]])
    expected = [[0.0, 0.1, -1.0, -1.0, -1.0], [1.0, -1.0, 0.0, math.exp(-1), -math.exp(-10)]]
    torch.testing.assert_close(f.log_sign(x), torch.tensor(expected))


def test_log_rows_come_before_sign_rows():
    x = torch.randn(3, 5)
    assert torch.equal(f.log_sign(x)[3:], x.sign())


@given(st.lists(st.lists(numbers, min_size=2, max_size=2), min_size=1, max_size=6))
def test_momenta_equal_the_scalar_loop(history):
    momenta = f.zero_momenta(torch.zeros(2)).double()
    for gradient in history:
        momenta = f.next_momenta(momenta, torch.tensor(gradient, dtype=torch.float64))
    for scalar, gradients in enumerate(zip(*history, strict=True)):
        assert momenta[:, scalar].tolist() == pytest.approx(reference.momenta(gradients))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 1)])
def test_momenta_start_at_zero_in_float32(shape):
    momenta = f.zero_momenta(torch.ones(shape, dtype=torch.bfloat16))
    assert momenta.shape == (5, *shape)
    assert momenta.dtype == torch.float32
    assert not momenta.any()
    gradient = torch.randn(shape)
    assert torch.equal(f.next_momenta(momenta, gradient), gradient.expand(5, *shape))


def test_squashed_is_relative_to_the_scale_and_bounded():
    raw, scale = torch.tensor([[3.0, -3.0, 1e9, 0.0]]), torch.tensor([[4.0, 4.0, 4.0, 0.0]])
    torch.testing.assert_close(f.squashed(raw, scale), torch.tensor([[0.6, -0.6, 1.0, 0.0]]))


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4), (1, 5), (5, 1), (30, 200), (200, 30)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_whitener_equals_muon_on_the_matrix(shape, size):
    matrix = size * torch.randn(shape, dtype=torch.float64)
    wide = shape[0] <= shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    q = f.whitener(gram)
    torch.testing.assert_close(
        q @ matrix if wide else matrix @ q,
        reference.newton_schulz(matrix),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("shape", [(20, 60), (60, 20)])
def test_whitener_in_float32_makes_nearly_orthogonal_matrices(shape):
    matrix = torch.randn(shape)
    wide = shape[0] <= shape[1]
    q = f.whitener(matrix @ matrix.T if wide else matrix.T @ matrix)
    white = q @ matrix if wide else matrix @ q
    torch.testing.assert_close(white, reference.newton_schulz(matrix), rtol=1e-3, atol=1e-4)
    # Muon's coefficients give up exactness for speed: singular values settle around 1.
    values = torch.linalg.svdvals(white)
    assert values.min() > 0.6 and values.max() < 1.3


def test_whitener_of_a_zero_or_singular_matrix():
    zero = torch.zeros(4, 4)
    assert f.whitener(zero).isfinite().all()
    assert not (f.whitener(zero) @ torch.zeros(4, 6)).any()
    matrix = torch.randn(4, 6)
    matrix[2] = 0
    white = f.whitener(matrix @ matrix.T) @ matrix
    assert not white[2].any()
    torch.testing.assert_close(white, reference.newton_schulz(matrix), rtol=1e-3, atol=1e-4)


def test_whiteners_of_many_sizes_are_those_of_each_alone():
    sizes = [3, f.SMALL_GRAM, 1, f.SMALL_GRAM + 5, 10]
    batches = [1, 2, 3, 2, 1]
    matrices = [
        torch.randn(batch, n, 2 * n, dtype=torch.float64)
        for batch, n in zip(batches, sizes, strict=True)
    ]
    grams = [m @ m.mT for m in matrices]
    for found, gram in zip(f.whiteners(grams), grams, strict=True):
        torch.testing.assert_close(found, f.whitener(gram))
    assert f.whiteners([]) == []


def test_tensor_features_by_hand():
    e = math.e
    scale = torch.tensor([[e**2, 1.0, e, e**2, e**3, e**4, e**5]])
    roles = torch.tensor([[1.0, 0.0]])
    found = f.tensor_features(scale, torch.tensor([9.0]), torch.tensor([3.0]), roles)
    noise = [math.log((1 - b * b) ** -0.5) for b in (0.5, 0.9, 0.99, 0.999, 0.9999)]
    ratios = [(k + 1 - n) / 4 for k, n in enumerate(noise)]
    size, age = math.log(9 / 100) / 4, math.log(4 / 201) / 4
    torch.testing.assert_close(found, torch.tensor([[*ratios, 0.5, size, age, 1.0, 0.0]]))
    assert found.shape == (1, f.NUM_TENSOR)


def test_ratios_of_pure_noise_are_zero():
    noise, momenta = torch.randn(40_000, 300), torch.zeros(5, 300)
    for gradient in noise:
        momenta = f.next_momenta(momenta, gradient)
    rms = torch.cat([torch.ones(2), momenta.square().mean(1).sqrt()])
    found = f.tensor_features(rms[None], torch.ones(1), torch.ones(1), torch.zeros(1, 2))
    assert found[0, :5].abs().max() < 0.05


@given(st.lists(st.floats(0, 1e30), min_size=7, max_size=7))
def test_tensor_features_are_finite_and_bounded(scale):
    found = f.tensor_features(
        torch.tensor([scale]), torch.ones(1), torch.zeros(1), torch.zeros(1, 2)
    )
    assert found.isfinite().all()
    assert found.abs().max() <= 2.5
