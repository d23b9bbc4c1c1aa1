import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference

from l2o_graph.paper import features as f

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


def test_a_scalar_has_seven_logarithms_and_seven_signs():
    raw = torch.randn(f.NUM_RAW, 3)
    assert f.log_sign(raw).shape == (f.NUM_FEATURES, 3) == (14, 3)
