"""The canonical form of SIRENs: one for all networks that are the same up to signs and phases."""

import math

import pytest
import torch
from support.sirens import networks

from l2o_graph.inr import canonical, render

OMEGA0 = 30.0


def drawn(layout=(2, 9, 7, 1), count=5):
    """Networks whose phases are many half turns from 0."""
    weights, biases = networks(count, layout, dtype=torch.float64)
    biases = [10 * torch.randn_like(b) / OMEGA0 for b in biases]
    return weights, biases


def disguised(weights, biases, seed=0):
    """The same functions by other weights: half turns and mirrored neurons, drawn at random."""
    dice = torch.Generator().manual_seed(seed)
    weights, biases = [w.clone() for w in weights], [b.clone() for b in biases]
    for i in range(len(weights) - 1):
        for network in range(len(weights[0])):
            for neuron in range(weights[i].shape[1]):
                turns, mirrored = torch.randint(-3, 4, (2,), generator=dice).tolist()
                biases[i][network, neuron] += turns * math.pi / OMEGA0
                weights[i + 1][network, :, neuron] *= (-1) ** turns
                if mirrored > 0:  # sin(z) = sin(pi - z)
                    weights[i][network, neuron] *= -1
                    biases[i][network, neuron] = math.pi / OMEGA0 - biases[i][network, neuron]
    return weights, biases


@pytest.mark.parametrize("layout", [(2, 9, 7, 1), (2, 4, 1), (2, 3, 4, 5, 1), (2, 1)])
def test_it_draws_the_same_with_phases_in_the_first_quarter(layout):
    weights, biases = drawn(layout)
    before = [t.clone() for t in (*weights, *biases)]
    of_weights, of_biases = canonical(weights, biases)
    torch.testing.assert_close(
        render(of_weights, of_biases), render(weights, biases), rtol=0, atol=1e-9
    )
    for b in of_biases[:-1]:
        assert float(OMEGA0 * b.min()) >= 0 and float(OMEGA0 * b.max()) <= math.pi / 2 + 1e-12
    assert all(torch.equal(a, b) for a, b in zip(before, (*weights, *biases), strict=True))


def test_networks_that_are_the_same_have_one_form_and_others_do_not():
    weights, biases = drawn()
    other = disguised(weights, biases)
    torch.testing.assert_close(render(*other), render(weights, biases), rtol=0, atol=1e-9)
    assert (other[0][0] - weights[0]).abs().max() > 1e-3
    form, form_of_other = canonical(weights, biases), canonical(*other)
    for a, b in zip((*form[0], *form[1]), (*form_of_other[0], *form_of_other[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    changed = [weights[0] * 1.001, *weights[1:]]
    assert (canonical(changed, biases)[0][0] - form[0][0]).abs().max() > 1e-6


def test_a_form_is_its_own_form_and_does_not_depend_on_the_batch():
    weights, biases = drawn()
    form = canonical(weights, biases)
    again = canonical(*form)
    for a, b in zip((*form[0], *form[1]), (*again[0], *again[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    one = canonical([w[2:3] for w in weights], [b[2:3] for b in biases])
    for a, b in zip((*form[0], *form[1]), (*one[0], *one[1]), strict=True):
        assert torch.equal(a[2:3], b)


def test_float32_draws_the_same_too():
    weights, biases = ([t.float() for t in part] for part in drawn((2, 32, 32, 1)))
    found = render(*canonical(weights, biases))
    torch.testing.assert_close(found, render(weights, biases), rtol=0, atol=1e-4)


def test_gradients_are_those_of_the_same_function():
    """The image's derivative by a weight is that by the weight of the form, up to its sign."""
    weights, biases = drawn()
    leaves = [t.requires_grad_() for t in (*weights, *biases)]
    image = render(weights, biases).square().sum()
    expected = torch.autograd.grad(image, leaves)
    found = torch.autograd.grad(render(*canonical(weights, biases)).square().sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_what_is_no_network_is_named():
    weights, biases = drawn()
    with pytest.raises(ValueError, match=r"INRs, layer 1: expected a weight \(5, out, 9\)"):
        canonical([weights[0], weights[1][..., :3], weights[2]], biases)
